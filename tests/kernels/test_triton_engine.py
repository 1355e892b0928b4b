"""The engine on the cuda executor in triton's interpreter: the tokens of the eager executor, and its warm-up."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from lively_model import lively_model

from gpt2rt.engine import LLM, SamplingParams, warmup
from gpt2rt.graph import device_loop

pytestmark = pytest.mark.kernel

VOCAB = 53
PROMPTS = [[5, 7, 11], [2], [5, 7, 11, 13, 17, 19]]


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Buffers of an executor are made once and hold numbers from then on: the kernels' own tests poison theirs."""


@pytest.fixture(scope="module")
def model():
    return lively_model(n_layer=1, n_embd=16, n_head=1, n_positions=40, vocab_size=VOCAB)


def test_the_tokens_of_the_eager_executor(model):
    ways = [{"temperature": 0.0}, {"seed": 3, "top_p": 0.9, "n": 2}, {"temperature": 0.0, "logprobs": 2}]
    params = [SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, **way) for way in ways]
    found = {}
    for name in ("eager", "cuda"):
        llm = LLM(model, executor=name, num_blocks=24, max_num_seqs=4)
        assert llm.executor_name == name
        outputs = llm.generate(PROMPTS, params)
        found[name] = [[choice.token_ids for choice in output.outputs] for output in outputs]
        assert llm.core.scheduler.num_free == llm.core.cache.pool.num_blocks
        llm.shutdown()
    assert found["cuda"] == found["eager"]
    assert len(set(found["cuda"][0][0])) > 1


@pytest.mark.parametrize("way", [{"temperature": 0.0}, {"seed": 3, "top_p": 0.9}], ids=["greedy", "drawn"])
def test_decoding_ahead(model, way):
    params = [SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False, **way) for count in (6, 8)]
    found = {}
    for name in ("eager", "cuda"):
        llm = LLM(model, executor=name, num_blocks=8, max_num_seqs=2)
        launched = []
        step = llm.core._ahead.next

        def counted(step=step, launched=launched):
            tokens = step()
            launched.append(tokens is not None)
            return tokens

        llm.core._ahead.next = counted
        found[name] = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[:2], params)]
        assert any(launched) == (name == "cuda")
        llm.shutdown()
    assert found["cuda"] == found["eager"]


def test_the_warm_up_runs_requests_of_all_kinds(model, monkeypatch):
    ends, run = [], warmup._run
    monkeypatch.setattr(warmup, "_run", lambda *requests: ends.extend(run(*requests)))
    # what each way to choose launches is seen in tests/engine/test_engine_launches.py
    monkeypatch.setattr(warmup, "_WAYS", warmup._WAYS[-1:])
    # and test_triton_warmup.py runs the loops
    loops = []
    monkeypatch.setattr(device_loop, "warm_up_loop", lambda executor, cache, rows: loops.append(rows))
    llm = LLM(model, executor="cuda", num_blocks=8, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=12)
    core = warmup.try_out(llm._served)
    reasons = [output.outputs[0].finish_reason for output in ends if isinstance(output.outputs, list)]
    # three alike, one in a mixture, and one that fills a step
    assert reasons == ["length"] * 5
    assert loops == [1, 2]
    assert core.cache.pool.num_free == core.cache.pool.num_blocks
    assert llm.core.cache.pool.num_free == 8
    llm.shutdown()
