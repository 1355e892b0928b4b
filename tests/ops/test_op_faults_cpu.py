"""Every op under wrong arguments: an exception before any work, or the right result; no crash, no stray write.

Each case takes good arguments and spoils one of them. Run under AddressSanitizer too: tests/sanitize.sh.
"""

import inspect
import math

import pytest
import torch
from cpu_step_model import Config, StepModel, aligned_bytes

import gpt2rt.ops as ops
from gpt2rt.kernels import refs

pytestmark = pytest.mark.proves("fault:F59")

RAW = torch.ops.gpt2rt
ERRORS = (ValueError, TypeError, IndexError)


def attention_arguments(scaled):
    caches, scales = [torch.randn(4, 2, 16, 8) for _ in range(2)], [None, None]
    if scaled:
        caches, scales = zip(*(refs.quantize_heads_ref(cache) for cache in caches), strict=True)
    qkv = torch.randn(5, 6, 8)
    return {
        "query": qkv[:, :2],
        "key_cache": caches[0],
        "value_cache": caches[1],
        "block_table": torch.tensor([[2, 0], [1, 3]], dtype=torch.int32),
        "seq_lens": torch.tensor([20, 9], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 4, 5], dtype=torch.int32),
        "max_query_len": 4,
        "scale": 0.3,
        "key_scales": scales[0],
        "value_scales": scales[1],
    }


def cases():
    """name -> (arguments by name, the function with its checks in Python)."""
    x, w = torch.randn(5, 24), torch.randn(24)
    weight, bias = torch.randn(7, 24), torch.randn(7)
    ids = torch.tensor([1, 2, 4])
    result = {
        "layer_norm": ({"x": x, "weight": w, "bias": w.clone(), "eps": 1e-5}, ops.layer_norm),
        "add_layer_norm": (
            {"x": x, "residual": torch.randn(5, 24), "weight": w, "bias": w.clone(), "eps": 1e-5},
            ops.add_layer_norm,
        ),
        "bias_gelu_new": ({"x": x, "bias": w}, ops.bias_gelu_new),
        "embedding": (
            {"input_ids": ids, "position_ids": torch.tensor([0, 1, 2]), "wte": x, "wpe": torch.randn(3, 24)},
            ops.embedding,
        ),
        "linear": ({"x": x, "weight": weight, "bias": bias}, ops.linear),
        "linear_gelu_new": ({"x": x, "weight": weight, "bias": bias}, ops.linear_gelu_new),
        "linear_residual": (
            {"x": x, "weight": weight, "bias": bias, "residual": torch.randn(5, 7)},
            ops.linear_residual,
        ),
    }
    for scaled in (False, True):
        suffix = " int8" if scaled else ""
        arguments = attention_arguments(scaled)
        result["paged_prefill_attention" + suffix] = (arguments, ops.paged_prefill_attention)
        decode = {k: v for k, v in arguments.items() if k not in ("query_start_loc", "max_query_len", "scale")}
        decode = dict(list(decode.items())[:5]) | {"max_seq_len": 32, "scale": 0.3} | dict(list(decode.items())[5:])
        decode["query"] = decode["query"][:2]
        result["paged_decode_attention" + suffix] = (decode, ops.paged_decode_attention)
        result["write_kv" + suffix] = (
            {
                "key": torch.randn(5, 2, 8),
                "value": torch.randn(5, 2, 8),
                "key_cache": arguments["key_cache"],
                "value_cache": arguments["value_cache"],
                "slot_mapping": torch.tensor([3, -1, 17, 5, 63]),
                "key_scales": arguments["key_scales"],
                "value_scales": arguments["value_scales"],
            },
            ops.write_kv,
        )
    return result


def step_arguments(cache_dtype=torch.float32):
    model = StepModel(Config(n_layer=1, cache_dtype=cache_dtype))
    return model.arguments(model.batch([([1, 2, 3], 0), ([4], 0)], [[5], [7]]), hidden=True)


NAMES = list(cases())
TENSORS = [
    (name, argument)
    for name, (arguments, _) in cases().items()
    for argument, value in arguments.items()
    if isinstance(value, torch.Tensor)
]
STEP_TENSORS = [name for name, value in step_arguments(torch.int8).items() if isinstance(value, torch.Tensor)]


def wrong_dtypes(tensor):
    others = (torch.float32, torch.float64, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64)
    return [tensor.to(dtype) for dtype in others if dtype != tensor.dtype]


