"""generate() on the cuda executor in triton's interpreter: the device chooses the tokens of the eager executor."""

import gc
import os
import weakref

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from lively_model import lively_model

from gpt2rt import GPT2LMHeadModel
from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.errors import NumericsError
from gpt2rt.generation.random import uniform
from gpt2rt.graph import StepBatch, device_loop
from gpt2rt.graph.cuda import CudaExecutor
from gpt2rt.graph.device_loop import RING, DeviceLoop, SamplingRows

pytestmark = pytest.mark.kernel

VOCAB = 53
PROMPTS = [[5, 7, 11], [2]]


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Buffers of a loop are made once and hold numbers from then on: the kernels' own tests poison theirs."""


@pytest.fixture(scope="module")
def model():
    return lively_model(n_layer=1, n_embd=16, n_head=1, n_positions=40, vocab_size=VOCAB, bos_token_id=0)


def both(model, **options):
    """What the eager and the cuda executor generate."""
    results = []
    for name in ("eager", "cuda"):
        assert model.generation_executor(name).name == name
        results.append(model.generate(PROMPTS, pad_token_id=0, **options))
    return results


def test_greedy(model):
    expected, ours = both(model, max_new_tokens=7, do_sample=False)
    assert torch.equal(ours, expected)
    assert len(set(expected[:, 3:].flatten().tolist())) > 4
    # the loop's state stays with the executor, and serves the next call
    states = model.generation_executor("cuda").loop_states
    assert [len(idle) for idle in states.values()] == [1]
    assert torch.equal(model.generate(PROMPTS, pad_token_id=0, max_new_tokens=7, do_sample=False), expected)
    assert [len(idle) for idle in states.values()] == [1]


def test_sampling(model):
    options = {"do_sample": True, "seed": -3, "num_return_sequences": 2, "max_new_tokens": 4}
    for settings in ({"top_k": 0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02}):
        expected, ours = both(model, **options, **settings)
        assert torch.equal(ours, expected)


def test_rows_that_end_at_different_times(model):
    model.generation_executor("eager")
    greedy = model.generate(PROMPTS, pad_token_id=0, max_new_tokens=6, do_sample=False)
    ends = [int(greedy[0, 3 + 1]), int(greedy[1, 3 + 3])]
    expected, ours = both(model, max_new_tokens=6, do_sample=False, eos_token_id=ends)
    assert torch.equal(ours, expected)
    # the first row ended before the second, which ended before the limit
    assert expected.shape[1] < greedy.shape[1]
    assert (expected[0] == 0).any()


def test_the_context_ends(model):
    prompt = [[(7 * i) % VOCAB for i in range(36)]]
    results = []
    for name in ("eager", "cuda"):
        model.generation_executor(name)
        results.append(model.generate(prompt, pad_token_id=0, max_length=41))
    expected, ours = results
    assert expected.shape == (1, 41)
    assert torch.equal(ours, expected)


def test_what_the_host_must_see(model):
    """Processors, scores and beams read the logits on the host; the tokens are the same."""
    for options in (
        {"repetition_penalty": 1.4},
        {"num_beams": 2},
        {"do_sample": True, "seed": 1, "typical_p": 0.8},
        {"return_dict_in_generate": True, "output_logits": True},
    ):
        expected, ours = both(model, **{"max_new_tokens": 3, "do_sample": False, **options})
        if "output_logits" in options:
            for a, b in zip(ours.logits, expected.logits, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            ours, expected = ours.sequences, expected.sequences
        assert torch.equal(ours, expected), options


def test_logits_that_are_not_finite_are_an_error(model):
    twin = GPT2LMHeadModel(model.config).eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_executor("cuda")
    tokens = twin.generate([[5, 7]], max_new_tokens=3, do_sample=False, pad_token_id=0)[0, 2:].tolist()
    with torch.no_grad():
        # the first step is fine, the second looks this row up
        twin.transformer.wpe.weight[2] = torch.nan
    assert twin.generation_executor("cuda").name == "cuda"
    assert twin.generate([[5]], max_new_tokens=1, do_sample=False, pad_token_id=0).shape == (1, 2)
    with pytest.raises(NumericsError, match="row 0"):
        twin.generate([[5, 7]], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens


def test_a_loop_follows_the_host_when_it_goes_elsewhere(model):
    """Steps that were begun ahead are taken back: lengths, blocks and tokens are as if they had not been."""
    executor = model.generation_executor("cuda")
    plan = executor.plan
    cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 8)
    sequence = Sequence(cache)
    executor.step(StepBatch.build([[5, 7, 11] * 5], [sequence]), cache)
    loop = DeviceLoop(executor, cache, 1)
    loop.start([3], [sequence], [40])
    for _ in range(RING - 1):
        loop.launch()
    assert not loop.can_launch()
    first = loop.read()
    assert (sequence.length, len(sequence.blocks), loop.pending) == (15 + RING - 1, 2, RING - 2)
    loop.forget()
    assert (sequence.length, len(sequence.blocks), loop.pending) == (16, 1, 0)
    with pytest.raises(RuntimeError, match="no step is pending"):
        loop.read()
    loop.start(first, [sequence], [40])
    loop.launch()
    again = loop.read()
    logits = executor.step(StepBatch.build([again], [sequence]), cache).logits
    loop.start(again, [sequence], [18])
    assert not loop.can_launch()
    sequence.truncate(17)
    loop.start(again, [sequence], [18])
    assert loop.can_launch()
    loop.launch()
    assert loop.read() == logits.argmax(-1).tolist()
    loop.close()
    sequence.free()
    assert cache.pool.num_free == 8


def test_an_executor_that_nobody_uses_goes_at_once(model):
    """A circle of references would keep its weights on the device until the garbage collector comes by."""
    plan = model.build_graph()
    executor = CudaExecutor(plan)
    sequence = Sequence(PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 4))
    loop = DeviceLoop(executor, sequence.cache, 1)
    loop.start([1], [sequence], [40])
    loop.launch()
    loop.read()
    loop.close()
    gone = weakref.ref(executor)
    enabled = gc.isenabled()
    gc.disable()
    try:
        del loop, executor
        assert gone() is None
    finally:
        if enabled:
            gc.enable()


