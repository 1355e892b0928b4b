"""What an engine runs on a GPU before it takes requests; here on the CPU, where it can be looked at."""

import pytest
import torch
from engine_cases import generate, prompt_ids, tiny

from gpt2rt.engine import SamplingParams, warmup
from gpt2rt.engine.params import RequestLimits

# tasks of the model that give no text
POOLED = 2


@pytest.fixture
def ends(monkeypatch):
    """The finished outputs of the requests that were run."""
    seen, run = [], warmup._run
    monkeypatch.setattr(warmup, "_run", lambda *requests: seen.extend(run(*requests)))
    return seen


def reasons(ends):
    return [output.outputs[0].finish_reason for output in ends if hasattr(output.outputs, "__len__")]


def test_requests_of_every_kind_come_to_their_end(ends):
    llm = tiny(max_num_seqs=40)
    params = SamplingParams(max_tokens=5, temperature=0.0)
    expected = generate(llm, [prompt_ids(7)], params)
    free, stats = llm.core.cache.pool.num_free, llm.stats()
    core = warmup.try_out(llm._served)
    # three of each way, forty in which each has its turn, some of them twice, and what fills a step
    ways, full = len(warmup._WAYS), warmup._filling(llm._served)
    assert sum(full) >= 512
    assert len(reasons(ends)) == 3 * ways + 40 - 2 * POOLED + len(full)
    assert set(reasons(ends)) == {"length"}
    assert not core.has_unfinished
    assert core.cache.pool.num_free == core.cache.pool.num_blocks
    # nothing of it is the engine's
    assert llm.core.cache.pool.num_free == free
    assert llm.stats() == stats
    assert generate(llm, [prompt_ids(7)], params) == expected


def test_kinds_that_the_limits_exclude_are_left_out(ends):
    llm = tiny(max_num_seqs=4, limits=RequestLimits(logprobs=0))
    warmup.try_out(llm._served)
    assert max(len(output.prompt_logprobs[-1]) for output in ends if getattr(output, "prompt_logprobs", None)) == 1
    assert set(reasons(ends)) == {"length"}
    # the step that is full has a row of logits for each token all the same
    assert len(ends[-1].prompt_logprobs) == warmup._filling(llm._served)[0]


def test_a_context_of_two_tokens(ends):
    llm = tiny(max_model_len=2, max_num_seqs=4, max_num_batched_tokens=8)
    warmup.try_out(llm._served)
    assert "error" not in reasons(ends)


def test_requests_without_memory_are_not_passed_over(monkeypatch):
    llm = tiny(max_num_seqs=4)

    def step(*batch, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(llm._served.executor, "step", step)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        warmup.try_out(llm._served)


def test_sizes_of_steps(monkeypatch):
    llm = tiny(max_num_seqs=12, num_blocks=40, max_num_batched_tokens=100)
    asked = {}
    executor = llm.core.served.executor
    # the cpu executor has no graphs
    warmup.capture(llm._served, llm.core.cache)
    monkeypatch.setattr(type(executor), "name", "cuda")
    monkeypatch.setattr(executor, "warm_up", lambda cache, **sizes: asked.update(sizes, cache=cache), raising=False)
    warmup.capture(llm._served, llm.core.cache)
    assert asked == {
        "cache": llm.core.cache,
        "batch_sizes": [1, 2, 4, 8, 12],
        "prompt_lengths": [16, 32, 64, 100],
    }
