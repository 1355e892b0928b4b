"""The small HTTP client: every way to end a body, connections used again, answers that break off."""

import asyncio

import pytest
from stub_server import StubServer

from gpt2rt.bench.http import HttpClient, HttpError, event_data

BODY = {"max_tokens": 3}


def all_events(url, count=1, path="/v1/completions", **options):
    """(status, data) of ``count`` answers, one after another on one client."""

    async def main():
        client = HttpClient(url, **options)
        try:
            found = []
            for _ in range(count):
                async with client.events(path, BODY) as (status, events):
                    found.append((status, [data async for data in events]))
            return found
        finally:
            await client.close()

    return asyncio.run(main())


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_events_of_every_kind_of_body(framing):
    with StubServer(framing=framing) as server:
        first, second = all_events(server.url, 2)
        # a body that ends with the connection ends the connection
        assert server.connections == (2 if framing == "close" else 1)
    assert first == second
    status, events = first
    assert status == 200
    assert len(events) == 5
    assert events[0] == b'{"choices": [{"index": 0, "text": " 0"}]}'
    assert events[-1] == b"[DONE]"


def test_whole_answers():
    async def main(url):
        client = HttpClient(url)
        try:
            return await client.request("GET", "/v1/models")
        finally:
            await client.close()

    with StubServer() as server:
        assert asyncio.run(main(server.url)) == (200, b'{"data": [{"id": "stub"}]}')


def test_a_connection_that_was_closed_while_idle_is_opened_again():
    with StubServer(close_after=1) as server:
        assert [status for status, _ in all_events(server.url, 3)] == [200, 200, 200]
        assert server.connections == 3
        assert len(server.requests) == 3


def test_headers_and_the_path_of_the_url_are_sent():
    with StubServer() as server:
        all_events(server.url + "/base/", headers={"Authorization": "Bearer key"})
        ((method, path, headers, body),) = server.requests
    assert (method, path, body) == ("POST", "/base/v1/completions", BODY)
    assert headers["authorization"] == "Bearer key"
    assert headers["host"] == server.url.removeprefix("http://")


def test_the_body_of_an_error_comes_whole():
    with StubServer(fault="refuse") as server:
        ((status, data),) = all_events(server.url)
    assert status == 503
    assert data == [b'{"error": {"message": "too many requests wait"}}']


@pytest.mark.parametrize(("fault", "message"), [("break", "broke off|closed"), ("garbage", "status line, got b'what")])
def test_a_broken_answer_is_an_error(fault, message):
    with StubServer(fault=fault) as server, pytest.raises(HttpError, match=message):
        all_events(server.url)


def test_a_silent_server_is_given_up():
    with StubServer(gap=5.0) as server, pytest.raises(HttpError, match="sent nothing for too long"):
        all_events(server.url, timeout=0.2)


def test_nobody_there():
    with StubServer() as server:
        url = server.url
    with pytest.raises(HttpError, match="cannot be reached"):
        all_events(url)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", ""])
def test_urls_are_checked(url):
    with pytest.raises(ValueError, match="base URL must be like"):
        HttpClient(url)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_may_be_cut_anywhere(size):
    text = b': ping\r\n\r\nevent: x\r\ndata: {"a": 1}\r\n\r\ndata:b\n\ndata: unfinished'

    async def main():
        async def pieces():
            for start in range(0, len(text), size):
                yield text[start : start + size]

        return [data async for data in event_data(pieces())]

    assert asyncio.run(main()) == [b'{"a": 1}', b"b"]
