"""What an engine runs on a GPU before it takes requests; here on the CPU, where it can be looked at."""

import pytest
import torch
from engine_cases import generate, prompt_ids, tiny

from gpt2rt.engine import SamplingParams, warmup
from gpt2rt.engine.params import RequestLimits
from gpt2rt.engine.served import ServedModel


@pytest.fixture
def ends(monkeypatch):
    """The finished outputs of the requests that were run."""
    seen = []
    monkeypatch.setattr(warmup, "_nobody", lambda output: seen.append(output) if output.finished else None)
    return seen


def reasons(ends):
    return [output.outputs[0].finish_reason for output in ends if hasattr(output.outputs, "__len__")]


def test_requests_of_every_kind_come_to_their_end(ends):
    llm = tiny()
    params = SamplingParams(max_tokens=5, temperature=0.0)
    expected = generate(llm, [prompt_ids(7)], params)
    free, stats = llm.core.cache.pool.num_free, llm.stats()
    warmup.warm_up(llm.core)
    # two kinds of pooling, those of sampling, and twelve at once
    assert len(ends) == 2 + len(warmup._WAYS) + warmup._MANY
    assert set(reasons(ends)) == {"length"}
    # nothing of it is the engine's
    assert llm.core.cache.pool.num_free == free
    assert llm.stats() == stats
    assert not llm.core.has_unfinished
    assert generate(llm, [prompt_ids(7)], params) == expected


def test_kinds_that_the_limits_exclude_are_left_out(ends):
    llm = tiny(limits=RequestLimits(logprobs=0))
    warmup.warm_up(llm.core)
    assert 0 < len(ends) < 2 + len(warmup._WAYS) + warmup._MANY
    assert set(reasons(ends)) == {"length"}


def test_a_context_of_two_tokens(ends):
    llm = tiny(max_model_len=2)
    warmup.warm_up(llm.core)
    assert "error" not in reasons(ends)


def test_sizes_of_steps(monkeypatch):
    llm = tiny(max_num_seqs=12, num_blocks=40, max_num_batched_tokens=100)
    asked = {}
    executor = llm.core.served.executor
    monkeypatch.setattr(type(executor), "name", "cuda")
    monkeypatch.setattr(warmup, "_run_each_kind", lambda served: None)
    monkeypatch.setattr(executor, "warm_up", lambda cache, **sizes: asked.update(sizes, cache=cache), raising=False)
    warmup.warm_up(llm.core)
    assert asked == {
        "cache": llm.core.cache,
        "batch_sizes": [1, 2, 4, 8, 12],
        "prompt_lengths": [16, 32, 64],
        "loops": False,
    }


def test_it_is_done_on_a_gpu_alone(monkeypatch):
    done = []
    monkeypatch.setattr(warmup, "warm_up", done.append)
    served = tiny().core.served
    warmup.new_core(served)
    assert done == []
    monkeypatch.setattr(warmup, "EngineCore", lambda served: "core")
    monkeypatch.setattr(ServedModel, "device", torch.device("cuda"))
    assert warmup.new_core(served) == "core"
    assert done == ["core"]
