"""The next token of each row: through processors and warpers, or in one op where that gives the same."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2rt import ops
from gpt2rt.errors import NumericsError
from gpt2rt.graph.cpu import CpuExecutor

from .batch import Best, Chosen
from .history import History
from .processors import EXCLUDED
from .random import uniform
from .sampling import check_logits, check_scores, greedy, quiet_threads, sample
from .scores import NO_IDS, processed_scores, spread
from .warpers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

if TYPE_CHECKING:
    from gpt2rt.graph.device_loop import SamplingRows

    from .decode import DecodePlan, Row


# the largest top_k for which only the best logits are computed; with more, sorting them out costs what it saves
_MOST_BEST = 256
# best logits beyond top_k, among which those that tie with the last one kept must end
_SPARE = 16
# tokens for each of the best from which on it pays: of 97 logits, finding 66 takes 7 us longer than reading all
_WORTHWHILE = 16
# rows that one program of the device's loop holds (kernels/advance.py)
_MOST_ON_DEVICE = 256


class Sampler:
    """Chooses tokens in one call of an op for all rows.

    Args:
        num_rows: the most rows of a call.
        do_sample: draw; otherwise the largest score is taken, and there are no settings.
        temperature, top_k, top_p, min_p: as for ``ops.sample``; None: off.
        device: where the scores will be.

    Attributes:
        device: the same.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        do_sample: bool,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self._draws = do_sample
        self._top_k = top_k
        self._settings = [
            None if value is None else torch.full((num_rows,), value, dtype=dtype, device=device)
            for value, dtype in (
                (temperature, torch.float64),
                (top_k, torch.int64),
                (top_p, torch.float64),
                (min_p, torch.float64),
            )
        ]
        # those of the rows of the last call
        self._count, self._slices = num_rows, self._settings

    def choose(self, scores: Tensor, numbers: ListLike[float], *, finite: bool) -> list[int]:
        """The next token of each row, -1 for one that has none to choose.

        Args:
            scores: [count, vocab_size] float32, on the sampler's device.
            numbers: for each row one in [0, 1), if tokens are drawn.
            finite: no score may be infinite.
        """
        if not self._draws:
            return ops.argmax(scores, finite=finite).tolist()
        return self._draw(scores, numbers, None, partial=False, finite=finite)

    def best_count(self, vocab_size: int) -> int:
        """How many of the best logits of a row suffice, for nearly every row; 0: all are needed, or cheaper."""
        if not self._draws:
            return 1
        if self._top_k is None or self._top_k > _MOST_BEST:
            return 0
        count = self._top_k + _SPARE
        return count if _WORTHWHILE * count <= vocab_size else 0

    def settings(self, count: int) -> dict[str, list[Any] | None]:
        """temperature, top_k, top_p and min_p of so many rows; None: off."""
        return {
            name: None if values is None else values[:count].tolist()
            for name, values in zip(("temperature", "top_k", "top_p", "min_p"), self._settings, strict=True)
        }

    def choose_best(self, best: Best, numbers: ListLike[float]) -> list[int] | None:
        """As :meth:`choose`, from the best logits; None if they do not suffice, or some logits are not finite."""
        if not self._draws:
            tokens = best.ids.squeeze(1).tolist()
            return None if -1 in tokens else tokens
        tokens = self._draw(best.logits, numbers, best.ids, partial=True, finite=True)
        return None if -1 in tokens else tokens

    def _draw(
        self, scores: Tensor, numbers: ListLike[float], token_ids: Tensor | None, *, partial: bool, finite: bool
    ) -> list[int]:
        if len(numbers) != self._count:
            self._count = len(numbers)
            self._slices = [None if values is None else values[: self._count] for values in self._settings]
        temperature, top_k, top_p, min_p = self._slices
        return ops.sample(
            scores,
            torch.tensor(numbers, dtype=torch.float64, device=self.device),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            token_ids=token_ids,
            partial=partial,
            finite=finite,
        ).tolist()


def make_sampler(plan: DecodePlan) -> Sampler | None:
    """A sampler that does what the warpers of a call do, one after another; None if there is none that does."""
    model = plan.executor.plan
    on_cpu = model.device.type == "cpu" and ops.extension_status().loaded
    if plan.output_scores or not (on_cpu or plan.executor.name == "cuda"):
        return None
    if model.vocab_size > ops.MAX_SCORES:
        return None
    if not plan.do_sample:
        return None if plan.warpers else Sampler(plan.num_rows, do_sample=False, device=model.device)
    settings: dict[str, float] = {}
    names = {
        TemperatureLogitsWarper: "temperature",
        TopKLogitsWarper: "top_k",
        TopPLogitsWarper: "top_p",
        MinPLogitsWarper: "min_p",
    }
    order = list(names.values())
    for warper in plan.warpers:
        name = names.get(type(warper))
        # one that comes twice, or before its turn, is something else
        if name is None or any(order.index(name) <= order.index(before) for before in settings):
            return None
        if getattr(warper, "min_tokens_to_keep", 1) != 1 or getattr(warper, "filter_value", EXCLUDED) != EXCLUDED:
            return None
        settings[name] = getattr(warper, name)
    if settings.get("temperature", 1.0) > torch.finfo(torch.float32).max:
        return None
    # mypy checks a dict of settings against every parameter at once
    return Sampler(plan.num_rows, do_sample=True, device=model.device, **settings)  # type: ignore[arg-type]


