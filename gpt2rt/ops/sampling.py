"""The next token of each row of scores: the largest, or one drawn after temperature, top_k, top_p and min_p.

And the numbers to draw with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2rt.kernels import sampling_refs as refs

from ._checks import check_index, check_rows
from ._library import define

#: the weight of a row's largest score
WEIGHT_UNIT = refs.UNIT
#: the most scores of a row
MAX_SCORES = refs.MAX_SCORES


def _argmax_fake(scores: Tensor, finite: bool) -> Tensor:
    return torch.empty(scores.size(0), dtype=torch.int64, device=scores.device)


def _sampling_weights_fake(scores: Tensor) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.int64, device=scores.device)


def _sample_fake(
    scores: Tensor,
    uniforms: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    token_ids: Tensor | None,
    partial: bool,
    finite: bool,
) -> Tensor:
    return torch.empty(scores.size(0), dtype=torch.int64, device=scores.device)


def _uniforms_fake(seeds: Tensor, requests: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    return torch.empty(seeds.size(0), dtype=torch.float64, device=seeds.device)


_argmax = define(
    "argmax",
    "(Tensor scores, bool finite) -> Tensor",
    reference=refs.argmax_ref,
    triton="sampling:argmax_triton",
    fake=_argmax_fake,
)
_sampling_weights = define(
    "sampling_weights",
    "(Tensor scores) -> Tensor",
    reference=refs.sampling_weights_ref,
    triton="sampling:sampling_weights_triton",
    fake=_sampling_weights_fake,
)
_sample = define(
    "sample",
    "(Tensor scores, Tensor uniforms, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
    "Tensor? token_ids, bool partial, bool finite) -> Tensor",
    reference=refs.sample_ref,
    triton="sampling:sample_triton",
    fake=_sample_fake,
)
_uniforms = define(
    "uniforms",
    "(Tensor seeds, Tensor requests, Tensor choices, Tensor positions) -> Tensor",
    reference=refs.uniforms_ref,
    triton="uniforms:uniforms_triton",
    fake=_uniforms_fake,
)


def check_scores(op: str, scores: Tensor) -> None:
    """``scores`` is [num_rows, vocab_size] float32 with contiguous rows that are not too long."""
    check_rows(op, "scores", scores)
    if scores.dtype != torch.float32:
        raise TypeError(f"{op}: scores has dtype {scores.dtype}, expected float32; call .float()")
    if not 1 <= scores.size(1) <= MAX_SCORES:
        raise ValueError(
            f"{op}: scores has shape {list(scores.shape)}, expected rows of 1 to {MAX_SCORES} tokens, whose "
            "weights can be summed exactly"
        )


def argmax(scores: Tensor, *, finite: bool = False) -> Tensor:
    """The token with the largest score of each row, the lowest id of equals.

    Args:
        scores: [num_rows, vocab_size] float32; rows contiguous, any stride between them; -inf: excluded.
        finite: no token can be excluded, so -inf is as bad as NaN.

    Returns:
        [num_rows] int64; -1 for a row that holds NaN or plus infinity (with ``finite``, any infinity) or no token that
        is not excluded.

    Raises:
        ValueError: a shape or stride does not fit.
        TypeError: ``scores`` is not float32.
    """
    check_scores("argmax", scores)
    return _argmax(scores, finite)


def sampling_weights(scores: Tensor) -> Tensor:
    """``exp(score - largest of its row)`` in units of 2**-42, rounded down: what :func:`sample` draws by.

    Integers, so that their sums are exact in any order; equal on every device.

    Args:
        scores: [num_rows, vocab_size] float32; rows contiguous; -inf: excluded.

    Returns:
        [num_rows, vocab_size] int64, 0 to 2**42, relative error 1e-7 before rounding down; all 0 in a row whose largest
        score is not finite, or that holds NaN.

    Raises:
        ValueError: a shape or stride does not fit.
        TypeError: ``scores`` is not float32.
    """
    check_scores("sampling_weights", scores)
    return _sampling_weights(scores)


def sample(
    scores: Tensor,
    uniforms: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    token_ids: Tensor | None = None,
    partial: bool = False,
    finite: bool = False,
) -> Tensor:
    """A token of each row, drawn from the softmax of its scores after temperature, top_k, top_p and min_p.

    In this order, each on what the one before left; tokens that tie with the last one kept stay. The token is the
    first, in order of ids, whose cumulative :func:`sampling_weights` exceed the row's number times their total. It is a
    function of the row's own scores, number and settings: not of its neighbours, threads, instruction set or device.

    On CUDA nothing waits for the device, with one exception: ``token_ids`` and ``partial`` run in plain torch there.

    Source: Holtzman et al., arXiv:1904.09751, section 3.1 (top_p); Nguyen et al., arXiv:2407.01082 (min_p).

    Args:
        scores: [num_rows, n] float32; rows contiguous, any stride between them; -inf: excluded.
        uniforms: [num_rows] float64, from 0 to below 1.
        temperature: [num_rows] float64, above 0; None: 1.
        top_k: [num_rows] int64; below 1, n or more: all tokens stay; None: off.
        top_p: [num_rows] float64, 0 to 1; 1: all tokens stay; None: off.
        min_p: [num_rows] float64, 0 to 1; 0: all tokens stay; None: off.
        token_ids: [num_rows, n] int64, the tokens that the columns stand for, none twice in a row; None: 0 to n - 1.
        partial: the columns are the best of a longer row, the largest first. A row has no token then if top_k may keep
            others too, because they tie with the last that is here.
        finite: no token can be excluded, so -inf is as bad as NaN.

    Returns:
        [num_rows] int64; -1 for a row that holds NaN or plus infinity (with ``finite``, any infinity), also after the
        temperature, or no token that is not excluded, or where ``partial`` says so; on CUDA, where looking at the
        values would wait for the device, also for a row whose number or setting is out of range.

    Raises:
        ValueError: a shape, stride or device does not fit, or, not on CUDA, a number or setting is out of range.
        TypeError: a dtype does not fit.
    """
    check_scores("sample", scores)
    shape = (scores.size(0),)
    check_index("sample", "uniforms", uniforms, shape, torch.float64, scores)
    if temperature is not None:
        check_index("sample", "temperature", temperature, shape, torch.float64, scores)
    if top_k is not None:
        check_index("sample", "top_k", top_k, shape, torch.int64, scores)
    if top_p is not None:
        check_index("sample", "top_p", top_p, shape, torch.float64, scores)
    if min_p is not None:
        check_index("sample", "min_p", min_p, shape, torch.float64, scores)
    if token_ids is not None:
        check_index("sample", "token_ids", token_ids, tuple(scores.shape), torch.int64, scores)
    return _sample(scores, uniforms, temperature, top_k, top_p, min_p, token_ids, partial, finite)


def uniforms(seeds: Tensor, requests: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    """The numbers that :func:`sample` draws with: a pure function of what each is drawn for.

    Philox4x32-10; the bits are those of :func:`gpt2rt.generation.random.uniform` on every device.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11, section 3.3.

    Args:
        seeds: [num_rows] int64, any; numbers of 64 bits without sign are given in two's complement.
        requests: [num_rows] int64, which request, likewise.
        choices: [num_rows] int64, which of several continuations; 32 bits count.
        positions: [num_rows] int64, the index in its sequence of the token that is drawn; 32 bits count.

    Returns:
        [num_rows] float64, from 0 to below 1, 53 random bits.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a dtype is not int64.
    """
    if seeds.dim() != 1:
        raise ValueError(f"uniforms: seeds has shape {list(seeds.shape)}, expected [num_rows]")
    for name, words in (("seeds", seeds), ("requests", requests), ("choices", choices), ("positions", positions)):
        check_index("uniforms", name, words, (seeds.size(0),), torch.int64, seeds)
    return _uniforms(seeds, requests, choices, positions)
