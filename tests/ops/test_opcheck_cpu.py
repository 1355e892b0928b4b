"""``torch.library.opcheck`` on every op: schema, fake implementation, autograd key, tracing."""

import pytest
import torch
from cpu_step_model import Config, StepModel, aligned_bytes
from quantized_cases import random_case

import gpt2rt.ops as ops

OPS = torch.ops.gpt2rt


def row_cases():
    x, w = torch.randn(5, 24), torch.randn(24)
    yield OPS.layer_norm, (x, w, w, 1e-5)
    yield OPS.layer_norm, (torch.randn(5, 30)[:, :24].bfloat16(), w.bfloat16(), w.bfloat16(), 1e-5)
    yield OPS.add_layer_norm, (x, torch.randn(5, 24), w, w, 1e-5)
    yield OPS.bias_gelu_new, (x, w)
    yield OPS.embedding, (torch.tensor([1, 2]), torch.tensor([0, 1]), x, torch.randn(3, 24))
    yield OPS.linear, (x, torch.randn(7, 24), torch.randn(7))
    yield OPS.linear, (x, torch.randn(24, 7).t(), None)
    yield OPS.linear_gelu_new, (x, torch.randn(24, 7).t(), torch.randn(7))
    yield OPS.linear_residual, (x, torch.randn(7, 24), None, torch.randn(5, 7))
    yield OPS.pack_linear, (torch.randn(7, 24), aligned_bytes(64 * 24 * 4))
    yield OPS.fingerprint_blocks, (torch.ones(5000, dtype=torch.uint8), torch.ones(4096, dtype=torch.uint8))


def cache_cases():
    key_cache, value_cache = torch.randn(4, 2, 16, 8), torch.randn(4, 2, 16, 8)
    qkv = torch.randn(5, 48).view(5, 6, 8)
    query, key, value = qkv[:, :2], qkv[:, 2:4], qkv[:, 4:]
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    lens = torch.tensor([20, 9], dtype=torch.int32)
    yield OPS.write_kv, (key, value, key_cache, value_cache, torch.tensor([3, -1, 17, 5, 63]))
    starts = torch.tensor([0, 4, 5], dtype=torch.int32)
    yield OPS.paged_prefill_attention, (query, key_cache, value_cache, table, lens, starts, 4, 0.3)
    caches = key_cache.bfloat16(), value_cache.bfloat16()
    yield OPS.step_attention, (query, *caches, table, lens, starts, 0.3)
    yield OPS.paged_decode_attention, (query[:2], key_cache, value_cache, table, lens, 32, 0.3)


def quantized_cases():
    x, bias = torch.randn(5, 128), torch.randn(70)
    for name in ("int8", "int4-g32", "int4-g64-zeros", "code4-g64"):
        case = random_case(name, 70, 128)
        integers = case.codebook is None
        yield OPS.quantized_linear, (x, *case.tensors, bias, 128, case.group_size, integers)
    size = ops.packed_quantized_bytes(70, 128, bits=4, group_size=64, has_zeros=False, has_codebook=True)
    yield OPS.pack_quantized, (*case.tensors, 128, 64, aligned_bytes(size))
    packed = aligned_bytes(size)
    yield OPS.packed_linear, (x, packed, case.codebook, None, 70, 5, 64, False, False, 1, torch.empty(5, 70))
    yield OPS.unpack_linear, (packed, case.codebook, 5, 64, False, torch.empty(70, 128))


def pool_cases():
    state = ops.new_block_pool(6)
    used = ops.block_pool_allocate(state, 3)
    yield OPS.block_pool_allocate, (state, 2)
    yield OPS.block_pool_incref, (state, used)
    yield OPS.block_pool_free, (state, used)


def step_cases():
    model = StepModel(Config(n_layer=1))
    batch = model.batch([([1, 2, 3], 0)], [[5]])
    yield OPS.cpu_step, tuple(model.arguments(batch, hidden=True).values())
    best = {"logits": torch.empty(0, 97), "top_ids": torch.empty(3, 2).long(), "top_logits": torch.empty(3, 2)}
    yield OPS.cpu_step, tuple((model.arguments(batch) | {"times": None, "kv_scales": None} | best).values())


def sampling_cases():
    scores, uniforms = torch.randn(3, 40), torch.rand(3, dtype=torch.float64)
    yield OPS.argmax, (scores, True)
    yield OPS.sampling_weights, (torch.randn(3, 50)[:, :40],)
    yield OPS.sample, (scores, uniforms, None, None, None, None, None, False, False)
    shares = torch.full((3,), 0.9, dtype=torch.float64)
    ids = torch.arange(40).flip(0).repeat(3, 1)
    yield OPS.sample, (scores, uniforms, shares, torch.tensor([1, 5, 0]), shares, shares / 10, ids, True, True)


CASES = [*row_cases(), *sampling_cases(), *cache_cases(), *quantized_cases(), *pool_cases(), *step_cases()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]).removeprefix("gpt2rt."))
def test_opcheck(case):
    op, arguments = case
    torch.library.opcheck(op, arguments)


def test_ops_without_results_to_trace():
    model = StepModel(Config(n_layer=1))
    for op, arguments in (
        (OPS.cpu_isa, ()),
        (OPS.cpu_isa_limit, ()),
        (OPS.cpu_step_workspace_bytes, (model.plan, 3, 1)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema",))
