"""``model.score``: the log-probability of texts, token by token, and their perplexity.

Each token is scored by log p(token | tokens before it in its window). A text longer than the window is cut into windows
that begin every ``stride`` tokens; each scores the tokens that the one before did not reach, so that every token is
scored once, with at least ``max_length - stride`` tokens before it (but where the text itself has fewer). That is the
strided evaluation of Hugging Face's guide "Perplexity of fixed-length models"; Press, Smith, Lewis, "Shortformer",
arXiv:2012.15832, section 2, call it sliding window inference, and ``stride = max_length`` nonoverlapping inference. A
token without any before it in its window (a text's first, and with disjoint windows each window's first) is not scored.

    perplexity = exp(-(sum of log-probabilities) / (number of scored tokens))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2rt.errors import RequestError
from gpt2rt.graph import Executor
from gpt2rt.graph.plan import Head

from .batch import CachedRows
from .reserve import new_cache
from .sampling import check_logits
from .starts import BLOCK_SIZE

# logits that exist at one time: 64 MB in float32, and as much again for their softmax
_MAX_LOGITS = 2**24

# tokens of a step that are not scored cost no logits
_MAX_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """Log-probabilities of some texts, in their order; natural logarithms (nats).

    Attributes:
        token_ids: of each text, without the bos token that was put before it.
        token_logprobs: of each text, for each token its log-probability (float32), None where it is not scored.
        logprobs: of each text, the sum over its scored tokens (float64).
        num_scored: of each text, how many tokens are scored.
        perplexities: of each text.
        perplexity: of all texts together: every scored token counts the same.
    """

    token_ids: list[list[int]]
    token_logprobs: list[list[float | None]]
    logprobs: list[float]
    num_scored: list[int]
    perplexities: list[float]
    perplexity: float


@dataclasses.dataclass(frozen=True)
class _Window:
    """A part of a text: it begins at token ``start``, ends before ``stop``, and scores from ``first`` on."""

    text: int
    start: int
    first: int
    stop: int


def windows_of(length: int, max_length: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, first scored token, stop) of the windows of a text of ``length`` tokens.

    The first token of a window is scored by none: it has nothing before it.
    """
    found, reached = [], 0
    for start in range(0, length, stride):
        stop = min(start + max_length, length)
        found.append((start, max(reached, start + 1), stop))
        if stop == length:
            break
        reached = stop
    return found