def test_what_inference_mode_made_is_of_use_outside(model):
    twin = GPT2LMHeadModel(model.config).eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_executor("cuda")
    options = {"max_new_tokens": 2, "do_sample": True, "seed": 4, "pad_token_id": 0}
    with torch.inference_mode():
        inside = twin.generate([[5]], **options)
    assert torch.equal(twin.generate([[5]], **options), inside)


def test_a_loop_draws_what_the_host_would(model):
    executor = model.generation_executor("cuda")
    plan = executor.plan
    cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 8)
    sequences = [Sequence(cache), Sequence(cache)]
    loop = DeviceLoop(executor, cache, 2)
    sampling = SamplingRows([7, 2**64 - 1], [2**63 + 5, 9], [0, 3], [10, 11])
    loop.start([1, 2], sequences, [40, 40], sampling)
    loop.launch()
    loop.launch()
    drawn = [loop.read(), loop.read()]
    numbers = [
        [uniform(7, 2**63 + 5, 0, 10 + i) for i in range(2)],
        [uniform(2**64 - 1, 9, 3, 11 + i) for i in range(2)],
    ]
    for row, tokens in enumerate(zip(*drawn, strict=True)):
        fresh = Sequence(cache)
        current = row + 1
        for step, token in enumerate(tokens):
            logits = executor.step(StepBatch.build([[current]], [fresh]), cache).logits
            cumulative = torch.softmax(logits[0].double(), -1).cumsum(-1)
            assert int((cumulative <= numbers[row][step]).sum()) == token
            current = token
    with pytest.raises(ValueError, match="max_rows must be 1 to 256, got 0"):
        DeviceLoop(executor, cache, 0)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_greedy_tokens_are_chosen_as_the_logits_are_computed(model, monkeypatch, rows):
    """Up to 8 rows: no logits are stored, and no launch looks for the largest of them."""
    executor = model.generation_executor("cuda")
    plan = executor.plan
    calls = []
    plain = device_loop.argmax_into_triton
    monkeypatch.setattr(
        device_loop, "argmax_into_triton", lambda *args, **kwargs: (calls.append(1), plain(*args, **kwargs))
    )
    cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 2 * rows)
    loop = DeviceLoop(executor, cache, rows)
    tokens = [(7 * row) % VOCAB for row in range(rows)]
    loop.start(tokens, [Sequence(cache) for _ in range(rows)], [16] * rows)
    loop.launch()
    chosen = loop.read()
    loop.close()
    assert len(calls) == (rows > 8)
    fresh = [Sequence(cache) for _ in range(rows)]
    logits = executor.step(StepBatch.build([[token] for token in tokens], fresh), cache).logits
    assert chosen == logits.argmax(-1).tolist()


def test_a_launch_that_fails_leaves_the_sequences_as_they_were(model, monkeypatch):
    executor = model.generation_executor("cuda")
    plan = executor.plan
    cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 4)
    sequences = [Sequence(cache), Sequence(cache)]
    loop = DeviceLoop(executor, cache, 2)
    loop.start([1, 2], sequences, [40, 40])
    loop.launch()
    first = loop.read()

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(executor.graphs, "run", full)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            loop.launch()
    assert [sequence.length for sequence in sequences] == [1, 1]
    assert loop.pending == 0
    loop.start(first, sequences, [40, 40])
    loop.launch()
    assert len(loop.read()) == 2
    loop.close()
    for sequence in sequences:
        sequence.free()
    assert cache.pool.num_free == cache.pool.num_blocks
