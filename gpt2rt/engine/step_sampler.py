"""The next tokens of a step's rows: all at once, or, where that fails, one by one."""

from __future__ import annotations

import logging

from .runner import Group, Row, StepRunner, logits_of
from .sampler import Sampled, Sampler, SamplingRow

_LOG = logging.getLogger("gpt2rt.engine")


class StepSampler:
    """Prepares a sampler for the rows of each step, and gives it their logits.

    Args:
        sampler: chooses tokens.
        runner: computes logits again where more of them are needed.
    """

    def __init__(self, sampler: Sampler, runner: StepRunner) -> None:
        self._sampler = sampler
        self._runner = runner
        # of the last step, so that nothing is prepared again while they stay the same
        self._rows: list[SamplingRow | None] = []

    def best_count(self, rows: list[Row]) -> int:
        """How many of the best logits the rows need; 0: all."""
        try:
            self._prepare(rows)
        except Exception as error:
            # who is at fault shows when each is asked alone
            _LOG.warning("the sampler cannot take %d sequences together (%s)", len(rows), error)
            return 0
        return self._sampler.best_count if rows else 0

    def choose(self, rows: list[Row], groups: list[Group]) -> Sampled:
        """The next token of each row, or why it has none; rows of requests that have ended may get any.

        Args:
            rows: at least one, those of the last :meth:`best_count`, or some of them.
            groups: what was computed for them.
        """
        try:
            return self._choose(rows, groups)
        except Exception as error:
            _LOG.warning("no tokens for %d sequences together (%s); each gets its own alone", len(rows), error)
            return self._choose_alone(rows)

    def release(self, row: SamplingRow) -> None:
        """A continuation ended, or has to be computed again later: give back what it holds here."""
        self._sampler.release(row)

    def forget(self) -> None:
        """Prepare for the rows of the next step, though they may be those of the last."""
        self._rows = []

    def _prepare(self, rows: list[Row]) -> None:
        own = [row.branch.row for row in rows]
        if own != self._rows:
            # none, if the sampler cannot take these
            self._rows = []
            # typed loosely: every branch that is sampled has one
            self._sampler.set_rows(own)  # type: ignore[arg-type]
            self._rows = own

    def _choose(self, rows: list[Row], groups: list[Group]) -> Sampled:
        self._prepare(rows)
        if len(groups) != 1 or not groups[0].direct:
            return self._sampler.sample(logits_of(rows, groups))
        output = groups[0].output
        if output.top_ids is not None:
            assert output.top_logits is not None
            sampled = self._sampler.sample_best(output.top_ids, output.top_logits)
            return sampled or self._sampler.sample(self._runner.all_logits(groups[0]))
        assert output.logits is not None
        return self._sampler.sample(output.logits)

    def _choose_alone(self, rows: list[Row]) -> Sampled:
        """One by one, from logits that are computed again: the others may have been changed."""
        sampled = Sampled([-1] * len(rows), {}, {})
        for place, row in enumerate(rows):
            own = row.branch.row
            if row.branch.request.finished or own is None:
                continue
            try:
                # what was said is counted from the beginning
                self._sampler.release(own)
                self._rows = []
                self._prepare([row])
                alone = self._sampler.sample(self._runner.last_logits(row.item), careful=True)
            except Exception as error:
                sampled.errors[place] = error
                continue
            sampled.tokens[place] = alone.tokens[0]
            if alone.errors:
                sampled.errors[place] = alone.errors[0]
            if alone.logprobs:
                sampled.logprobs[place] = alone.logprobs[0]
        return sampled
