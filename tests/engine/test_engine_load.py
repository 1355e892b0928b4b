"""Loads: sixteen clients that come, go, err and leave, on a pool that is too small for them."""

import asyncio
import json
import os

import engine_load
import engine_soak
import pytest
from engine_cases import tiny

from gpt2rt.engine import SamplingParams

# a minute in CI
SECONDS = float(os.environ.get("GPT2RT_LOAD_SECONDS", "8"))
STREAMS = 16


@pytest.fixture(scope="module")
def questions():
    return engine_load.make_questions(tiny(), int(16 + SECONDS), engine_load.Mix())


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.proves("load:L1", "load:L5", "promise:D5", "fault:F50")
@pytest.mark.parametrize(
    ("share", "options"),
    [(0.75, {}), (0.25, {"quantization": "int8", "enable_prefix_caching": False})],
    ids=["float32", "int8"],
)
def test_clients_that_come_and_go(share, options, questions, async_llm):
    mix = engine_load.Mix()
    if options:
        questions = engine_load.make_questions(tiny(**options), 16, mix)
    engine = async_llm(num_blocks=60, max_num_queued_reqs=None, **options)
    books = engine_load.Books(engine)
    asyncio.run(engine_load.closed_loop(books, questions, mix, streams=STREAMS, seconds=share * SECONDS, least=20))
    assert books.wrong() == []
    assert books.counts["left"] > 0
    assert books.counts["refused"] > 0
    assert books.observed["preemptions"] > 0


@pytest.mark.proves("load:L1", "G12")
def test_the_books_notice_a_wrong_token_and_a_lost_one(questions, async_llm):
    """The negative control: answers of which one token is another, and deltas of which one is dropped."""
    mix = engine_load.Mix(leave=0.0, invalid=0.0)
    wrong = [engine_load.Question(q.prompt, q.settings, [([7, *ids[1:]], *rest) for ids, *rest in q.answer])
             for q in questions[:3]]  # fmt: skip
    books = engine_load.Books(async_llm())
    asyncio.run(engine_load.closed_loop(books, wrong, mix, streams=2, seconds=0.0, least=0))
    asyncio.run(engine_load.Client(books, wrong, mix, 0).ask())
    assert any("differs after token 0" in mistake for mistake in books.mistakes)
    books.mistakes.clear()
    assert books.wrong() == []
    name = next(iter(books.delivered))
    books.delivered[name] -= 1
    assert books.wrong() == [f"requests with lost tokens: {[name]}"]


@pytest.mark.proves("load:L5")
def test_counters_are_exact():
    llm = tiny(num_blocks=12)
    steps = []
    llm.core.observer = steps.append
    params = [SamplingParams(max_tokens=40, n=1 + i % 2, seed=i, ignore_eos=True) for i in range(6)]
    outputs = llm.generate([[1 + i] * 10 for i in range(6)], params)
    made = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    stats = llm.stats()
    assert made == 9 * 40 == stats.generation_tokens == sum(step.num_generation_tokens for step in steps)
    assert made == sum(request.num_generation_tokens for step in steps for request in step.finished)
    assert stats.prompt_tokens == 60 == sum(step.num_prompt_tokens for step in steps)
    assert sum(len(step.time_to_first_token) for step in steps) == 6
    # every token but each choice's first has one before it
    assert sum(len(step.inter_token_latency) for step in steps) == made - 9
    assert stats.num_preemptions == sum(output.metrics.num_preemptions for output in outputs) > 0
    assert stats.finished == {"length": 6}
    assert stats.num_steps == len(steps)
    for request in [request for step in steps for request in step.finished]:
        parts = request.queue_time + request.prefill_time + request.decode_time
        assert request.e2e_latency >= parts - 1e-6
    # computed tokens: each once, and again after a preemption
    assert sum(step.num_tokens for step in steps) >= 60 + made - 9 - sum(step.prefix_cache_hits for step in steps)


@pytest.mark.proves("load:L5", "fault:F50")
def test_an_abort_is_counted_though_no_step_follows(async_llm):
    engine = async_llm()
    books = engine_load.Books(engine)

    async def leave():
        stream = engine.generate([1, 2, 3], SamplingParams(max_tokens=400, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        await books.settle()

    asyncio.run(leave())
    (made,) = books.generated.values()
    assert made > 0
    assert books.observed["finished abort"] == 1
    assert books.observed["finished_tokens"] == made == engine.stats().generation_tokens
    assert engine.stats().num_steps == books.observed["steps"] - 1


# ---- the long loads, in small ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", engine_soak.LOADS)
def test_the_long_loads_run_dry(load, tmp_path):
    out = tmp_path / "result.json"
    assert engine_soak.main([load, "--dry", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["load"] == load
    assert result["wrong"] == []
    assert result["dry"] is True
    assert result["machine"]["isa"]


def test_the_soak_fails_when_something_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_load.Books, "wrong", lambda self: ["a token is lost"])
    out = tmp_path / "result.json"
    assert engine_soak.main(["drops", "--dry", "--out", str(out)]) == 1
    assert "a token is lost" in json.loads(out.read_text())["wrong"]
