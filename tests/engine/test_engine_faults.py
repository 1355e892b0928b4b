"""Faults of one request, one after the other: it gets an error, and the others end as they do alone."""

import pytest
import torch
from engine_cases import no_blocks, prompt_ids, said, start, tiny
from engine_faults import (
    Fault,
    Injected,
    assert_clean,
    begin,
    plain_requests,
    poison,
    references,
    requests,
    result,
    run,
    small_llm,
)

from gpt2rt.cache import PrefixIndex
from gpt2rt.engine import PoolingParams, SamplingParams
from gpt2rt.engine.batch import StepBuffers
from gpt2rt.engine.output_text import OutputText
from gpt2rt.engine.request import Request
from gpt2rt.engine.sampler import Sampler
from gpt2rt.engine.scheduler import Scheduler
from gpt2rt.engine.served import ServedModel
from gpt2rt.errors import CacheFullError, NumericsError, QueueFullError, RequestError, RequestFailedError

STAGE = Injected("thrown by the test")


@pytest.fixture(scope="module")
def engine():
    with small_llm() as llm:
        yield llm


@pytest.fixture(scope="module")
def expected():
    return references(requests())


# ---- a stage that fails for one request, and for nobody else (F55) -------------------------------------------------


def _of_branch(request, scheduler, branch, *_):
    return branch.request is request


def _of_items(request, _, items):
    return any(item.branch.request is request for item in items)