def spoiled(tensor):
    """Forms of a tensor that no op can take: other dtypes, dimensions and sizes."""
    yield from wrong_dtypes(tensor)
    yield torch.tensor(3, dtype=tensor.dtype)
    yield tensor[None]
    if tensor.dim() > 1:
        yield tensor.flatten()
    for dim in range(tensor.dim()):
        longer = list(tensor.shape)
        longer[dim] += 1
        yield torch.zeros(longer, dtype=tensor.dtype)


@pytest.mark.parametrize(("name", "argument"), TENSORS, ids=lambda value: value.replace(" ", "_"))
def test_wrong_dtypes_and_shapes(name, argument):
    """Both doors refuse, or what they take they compute right: a table may have more rows, for example."""
    arguments, function = cases()[name]
    refused = 0
    for value in spoiled(arguments[argument]):
        for door in (function, getattr(RAW, name.removesuffix(" int8"))):
            changed = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            changed[argument] = value.clone()
            before = {k: v.clone() for k, v in changed.items() if isinstance(v, torch.Tensor)}
            error = None
            try:
                result = door(*changed.values())
            except ERRORS as raised:
                error = str(raised)
            if error is None:
                assert_right(name, before, {k: v for k, v in changed.items() if k not in before}, changed, result)
                continue
            refused += 1
            assert len(error) > 20, "an error says what was wrong"
            for key, tensor in before.items():
                assert torch.equal(changed[key], tensor), f"{key} was written before {error}"
    assert refused >= 2 * len(wrong_dtypes(arguments[argument])), "some wrong dtype was taken"


