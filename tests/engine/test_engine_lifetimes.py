"""Requests and engines that end early, take turns and stand side by side; what the caches keep between them."""

import asyncio
import gc

import pytest
import torch
from engine_cases import TEXT, collect, generate, prompt_ids, run, said, start, tiny

from gpt2rt.engine import LLM, EngineConfig, RequestOutputKind, SamplingParams
from gpt2rt.errors import EngineDeadError, RequestError, RequestFailedError


def only(llm, prompt=TEXT[:40], **settings):
    """The one choice of a request."""
    (output,) = llm.generate([prompt], SamplingParams(**settings))
    return output.outputs[0]


@pytest.fixture(scope="module")
def llm():
    return tiny()


# ---- ending early ----------------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F50")
def test_aborted_at_any_moment():
    llm = tiny(max_num_seqs=4, max_num_batched_tokens=16)
    # 60 tokens in chunks of at most 16, three choices, which wait for places
    settings = {"max_tokens": 8, "seed": 1, "logprobs": 0}
    prompts = [prompt_ids(10), prompt_ids(60, seed=1), prompt_ids(20, seed=2)]
    params = [SamplingParams(n=n, **settings) for n in (1, 3, 1)]
    expected = generate(llm, prompts, params)
    for steps in range(26):
        requests = [start(llm, *question) for question in zip(prompts, params, strict=True)]
        with torch.inference_mode():
            for _ in range(steps):
                llm.core.step()
        ended = requests[1].finished
        assert llm.core.abort(requests[1].request_id) is not ended
        assert not llm.core.abort(requests[1].request_id)
        assert all(branch.sequence is None for branch in requests[1].branches)
        words = run(llm, requests[0], requests[2])
        assert words == [expected[0], expected[2]]
        if ended:
            assert said(requests[1].outputs[-1]) == expected[1]
            break
        for mine, whole in zip(said(requests[1].outputs[-1])["choices"], expected[1]["choices"], strict=False):
            assert mine["finish_reason"] in ("abort", "length")
            assert mine["token_ids"] == whole["token_ids"][: len(mine["token_ids"])]
            assert whole["text"].startswith(mine["text"].rstrip("�"))
        assert llm.stats().num_free_blocks == llm.stats().num_blocks
    else:
        pytest.fail("26 steps were not enough")
    assert steps > 10


def test_a_stream_that_is_closed_early_leaves_nothing(llm):
    free = llm.stats().num_free_blocks
    stream = llm.stream(TEXT[:60], SamplingParams(max_tokens=100))
    next(stream), next(stream)
    assert llm.stats().num_requests_running == 1
    stream.close()
    assert llm.stats().num_requests_running == 0
    assert llm.stats().num_free_blocks == free
    for output in llm.stream(TEXT[:60], SamplingParams(max_tokens=100)):
        if len(output.outputs[0].token_ids) == 3:
            break
    del output
    gc.collect()
    assert not llm.core.requests


def test_a_stream_that_is_never_read_leaves_nothing(llm):
    stream = llm.stream(TEXT[:60], SamplingParams(max_tokens=100))
    stream.close()
    assert not llm.core.requests
    llm.stream(TEXT[:60], SamplingParams(max_tokens=100))
    gc.collect()
    assert not llm.core.requests


def test_a_stream_refuses_before_it_is_read(llm):
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.stream([], SamplingParams())


def test_streams_take_turns_with_each_other_and_with_calls(llm):
    prompts = [prompt_ids(20, seed=i) for i in range(3)]
    params = SamplingParams(max_tokens=12, n=2, seed=2, output_kind=RequestOutputKind.DELTA)
    expected = generate(llm, prompts, params)
    streams = [llm.stream(prompt, params) for prompt in prompts]
    found = [[], [], []]
    for turn in range(4):
        for pieces, stream in zip(found, streams, strict=True):
            pieces.append(next(stream))
        if turn == 1:
            assert generate(llm, prompts[:1], params) == expected[:1]
    for pieces, stream in zip(found, streams, strict=True):
        pieces += stream
    assert [collect(pieces) for pieces in found] == expected


def test_ctrl_c_leaves_nothing(llm):
    def interrupt(output_ids, logits):
        if len(output_ids) == 2:
            raise KeyboardInterrupt
        return logits

    params = [SamplingParams(), SamplingParams(logits_processors=[interrupt])]
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], params)
    assert not llm.core.requests
    assert len(only(llm, [1], max_tokens=3).token_ids) == 3


def test_a_request_that_fails_harms_no_other(llm):
    def broken(output_ids, logits):
        if len(output_ids) == 2:
            raise ZeroDivisionError("on purpose")
        return logits

    good = SamplingParams(max_tokens=8, seed=1)
    expected = generate(llm, [[1], [2]], good)
    with pytest.warns(UserWarning, match="on purpose"):
        outputs = llm.generate([[1], [3], [2]], [good, SamplingParams(logits_processors=[broken]), good])
    assert [said(outputs[0]), said(outputs[2])] == expected
    assert outputs[1].outputs[0].finish_reason == "error"
    assert len(outputs[1].outputs[0].token_ids) == 2
    assert isinstance(outputs[1].error, (RequestError, RequestFailedError))
    with pytest.raises((RequestError, RequestFailedError), match="on purpose"):
        list(llm.stream([3], SamplingParams(logits_processors=[broken])))