def _of_slots(request, batch, cache, **_):
    held = {block for branch in request.branches if branch.sequence for block in branch.sequence.blocks}
    return any(slot // cache.block_size in held for slot in batch.slot_mapping.tolist())


def _of_rows(request, _, rows):
    return any(row is branch.row for row in rows for branch in request.branches)


def _of_sampled(request, sampler, *_, **__):
    return _of_rows(request, sampler, sampler._rows)


def _of_text(request, text, *_, **__):
    return any(branch.text is text for branch in request.branches)


def _of_chain(request, _, __, ___, chain, ____):
    return any(branch.chain is chain for branch in request.branches)


def _itself(request, other):
    return request is other


def _of_params(request, _, __, params):
    return params is request.params


# where, whose call it is, how many of the requests come there
STAGES = {
    "schedule": (lambda llm: (Scheduler, "_reserve"), _of_branch, 5),
    "admit": (lambda llm: (Scheduler, "_begin"), _of_branch, 5),
    "lay-out": (lambda llm: (StepBuffers, "lay_out"), _of_items, 5),
    "step": (lambda llm: (llm.core._runner.executor, "step"), _of_slots, 5),
    "fork": (lambda llm: (Scheduler, "fork"), _of_branch, 1),
    "sampler-rows": (lambda llm: (Sampler, "set_rows"), _of_rows, 4),
    "sampler": (lambda llm: (Sampler, "sample"), _of_sampled, 4),
    "text": (lambda llm: (OutputText, "put"), _of_text, 4),
    "text-end": (lambda llm: (OutputText, "end"), _of_text, 4),
    "index": (lambda llm: (PrefixIndex, "insert"), _of_chain, 5),
    "pool": (lambda llm: (ServedModel, "pool"), _of_params, 1),
    "output": (lambda llm: (Request, "output"), _itself, 5),
}


@pytest.mark.proves("fault:F55")
@pytest.mark.parametrize("first", [0, 2], ids=["at-once", "later"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_fails_for_one_request(engine, expected, stage, first):
    find, is_of, count = STAGES[stage]
    owner, name = find(engine)
    hit = 0
    for index in range(len(expected)):
        engine.reset_prefix_cache()
        begun = begin(engine, requests())
        request = begun[index]

        def when(*arguments, whose=request, **keywords):
            return is_of(whose, *arguments, **keywords)

        with Fault(owner, name, STAGE, first=first, forever=True, when=when) as fault:
            results = run(engine, begun)
        assert_clean(engine.core)
        got = results.pop(index)
        assert results == expected[:index] + expected[index + 1 :]
        if fault.fired:
            hit += 1
            assert isinstance(got, RequestFailedError)
            assert got.__cause__ is STAGE
        else:
            assert got == expected[index]
    assert hit == count or (first and hit <= count)
    assert run(engine, begin(engine, requests())) == expected


@pytest.mark.proves("fault:F55")
@pytest.mark.parametrize("first", [0, 1])
def test_a_sink_fails(engine, expected, first):
    for index in range(len(expected)):
        begun = begin(engine, requests())
        outputs, calls = begun[index].outputs, []

        def sink(output, outputs=outputs, calls=calls):
            calls.append(output)
            if len(calls) == first + 1:
                raise STAGE
            outputs.append(output)

        begun[index].sink = sink
        results = run(engine, begun)
        got = results.pop(index)
        assert results == expected[:index] + expected[index + 1 :]
        if len(calls) > first:
            # told by a second, smaller output
            assert isinstance(got, RequestFailedError)
            assert got.__cause__ is STAGE
        assert_clean(engine.core)


@pytest.mark.proves("fault:F55")
def test_a_sink_that_takes_nothing(engine, expected):
    begun = begin(engine, requests())

    def sink(output):
        raise STAGE

    begun[1].sink = sink
    begun[1].outputs.append(None)
    with torch.inference_mode():
        while engine.core.has_unfinished:
            engine.core.step()
    assert begun[1].finished
    assert [result(begun[place]) for place in (0, 2, 3, 4)] == [expected[place] for place in (0, 2, 3, 4)]


@pytest.mark.proves("fault:F55")
def test_an_observer_fails(engine, expected, caplog):
    engine.core.observer = lambda iteration: 1 / 0
    try:
        assert run(engine, begin(engine, requests())) == expected
    finally:
        engine.core.observer = None
    assert "observer" in caplog.text


@pytest.mark.proves("fault:F55")
@pytest.mark.parametrize("fault", ["raises", "shape", "none-left", "nan"])
def test_a_processor_of_one_request_fails(engine, fault):
    def processor(output_ids, logits):
        if len(output_ids) < 2:
            return logits
        if fault == "raises":
            raise STAGE
        if fault == "shape":
            return logits[:-1]
        return torch.full_like(logits, float("nan") if fault == "nan" else -torch.inf)

    cases = plain_requests()
    wanted = references(cases)
    bad = SamplingParams(max_tokens=5, seed=1, logits_processors=[processor])
    with pytest.warns(UserWarning, match="failed"):
        outputs = engine.generate(
            [*(prompt for prompt, _ in cases), prompt_ids(12)], [*(params for _, params in cases), bad]
        )
    assert [said(output) for output in outputs[:-1]] == wanted
    last = outputs[-1]
    assert isinstance(last.error, (RequestError, NumericsError))
    assert last.outputs[0].finish_reason == "error"
    assert len(last.outputs[0].token_ids) == 2


# ---- NaN in one row (F58) ------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F58")
@pytest.mark.parametrize(
    ("cases", "waits"),
    [(requests, False), (plain_requests, False), (requests, True)],
    ids=["all-logits", "best-logits", "seen-late"],
)
def test_nan_in_one_row(engine, cases, waits, monkeypatch):
    # on a GPU the numbers that show it are read with the tokens
    monkeypatch.setattr(engine.core._sampler._sampler, "_waits", waits)
    cases = cases()
    expected = references(cases)
    seen = []
    engine.core.observer = lambda iteration: seen.append(iteration.corrupted)
    try:
        for index, (_, params) in enumerate(cases):
            if isinstance(params, PoolingParams):
                continue
            engine.reset_prefix_cache()
            before = engine.stats().corrupted_requests
            seen.clear()
            begun = begin(engine, cases)
            with torch.inference_mode():
                while not begun[index].num_output_tokens:
                    engine.core.step()
            poison(engine.core, begun[index])
            results = run(engine, begun)
            got = results.pop(index)
            assert isinstance(got, NumericsError)
            assert results == expected[:index] + expected[index + 1 :]
            assert engine.stats().corrupted_requests == before + 1
            assert sum(seen) == 1
            assert_clean(engine.core)
            # blocks that held NaN serve the next requests
            assert run(engine, begin(engine, cases)) == expected
    finally:
        engine.core.observer = None


@pytest.mark.proves("fault:F58")
@pytest.mark.parametrize(
    "params",
    [
        PoolingParams(task="embed"),
        PoolingParams(task="embed", pooling="mean"),
        PoolingParams(task="token_embed"),
        SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2),
        SamplingParams(max_tokens=2, seed=4, n=2),
    ],
    ids=["embed", "mean", "token_embed", "prompt_logprobs", "n"],
)
def test_nan_in_a_prompt(engine, params):
    neighbours = requests(3)
    expected = references(neighbours)
    engine.reset_prefix_cache()
    long = start(engine, prompt_ids(150, seed=9), params)
    begun = begin(engine, neighbours)
    with torch.inference_mode():
        engine.core.step()
    assert not long.finished
    assert not long.num_output_tokens
    poison(engine.core, long)
    *others, got = run(engine, [*begun, long])
    assert others == expected
    assert isinstance(got, NumericsError)
    # what was computed before the fault was seen is not given to others
    again = start(engine, prompt_ids(150, seed=9), params)
    fresh = small_llm(enable_prefix_caching=False)
    assert run(engine, [again]) == run(fresh, [start(fresh, prompt_ids(150, seed=9), params)])


# ---- names, aborts (F52), the pool (F53), the queue ----------------------------------------------------------------


@pytest.mark.proves("fault:F52")
def test_a_name_twice(engine, expected):
    cases = requests(2)
    first = start(engine, *cases[0])
    second = engine._frontend.make(
        cases[1][0], cases[1][1], lambda output: None, request_id=first.request_id, prompt=None
    )
    with pytest.raises(RequestError, match=f"request_id '{first.request_id}' is in use"):
        engine.core.add(second)
    assert run(engine, [first]) == expected[:1]
    # the name is free again
    outputs = []
    second.branches.clear()
    second.sink, second.outputs = outputs.append, outputs
    engine.core.add(second)
    assert run(engine, [second]) == expected[1:2]


@pytest.mark.proves("fault:F52")
@pytest.mark.parametrize("steps", range(6))
def test_an_abort(engine, expected, steps):
    # of each in turn, while it waits, in its prompt, and in its answer
    for index in range(len(expected)):
        engine.reset_prefix_cache()
        begun = begin(engine, requests())
        with torch.inference_mode():
            for _ in range(steps):
                engine.core.step()
        name, was_finished = begun[index].request_id, begun[index].finished
        assert engine.core.abort(name) is not was_finished
        assert not engine.core.abort(name)
        assert not engine.core.abort("nobody")
        assert all(branch.sequence is None for branch in begun[index].branches)
        results = run(engine, begun)
        assert_clean(engine.core)
        if not was_finished and not isinstance(begun[index].params, PoolingParams):
            got = results[index]
            reasons = [choice["finish_reason"] for choice in got["choices"]]
            assert "abort" in reasons
            # what it has is the beginning of what it would have had
            for choice, whole in zip(got["choices"], expected[index]["choices"], strict=False):
                assert choice["token_ids"] == whole["token_ids"][: len(choice["token_ids"])]
                assert whole["text"].startswith(choice["text"])
        del results[index]
        assert results == expected[:index] + expected[index + 1 :]


@pytest.mark.proves("fault:F53")
def test_a_request_larger_than_the_pool():
    with tiny(num_blocks=4) as llm:
        with pytest.raises(
            RequestError, match=r"needs up to 5 KV blocks of 16 tokens for its 79 tokens.* has 4 in all"
        ):
            llm.generate([prompt_ids(60)], SamplingParams(max_tokens=20))
        assert_clean(llm.core)
        assert len(
            llm.generate([prompt_ids(60)], SamplingParams(max_tokens=5, temperature=0.0))[0].outputs[0].token_ids
        )


@pytest.mark.proves("fault:F53")
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_pool_that_decoding_exhausts(prefix_caching):
    cases = [
        (
            prompt_ids(14 + place, seed=30 + place),
            SamplingParams(max_tokens=40, seed=place, logprobs=0, ignore_eos=True),
        )
        for place in range(5)
    ]
    cases.append((prompt_ids(20, seed=40), SamplingParams(max_tokens=30, seed=1, n=3, ignore_eos=True)))
    expected = references(cases)
    with small_llm(num_blocks=9, enable_prefix_caching=prefix_caching) as llm:
        assert run(llm, begin(llm, cases)) == expected
        assert llm.stats().num_preemptions
        assert_clean(llm.core)


@pytest.mark.proves("fault:F53")
def test_a_pool_that_gives_nothing(engine, caplog):
    with no_blocks(lambda sequence, count: True):
        (got,) = run(engine, begin(engine, requests(1)))
    assert isinstance(got, RequestFailedError)
    assert isinstance(got.__cause__, CacheFullError)
    assert "although no other runs" in str(got)


def test_a_full_queue(expected):
    with small_llm(max_num_seqs=2, max_num_queued_reqs=1) as llm:
        begun = begin(llm, requests())
        assert [isinstance(one, QueueFullError) for one in begun] == [False] * 3 + [True] * 2
        assert begun[3].retry_after > 0
        assert run(llm, begun)[:3] == expected[:3]
