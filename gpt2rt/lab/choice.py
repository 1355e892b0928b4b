"""Problems of what happens to logits: choosing, drawing, penalties, log-probabilities; the way to the next step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt2rt.kernels import sampling_refs, score_refs

from .problem import DEFINITION, Place, Problem, load, size_of


def _scores(place: Place, rows: int, vocab: int) -> tuple[int, Tensor]:
    copies = place.copies(4 * rows * vocab)
    return copies, place.normal(copies, rows, vocab, scale=3.0, dtype=torch.float32)


def argmax(place: Place, *, rows: int, vocab: int) -> Problem:
    copies, scores = _scores(place, rows, vocab)
    forms = place.forms("argmax", "sampling:argmax_triton", sampling_refs.argmax_ref, lambda i: (scores[i], False))
    forms["torch"] = lambda i: scores[i].argmax(dim=-1)
    return Problem(forms, lambda: sampling_refs.argmax_ref(scores[0], False), moved=size_of(scores[0]), copies=copies)


def sampling_weights(place: Place, *, rows: int, vocab: int) -> Problem:
    copies, scores = _scores(place, rows, vocab)
    definition = sampling_refs.sampling_weights_ref
    forms = place.forms("sampling_weights", "sampling:sampling_weights_triton", definition, lambda i: (scores[i],))
    forms["torch softmax"] = lambda i: scores[i].softmax(dim=-1)
    return Problem(
        forms,
        lambda: sampling_refs.sampling_weights_ref(scores[0]),
        moved=3 * size_of(scores[0]),
        copies=copies,
        unchecked=frozenset({"torch softmax"}),
    )


def sample(place: Place, *, rows: int, vocab: int, settings: str) -> Problem:
    """A draw; ``settings``: "plain", or "all" for temperature, top_k, top_p and min_p together."""
    copies, scores = _scores(place, rows, vocab)
    numbers = place.uniform(rows, dtype=torch.float64)
    filters: tuple[Tensor | None, ...] = (None,) * 4
    if settings == "all":
        temperature, top_p, min_p = (
            torch.full((rows,), value, dtype=torch.float64, device=place.device) for value in (0.8, 0.95, 0.01)
        )
        filters = temperature, torch.full((rows,), 50, device=place.device), top_p, min_p
    rest = (None, False, False)
    definition = sampling_refs.sample_ref
    forms = place.forms("sample", "sampling:sample_triton", definition, lambda i: (scores[i], numbers, *filters, *rest))

    def plain(i: int) -> Tensor:
        """The usual chain of operations: divide, keep the best, cut the cumulative sum, draw."""
        x = scores[i]
        if settings == "all":
            x = x / 0.8
            x = x.masked_fill(x < x.topk(min(50, vocab)).values[:, -1:], -torch.inf)
            ranked, order = x.sort(dim=-1, descending=True)
            p = ranked.softmax(dim=-1)
            keep = ((p.cumsum(dim=-1) - p) < 0.95) & (p >= 0.01 * p[:, :1])
            x = torch.full_like(x, -torch.inf).scatter(1, order, ranked.masked_fill(~keep, -torch.inf))
        # an exponential race: no wait for the device, as multinomial has one
        return (x.softmax(dim=-1) / torch.empty_like(x).exponential_()).argmax(dim=-1)

    forms["torch"] = plain
    return Problem(
        forms,
        lambda: sampling_refs.sample_ref(scores[0], numbers, *filters, *rest),
        moved=size_of(scores[0]),
        copies=copies,
        unchecked=frozenset({"torch"}),
    )


def uniforms(place: Place, *, rows: int) -> Problem:
    keys = [place.integers(-(2**62), 2**62, rows) for _ in range(4)]
    forms = place.forms("uniforms", "uniforms:uniforms_triton", sampling_refs.uniforms_ref, lambda _: (*keys,))
    return Problem(forms, lambda: sampling_refs.uniforms_ref(*keys), moved=40 * rows)


def _counts(place: Place, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    counts = place.integers(0, 6, rows + 1, vocab, dtype=torch.int32)
    # most tokens were never said
    counts *= place.integers(0, 50, rows + 1, vocab, dtype=torch.int32) == 0
    return counts, place.permutation(rows + 1)[:rows]


def _restore(state: Tensor, before: Tensor) -> None:
    state.copy_(before)


def penalties(place: Place, *, rows: int, vocab: int) -> Problem:
    copies, scores = _scores(place, rows, vocab)
    counts, slots = _counts(place, rows, vocab)
    settings = [place.uniform(rows, low=low, high=high, dtype=torch.float64) for low, high in ((1, 2), (0, 1), (0, 1))]
    forms = place.forms(
        "penalties",
        "penalties:penalties_triton",
        score_refs.penalties_ref,
        lambda i: (scores[i], counts, slots, *settings),
    )
    return Problem(
        forms,
        lambda: score_refs.penalties_ref(scores[0], counts, slots, *settings),
        moved=3 * size_of(scores[0]),
        copies=copies,
    )


def count_tokens(place: Place, *, rows: int, vocab: int) -> Problem:
    counts, slots = _counts(place, rows, vocab)
    before, ids = counts.clone(), place.integers(0, vocab, rows)

    def expected() -> Tensor:
        result = before.clone()
        score_refs.count_tokens_ref(result, slots, ids)
        return result

    definition = score_refs.count_tokens_ref
    forms = place.forms("count_tokens", "penalties:count_tokens_triton", definition, lambda _: (counts, slots, ids))
    return Problem(forms, expected, moved=24 * rows, prepare=lambda: _restore(counts, before), outputs=lambda _: counts)


def reset_counts(place: Place, *, rows: int, vocab: int, tokens: int) -> Problem:
    counts, slots = _counts(place, rows, vocab)
    before, ids = counts.clone(), place.integers(0, vocab, rows * tokens)
    starts = torch.arange(rows + 1, device=place.device) * tokens
    prompts = place.integers(0, tokens, rows)

    def expected() -> Tensor:
        result = before.clone()
        score_refs.reset_counts_ref(result, slots, ids, starts, prompts, tokens)
        return result

    sequences = slots, ids, starts, prompts, tokens
    definition = score_refs.reset_counts_ref
    forms = place.forms("reset_counts", "penalties:reset_counts_triton", definition, lambda _: (counts, *sequences))
    moved = 4 * rows * vocab + 16 * rows * tokens
    return Problem(forms, expected, moved=moved, prepare=lambda: _restore(counts, before), outputs=lambda _: counts)


def log_probabilities(place: Place, *, rows: int, vocab: int, best: int) -> Problem:
    copies, scores = _scores(place, rows, vocab)
    ids = place.integers(0, vocab, rows)
    forms = place.forms(
        "log_probabilities",
        "log_probabilities:log_probabilities_triton",
        score_refs.log_probabilities_ref,
        lambda i: (scores[i], ids, best),
    )

    def plain(i: int) -> tuple[Tensor, ...]:
        logs = scores[i].log_softmax(dim=-1)
        chosen = logs.gather(1, ids[:, None])
        values, order = logs.topk(best, dim=-1)
        return chosen[:, 0], 1 + (logs > chosen).sum(dim=-1), values, order

    forms["torch"] = plain
    return Problem(
        forms,
        lambda: score_refs.log_probabilities_ref(scores[0], ids, best),
        moved=size_of(scores[0]),
        copies=copies,
    )


def advance(place: Place, *, rows: int) -> Problem:
    """From the tokens of a step to the inputs of the next, on the device."""
    blocks, block_size, ring = 8, 16, 4
    position = place.integers(0, blocks * block_size - 1, rows)
    state = {
        "input_ids": place.integers(0, 50, rows),
        "position_ids": position,
        "slot_mapping": place.integers(0, 999, rows),
        "seq_lens": (position + 1).to(torch.int32),
        "limits": place.integers(1, blocks * block_size + 1, rows, dtype=torch.int32),
        "block_table": place.integers(0, 999, rows, blocks, dtype=torch.int32),
        "ring": place.integers(0, 50, ring, rows),
        "step": torch.full((rows,), 6, dtype=torch.int64, device=place.device),
    }
    before = {name: tensor.clone() for name, tensor in state.items()}
    chosen = place.integers(-1, 50, rows)

    def prepare() -> None:
        for name, tensor in state.items():
            tensor.copy_(before[name])

    def by_definition(tensors: dict[str, Tensor]) -> None:
        load("advance:advance_ref")(chosen, *tensors.values(), block_size)

    def expected() -> tuple[Tensor, ...]:
        result = {name: tensor.clone() for name, tensor in before.items()}
        by_definition(result)
        return tuple(result.values())

    forms: dict[str, Callable[[int], Any]] = {}
    if place.has_triton:
        launch = load("advance:advance_triton")
        forms["Triton"] = lambda _: launch(chosen, *state.values(), block_size)
    forms[DEFINITION] = lambda _: by_definition(state)
    return Problem(forms, expected, moved=100 * rows, prepare=prepare, outputs=lambda _: tuple(state.values()))