def assert_right(name, before, others, after, result):
    reference = getattr(refs, name.removesuffix(" int8") + "_ref")
    order = inspect.signature(reference).parameters
    tensors = {k: v.clone() for k, v in before.items()}
    expected = reference(**{k: (tensors | others)[k] for k in order})
    if result is None:
        for key, tensor in tensors.items():
            torch.testing.assert_close(after[key], tensor)
        return
    for ours, theirs in zip(*((r if isinstance(r, tuple) else (r,)) for r in (result, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "argument"), TENSORS, ids=lambda value: value.replace(" ", "_"))
def test_strides_are_followed_or_refused(name, argument):
    """Rows with gaps, transposed and repeated memory: the result of a contiguous copy, or an exception."""
    arguments, function = cases()[name]
    good = arguments[argument]
    gaps = torch.stack([good, torch.full_like(good, 1)], dim=-1)[..., 0]
    turned = good.t().contiguous().t() if good.dim() == 2 else good.transpose(0, -1).contiguous().transpose(0, -1)
    repeated = good[:1].expand(good.shape)
    forms = [(gaps, good), (turned, good)]
    written = name.startswith("write_kv") and argument not in ("key", "value", "slot_mapping")
    if not written and not (name.startswith("write_kv") and argument == "slot_mapping"):
        forms.append((repeated, repeated.contiguous()))
    for value, plain in forms:
        for door in (function, getattr(RAW, name.removesuffix(" int8"))):
            changed = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            before = {k: v.clone() for k, v in changed.items() if isinstance(v, torch.Tensor)} | {argument: plain}
            changed[argument] = value
            others = {k: v for k, v in changed.items() if k not in before}
            try:
                result = door(*changed.values())
            except ERRORS:
                continue
            assert_right(name, before, others, changed, result)


@pytest.mark.parametrize(("name", "argument"), TENSORS, ids=lambda value: value.replace(" ", "_"))
def test_another_device(name, argument):
    arguments, function = cases()[name]
    with pytest.raises((*ERRORS, NotImplementedError)):
        function(*(arguments | {argument: arguments[argument].to("meta")}).values())


@pytest.mark.parametrize("name", NAMES)
def test_empty_inputs_give_empty_results(name):
    arguments, function = cases()[name]
    rows = {"layer_norm", "add_layer_norm", "bias_gelu_new", "linear", "linear_gelu_new", "linear_residual"}
    if name in rows:
        changed = arguments | {k: v[:0] for k, v in arguments.items() if k in ("x", "residual")}
    elif name == "embedding":
        changed = arguments | {k: v[:0] for k, v in arguments.items() if k.endswith("_ids")}
    elif name.startswith("write_kv"):
        changed = arguments | {k: arguments[k][:0] for k in ("key", "value", "slot_mapping")}
        before = arguments["key_cache"].clone()
        assert function(*changed.values()) is None
        assert torch.equal(arguments["key_cache"], before)
        return
    else:
        changed = arguments | {k: arguments[k][:0] for k in ("query", "block_table", "seq_lens")}
        if "query_start_loc" in changed:
            changed["query_start_loc"] = torch.zeros(1, dtype=torch.int32)
    result = function(*changed.values())
    for tensor in result if isinstance(result, tuple) else (result,):
        assert tensor.size(0) == 0


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("write_kv")])
def test_tensors_that_require_grad_are_read_like_others(name):
    """The ops have no gradient: values are right, and who asks for a gradient gets a warning and None, never zeros."""
    arguments, function = cases()[name]
    expected = function(*arguments.values())
    wanted = {
        k: v.detach().clone().requires_grad_()
        for k, v in arguments.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
    result = function(*(arguments | wanted).values())
    for ours, plain in zip(*((r if isinstance(r, tuple) else (r,)) for r in (result, expected)), strict=True):
        assert torch.equal(ours.detach(), plain)
        with pytest.warns(UserWarning, match="autograd kernel was not registered"):
            ours.sum().backward()
    assert all(tensor.grad is None for tensor in wanted.values())


# ---- memory that is shared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "other"), [("key_cache", "value_cache"), ("key_cache", "key")])
def test_write_kv_into_what_it_reads(written, other):
    arguments, _ = cases()["write_kv"]
    memory = torch.randn(4 * 2 * 16 * 8)
    arguments |= {written: memory.view(4, 2, 16, 8)}
    arguments |= {other: memory.view(4, 2, 16, 8) if other == "value_cache" else memory[: 5 * 16].view(5, 2, 8)}
    before = memory.clone()
    for door in (ops.write_kv, RAW.write_kv):
        with pytest.raises(ValueError, match=f"{written} is written to and shares memory with {other}"):
            door(*arguments.values())
    assert torch.equal(memory, before)


def test_halves_of_one_tensor_are_apart():
    arguments, _ = cases()["write_kv"]
    both = torch.zeros(2, 4, 2, 16, 8)
    ops.write_kv(*(arguments | {"key_cache": both[0], "value_cache": both[1]}).values())
    assert torch.equal(both[0, 0, :, 3], arguments["key"][0])
    assert torch.equal(both[1, 0, :, 3], arguments["value"][0])


@pytest.mark.parametrize(
    ("written", "other"),
    [
        ("kv_cache", "arena"),
        ("kv_cache", "kv_scales"),
        ("logits", "hidden"),
        ("workspace", "logits"),
        ("hidden", "wte"),
        ("workspace", "kv_cache"),
    ],
)
def test_a_step_into_what_it_reads(written, other):
    arguments = step_arguments(torch.int8 if other == "kv_scales" else torch.float32)
    a, b = arguments[written], arguments[other]
    size = max(a.numel() * a.element_size(), b.numel() * b.element_size())
    memory = aligned_bytes(-(-size // 64) * 64)
    for name, tensor in ((other, b), (written, a)):
        count = tensor.numel() * tensor.element_size()
        shared = memory[:count].view(tensor.dtype).view(tensor.shape)
        shared.copy_(tensor)
        arguments[name] = shared
    # the weights must stay good for the plan to be read
    if other == "arena":
        memory[: b.numel()].copy_(b)
    before = memory.clone()
    with pytest.raises(ValueError, match="is written to and shares memory with"):
        ops.cpu_step(*arguments.values())
    assert torch.equal(memory, before)


@pytest.mark.parametrize("argument", STEP_TENSORS)
def test_a_step_with_wrong_dtypes_and_shapes(argument):
    for value in spoiled(step_arguments(torch.int8)[argument]):
        arguments = step_arguments(torch.int8)
        # larger than needed is fine for scratch memory, of any dtype and shape, for the arena and for a block table
        if argument == "workspace" and value.numel() * value.element_size() >= arguments[argument].nbytes:
            continue
        if argument == "arena" and value.dtype == torch.uint8 and value.dim() == 1:
            continue
        if argument == "block_table" and value.dtype == torch.int32 and value.shape == (2, 2):
            continue
        arguments[argument] = value
        with pytest.raises(ERRORS):
            ops.cpu_step(*arguments.values())
        for name in ("logits", "hidden"):
            if name != argument:
                assert arguments[name].isnan().all(), f"{name} was written"


# ---- sizes beyond 2^31 ---------------------------------------------------------------------------------------------

BIG = 2**31 + 2**20


def test_rows_beyond_2_31_elements():
    """Strides of 0 make tensors of any size; offsets into them pass 2^31 and nothing is read wrong or refused late."""
    row = torch.randn(24)
    table = row.expand(BIG, 24)
    ids = torch.tensor([0, 5, BIG - 1])
    with pytest.raises(ValueError, match="contiguous"):
        ops.embedding(ids, torch.tensor([0, 1, 2]), table, torch.randn(3, 24))
    wpe = torch.randn(3, 24)
    raw = RAW.embedding(ids, torch.tensor([0, 1, 2]), table, wpe)
    assert torch.equal(raw, row + wpe)
    with pytest.raises(IndexError, match=rf"input_ids\[2\] is {BIG}"):
        RAW.embedding(torch.tensor([0, 5, BIG]), torch.tensor([0, 1, 2]), table, wpe)


def test_a_cache_beyond_2_31_elements():
    """The last block of an int8 cache of 2^31 codes and more, of which only a few pages are ever touched."""
    num_blocks = BIG // (2 * 16 * 64) + 1
    caches = [torch.empty(num_blocks, 2, 16, 64, dtype=torch.int8) for _ in range(2)]
    scales = [torch.empty(num_blocks, 2, 16) for _ in range(2)]
    assert caches[0].numel() > 2**31
    keys, values, query = torch.randn(3, 5, 2, 64).unbind(0)
    slots = (num_blocks - 1) * 16 + torch.arange(5)
    ops.write_kv(keys, values, *caches, slots, *scales)
    small = [torch.zeros(1, 2, 16, 64, dtype=torch.int8) for _ in range(2)]
    small_scales = [torch.zeros(1, 2, 16) for _ in range(2)]
    ops.write_kv(keys, values, *small, torch.arange(5), *small_scales)
    assert torch.equal(caches[1][-1, :, :5], small[1][0, :, :5])

    def attend(block, where, scale):
        lens, starts = torch.tensor([5]).int(), torch.tensor([0, 5]).int()
        return ops.paged_prefill_attention(query, *where, torch.tensor([[block]]).int(), lens, starts, 5, 0.1, *scale)

    assert torch.equal(attend(num_blocks - 1, caches, scales), attend(0, small, small_scales))
    with pytest.raises(IndexError, match=f"but the cache has {num_blocks * 16} slots"):
        ops.write_kv(keys, values, *caches, slots + 16, *scales)


# ---- block tables --------------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F60")
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("paged_")])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_table": [[2, -1], [1, 3]]}, IndexError, r"block_table\[0, 1\] is -1, but the cache has 4 blocks"),
        ({"block_table": [[2, 0], [4, 3]]}, IndexError, r"block_table\[1, 0\] is 4, but the cache has 4 blocks"),
        ({"block_table": [[2, 2**31 - 1], [1, 3]]}, IndexError, r"block_table\[0, 1\] is 2147483647"),
        ({"seq_lens": [33, 9]}, ValueError, r"seq_lens\[0\] is 33, .*"),
        ({"seq_lens": [2**31 - 1, 9]}, ValueError, r"seq_lens\[0\] is 2147483647"),
        ({"seq_lens": [-1, 9]}, ValueError, r"seq_lens\[0\] is -1"),
    ],
)
def test_tables_that_lead_outside(name, change, error, message):
    arguments, function = cases()[name]
    if "max_seq_len" in arguments:
        arguments["max_seq_len"] = 2**31
    changed = arguments | {k: torch.tensor(v, dtype=torch.int32) for k, v in change.items()}
    with pytest.raises(error, match=message):
        function(*changed.values())


@pytest.mark.proves("fault:F60")
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("paged_")])
def test_a_block_that_stands_twice_is_read_twice(name):
    """Sequences share blocks, so a repeated one is no error: its tokens count as often as it stands."""
    arguments, function = cases()[name]
    changed = arguments | {"block_table": torch.tensor([[2, 2], [2, 0]], dtype=torch.int32)}
    result = function(*changed.values())
    reference = getattr(refs, name.removesuffix(" int8") + "_ref")
    torch.testing.assert_close(result, reference(*changed.values()), rtol=1e-5, atol=1e-5)
    # the entries past a sequence's end may be anything
    wild = changed | {"block_table": torch.tensor([[2, 2], [2, -7]], dtype=torch.int32)}
    assert torch.equal(function(*wild.values()), result)
    assert not math.isnan(float(result.sum()))
