"""Problems of the matrix products: the ops, and the fused layers of a GPU step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2rt.kernels import refs
from gpt2rt.kernels.fused_linear import Append, Norm, Partials, fused_linear_ref, merge_partials_ref
from gpt2rt.kernels.quantized_linear import quantized_linear_ref
from gpt2rt.ops.cuda_extension import cuda_extension_status

from .problem import DEFINITION, Place, Problem, load, poison, size_of, tried
from .rows import EPS
from .weights import copies_of, make_weight, random_codes

#: tokens of a split of attention
SPLIT = 64
#: up to so many rows the tiles take a norm in
MAX_NORM_ROWS = 64
BLOCK_SIZE = 16
#: variants that are tried beside the tables: name -> arguments of RowsTile and Tile
ROWS_VARIANTS = {"n2 w4": (2, 4), "n4 w4": (4, 4), "n8 w4": (8, 4), "n8 w8": (8, 8)}
TILE_VARIANTS = {
    "16x32x64": (16, 32, 64, 4, 4),
    "32x64x64": (32, 64, 64, 4, 4),
    "64x64x64": (64, 64, 64, 4, 4),
    "64x128x64": (64, 128, 64, 4, 4),
    "128x128x64": (128, 128, 64, 8, 3),
}


def linear(place: Place, *, rows: int, k: int, n: int, op: str = "linear", conv1d: bool = False) -> Problem:
    """``linear``, ``linear_gelu_new`` and ``linear_residual``: ops on the model's own weights; ``conv1d``: with
    contiguous columns, as Conv1D has them.
    """
    weight = place.normal(k, n, scale=k**-0.5).t() if conv1d else place.normal(n, k, scale=k**-0.5)
    bias = place.normal(n)
    copies = place.copies(size_of(weight))
    weights = [weight] + [weight.clone() for _ in range(copies - 1)]
    x = place.normal(rows, k)
    extra = (place.normal(rows, n),) if op == "linear_residual" else ()
    definition = {
        "linear": refs.linear_ref,
        "linear_gelu_new": refs.linear_gelu_new_ref,
        "linear_residual": refs.linear_residual_ref,
    }[op]
    forms = place.forms(op, f"linear:{op}_triton", definition, lambda i: (x, weights[i], bias, *extra))

    def plain(i: int) -> Tensor:
        y = F.linear(x, weights[i], bias)
        if op == "linear_gelu_new":
            y = F.gelu(y, approximate="tanh")
        return extra[0] + y if extra else y

    forms["torch"] = plain
    return Problem(
        forms,
        lambda: definition(x.double(), weight.double(), bias.double(), *(e.double() for e in extra)),
        moved=size_of(weight, bias, x, *extra) + rows * n * place.dtype.itemsize,
        operations=2 * rows * n * k,
        copies=copies,
    )


def quantized_linear(place: Place, *, rows: int, k: int, n: int, format: str) -> Problem:
    """``quantized_linear``: a weight as checkpoints hold it."""
    codes, scales, zeros, table, group = random_codes(place, format, n, k)
    copies = place.copies(size_of(codes))
    held = [codes] + [codes.clone() for _ in range(copies - 1)]
    x, bias = place.normal(rows, k), place.normal(n)
    # the group size of int8 has no meaning; the ops want a multiple of 32
    rest = (k, 64 if codes.dtype == torch.int8 else group, False)
    forms = place.forms(
        "quantized_linear",
        "quantized_linear_triton:quantized_linear_triton",
        quantized_linear_ref,
        lambda i: (x, held[i], scales, zeros, table, bias, *rest),
    )
    wide = make_dense(place, codes, scales, zeros, table, k, group)
    dense = [wide] + [wide.clone() for _ in range(min(copies, place.copies(size_of(wide))) - 1)]
    forms["torch, dense"] = lambda i: F.linear(x, dense[i % len(dense)], bias)
    if place.device.type == "cuda" and format == "int4" and place.dtype == torch.bfloat16 and inner_tiles(k):
        forms["torch int4"] = tinygemm(x, held, scales, bias, group)
    return Problem(
        forms,
        lambda: quantized_linear_ref(x.double(), codes, scales, zeros, table, bias.double(), *rest),
        moved=size_of(codes, scales, zeros, bias, x) + rows * n * place.dtype.itemsize,
        operations=2 * rows * n * k,
        copies=copies,
    )


def make_dense(place: Place, codes, scales, zeros, table, k: int, group: int) -> Tensor:
    """The weight that codes stand for, in the dtype of the place."""
    from gpt2rt.kernels.weights import pack_quantized

    packed = pack_quantized(codes, scales, zeros, table, in_features=k, group_size=group, compute_dtype=place.dtype)
    return packed.dequantize(place.dtype)


def inner_tiles(k: int) -> int:
    """Tiles of 16 columns that torch's int4 product reads together, of rows of ``k`` columns; 0: it has none for them.

    Source: ``_convert_weight_to_int4pack`` of torch (aten/src/ATen/native/cuda/int4mm.cu) wants whole groups of them.
    """
    return next((tiles for tiles in (8, 4, 2) if k % (16 * tiles) == 0), 0)


def tinygemm(x: Tensor, held: list[Tensor], scales: Tensor, bias: Tensor, group: int) -> Callable[[int], Tensor]:
    """torch's own int4 product, on the same codes: bfloat16, CUDA."""
    pairs = torch.stack((scales, torch.zeros_like(scales)), dim=-1).transpose(0, 1).contiguous().bfloat16()
    tiles = inner_tiles(x.size(1))
    packed = [torch._convert_weight_to_int4pack(codes, tiles) for codes in held]
    return lambda i: torch._weight_int4pack_mm(x, packed[i], group, pairs) + bias


