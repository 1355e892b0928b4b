"""All kernels: what computes them, how they are compared, and at which sizes. One entry a kernel.

To add a kernel, write its problem (``rows.py``, ``products.py``, ``attention.py``, ``choice.py``) and its entry here.
To try a variant, add it to the forms of its problem: it is checked and timed beside the others. docs/kernels.md shows
how.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from . import attention, choice, products, rows
from .problem import Place, Problem

#: largest error of a kernel that rounds, as a share of the largest expected magnitude: a few roundings of the dtype
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclasses.dataclass(frozen=True)
class Operation:
    """A kernel, its definition and its forms.

    Attributes:
        name: what it is called here.
        maths: what it computes.
        reference: the definition, ``module:function`` below ``gpt2rt.kernels``.
        triton: its launchers, ``module:function`` likewise.
        cpp: file of its C++ form below csrc/cpu, or empty.
        build: makes the problem of one size.
        toy: the size that Triton's interpreter runs in a moment.
        sizes: the sizes that are measured: those of GPT-2.
        exact: results are those of the definition to the bit; else within :data:`TOLERANCE`.
        limit: what bounds the time of its sizes: "memory", "arithmetic", or "launch" where there is next to nothing to
            do.
        dtype: in which it computes, whatever the dtype of the place; None: in that.
    """

    name: str
    maths: str
    reference: str
    triton: tuple[str, ...]
    cpp: str
    build: Callable[..., Problem]
    toy: dict[str, Any]
    sizes: tuple[dict[str, Any], ...]
    exact: bool = False
    limit: str = "memory"
    dtype: torch.dtype | None = None

    def tolerance(self, dtype: torch.dtype) -> float:
        """The largest error that is allowed."""
        return 0.0 if self.exact else TOLERANCE[self.dtype or dtype]

    def problem(self, place: Place, size: dict[str, Any]) -> Problem:
        """The problem of one size, its data made."""
        return self.build(place, **size)


def _sized(**choices: tuple) -> tuple[dict[str, Any], ...]:
    """Sizes out of columns of equal length."""
    return tuple(dict(zip(choices, row, strict=True)) for row in zip(*choices.values(), strict=True))


def _linear(op: str) -> Callable[..., Problem]:
    def build(place: Place, **size: Any) -> Problem:
        return products.linear(place, op=op, **size)

    return build


def _fused(kernel: str) -> Callable[..., Problem]:
    def build(place: Place, **size: Any) -> Problem:
        return products.fused_linear(place, kernel=kernel, **size)

    return build


_ROWS = _sized(rows=(1, 64, 8192, 8192), n=(768, 768, 768, 1600))
_MATRICES = _sized(rows=(1, 8, 64, 1024), k=(768, 768, 768, 768), n=(2304, 3072, 3072, 3072))
_ROLES = ("qkv", "proj", "fc", "down", "head", "fc", "fc", "fc", "fc", "down", "fc")
_ROLE_K = (768, 768, 768, 3072, 768, 768, 768, 768, 1600, 6400, 1600)
_ROLE_N = (2304, 768, 3072, 768, 50257, 3072, 3072, 3072, 6400, 1600, 6400)
_ROLE_FORMATS = ("dense", "dense", "dense", "dense", "dense", "int8", "int4", "nf4", "dense", "int4", "int4")
_VOCAB = _sized(rows=(1, 64), vocab=(50257, 50257))
_DECODE = {
    "seqs": (1, 1, 64, 64, 64, 256),
    "context": (256, 1024, 512, 512, 512, 512),
    "heads": (12,) * 6,
    "head_dim": (64,) * 6,
    "cache": ("float", "float", "float", "int8", "float8", "float"),
}
_PREFILL = {
    "seqs": (1, 1, 1, 8),
    "queries": (128, 1024, 128, 128),
    "context": (128, 1024, 1024, 128),
    "heads": (12,) * 4,
    "head_dim": (64,) * 4,
    "cache": ("float",) * 4,
}
_TOY_FUSED = {"rows": 2, "k": 64, "n": 48, "role": "fc", "format": "int4-g32"}

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            "layer_norm",
            "y = (x - mean) / sqrt(var + eps) * w + b",
            "refs:layer_norm_ref",
            ("layer_norm:layer_norm_triton",),
            "layer_norm.cpp",
            rows.layer_norm,
            {"rows": 3, "n": 100},
            _ROWS,
        ),
        Operation(
            "add_layer_norm",
            "s = x + r; y = layer_norm(s)",
            "refs:add_layer_norm_ref",
            ("layer_norm:add_layer_norm_triton",),
            "layer_norm.cpp",
            rows.add_layer_norm,
            {"rows": 3, "n": 100},
            _ROWS,
        ),
        Operation(
            "norm_rows",
            "y[i] = layer_norm(x[rows[i]]), out of float32",
            "norm_rows:norm_rows_ref",
            ("norm_rows:norm_rows_triton",),
            "",
            rows.norm_rows,
            {"rows": 3, "n": 100},
            _ROWS,
        ),
        Operation(
            "bias_gelu_new",
            "y = gelu_new(x + b)",
            "refs:bias_gelu_new_ref",
            ("bias_gelu_new:bias_gelu_new_triton",),
            "bias_gelu_new.cpp",
            rows.bias_gelu_new,
            {"rows": 3, "n": 100},
            _sized(rows=(1, 64, 8192), n=(3072, 3072, 3072)),
        ),
        Operation(
            "embedding",
            "x = wte[ids] + wpe[positions]",
            "refs:embedding_ref",
            ("embedding:embedding_triton",),
            "embedding.cpp",
            rows.embedding,
            {"rows": 3, "n": 100, "vocab": 50},
            _sized(rows=(1, 64, 8192), n=(768, 768, 768), vocab=(50257, 50257, 50257)),
        ),
        Operation(
            "embedding_rows",
            "x = wte[ids] + wpe[positions], wte in any format, x float32",
            "embedding_rows:embedding_rows_ref",
            ("embedding_rows:embedding_rows_triton",),
            "",
            rows.embedding_rows,
            {"rows": 3, "n": 100, "vocab": 50, "format": "int4-zeros"},
            _sized(rows=(1, 1024, 1024), n=(768,) * 3, vocab=(50257,) * 3, format=("dense", "dense", "int8")),
        ),
        *(
            Operation(
                op,
                maths,
                f"refs:{op}_ref",
                (f"linear:{op}_triton",),
                "linear.cpp",
                _linear(op),
                {"rows": 3, "k": 40, "n": 24},
                _MATRICES,
            )
            for op, maths in (
                ("linear", "y = x w^T + b"),
                ("linear_gelu_new", "y = gelu_new(x w^T + b)"),
                ("linear_residual", "y = r + x w^T + b"),
            )
        ),
        Operation(
            "quantized_linear",
            "y = x dequantised(codes)^T + b",
            "quantized_linear:quantized_linear_ref",
            ("quantized_linear_triton:quantized_linear_triton",),
            "quantized.cpp",
            products.quantized_linear,
            {"rows": 2, "k": 64, "n": 40, "format": "int4-g32"},
            _sized(
                rows=(1, 16, 1, 16, 512, 1),
                k=(768, 768, 1600, 1600, 768, 768),
                n=(3072, 3072, 6400, 6400, 3072, 3072),
                format=("int8", "int8", "int4", "int4", "int4", "nf4"),
            ),
        ),
        Operation(
            "linear_rows",
            "y = r + act(norm(x) w^T + b), up to 8 rows; KV append; merge of split attention",
            "fused_linear:fused_linear_ref",
            ("linear_rows:fused_linear_rows_triton", "fused_linear:fused_linear_triton"),
            "",
            _fused("linear_rows"),
            _TOY_FUSED,
            tuple(
                {"rows": r, "k": k, "n": n, "role": role, "format": f}
                for r in (1, 8)
                for k, n, role, f in zip(_ROLE_K, _ROLE_N, _ROLES, _ROLE_FORMATS, strict=True)
            ),
        ),
        Operation(
            "linear_tiles",
            "y = r + act(norm(x) w^T + b), any number of rows, tensor cores; KV append",
            "fused_linear:fused_linear_ref",
            ("linear_tiles:fused_linear_tiles_triton", "fused_linear:fused_linear_triton"),
            "",
            _fused("linear_tiles"),
            {**_TOY_FUSED, "rows": 9, "n": 32, "k": 128},
            tuple(
                {"rows": r, "k": k, "n": n, "role": role, "format": f}
                for r in (16, 64, 512, 1024)
                for k, n, role, f in (
                    (768, 2304, "qkv", "dense"),
                    (768, 768, "proj", "dense"),
                    (768, 3072, "fc", "dense"),
                    (3072, 768, "down", "dense"),
                    (768, 3072, "fc", "int8"),
                    (768, 3072, "fc", "int4"),
                    (1600, 6400, "fc", "dense"),
                )
            ),
        ),
        Operation(
            "head_argmax",
            "first n with the largest (norm(x) w^T)[n], and that logit",
            "head:head_argmax_ref",
            ("head:head_argmax_triton", "head:head_keys_triton"),
            "",
            products.head_argmax,
            {"rows": 2, "k": 64, "n": 50, "format": "int8"},
            _sized(
                rows=(1, 8, 1, 1), k=(768, 768, 768, 1600), n=(50257,) * 4, format=("dense", "dense", "int8", "int8")
            ),
        ),
        Operation(
            "write_kv",
            "cache[slot[t]] = key[t], value[t]; 8-bit caches with a scale a head",
            "refs:write_kv_ref",
            ("write_kv:write_kv_triton",),
            "write_kv.cpp",
            attention.write_kv,
            {"rows": 3, "heads": 2, "head_dim": 40, "cache": "int8"},
            _sized(
                rows=(1, 1024, 1024, 1024),
                heads=(12,) * 4,
                head_dim=(64,) * 4,
                cache=("float", "float", "int8", "float8"),
            ),
            exact=True,
        ),
        Operation(
            "paged_decode_attention",
            "y = softmax(scale q k^T) v for one query a sequence, context in splits of 64",
            "refs:paged_decode_attention_ref",
            (
                "paged_decode_attention:paged_decode_attention_triton",
                "paged_decode_attention:paged_decode_partials_triton",
                "batch_invariant_attention:tile_partials_triton",
            ),
            "paged_attention.cpp",
            attention.paged_decode_attention,
            {"seqs": 2, "context": 70, "heads": 1, "head_dim": 32, "cache": "int8"},
            _sized(**_DECODE),
        ),
        Operation(
            "paged_prefill_attention",
            "y = softmax(scale q k^T, causal) v for the last queries of each sequence",
            "refs:paged_prefill_attention_ref",
            (
                "paged_prefill_attention:paged_prefill_attention_triton",
                "paged_prefill_attention:paged_prefill_into_triton",
                "batch_invariant_attention:tile_attention_triton",
            ),
            "paged_attention.cpp",
            attention.paged_prefill_attention,
            {"seqs": 2, "queries": 5, "context": 70, "heads": 1, "head_dim": 32, "cache": "float"},
            _sized(**_PREFILL),
            limit="arithmetic",
        ),
        Operation(
            "merge_splits",
            "y = sum_i 2^(lse_i - m) v_i / sum_i 2^(lse_i - m), in order",
            "fused_linear:merge_partials_ref",
            ("merge_splits:merge_splits_triton",),
            "",
            attention.merge_splits,
            {"seqs": 2, "splits": 3, "heads": 1, "head_dim": 32},
            _sized(seqs=(1, 64, 256), splits=(16, 16, 16), heads=(12,) * 3, head_dim=(64,) * 3),
        ),
        Operation(
            "argmax",
            "first of the largest scores",
            "sampling_refs:argmax_ref",
            ("sampling:argmax_triton", "sampling:argmax_into_triton"),
            "sampler.cpp",
            choice.argmax,
            {"rows": 2, "vocab": 300},
            _VOCAB,
            exact=True,
        ),
        Operation(
            "sampling_weights",
            "w = floor(2^42 exp(s - max s))",
            "sampling_refs:sampling_weights_ref",
            ("sampling:sampling_weights_triton",),
            "sampler.cpp",
            choice.sampling_weights,
            {"rows": 2, "vocab": 300},
            _VOCAB,
            exact=True,
        ),
        Operation(
            "sample",
            "first token whose cumulative weight exceeds u * total, after temperature, top_k, top_p, min_p",
            "sampling_refs:sample_ref",
            ("sampling:sample_triton", "sampling:sample_into_triton"),
            "sampler.cpp",
            choice.sample,
            {"rows": 2, "vocab": 300, "settings": "all"},
            _sized(rows=(1, 64, 1, 64), vocab=(50257,) * 4, settings=("plain", "plain", "all", "all")),
            exact=True,
        ),
        Operation(
            "uniforms",
            "53 bits of Philox4x32-10(seed, request, choice, position)",
            "sampling_refs:uniforms_ref",
            ("uniforms:uniforms_triton", "uniforms:uniforms_into_triton"),
            "uniforms.cpp",
            choice.uniforms,
            {"rows": 5},
            _sized(rows=(1, 256)),
            exact=True,
            limit="launch",
        ),
        Operation(
            "penalties",
            "scores less repetition, frequency and presence",
            "score_refs:penalties_ref",
            ("penalties:penalties_triton", "penalties:penalties_into_triton"),
            "penalties.cpp",
            choice.penalties,
            {"rows": 2, "vocab": 300},
            _VOCAB,
            exact=True,
        ),
        Operation(
            "count_tokens",
            "counts[slot, token] += 2",
            "score_refs:count_tokens_ref",
            ("penalties:count_tokens_triton",),
            "penalties.cpp",
            choice.count_tokens,
            {"rows": 3, "vocab": 30},
            _VOCAB,
            exact=True,
            limit="launch",
        ),
        Operation(
            "reset_counts",
            "counts of whole sequences, made anew",
            "score_refs:reset_counts_ref",
            ("penalties:reset_counts_triton",),
            "penalties.cpp",
            choice.reset_counts,
            {"rows": 2, "vocab": 30, "tokens": 20},
            _sized(rows=(1, 16), vocab=(50257, 50257), tokens=(1024, 1024)),
            exact=True,
        ),
        Operation(
            "log_probabilities",
            "log_softmax of a token, its rank, the k best",
            "score_refs:log_probabilities_ref",
            ("log_probabilities:log_probabilities_triton", "log_probabilities:log_probabilities_into_triton"),
            "log_probabilities.cpp",
            choice.log_probabilities,
            {"rows": 2, "vocab": 300, "best": 3},
            _sized(rows=(1, 64, 64), vocab=(50257,) * 3, best=(0, 0, 5)),
            dtype=torch.float32,
        ),
        Operation(
            "advance",
            "a step's tokens become the next step's inputs",
            "advance:advance_ref",
            ("advance:advance_triton",),
            "",
            choice.advance,
            {"rows": 5},
            _sized(rows=(1, 256)),
            exact=True,
            limit="launch",
        ),
    )
}
