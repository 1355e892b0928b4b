"""The program that loads a server: it runs, and finds what is wrong."""

import asyncio
import json
import socket
import subprocess
import sys
import types

import pytest
import server_load
from server_sections import clients, leaving, overload, process, shared
from server_sections.clients import Leave, Reply

QUESTION = shared.questions(0, 1, ids=True)[0]
USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": QUESTION.tokens}}).encode()


def dry(section, tmp_path, capsys, *more):
    out = tmp_path / "load.json"
    code = server_load.main([section, "--dry", *more, "--out", str(out)])
    result = json.loads(out.read_text())
    assert code == 0, capsys.readouterr().out
    assert result["machine"]["commit"]
    assert result["packages"]["uvicorn"]
    assert result["settings"]["dry"] is True
    assert all(target["pass"] for target in result["sections"][section]["targets"].values() if target["decides"])
    return result["sections"][section]


def test_a_dry_overload(tmp_path, capsys):
    found = dry("l3", tmp_path, capsys)
    assert found["arrived"] == found["admitted"] + found["refused"] > 0
    assert found["admitted"] == found["ttft_ms"]["loaded"]["samples"] > 0
    assert found["refused"] == found["rejections"]["admission_rejections_total"]
    assert found["health_ms"]["samples"] > 0


@pytest.mark.proves("fault:F50", "fault:F57")
def test_dry_clients_that_leave_and_servers_that_end(tmp_path, capsys):
    found = dry("l4", tmp_path, capsys, "--cycles", "1")
    assert found["leavers"]["left"] == server_load.DRY["drops"]
    assert found["leavers"]["stayed"] > 0
    assert found["restarts"]["cycle_ms"]["samples"] == 1


@pytest.mark.proves("load:L5")
def test_dry_books(tmp_path, capsys):
    found = dry("l5", tmp_path, capsys)
    whole, half, single = (found[name] for name in ("all read to the end", "half leave", "one at a time"))
    assert whole["by_steps"] == whole["delivered"] > 0
    assert half["by_steps"] == half["delivered"] + half["discarded"]
    assert single["by_steps"] == single["delivered"] + single["discarded"]


# ---- what is wrong shows ---------------------------------------------------------------------------------------------


def stream(*events, **values):
    return Reply(status=200, events=list(events), complete=True, ttft=0.01, **values)


def judged(reply, unloaded=0.01, health=((200, 0.01),)):
    verdicts = shared.Verdicts(dry=False)
    refused = Reply(status=503, headers={"retry-after": "1"}, complete=True)
    arrivals = [overload.Arrival(QUESTION, 0.0, one) for one in (reply, refused)]
    overload.judge_overload(verdicts, arrivals, [unloaded], list(health))
    return verdicts.failed


def test_an_overload_that_is_answered_in_order_has_no_fault():
    assert judged(stream(USAGE, b"[DONE]")) == []
    assert judged(Reply(status=503, headers={"retry-after": "2"}, complete=True)) == ["p99 TTFT, loaded / unloaded"]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=503, complete=True),
        Reply(status=503, headers={"retry-after": "0"}, complete=True),
        Reply(status=503, headers={"retry-after": "1"}),
        Reply(status=500, body=b"fault", complete=True),
        Reply(error="ConnectionResetError: reset by peer"),
        stream(USAGE),
        stream(USAGE.replace(b"}}", b"0}}"), b"[DONE]"),
        Reply(status=200, events=[USAGE, b"[DONE]"]),
    ],
    ids=["no retry-after", "retry-after 0", "half a 503", "500", "reset", "no [DONE]", "wrong usage", "half a stream"],
)
def test_any_other_answer_is_a_fault(reply):
    assert "neither whole nor 503 with Retry-After" in judged(reply)


def test_slow_answers_miss_their_targets():
    assert judged(stream(USAGE, b"[DONE]"), unloaded=0.001) == ["p99 TTFT, loaded / unloaded"]
    assert judged(stream(USAGE, b"[DONE]"), health=[(200, 0.2)]) == ["/health p99, s"]
    assert judged(stream(USAGE, b"[DONE]"), health=[(503, 0.01)]) == ["other answers than 200 of /health"]


@pytest.mark.parametrize("name", ["by_requests", "timed", "failed", "delivered"])
def test_one_token_too_many_anywhere_shows_in_the_books(name):
    made = {"by_steps": 10, "by_requests": 10, "timed": 8, "failed": 0, "delivered": 10}
    verdicts = shared.Verdicts(dry=True)
    shared.check_books(verdicts, "", made, made["delivered"], untimed=2)
    assert verdicts.failed == []
    made[name] += 1
    shared.check_books(verdicts, "", made, made["delivered"], untimed=2)
    assert len(verdicts.failed) == 1


def test_a_stream_that_was_aborted_is_not_whole():
    ends = [{"choices": [{"finish_reason": None}]}, {"choices": [{"finish_reason": "abort"}]}]
    assert leaving.ends_otherwise(stream(*(json.dumps(end).encode() for end in ends)))
    ends[1]["choices"][0]["finish_reason"] = "length"
    assert not leaving.ends_otherwise(stream(*(json.dumps(end).encode() for end in ends)))