def fused_linear(
    place: Place, *, rows: int, k: int, n: int, format: str, role: str, kernel: str, head_dim: int = 64
) -> Problem:
    """The fused layers of a step, by their role: "qkv" (norm, KV cache), "proj" (residual; merged attention in the
    kernel of few rows), "fc" (norm, gelu_new), "down" (residual) and "head" (norm).

    Args:
        kernel: "linear_rows" or "linear_tiles".
    """
    weight = make_weight(place, format, n, k)
    copies = place.copies(weight.num_bytes)
    weights = copies_of(weight, copies)
    bias = None if role == "head" else place.normal(n)
    options: dict[str, Any] = {}
    # with more rows a launch of its own has normalised them
    normed = role in ("qkv", "fc", "head") and (kernel == "linear_rows" or rows <= MAX_NORM_ROWS)
    x: Tensor | None = place.normal(rows, k, dtype=torch.float32 if normed else place.dtype)
    definition = x
    if normed:
        options["norm"] = Norm(place.normal(k), place.normal(k), EPS)
    if role == "fc":
        options["activation"] = "gelu_new"
    if role in ("proj", "down"):
        options["residual"] = place.normal(rows, n, dtype=torch.float32)
    wide = role in ("proj", "down", "head")
    shape: tuple[int, ...] = (rows, n // 3 if role == "qkv" else n)
    out = torch.empty(shape, dtype=torch.float32 if wide else place.dtype, device=place.device)
    outputs: list[Tensor] = [out]
    caches: tuple[Tensor, ...] = ()
    if role == "qkv":
        slots = place.permutation(2 * rows)[:rows]
        shape = -(-2 * rows // BLOCK_SIZE), k // head_dim, BLOCK_SIZE, head_dim
        caches = (place.normal(*shape), place.normal(*shape))
        outputs += caches
        options["append"] = Append(*caches, slots)
    if role == "proj" and kernel == "linear_rows":
        shape = rows, k // head_dim, 4
        partials = Partials(
            place.normal(*shape, head_dim, dtype=torch.float32),
            place.normal(*shape, dtype=torch.float32),
            torch.full((rows,), 4 * SPLIT, dtype=torch.int32, device=place.device),
        )
        definition = merge_partials_ref(partials, SPLIT, torch.float64)
        x, options["partials"] = None, partials
    forms: dict[str, Callable[[int], Any]] = {}
    if place.has_triton:
        forms.update(_fused_forms(place, kernel, x, weights, bias, out, rows, options))
    assert definition is not None
    narrow = definition.float()
    known = {name: value for name, value in options.items() if name in ("norm", "activation", "residual")}
    forms[DEFINITION] = lambda i: fused_linear_ref(narrow, weights[i], bias, **known)
    forms["torch" if format == "dense" else "torch, dense"] = _plain(place, definition, weights, bias, options)

    def compare(result: Any) -> tuple[Tensor, ...]:
        if not caches or result is not out:
            return (result,)
        block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        return (torch.cat([out, *(cache[block, :, offset].flatten(1) for cache in caches)], dim=1),)

    def expected() -> Tensor:
        norm, residual = options.get("norm"), options.get("residual")
        wide_norm = None if norm is None else Norm(norm.weight.double(), norm.bias.double(), norm.eps)
        return fused_linear_ref(
            definition.double(),
            weight,
            None if bias is None else bias.double(),
            norm=wide_norm,
            activation=options.get("activation", "linear"),
            residual=None if residual is None else residual.double(),
        )

    read = size_of(bias, options.get("residual"), definition if x is None else x)
    return Problem(
        forms,
        expected,
        moved=weight.num_bytes + read + size_of(out) * (3 if caches else 1),
        operations=2 * rows * n * k,
        copies=copies,
        prepare=lambda: poison(*outputs),
        outputs=compare,
    )


def _fused_forms(place, kernel, x, weights, bias, out, rows: int, options) -> dict[str, Callable[[int], Any]]:
    weight = weights[0]
    if kernel == "linear_rows":
        launch = load("linear_rows:fused_linear_rows_triton")

        def run(i: int) -> Tensor:
            launch(x, weights[i], bias, out, **options)
            return out

        forms: dict[str, Callable[[int], Any]] = {"Triton": run}
        in_cuda = weight.group_size and weight.compute_dtype.itemsize == 2 and cuda_extension_status().loaded
        if place.device.type == "cuda" and in_cuda and weight.shape[1] <= load("linear_rows_cuda:MAX_K"):
            launch_cuda = load("linear_rows_cuda:fused_linear_rows_cuda")

            def run_cuda(i: int) -> Tensor:
                launch_cuda(x, weights[i], bias, out, **options)
                return out

            forms["CUDA C++"] = run_cuda
        if place.device.type == "cuda" and rows == 1 and weight.shape[1] <= 8192:
            from gpt2rt.kernels.linear_rows import TILES as ROWS_TILES
            from gpt2rt.kernels.linear_rows import RowsTile, rows_config

            for name, numbers in ROWS_VARIANTS.items():
                # more than 128 weights a thread would spill
                if numbers[0] * rows_config(weight).block_k <= 128 * 32 * numbers[1]:
                    forms[f"Triton: {name}"] = tried(ROWS_TILES, RowsTile(*numbers), run)
        return forms
    launch = load("linear_tiles:fused_linear_tiles_triton")
    needed = load("linear_tiles:workspace_bytes")

    def space(**which: bool) -> Tensor:
        # other tiles split K into more parts, each of at least 128 elements
        most = weight.shape[1] // 128 * min(rows, MAX_NORM_ROWS) * weight.shape[0] * 4
        return torch.zeros(max(most, needed(weight, rows, **which)), dtype=torch.uint8, device=place.device)

    normal, invariant = space(), space(batch_invariant=True)

    def tiles(i: int) -> Tensor:
        launch(x, weights[i], bias, out, workspace=normal, **options)
        return out

    def tiles_invariant(i: int) -> Tensor:
        launch(x, weights[i], bias, out, workspace=invariant, batch_invariant=True, **options)
        return out

    forms = {"Triton": tiles, "Triton: batch invariant": tiles_invariant}
    # one role and format of many rows: each variant costs a compilation
    worth = place.device.type == "cuda" and rows > MAX_NORM_ROWS and "activation" in options
    if worth and place.dtype.itemsize == 2 and weight.format == "dense":
        from gpt2rt.kernels.tile_config import TILES, Tile

        for name, sizes in TILE_VARIANTS.items():
            forms[f"Triton: {name}"] = tried(TILES, Tile(*sizes), tiles)
    return forms


def _plain(place, x: Tensor, weights, bias: Tensor | None, options) -> Callable[[int], Tensor]:
    """The same by torch's kernels, on dense weights."""
    dense = [w.data if w.format == "dense" else w.dequantize(place.dtype) for w in weights[:1]]
    dense += [w.data if w.format == "dense" else dense[0].clone() for w in weights[1:]]
    norm, residual = options.get("norm"), options.get("residual")

    def run(i: int) -> Tensor:
        h = x.to(place.dtype)
        if norm is not None:
            h = F.layer_norm(h, (h.size(1),), norm.weight, norm.bias, norm.eps)
        y = F.linear(h, dense[i], bias)
        if options.get("activation") == "gelu_new":
            y = F.gelu(y, approximate="tanh")
        return y if residual is None else residual + y

    return run


def head_argmax(place: Place, *, rows: int, k: int, n: int, format: str) -> Problem:
    """The output layer of greedy decoding: norm, product and the first of the largest logits."""
    weight = make_weight(place, format, n, k)
    copies = place.copies(weight.num_bytes)
    weights = copies_of(weight, copies)
    x, norm = place.normal(rows, k, dtype=torch.float32), Norm(place.normal(k), place.normal(k), EPS)
    ids = torch.empty(rows, dtype=torch.int64, device=place.device)
    best = torch.empty(rows, dtype=torch.float32, device=place.device)
    forms: dict[str, Callable[[int], Any]] = {}
    if place.has_triton:
        launch = load("head:head_argmax_triton")
        # a key for each row of the weight is what the smallest tile needs
        work = torch.zeros(8 * rows * n, dtype=torch.uint8, device=place.device)

        def run(i: int) -> tuple[Tensor, Tensor]:
            launch(x, weights[i], norm, None, ids, best, work)
            return ids, best

        forms["Triton"] = run
    forms[DEFINITION] = lambda i: load("head:head_argmax_ref")(x, weights[i], norm, None)[:2]
    plain = _plain(place, x, weights, None, {"norm": norm})
    forms["torch" if format == "dense" else "torch, dense"] = lambda i: plain(i).max(dim=-1)[::-1]
    wide = Norm(norm.weight.double(), norm.bias.double(), norm.eps)
    logits: list[Tensor] = []

    def expected() -> tuple[Tensor, Tensor]:
        largest = _logits().amax(dim=-1)
        return largest, largest

    def _logits() -> Tensor:
        if not logits:
            logits.append(fused_linear_ref(x.double(), weight, None, norm=wide))
        return logits[0]

    def compare(result: Any) -> tuple[Tensor, Tensor]:
        # of two logits that rounding cannot tell apart either may be chosen
        chosen, value = result
        return _logits().gather(1, chosen.clamp(min=0)[:, None])[:, 0].masked_fill(chosen < 0, torch.nan), value

    return Problem(
        forms,
        expected,
        moved=weight.num_bytes + size_of(x),
        operations=2 * rows * n * k,
        copies=copies,
        prepare=lambda: poison(ids, best),
        outputs=compare,
    )
