"""Problems of the kernels that go over rows: norms, the activation, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gpt2rt.kernels import refs
from gpt2rt.kernels.fused_linear import Norm

from .problem import DEFINITION, Place, Problem, load, poison, size_of
from .weights import make_weight

EPS = 1e-5


def layer_norm(place: Place, *, rows: int, n: int) -> Problem:
    copies = place.copies(2 * rows * n * place.dtype.itemsize)
    xs = place.normal(copies, rows, n)
    weight, bias = place.normal(n), place.normal(n)
    forms = place.forms(
        "layer_norm", "layer_norm:layer_norm_triton", refs.layer_norm_ref, lambda i: (xs[i], weight, bias, EPS)
    )
    forms["torch"] = lambda i: F.layer_norm(xs[i], (n,), weight, bias, EPS)
    return Problem(
        forms,
        lambda: refs.layer_norm_ref(xs[0].double(), weight.double(), bias.double(), EPS),
        moved=2 * size_of(xs[0]) + size_of(weight, bias),
        copies=copies,
    )


def add_layer_norm(place: Place, *, rows: int, n: int) -> Problem:
    copies = place.copies(4 * rows * n * place.dtype.itemsize)
    xs, residuals = place.normal(copies, rows, n), place.normal(copies, rows, n)
    weight, bias = place.normal(n), place.normal(n)
    forms = place.forms(
        "add_layer_norm",
        "layer_norm:add_layer_norm_triton",
        refs.add_layer_norm_ref,
        lambda i: (xs[i], residuals[i], weight, bias, EPS),
    )

    def plain(i: int):
        total = xs[i] + residuals[i]
        return F.layer_norm(total, (n,), weight, bias, EPS), total

    def expected():
        # the norm reads the rounded sum
        total = (xs[0].float() + residuals[0].float()).to(place.dtype).double()
        return refs.layer_norm_ref(total, weight.double(), bias.double(), EPS), total

    forms["torch"] = plain
    return Problem(forms, expected, moved=4 * size_of(xs[0]) + size_of(weight, bias), copies=copies)


def norm_rows(place: Place, *, rows: int, n: int) -> Problem:
    """The norm of a chain: from the float32 residual stream into the dtype of the products."""
    copies = place.copies(rows * n * (4 + place.dtype.itemsize))
    xs = place.normal(copies, rows, n, dtype=torch.float32)
    weight, bias = place.normal(n), place.normal(n)
    out, norm = torch.empty(rows, n, dtype=place.dtype, device=place.device), Norm(weight, bias, EPS)
    forms: dict[str, Callable[[int], Any]] = {}
    if place.has_triton:
        launch = load("norm_rows:norm_rows_triton")

        def run(i: int):
            launch(xs[i], norm, out)
            return out

        forms["Triton"] = run
    wide = weight.float(), bias.float()
    forms[DEFINITION] = lambda i: load("norm_rows:norm_rows_ref")(xs[i], norm).to(place.dtype)
    forms["torch"] = lambda i: F.layer_norm(xs[i], (n,), *wide, EPS).to(place.dtype)
    return Problem(
        forms,
        lambda: refs.layer_norm_ref(xs[0].double(), weight.double(), bias.double(), EPS),
        moved=size_of(xs[0], out, weight, bias),
        copies=copies,
        prepare=lambda: poison(out),
    )


def bias_gelu_new(place: Place, *, rows: int, n: int) -> Problem:
    copies = place.copies(2 * rows * n * place.dtype.itemsize)
    xs, bias = place.normal(copies, rows, n), place.normal(n)
    forms = place.forms(
        "bias_gelu_new", "bias_gelu_new:bias_gelu_new_triton", refs.bias_gelu_new_ref, lambda i: (xs[i], bias)
    )
    forms["torch"] = lambda i: F.gelu(xs[i] + bias, approximate="tanh")
    return Problem(
        forms,
        lambda: refs.bias_gelu_new_ref(xs[0].double(), bias.double()),
        moved=2 * size_of(xs[0]) + size_of(bias),
        copies=copies,
    )


def embedding(place: Place, *, rows: int, n: int, vocab: int) -> Problem:
    wte, wpe = place.normal(vocab, n), place.normal(1024, n)
    copies = place.copies(2 * rows * n * place.dtype.itemsize)
    ids, positions = place.integers(0, vocab, copies, rows), place.integers(0, 1024, copies, rows)
    forms = place.forms(
        "embedding", "embedding:embedding_triton", refs.embedding_ref, lambda i: (ids[i], positions[i], wte, wpe)
    )
    forms["torch"] = lambda i: F.embedding(ids[i], wte) + F.embedding(positions[i], wpe)
    return Problem(
        forms,
        lambda: refs.embedding_ref(ids[0], positions[0], wte.double(), wpe.double()),
        moved=3 * rows * n * place.dtype.itemsize + 16 * rows,
        copies=copies,
    )


def embedding_rows(place: Place, *, rows: int, n: int, vocab: int, format: str) -> Problem:
    """The embedding of a chain: a table of any format into the float32 residual stream."""
    wte, wpe = make_weight(place, format, vocab, n), place.normal(1024, n)
    copies = place.copies(2 * rows * n * place.dtype.itemsize)
    ids, positions = place.integers(0, vocab, copies, rows), place.integers(0, 1024, copies, rows)
    out = torch.empty(rows, n, dtype=torch.float32, device=place.device)
    forms: dict[str, Callable[[int], Any]] = {}
    if place.has_triton:
        launch = load("embedding_rows:embedding_rows_triton")

        def run(i: int):
            launch(ids[i], positions[i], wte, wpe, out)
            return out

        forms["Triton"] = run
    forms[DEFINITION] = lambda i: load("embedding_rows:embedding_rows_ref")(ids[i], positions[i], wte, wpe)
    if format == "dense":
        forms["torch"] = lambda i: F.embedding(ids[i], wte.data).float() + F.embedding(positions[i], wpe).float()

    def expected():
        return wte.dequantize(torch.float64)[ids[0]] + wpe.double()[positions[0]]

    table_bytes = wte.num_bytes * rows // vocab
    return Problem(
        forms,
        expected,
        moved=table_bytes + rows * n * (4 + place.dtype.itemsize) + 16 * rows,
        copies=copies,
        prepare=lambda: poison(out),
    )