class Chooser:
    """Chooses the next tokens of the rows of a call, and records what was asked for.

    Args:
        plan: the call.
        rows: its rows.
        history: from ``scores.make_history``.

    Attributes:
        scores, logits: recorded steps, each [num_rows, vocab_size] float32, if asked for.
        best_count: how many of the best logits of each row :meth:`choose_best` wants; 0: :meth:`choose` wants all.
        on_device: tokens after the first may be chosen where the model is, see :meth:`sampling_rows`.
    """

    def __init__(self, plan: DecodePlan, rows: list[Row], history: History | None) -> None:
        self._plan = plan
        self._rows = rows
        self._history = history
        self._sampler = make_sampler(plan)
        self._changes = bool(plan.processors or plan.user_processors)
        self.best_count = 0
        self.on_device = False
        if self._sampler is not None and not (self._changes or plan.output_logits):
            if isinstance(plan.executor, CpuExecutor):
                self.best_count = self._sampler.best_count(plan.executor.plan.vocab_size)
            self.on_device = plan.executor.name == "cuda" and len(rows) <= _MOST_ON_DEVICE
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def choose(self, logits: Tensor, live: list[int]) -> list[int]:
        """The next token of some rows that have equally many new tokens.

        Args:
            logits: [len(live), vocab_size] float32.
            live: which rows, in ascending order.

        Raises:
            NumericsError: the logits of a row hold NaN or infinity.
            RequestError: the processors left a row no token.
        """
        plan = self._plan
        step = self._rows[live[0]].num_new
        # without processors the sampler looks at the logits themselves
        if not plan.remove_invalid_values and (self._changes or self._sampler is None):
            check_logits(logits, live)
        if plan.output_logits:
            self._record(self.logits, logits, live, step)
        scores = processed_scores(plan, self._history, logits, live, step) if self._changes else logits
        if self._sampler is not None and scores.dtype == torch.float32 and scores.device == self._sampler.device:
            tokens = self._sampler.choose(scores.contiguous(), self._numbers(live), finite=not self._changes)
            if -1 not in tokens:
                return tokens
            return self._refuse(scores, live, tokens.index(-1))
        with quiet_threads(scores) if self._changes or plan.do_sample else contextlib.nullcontext():
            if self._changes:
                check_scores(scores, live)
            scores = plan.warpers(NO_IDS, scores)
            if plan.output_scores:
                self._record(self.scores, scores, live, step)
            return sample(scores, self._numbers(live)) if plan.do_sample else greedy(scores)

    def choose_best(self, best: Best, live: list[int]) -> list[int]:
        """As :meth:`choose`, from the best logits of each row; all are computed where those do not suffice."""
        assert self._sampler is not None
        tokens = self._sampler.choose_best(best, self._numbers(live))
        return self.choose(best.all_logits(), live) if tokens is None else tokens

    def take(self, chosen: Chosen, live: list[int]) -> list[int]:
        """As :meth:`choose`, from what the device chose; an error says what was wrong with a row that has no token."""
        return self.choose(chosen.all_logits(), live) if -1 in chosen.tokens else chosen.tokens

    def sampling_rows(self, live: list[int]) -> SamplingRows | None:
        """How the device draws the next tokens of some rows, and those after them; None: it takes the largest logit."""
        if not self._plan.do_sample:
            return None
        from gpt2rt.graph.device_loop import SamplingRows

        assert self._sampler is not None
        rows = [self._rows[index] for index in live]
        return SamplingRows(
            seeds=[self._plan.seed] * len(rows),
            requests=[row.request for row in rows],
            choices=[row.choice for row in rows],
            positions=[len(row.ids) for row in rows],
            **self._sampler.settings(len(rows)),
        )

    def _numbers(self, live: list[int]) -> list[float]:
        """The random numbers of the rows' next tokens; none where nothing is drawn."""
        if not self._plan.do_sample:
            return []
        rows = (self._rows[index] for index in live)
        return [uniform(self._plan.seed, row.request, row.choice, len(row.ids)) for row in rows]

    def _refuse(self, scores: Tensor, live: list[int], place: int) -> list[int]:
        """Say what is wrong with scores that have no token to choose."""
        if not self._changes:
            check_logits(scores, live)
        check_scores(scores, live)
        raise NumericsError(f"row {live[place]}: the scores overflow float32 after the temperature; raise it")

    def _record(self, steps: list[Tensor], values: Tensor, live: list[int], step: int) -> None:
        """Keep the live rows' values of a step; rows without any have 0."""
        if step == len(steps):
            steps.append(spread(values, live, len(self._rows)).clone())
        else:
            steps[step][live] = values
