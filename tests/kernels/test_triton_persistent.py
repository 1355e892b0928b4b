"""The cuda executor with the persistent kernel, emulated, for single steps; Triton's interpreter runs the others."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from cuda_persistent_host import emulating, register
from cuda_rows_host import why_not
from gpu_sections import correctness
from gpu_sections import decode as decode_section
from gpu_sections import persistent as benchmark
from gpu_sections.session import Session

from gpt2rt import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.graph import StepBatch, cuda, device_loop, make_executor, persistent
from gpt2rt.graph.cuda import CudaExecutor
from gpt2rt.graph.device_loop import DeviceLoop, SamplingRows
from gpt2rt.ops._library import ExtensionStatus

pytestmark = pytest.mark.kernel

if why_not() is not None:
    pytest.skip(str(why_not()), allow_module_level=True)

VOCAB = 61


@pytest.fixture(scope="module", autouse=True)
def op_on_the_host():
    return register()


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Buffers of a step are made once and hold numbers from then on."""
    torch.manual_seed(0)


@pytest.fixture
def launches(monkeypatch):
    """Asks for the persistent kernel, as the variable does on a device, and counts its launches."""
    counted = []
    launch = persistent.persistent_decode_cuda

    def counting(*arguments, **options):
        counted.append(1)
        launch(*arguments, **options)

    monkeypatch.setattr(cuda, "use_persistent_decode", lambda device: True)
    monkeypatch.setattr(persistent, "persistent_decode_cuda", counting)
    with emulating(blocks=4):
        yield counted


def gpt2(dtype=torch.float16):
    config = GPT2Config(
        vocab_size=VOCAB, n_layer=2, n_embd=32, n_head=2, n_positions=48, bos_token_id=0, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
    return model.to(dtype)


def decode(executor, tokens, sequences, cache, **options):
    return executor.step(StepBatch.build([[token] for token in tokens], sequences), cache, **options)


def test_single_steps_are_one_launch_and_others_go_on_as_before(launches):
    plan = gpt2().generation_executor("eager").plan
    executor, eager = CudaExecutor(plan), make_executor(plan, "eager")
    assert executor.persistent_disabled == ""
    results = []
    for each in (executor, eager):
        cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 12, dtype=plan.dtype)
        sequences = [Sequence(cache) for _ in range(2)]
        rows = [each.step(StepBatch.build([[3, 4, 5, 6], [9, 8]], sequences), cache).logits]
        single = decode(each, [7], sequences[:1], cache, return_hidden=True)
        rows += [single.logits, single.hidden]
        rows.append(decode(each, [1, 2], sequences, cache).logits)
        rows.append(decode(each, [11], sequences[1:], cache).logits)
        # a second context of the same size of batch
        best = decode(each, [12], sequences[1:], cache, **({"head": "argmax"} if each is executor else {}))
        rows.append(best.top_logits if each is executor else best.logits.amax(-1, keepdim=True))
        results.append(rows)
    assert len(launches) == 3
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_loop_on_the_device_chooses_the_same_tokens(launches, monkeypatch):
    # the kernel chooses by itself
    monkeypatch.setattr(device_loop, "argmax_into_triton", lambda *_, **__: pytest.fail("launched"))
    model = gpt2()
    plan = model.generation_executor("eager").plan
    chosen = []
    for executor in (CudaExecutor(plan), None):
        if executor is None:
            before, executor = len(launches), make_executor(plan, "eager")
        cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 12, dtype=plan.dtype)
        sequence = Sequence(cache)
        token = int(executor.step(StepBatch.build([[3, 4, 5]], [sequence]), cache).logits.argmax())
        tokens = [token]
        if isinstance(executor, CudaExecutor):
            loop = DeviceLoop(executor, cache, 1)
            loop.start([token], [sequence], [40])
            for _ in range(6):
                loop.launch()
                tokens += loop.read()
            loop.close()
        else:
            for _ in range(6):
                tokens.append(int(decode(executor, tokens[-1:], [sequence], cache).logits.argmax()))
        chosen.append(tokens)
    assert before == len(launches) == 6
    assert chosen[0] == chosen[1]


def test_a_loop_that_draws(launches):
    """The sampler reads the kernel's logits; with a temperature near zero it draws the largest."""
    plan = gpt2().generation_executor("eager").plan
    chosen = []
    for sampling in (None, SamplingRows([1], [0], [0], [4], temperature=[1e-4])):
        cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 12, dtype=plan.dtype)
        sequence = Sequence(cache)
        executor = CudaExecutor(plan)
        executor.step(StepBatch.build([[3, 4, 5]], [sequence]), cache)
        loop = DeviceLoop(executor, cache, 1)
        loop.start([6], [sequence], [40], sampling)
        tokens = []
        for _ in range(3):
            loop.launch()
            tokens += loop.read()
        chosen.append(tokens)
    assert len(launches) == 6
    assert chosen[0] == chosen[1]