def score(
    executor: Executor,
    texts: Any,
    tokenizer: Any = None,
    *,
    stride: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    add_bos: bool = False,
    bos_token_id: int | None = None,
) -> ScoreOutput:
    """As :meth:`GenerationMixin.score`.

    Args:
        executor: of the model.
        texts, tokenizer, stride, max_length, batch_size, add_bos: see there.
        bos_token_id: of the model.

    Raises:
        RequestError: an argument is wrong, or a text has nothing to score; nothing has been computed.
        NumericsError: the model's logits hold NaN or infinity.
    """
    plan = executor.plan
    head = plan.nodes[-1]
    assert isinstance(head, Head)
    if head.linear is None:
        raise RequestError("the model has no output layer, so it gives no probabilities; load it as a language model")
    max_length = plan.n_positions if max_length is None else max_length
    _check_integer("max_length", max_length, 2, plan.n_positions, "the model's n_positions")
    stride = max(1, max_length // 2) if stride is None else stride
    _check_integer("stride", stride, 1, max_length, "max_length")
    _check_integer("batch_size", batch_size, 1, 2**31 - 1, "2**31 - 1")
    rows = _read_texts(texts, tokenizer, plan.vocab_size)
    extra: list[int] = []
    if add_bos:
        if bos_token_id is None:
            raise RequestError("add_bos=True needs a bos_token_id, but neither generation_config nor config has one")
        if not 0 <= bos_token_id < plan.vocab_size:
            raise RequestError(f"bos_token_id is {bos_token_id}, but the vocabulary has ids 0 to {plan.vocab_size - 1}")
        extra = [bos_token_id]
    ids = [extra + row for row in rows]
    for index, row in enumerate(ids):
        if len(row) < 2:
            raise RequestError(
                f"text {index} has a single token and nothing before it, so there is nothing to score; add_bos=True "
                "puts the bos token before each text"
            )
    windows = [_Window(i, *place) for i, row in enumerate(ids) for place in windows_of(len(row), max_length, stride)]
    # long windows together: those of a batch end together
    windows.sort(key=lambda window: window.start - window.stop)
    values: list[list[float | None]] = [[None] * len(row) for row in ids]
    for begin in range(0, len(windows), batch_size):
        _score_windows(executor, windows[begin : begin + batch_size], ids, values)
    return _summed(rows, [row[len(extra) :] for row in values])


def _score_windows(
    executor: Executor, windows: Sequence[_Window], ids: list[list[int]], values: list[list[float | None]]
) -> None:
    """Compute some windows side by side and write the log-probabilities of their tokens to ``values``."""
    plan = executor.plan
    lengths = [window.stop - window.start for window in windows]
    cache = new_cache(
        executor,
        sum(-(-length // BLOCK_SIZE) for length in lengths),
        f"windows of {sum(lengths)} tokens together",
        "lower batch_size or max_length",
    )
    cached = CachedRows(executor, cache, lengths)
    done = [0] * len(windows)
    for row in range(len(windows)):
        cached.begin(row)
    try:
        while live := [row for row, length in enumerate(lengths) if done[row] < length]:
            share = max(1, min(_MAX_LOGITS // plan.vocab_size, _MAX_TOKENS) // len(live))
            tokens, wanted, targets, start = [], [], [], 0
            for row in live:
                window, begin = windows[row], windows[row].start + done[row]
                stop = min(begin + share, window.stop)
                tokens.append(ids[window.text][begin:stop])
                # the logits at a token score the next one
                scored = range(max(begin, window.first - 1), min(stop, window.stop - 1))
                wanted += [start + place - begin for place in scored]
                targets += [(window.text, place + 1) for place in scored]
                start += stop - begin
                done[row] += stop - begin
            # a step has logits of something, also where it only brings context into the cache
            logits = cached.compute_all(tokens, live, wanted or [0])
            if not targets:
                continue
            check_logits(logits, [text for text, _ in targets])
            chosen = torch.tensor([[ids[text][place]] for text, place in targets], device=logits.device)
            logprobs = torch.log_softmax(logits, dim=-1).gather(1, chosen).squeeze(1).tolist()
            for (text, place), value in zip(targets, logprobs, strict=True):
                values[text][place] = value
    finally:
        cached.free(range(len(windows)))


def _summed(ids: list[list[int]], values: list[list[float | None]]) -> ScoreOutput:
    scored = [[value for value in row if value is not None] for row in values]
    sums = [math.fsum(row) for row in scored]
    return ScoreOutput(
        token_ids=ids,
        token_logprobs=values,
        logprobs=sums,
        num_scored=[len(row) for row in scored],
        perplexities=[_perplexity(total, len(row)) for total, row in zip(sums, scored, strict=True)],
        perplexity=_perplexity(math.fsum(sums), sum(len(row) for row in scored)),
    )


def _perplexity(logprob: float, count: int) -> float:
    mean = -logprob / count
    # beyond the range of float64
    return math.exp(mean) if mean < 709.0 else math.inf


def _check_integer(name: str, value: Any, low: int, high: int, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} must be an integer from {low} to {high}, {what}; got {value!r}")


def _read_texts(texts: Any, tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """The ids of each text."""
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, Tensor):
        texts = (texts.unsqueeze(0) if texts.dim() == 1 else texts).tolist()
    if not isinstance(texts, list | tuple) or not texts:
        raise RequestError(
            f"expected texts, or a list of token ids for each text, got {type(texts).__name__}"
            + (", which is empty" if isinstance(texts, list | tuple) else "")
        )
    rows = []
    for index, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise RequestError("scoring text needs its tokenizer: model.score(texts, tokenizer); or pass token ids")
            # a text longer than the model's window is no concern here
            ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        else:
            ids = text.tolist() if hasattr(text, "tolist") else text
        if not isinstance(ids, list | tuple):
            raise RequestError(
                f"text {index} is {text!r}, expected a text or a list of token ids: [[...]] for one text"
            )
        if not ids:
            raise RequestError(f"text {index} is {text!r}, which has no tokens; leave it out")
        wrong = [token for token in ids if not isinstance(token, int) or isinstance(token, bool)]
        if wrong:
            raise RequestError(f"text {index} holds {wrong[0]!r}, a {type(wrong[0]).__name__}; token ids are integers")
        bad = [token for token in ids if not 0 <= token < vocab_size]
        if bad:
            raise RequestError(
                f"text {index} holds the token id {bad[0]}, but the vocabulary has ids 0 to {vocab_size - 1}; was it "
                "encoded with another model's tokenizer?"
            )
        rows.append(list(ids))
    return rows
