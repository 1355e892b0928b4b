"""The next token of each row of a step: one op for all rows, whatever each of them asks for.

Rows that look at their logits as they are go one way, rows that change them first (penalties, biases, excluded tokens,
processors) another, on a copy. Both end in the same ops, whose results for a row do not depend on the others; so a
row's token is the same alone and in any batch, bit for bit, and equal to what ``model.generate`` chooses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.errors import NumericsError, RequestError
from gpt2rt.generation.sampling import quiet_threads
from gpt2rt.graph.transfer import fetch, to_device

from . import logprobs
from .params import SamplingParams
from .random_numbers import RandomNumbers
from .row_penalties import DevicePenalties, HostPenalties, Said
from .row_rules import make_rules

# the largest top_k for which only the best logits are asked for, as in generation/choice.py
_MOST_BEST = 256
# best logits beyond top_k, among which those that tie with the last one kept must end
_SPARE = 16
# tokens for each of the best from which on it pays
_WORTHWHILE = 16


class SamplingRow:
    """How the tokens of one continuation are chosen.

    Args:
        params: the request's, checked.
        seed, request, choice: of ``generation.random.uniform``; integers of 64, 64 and 32 bits.
        prompt_ids: tokens of the prompt; not copied, must stay as they are.
        output_ids: tokens that follow it; not copied: whoever runs the engine appends to them.
        eos_token_ids: the model's end tokens.
        tokenizer: for ``bad_words`` if ``params`` were not checked with one.

    Attributes:
        params, seed, request, choice, prompt_ids, output_ids: the same; seed and request in two's complement.
        rules: what is changed in its scores besides penalties, or None.
        penalised: penalties change its scores.
        said, slot, counted: what :mod:`row_penalties` keeps with the row.
    """

    __slots__ = (
        "choice",
        "counted",
        "output_ids",
        "params",
        "penalised",
        "prompt_ids",
        "request",
        "rules",
        "said",
        "seed",
        "slot",
    )

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        request: int,
        choice: int,
        prompt_ids: list[int],
        output_ids: list[int],
        eos_token_ids: frozenset[int],
        tokenizer: Any = None,
    ) -> None:
        self.params = params
        self.seed = _signed(seed)
        self.request = _signed(request)
        self.choice = choice
        self.prompt_ids = prompt_ids
        self.output_ids = output_ids
        self.rules = make_rules(params, eos_token_ids, tokenizer)
        self.penalised = (
            params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        )
        self.said: Said | None = None
        self.slot = -1
        self.counted = 0

    def plain(self) -> bool:
        """Whether its token is chosen by its logits as they are."""
        return not self.penalised and (self.rules is None or self.rules.idle(len(self.output_ids)))


@dataclasses.dataclass(slots=True)
class Sampled:
    """What was chosen in a step.

    Attributes:
        tokens: for each row; -1 where ``errors`` says why there is none.
        errors: of rows without a token: NumericsError, or RequestError where the request's own rules are at fault.
        logprobs: of rows that asked: log-probability and rank of the token and of the likeliest, by the model's logits.
    """

    tokens: list[int]
    errors: dict[int, Exception]
    logprobs: dict[int, logprobs.Entry]


# one column for each row of a step
_COLUMNS: dict[str, Any] = {
    "temperature": np.float64,
    "top_k": np.int64,
    "top_p": np.float64,
    "min_p": np.float64,
    "greedy": np.bool_,
}
# the value of a setting that changes nothing
_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class Sampler:
    """Chooses the tokens of the rows of each step.

    Args:
        vocab_size: of the model.
        device: where the logits will be.
        capacity: rows of a step, at first; more are made room for.

    Attributes:
        best_count: how many of the best logits of each row suffice, for nearly every step, on the CPU: 1 if all rows
            take the largest, k + some where they draw among the k largest; 0: all logits are needed.
    """

    def __init__(self, vocab_size: int, device: torch.device, *, capacity: int) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._on_host = on_host = self._device.type == "cpu"
        # reading a number waits for the device
        self._waits = self._device.type == "cuda"
        self._penalties = HostPenalties() if on_host else DevicePenalties(vocab_size, self._device)
        self._numbers = RandomNumbers(self._device)
        self._rows: list[SamplingRow] = []
        self._columns: dict[str, np.ndarray] = {}
        self._capacity = 0
        self._make_room(max(1, capacity))
        self._plain: _Group | None = None
        self._edited: _Group | None = None
        self._asked: list[int] = []
        self._asked_index: Tensor | None = None
        self._draws = False
        self.best_count = 0

    def _make_room(self, capacity: int) -> None:
        # what stood there is written again: none of the rows is known any more
        self._rows = []
        self._capacity = capacity
        self._columns = {name: np.zeros(capacity, dtype=dtype) for name, dtype in _COLUMNS.items()}

    def set_rows(self, rows: list[SamplingRow]) -> None:
        """Prepare for steps with these rows, in this order. Call it when they differ from those of the last step.

        A row that wants penalties takes a place for its counts here and has it until :meth:`release`.
        """
        count = len(rows)
        if count > self._capacity:
            self._make_room(max(count, 2 * self._capacity))
        known = len(self._rows)
        for place, row in enumerate(rows):
            if place >= known or self._rows[place] is not row:
                self._write(place, row)
        self._rows = list(rows)
        plain: list[int] = []
        edited: list[int] = []
        for place, row in enumerate(rows):
            (plain if row.plain() else edited).append(place)
        self._asked = [place for place, row in enumerate(rows) if row.params.logprobs is not None]
        every = len(self._asked) in (0, count)
        self._asked_index = None if every else to_device(self._asked, torch.int64, self._device)
        self._plain = self._group(plain) if plain else None
        self._edited = self._group(edited) if edited else None
        self._penalties.open([rows[place] for place in edited if rows[place].penalised])
        for place in edited:
            rules = rows[place].rules
            if rules is not None:
                rules.to(self._device)
        self._draws = not self._columns["greedy"][:count].all()
        if self._draws:
            self._numbers.set_rows(self._rows)
        self.best_count = 0 if edited or self._asked or not plain else self._count_best()

    def _write(self, place: int, row: SamplingRow) -> None:
        params, columns = row.params, self._columns
        greedy = params.greedy
        columns["greedy"][place] = greedy
        # the only token that top_k=1 leaves, or the first of those that tie: what argmax gives
        columns["temperature"][place] = 1.0 if greedy else params.temperature
        columns["top_k"][place] = 1 if greedy else max(params.top_k, 0)
        columns["top_p"][place] = 1.0 if greedy else params.top_p
        columns["min_p"][place] = 0.0 if greedy else params.min_p

    def _column(self, name: str, places: list[int] | None) -> Tensor:
        """A column of the rows, or of some of them, as a tensor where the logits are."""
        column = self._columns[name]
        column = column[: len(self._rows)].copy() if places is None else column[places]
        values = torch.from_numpy(column)
        on_gpu = self._device.type == "cuda"
        return (values.pin_memory() if on_gpu else values).to(self._device, non_blocking=on_gpu)

    def _group(self, places: list[int]) -> _Group:
        every = len(places) == len(self._rows)
        draws = not bool(self._columns["greedy"][places].all())
        settings: dict[str, Tensor | None] = {}
        if draws:
            for name, off in _OFF.items():
                active = bool((self._columns[name][places] != off).any())
                # there each setting that may be off doubles the kernels, and dividing by 1 changes no bit
                active = active or (name == "temperature" and not self._on_host)
                settings[name] = self._column(name, None if every else places) if active else None
        index = None if every else to_device(places, torch.int64, self._device)
        return _Group(places, index, settings if draws else None)

    def _count_best(self) -> int:
        """How many of the best logits suffice for rows that all are plain."""
        assert self._plain is not None
        if self._device.type != "cpu":
            return 0
        if self._plain.settings is None:
            return 1
        top_k = self._columns["top_k"][: len(self._rows)]
        if top_k.min() < 1 or top_k.max() > _MOST_BEST:
            return 0
        count = int(top_k.max()) + _SPARE
        return count if count <= ops.MAX_TOP and _WORTHWHILE * count <= self._vocab_size else 0

    def sample(self, logits: Tensor, *, careful: bool = False) -> Sampled:
        """Choose the next token of each row; on a GPU with one wait, or two where a caller's processor sees scores.

        Args:
            logits: [len(rows), vocab_size] float32, rows contiguous; may be overwritten.
            careful: look at the logits before they are changed, at the price of a second wait on a GPU.

        Raises:
            NumericsError: logits of a row that is changed hold NaN or infinity, which is found too late to say whose
                fault it is; never if ``careful``.
        """
        numbers = self._numbers.draw() if self._draws else None
        plain = self._plain
        if plain is not None and plain.index is None and not self._asked:
            (tokens,) = fetch(plain.choose(logits, numbers, finite=True))
            errors: dict[int, Exception] = {}
            if -1 in tokens:
                errors = {place: _bad_logits(logits[place]) for place, token in enumerate(tokens) if token < 0}
            return Sampled(tokens, errors, {})
        with quiet_threads(logits):
            return self._sample_groups(logits, numbers, careful)

    def _sample_groups(self, logits: Tensor, numbers: Tensor | None, careful: bool) -> Sampled:
        """As :meth:`sample`, with any rows."""
        errors: dict[int, Exception] = {}
        edited, plain = self._edited, self._plain
        # of rows that are changed: -1 says that some logit is not finite, before a rule can hide it
        fine: Tensor | None = None
        chosen: list[tuple[_Group, Tensor]] = []
        if edited is not None:
            # log-probabilities are those of the logits as they came
            scores = edited.pick(logits) if edited.index is not None or not self._asked else logits.clone()
            fine = ops.argmax(scores, finite=True)
            if careful or not self._waits or self._has_processors(edited):
                for place, row, best in zip(edited.places, scores, fetch(fine)[0], strict=True):
                    if best < 0:
                        errors[place] = _bad_logits(row)
                fine = None
            scores = self._edit(scores, edited, errors)
            chosen.append((edited, edited.choose(scores, numbers, finite=False)))
        if plain is not None:
            chosen.append((plain, plain.choose(plain.pick(logits), numbers, finite=True)))
        wanted = [ids for _, ids in chosen]
        if self._asked:
            wanted += self._logprobs(logits, chosen)
        found = fetch(*wanted, *(() if fine is None else (fine,)))
        if fine is not None and -1 in found[-1]:
            raise NumericsError("logits of a row with rules or penalties hold NaN or infinity")
        tokens = [-1] * len(self._rows)
        for (group, _), ids in zip(chosen, found, strict=False):
            for place, token in zip(group.places, ids, strict=True):
                if place not in errors:
                    tokens[place] = token
        if edited is not None:
            self._explain_edited(scores, tokens, errors)
        if plain is not None:
            errors.update({place: _bad_logits(logits[place]) for place in plain.places if tokens[place] < 0})
        if not self._asked:
            return Sampled(tokens, errors, {})
        counts = [self._rows[place].params.logprobs or 0 for place in self._asked]
        asked = [tokens[place] for place in self._asked]
        known = zip(self._asked, logprobs.entries_of(asked, found[len(chosen) : len(chosen) + 4], counts), strict=True)
        return Sampled(tokens, errors, {place: entry for place, entry in known if entry and tokens[place] >= 0})

    def sample_best(self, ids: Tensor, logits: Tensor) -> Sampled | None:
        """As :meth:`sample`, from the best logits of each row, where ``best_count`` is not 0.

        Args:
            ids: [len(rows), best_count] int64, their tokens, the best first, of equal ones the lowest id.
            logits: [len(rows), best_count] float32.

        Returns:
            None if they do not suffice for some row, or its logits are not finite: all are needed.
        """
        assert self._plain is not None
        if self._plain.settings is None:
            (tokens,) = fetch(ids[:, 0])
        else:
            numbers = self._numbers.draw()
            (tokens,) = fetch(
                ops.sample(logits, numbers, token_ids=ids, partial=True, finite=True, **self._plain.settings)
            )
        return None if -1 in tokens else Sampled(tokens, {}, {})

    def release(self, row: SamplingRow) -> None:
        """The continuation ended, or has to be computed again later: give back what it holds here."""
        self._penalties.close(row)

    def _edit(self, scores: Tensor, group: _Group, errors: dict[int, Exception]) -> Tensor:
        """The scores of a group after the rules of its rows; those at fault are in ``errors``."""
        rows = [self._rows[place] for place in group.places]
        for place, row, scores_of_row in zip(group.places, rows, scores, strict=True):
            if row.rules is not None and place not in errors:
                row.rules.add_bias(scores_of_row)
        if any(row.penalised for row in rows):
            scores = self._penalties.penalised(scores, rows)
        for place, row, scores_of_row in zip(group.places, rows, scores, strict=True):
            if row.rules is None or place in errors:
                continue
            try:
                row.rules.exclude(scores_of_row, row.prompt_ids, row.output_ids)
            except RequestError as error:
                errors[place] = error
        return scores

    def _explain_edited(self, scores: Tensor, tokens: list[int], errors: dict[int, Exception]) -> None:
        """Say why rows that were changed have no token."""
        assert self._edited is not None
        for index, place in enumerate(self._edited.places):
            if tokens[place] >= 0 or place in errors:
                continue
            largest = scores[index].amax().item()
            if largest == -np.inf:
                errors[place] = RequestError(
                    "no token is left to choose: allowed_token_ids, bad_words, min_tokens and the logits processors "
                    "together exclude all of them; loosen one"
                )
            else:
                errors[place] = NumericsError(
                    f"the scores hold {largest} after penalties, processors and temperature, expected finite numbers"
                )

    def _logprobs(self, logits: Tensor, chosen: list[tuple[_Group, Tensor]]) -> tuple[Tensor, ...]:
        """What ``ops.log_probabilities`` says of the rows that asked and of their tokens."""
        ids = chosen[0][1]
        if len(chosen) > 1:
            ids = torch.empty(len(self._rows), dtype=torch.int64, device=logits.device)
            for group, tokens in chosen:
                assert group.index is not None
                ids.index_copy_(0, group.index, tokens)
        if self._asked_index is not None:
            logits, ids = logits.index_select(0, self._asked_index), ids.index_select(0, self._asked_index)
        return ops.log_probabilities(logits, ids, max(self._rows[place].params.logprobs or 0 for place in self._asked))

    def _has_processors(self, group: _Group) -> bool:
        """Whether code of a caller looks at the scores of a row of the group."""
        rules = (self._rows[place].rules for place in group.places)
        return any(own is not None and own.has_processors for own in rules)


@dataclasses.dataclass(slots=True)
class _Group:
    """Rows of a step that are treated alike.

    Attributes:
        places: which rows, in ascending order.
        index: the same on the device; None: all rows of the step.
        settings: for ``ops.sample``; None: all take the largest score.
    """

    places: Sequence[int]
    index: Tensor | None
    settings: dict[str, Any] | None

    def pick(self, values: Tensor) -> Tensor:
        """Of something for each row of the step that for each row of the group: a copy unless they are the same."""
        return values if self.index is None else values.index_select(0, self.index)

    def choose(self, scores: Tensor, numbers: Tensor | None, *, finite: bool) -> Tensor:
        """[len(places)] int64: the token of each row of the group, -1 without one.

        Args:
            scores: [len(places), vocab_size] float32.
            numbers: for each row of the step, if tokens are drawn.
            finite: no score may be infinite.
        """
        if self.settings is None:
            return ops.argmax(scores, finite=finite)
        assert numbers is not None
        return ops.sample(scores, self.pick(numbers), finite=finite, **self.settings)


def _bad_logits(logits: Tensor) -> NumericsError:
    """What to say of a row of the model's logits from which nothing can be chosen."""
    bad = int((~logits.isfinite()).sum())
    if bad:
        return NumericsError(
            f"{bad} of {len(logits)} logits are NaN or infinite; the weights are damaged or overflow their dtype (try "
            "dtype=torch.float32)"
        )
    return NumericsError("the scores overflow float32 after the temperature; raise it")


def _signed(value: int) -> int:
    """64 bits in two's complement."""
    return (value + 2**63) % 2**64 - 2**63