def test_other_caches_are_the_chains(launches):
    plan = gpt2().generation_executor("eager").plan
    executor = CudaExecutor(plan)
    cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 4, dtype=torch.int8)
    assert decode(executor, [3], [Sequence(cache)], cache).logits.isfinite().all()
    assert not launches


def test_other_positions(launches):
    executor = CudaExecutor(gpt2().generation_executor("eager").plan)
    wpe = torch.randn(48, 32).half()
    other = executor.with_positions(wpe)
    assert other.persistent_disabled == ""
    cache = PagedKVCache(2, 2, 16, 4, dtype=torch.float16)
    ours = [decode(each, [3], [Sequence(cache)], cache).logits for each in (executor, other)]
    assert len(launches) == 2
    assert not torch.equal(*ours)
    eager = make_executor(other.plan, "eager")
    assert torch.allclose(ours[1], decode(eager, [3], [Sequence(cache)], cache).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("which", ["batch invariant", "OpenAI GPT", "float32", "no room"])
def test_a_refusal_is_said_aloud(launches, monkeypatch, which):
    model, options = gpt2(torch.float32 if which == "float32" else torch.float16), {}
    reason = "the weights are torch.float32"
    if which == "batch invariant":
        options, reason = {"batch_invariant": True}, "the executor is batch invariant"
    elif which == "OpenAI GPT":
        config = OpenAIGPTConfig(n_layer=1, n_embd=32, n_head=2, vocab_size=VOCAB, n_positions=48)
        model, reason = OpenAIGPTLMHeadModel(config).eval().half(), "its norms stand behind the residual additions"
    elif which == "no room":
        reason = "too long for the device's shared memory"

        def refuse(*_):
            raise ValueError(f"persistent_decode_cuda: the rows of this model are {reason}")

        monkeypatch.setattr(persistent, "persistent_blocks", refuse)
    plan = model.generation_executor("eager").plan
    with pytest.warns(RuntimeWarning, match=f"GPT2RT_CUDA_PERSISTENT is set, but .*{reason}"):
        executor = CudaExecutor(plan, **options)
    assert reason in executor.persistent_disabled
    cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 4, dtype=plan.dtype)
    assert decode(executor, [3], [Sequence(cache)], cache).logits.isfinite().all()
    assert not launches


def test_it_is_off_unless_asked_for(monkeypatch):
    monkeypatch.setenv("GPT2RT_CUDA_PERSISTENT", "1")
    executor = CudaExecutor(gpt2().generation_executor("eager").plan)
    # the variable is for CUDA devices
    assert executor.persistent_disabled == "GPT2RT_CUDA_PERSISTENT is not set"
    assert executor.chain.persistent is None


def test_the_benchmark_checks_and_times_it(launches, monkeypatch):
    """Its parts of sections a, c and f, as they run where the library is loaded."""
    monkeypatch.setattr(benchmark, "cuda_extension_status", lambda: ExtensionStatus(True, "emulated", ""))
    session = Session(torch.device("cpu"), None, dry=True)
    with torch.no_grad(), session.section("all"):
        correctness._persistent(session)
        model = benchmark.make_model("toy", "float16", session.device)
        decode_section._steps(session, "toy", "float16", model)
        decode_section._persistent(session, "toy", "float16", model)
        benchmark.time_grids(session)
    section = session.result["sections"]["all"]
    assert (section["state"], session.failures()) == ("done", [])
    names = [row["name"] for row in section["rows"]]
    assert "persistent toy bfloat16: logits" in names
    assert "persistent toy float16: bits of 3 launches" in names
    assert "persistent toy float16: bits on 1 of 4 blocks" in names
    times = {row["name"]: set(row["us"]) for row in section["rows"] if row["kind"] == "times"}
    # asked for by the variable, it is what the model's steps are: they are not called by the chain's name
    assert times["decode toy float16 context 40"] == {benchmark.LABEL, "torch in a graph"}
    assert times["persistent decode toy float16 context 40"] == {"gpt2rt", benchmark.LABEL}
    assert {"gpt2rt", benchmark.LABEL, f"{benchmark.LABEL}, 2 blocks"} <= times["persistent grids toy"]
    assert "persistent decode, barriers" in times
    assert launches


def test_the_benchmark_says_why_it_has_no_times(launches):
    session = Session(torch.device("cpu"), None, dry=True)
    with torch.no_grad(), session.section("all"):
        correctness._persistent(session)
        benchmark.time_grids(session)
    texts = {row["text"] for row in session.result["sections"]["all"]["rows"]}
    assert texts == {f"not run: {benchmark.cuda_extension_status().reason}"}
    assert not launches