def test_a_missed_target_is_the_exit_status(tmp_path, monkeypatch):
    async def run(arguments, verdicts):
        verdicts.equal("lost tokens", 1, 0)
        verdicts.at_most("seconds", 2.0, 1.0)
        return {}

    monkeypatch.setitem(server_load.SECTIONS, "l5", run)
    out = tmp_path / "load.json"
    assert server_load.main(["l5", "--out", str(out)]) == 1
    targets = json.loads(out.read_text())["sections"]["l5"]["targets"]
    assert targets["lost tokens"] == {"value": 1, "target": "== 0", "pass": False, "decides": True}
    assert not targets["seconds"]["pass"]
    for dry in (True, False):
        verdicts = shared.Verdicts(dry)
        verdicts.at_most("seconds", 2.0, 1.0)
        verdicts.some("refused", 0)
        assert len(verdicts.failed) == (0 if dry else 2)


def test_dry_sizes_are_those_of_options_and_what_is_given_goes_before():
    assert set(server_load.DRY) <= set(vars(server_load.parse_arguments([])))
    arguments = server_load.parse_arguments(["l4", "--dry", "--cycles", "7"])
    assert (arguments.cycles, arguments.drops) == (7, server_load.DRY["drops"])
    assert server_load.parse_arguments([]).cycles == 200


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        server_load.main(["l9"])
    assert "l9: the sections are l3, l4, l5" in capsys.readouterr().err


# ---- the client ------------------------------------------------------------------------------------------------------

EVENTS = [b'{"choices":[{"finish_reason":null}]}', b'{"choices":[{"finish_reason":"length"}]}', b"[DONE]"]


def answered(leave, *, cut=False):
    """What a client gets from a server that sends EVENTS, and what that server read of the request."""
    heard = bytearray()

    async def serve(reader, writer):
        while not heard.endswith(b"{}") and (data := await reader.read(1 << 16)):
            heard.extend(data)
        if heard.endswith(b"{}"):
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for event in (b": ping\n\n", *(b"data: " + event + b"\n\n" for event in EVENTS)):
                writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                await asyncio.sleep(0.01)
            if not cut:
                writer.write(b"0\r\n\r\n")
        writer.close()

    async def both():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            reply = await clients.call("127.0.0.1", port, "POST", "/x", b"{}", leave=leave)
            await asyncio.sleep(0.1)
        return reply

    return asyncio.run(both()), bytes(heard)


def test_an_answer_is_read_to_its_end():
    reply, heard = answered(None)
    assert (reply.status, reply.events, reply.done, reply.error) == (200, EVENTS, True, "")
    assert heard.startswith(b"POST /x HTTP/1.1\r\n")
    assert 0.0 < reply.ttft < reply.seconds


def test_an_answer_that_breaks_off_is_noticed():
    reply, _ = answered(None, cut=True)
    assert not reply.complete
    assert "IncompleteReadError" in reply.error or "ValueError" in reply.error


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("moment", "events"),
    [("stream", 1), ("last", 2), ("done", 3), ("connect", 0), ("head", 0), ("body", 0), ("sent", 0)],
)
def test_a_client_leaves_when_it_is_told_to(moment, events, reset):
    reply, heard = answered(Leave(moment, share=0.4, events=1, reset=reset))
    assert reply.events == EVENTS[:events]
    assert not reply.complete
    assert reply.error == ""
    # a reset takes along what the other side has not read
    if not reset and not events:
        ends = {"connect": b"", "head": heard[-1:], "body": b"\r\n\r\n", "sent": b"{}"}
        assert heard.endswith(ends[moment])
        assert (b"\r\n\r\n" in heard) == (moment in ("body", "sent"))


# ---- the process -----------------------------------------------------------------------------------------------------


def test_a_port_is_free_until_somebody_listens():
    port = process.unused_port()
    assert 20000 <= port < 30000
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert not process.is_free(port)
    assert process.is_free(port)


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such model: $4 >&2\nexit 3\n", encoding="ascii")
    python.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(python))

    async def start():
        async with process.ServeProcess(["absent"]):
            pass

    with pytest.raises(RuntimeError, match="exit code 3: no such model: absent"):
        asyncio.run(start())


def test_a_process_that_is_left_is_found():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    server = process.ServeProcess([])
    server.process = types.SimpleNamespace(pid=child.pid)
    assert server.leaves_processes()
    child.communicate(b"\n")
    assert not server.leaves_processes()


def test_growth_of_memory_is_that_after_warming_up():
    watch = process.Watch(None)
    watch.samples = [{"rss": rss} for rss in [0, 50, *[100] * 4, *[130] * 4]]
    assert watch.growth() == 30
    watch.samples = [{"rss": 5}]
    assert watch.growth() == 0


def test_the_probe_tells_of_a_server_that_is_not_there():
    port = str(process.unused_port())
    told = subprocess.run(
        [sys.executable, str(overload.HEALTH_PROBE), "127.0.0.1", port, "0.05", "0.02"], capture_output=True, check=True
    )
    statuses = [json.loads(line)[0] for line in told.stdout.splitlines()]
    assert statuses
    assert set(statuses) == {0}
