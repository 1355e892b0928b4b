"""Many clients at once, some of which go away or ask for nonsense: the others get what they would get alone."""

import asyncio
import random

import httpx
import pytest
from live_server import Api, LiveServer, events, wait_until

REQUESTS = 80
SIDE_BY_SIDE = 16


def wishes():
    """Bodies with different lengths, ways of drawing and numbers of choices."""
    rng = random.Random(1)
    texts = ["ROMEO:", "JULIET:\nO", "First Citizen:\nWe are", "🌶 Où", "KING RICHARD:\n" + "my lord, " * 20]
    for place in range(REQUESTS):
        body = {"prompt": rng.choice(texts), "max_tokens": rng.randrange(1, 80), "ignore_eos": True, "seed": place}
        body["temperature"] = rng.choice([0.0, 0.7, 1.0])
        if body["temperature"] and rng.random() < 0.2:
            body["n"] = rng.randrange(2, 5)
        if rng.random() < 0.2:
            body["stop"] = ["\n"]
        fate = rng.choices(["stream", "whole", "goes", "nonsense"], [50, 20, 25, 5])[0]
        yield body, fate, rng.random()


def joined(choices):
    """Index -> text and reason of choices that came whole or in pieces."""
    found = {}
    for choice in choices:
        text, reason = found.get(choice["index"], ("", None))
        found[choice["index"]] = (text + choice["text"], choice["finish_reason"] or reason)
    return found


@pytest.mark.proves("load:L1", "fault:F50")
def test_finished_requests_are_as_if_alone(engine):
    api = Api(engine)
    plan = list(wishes())
    alone = {
        place: joined(api.post("/v1/completions", body).json()["choices"])
        for place, (body, fate, _) in enumerate(plan)
        if fate in ("stream", "whole")
    }
    before = engine.stats()

    async def ask(client, gate, place, body, fate, when):
        async with gate:
            if fate == "nonsense":
                wrong = {**body, "temperature": -1} if when < 0.5 else {**body, "prompt": [5000]}
                response = await client.post("/v1/completions", json=wrong)
                assert response.status_code == 400
                return 0
            if fate == "whole":
                response = await client.post("/v1/completions", json=body)
                assert joined(response.json()["choices"]) == alone[place]
                return 0
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as on:
                text, pieces = "", 0
                async for piece in on.aiter_text():
                    text += piece
                    pieces += 1
                    if fate == "goes" and pieces > when * 10:
                        return "[DONE]" not in text
            found = [choice for event in events(text) for choice in event["choices"]]
            if fate == "stream":
                assert joined(found) == alone[place]
            return 0

    async def ask_all(url):
        gate = asyncio.Semaphore(SIDE_BY_SIDE)
        limits = httpx.Limits(max_connections=SIDE_BY_SIDE)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False, verify=False) as client:
            jobs = [ask(client, gate, place, *wish) for place, wish in enumerate(plan)]
            return await asyncio.gather(*jobs)

    with LiveServer(engine) as server:
        gone = sum(asyncio.run(ask_all(server.url)))
        wait_until(lambda: engine.stats().num_requests_running == engine.stats().num_requests_waiting == 0)
        after = engine.stats()
    assert gone > 0
    # each request ended once; those whose clients went may have been done before it was seen
    ends = {reason: count - before.finished.get(reason, 0) for reason, count in after.finished.items()}
    assert sum(ends.values()) == sum(fate != "nonsense" for _, fate, _ in plan)
    assert ends.get("abort", 0) <= sum(fate == "goes" for _, fate, _ in plan)
    assert ends.get("error", 0) == 0
