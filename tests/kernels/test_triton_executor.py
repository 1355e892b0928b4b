"""The cuda executor in triton's interpreter: whole models through the kernels, against the eager executor."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.graph import StepBatch, make_executor
from gpt2rt.graph.cuda import CudaExecutor

pytestmark = pytest.mark.kernel

VOCAB = 61


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Buffers of a step are made once and hold numbers from then on: the kernels' own tests poison theirs."""
    torch.manual_seed(0)


def gpt2(**options):
    options = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 48, **options}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=None, **options)).eval()
    return spread(model)


def spread(model):
    """Weights large enough that the likeliest token changes from step to step."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "wpe" not in name:
                parameter.normal_(std=0.3)
            elif parameter.dim() == 2:
                parameter.normal_(std=0.6)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def cache_for(plan, dtype=torch.float32):
    return PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, 24, dtype=dtype)


def steps(executor, dtype=torch.float32, **options):
    """Logits of a ragged prompt step, of two decode steps and of a second chunk of one sequence."""
    cache = cache_for(executor.plan, dtype)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5, 1, 18)]
    sequences = [Sequence(cache) for _ in prompts]
    results = [executor.step(StepBatch.build(prompts, sequences), cache, **options)]
    for tokens in ([7, 8, 9], [1, 0, 60]):
        results.append(executor.step(StepBatch.build([[t] for t in tokens], sequences), cache, **options))
    results.append(executor.step(StepBatch.build([[3, 4, 5]], sequences[1:2]), cache, **options))
    return results


def close(ours, theirs, tolerance=2e-5):
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("logits", "hidden"):
            a, b = getattr(mine, name), getattr(other, name)
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_gpt2_gives_the_numbers_of_the_eager_executor():
    plan = gpt2().build_graph()
    executor = CudaExecutor(plan)
    assert executor.graphs.disabled == "the weights are on cpu"
    close(steps(executor, return_hidden=True), steps(make_executor(plan, "eager"), return_hidden=True))


def test_openai_gpt_gives_the_numbers_of_the_eager_executor():
    config = OpenAIGPTConfig(n_layer=1, n_embd=32, n_head=2, n_positions=48, vocab_size=VOCAB, afn="gelu")
    plan = spread(OpenAIGPTLMHeadModel(config).eval()).build_graph()
    close(steps(CudaExecutor(plan)), steps(make_executor(plan, "eager")))


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_pytorch_tanh"])
def test_other_activations_and_scales(activation):
    plan = gpt2(n_layer=1, n_head=4, activation_function=activation, scale_attn_by_inverse_layer_idx=True).build_graph()
    close(steps(CudaExecutor(plan)), steps(make_executor(plan, "eager")))


def test_an_activation_without_a_kernel_is_refused_by_name():
    plan = gpt2(n_layer=1, activation_function="mish").build_graph()
    with pytest.raises(ValueError, match="cuda executor cannot run this model: there is no kernel for the activation"):
        make_executor(plan, "cuda")
    assert make_executor(plan).name != "cuda"


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_quantised_weights_are_multiplied_by_float_activations(scheme, tmp_path):
    gpt2(n_embd=64, n_layer=1).save_pretrained(tmp_path)
    config = {"scheme": scheme, "activations": "float32", "embeddings": "int8" if scheme != "int4" else "int4"}
    plan = GPT2LMHeadModel.from_pretrained(tmp_path, quantization=config).eval().build_graph()
    executor = CudaExecutor(plan)
    close(steps(executor), steps(make_executor(plan, "eager")), 5e-5)
    dense = CudaExecutor(GPT2LMHeadModel.from_pretrained(tmp_path).eval().build_graph())
    assert executor.weight_bytes < dense.weight_bytes / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_models_of_16_bits(dtype):
    model = gpt2(n_layer=1)
    wide = steps(make_executor(model.build_graph(), "eager"))
    plan = model.to(dtype).build_graph()
    ours = steps(CudaExecutor(plan), dtype)
    close(ours, wide, 30 * torch.finfo(dtype).eps)


def test_an_int8_cache():
    plan = gpt2(n_layer=1).build_graph()
    close(steps(CudaExecutor(plan), torch.int8), steps(make_executor(plan, "eager"), torch.int8), 1e-3)


def test_argmax_and_rows_in_another_order():
    plan = gpt2(n_layer=1).build_graph()
    executor, reference = CudaExecutor(plan), make_executor(plan, "eager")
    expected = steps(reference)[1].logits
    cache = cache_for(plan)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5, 1, 18)]
    sequences = [Sequence(cache) for _ in prompts]
    executor.step(StepBatch.build(prompts, sequences), cache)
    batch = StepBatch.build([[7], [8], [9]], sequences)
    found = executor.step(batch, cache, head="argmax")
    assert torch.equal(found.top_ids.squeeze(1), expected.argmax(-1))
    torch.testing.assert_close(found.top_logits.squeeze(1), expected.amax(-1), rtol=2e-5, atol=2e-5)
    batch.logits_indices = torch.tensor([2, 0, 1])
    # the same step again writes the same keys and values
    torch.testing.assert_close(executor.step(batch, cache).logits, expected[[2, 0, 1]], rtol=2e-5, atol=1e-4)
    with pytest.raises(ValueError, match="head must be"):
        executor.step(batch, cache, head="best")


def test_padding_changes_nothing():
    """Three rows run as four; what an earlier, larger step left in the buffers must not show."""
    plan = gpt2(n_layer=1).build_graph()
    executor = CudaExecutor(plan)
    first = steps(executor)
    cache = cache_for(plan)
    sequences = [Sequence(cache) for _ in range(4)]
    executor.step(StepBatch.build([[9], [9, 9], [9], [9]], sequences), cache)
    executor.step(StepBatch.build([[1], [2], [3], [4]], sequences), cache)
    for mine, other in zip(steps(executor), first, strict=True):
        assert torch.equal(mine.logits, other.logits)


def test_batch_invariance():
    """A token has the same bits alone, in a batch, decoded, in a prompt and in a chunk of one."""
    plan = gpt2(n_layer=1).build_graph()
    executor = CudaExecutor(plan, batch_invariant=True)
    ids = torch.randint(0, VOCAB, (20,)).tolist()

    def logits(chunks, company=()):
        cache = cache_for(plan)
        sequence, others = Sequence(cache), [Sequence(cache) for _ in company]
        first = 0
        for size in chunks:
            tokens = [ids[first : first + size], *([c] if isinstance(c, int) else c for c in company)]
            result = executor.step(StepBatch.build(tokens, [sequence, *others]), cache).logits[0]
            first += size
        return result

    together = logits([20])
    assert torch.equal(logits([13, 7]), together)
    assert torch.equal(logits([19, 1]), together)
    assert torch.equal(logits([19, 1], company=(5, 6)), together)
    # the control: another arithmetic gives other bits, and the same numbers
    other = CudaExecutor(plan, batch_invariant=False)
    cache = cache_for(plan)
    plain = other.step(StepBatch.build([ids], [Sequence(cache)]), cache).logits[0]
    torch.testing.assert_close(plain, together, rtol=2e-5, atol=1e-4)


def test_warm_up_writes_to_free_blocks_alone():
    plan = gpt2(n_layer=1, n_embd=16, n_head=1, n_positions=32).build_graph()
    executor = CudaExecutor(plan)
    cache = cache_for(plan)
    held = Sequence(cache)
    held.append(20)
    cache.data[:, :, held.blocks] = 7.0
    # a decode step, prompts of 16 tokens and of the whole context, and 2, 16 and 64 tokens without a graph
    assert executor.warm_up(cache, batch_sizes=(1,), prompt_lengths=(16, 64)) == 6
    assert (cache.data[:, :, held.blocks] == 7.0).all()
    assert cache.pool.num_free == 22
    assert sum(len(idle) for idle in executor.loop_states.values()) == 2
    with pytest.raises(ValueError, match="batch_sizes must be positive, got 0"):
        executor.warm_up(cache, batch_sizes=(0,))


def test_a_model_with_other_positions_shares_the_weights():
    plan = gpt2(n_layer=1).build_graph()
    executor = CudaExecutor(plan)
    before = steps(executor)
    other = executor.with_positions(torch.zeros_like(plan.nodes[0].wpe))
    reference = make_executor(plan, "eager").with_positions(torch.zeros_like(plan.nodes[0].wpe))
    close(steps(other), steps(reference))
    close(steps(executor), before, 0.0)