def test_a_context_manager_ends_it():
    with tiny() as llm:
        stream = llm.stream([1], SamplingParams(max_tokens=50))
        next(stream)
        core = llm.core
    assert not core.requests
    assert [output.outputs[0].finish_reason for output in stream][-1] == "abort"
    for use in (lambda: llm.generate([[1]]), lambda: llm.embed([[1]]), lambda: next(llm.stream([1])), llm.stats):
        with pytest.raises(EngineDeadError, match="shut down"):
            use()
    llm.shutdown()


# ---- the prefix cache ------------------------------------------------------------------------------------------------


@pytest.mark.proves("promise:D2")
def test_hits_are_counted():
    llm = tiny()
    steps = []
    llm.core.observer = lambda step: steps.append((step.prefix_cache_queries, step.prefix_cache_hits))
    prompt = prompt_ids(40)
    for cached in (0, 32):
        output = llm.generate([prompt], SamplingParams(max_tokens=2))[0]
        assert output.num_cached_tokens == output.metrics.num_cached_tokens == cached
    stats = llm.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (80, 32)
    assert [sum(column) for column in zip(*steps, strict=True)] == [80, 32]
    llm.reset_prefix_cache()
    assert llm.generate([prompt], SamplingParams(max_tokens=2))[0].num_cached_tokens == 0
    plain = tiny(enable_prefix_caching=False)
    for _ in range(2):
        assert plain.generate([prompt], SamplingParams(max_tokens=2))[0].num_cached_tokens == 0
    assert plain.stats().prefix_cache_queries == 0


def test_the_cache_gives_way_to_requests():
    llm = tiny(num_blocks=8)
    for seed in range(6):
        output = llm.generate([prompt_ids(100, seed=seed)], SamplingParams(max_tokens=20, ignore_eos=True))[0]
        assert output.num_cached_tokens == 0
        # cached blocks count as free
        assert llm.stats().num_free_blocks == 8
    assert llm.stats().num_preemptions == 0


# ---- what keys and values are kept in --------------------------------------------------------------------------------


def test_smaller_caches_are_near():
    prompt = llm_prompt = prompt_ids(60)
    numbers = {}
    for dtype in ("float32", "bfloat16", "int8"):
        llm = tiny(kv_cache_dtype=dtype)
        assert llm.core.cache.data.dtype is getattr(torch, dtype)
        output = llm.generate([llm_prompt], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
        numbers[dtype] = torch.tensor(
            [entry[token].logprob for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        )
    assert 0 < (numbers["bfloat16"] - numbers["float32"]).abs().max() < 0.2
    assert 0 < (numbers["int8"] - numbers["float32"]).abs().max() < 0.2


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of"):
        EngineConfig(kv_cache_dtype="int3")
    with pytest.raises(ValueError, match=r"float8.* has no kernels"):
        tiny(executor="cpu", kv_cache_dtype="float8")
    with pytest.raises(TypeError, match="num_blocks stand in config already"):
        LLM(config=EngineConfig(), num_blocks=4)
    with pytest.raises(TypeError, match="'num_block' is no setting of the engine; did you mean 'num_blocks'"):
        LLM(num_block=4)
    with pytest.raises(ValueError, match="task must be one of"):
        tiny(task="sing")


def test_several_engines_live_side_by_side(async_llm):
    engines = [tiny(), tiny("gpt2rt/tiny-gpt1"), tiny(quantization="int8"), tiny(num_blocks=40)]
    params = SamplingParams(max_tokens=10, seed=1, logprobs=1, output_kind=RequestOutputKind.DELTA)
    expected = [generate(engine, [prompt_ids(20)], params)[0] for engine in engines]
    assert expected[0] == expected[3] != expected[2]
    streams = [engine.stream(prompt_ids(20), params) for engine in engines]
    found = [[] for _ in engines]
    while any(not pieces or not pieces[-1].finished for pieces in found):
        for pieces, stream in zip(found, streams, strict=True):
            pieces += [piece for piece in [next(stream, None)] if piece]
    assert [collect(pieces) for pieces in found] == expected
    # two engines on one model share its weights
    shared = LLM(engines[0].model, tokenizer=engines[0].tokenizer, num_blocks=20)
    assert generate(shared, [prompt_ids(20)], params)[0] == expected[0]
    engine = async_llm(engines[0].model)

    async def ask():
        own = SamplingParams(max_tokens=10, seed=1, logprobs=1, detokenize=False)
        return [output async for output in engine.generate(prompt_ids(20), own)][-1]

    assert asyncio.run(ask()).outputs[0].token_ids == expected[0]["choices"][0]["token_ids"]
