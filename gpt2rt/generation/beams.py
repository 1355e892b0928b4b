"""Beam search and beam sampling: of every prompt, the likeliest continuations found by keeping a few of them alive.

A step adds the log-probabilities of the next token to the score of each running beam and takes the best continuations
of all beams of the prompt together (or draws them, without replacement). Those that end leave for the finished ones,
ranked by score / length**length_penalty; the best of the others run on. The rules, among them when a prompt is done,
are those of transformers 5.23; they are described at :class:`BeamSearch`.

Beams are forks of the paged cache: beams with a common past share its blocks, and a beam that goes on as several costs
no copy but of the block it is writing to. All beams of all prompts are one ragged batch; prompts that are done leave
it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache
from gpt2rt.errors import NumericsError, RequestError

from .batch import CachedRows
from .decode import DecodePlan, Row, cache_lengths, prompt_keys
from .draw import sample_without_replacement
from .past import cache_columns
from .random import uniform
from .reserve import new_cache
from .sampling import check_logits, quiet_threads
from .scores import NO_IDS, make_history, processed_scores, spread
from .starts import BLOCK_SIZE, LayerPairs, read_sequences
from .stopping import StoppingCriteriaList

# what transformers gives beams that must lose to every other; float32, so that adding to it rounds as there
_LOST = np.float32(-1e9)


@dataclasses.dataclass
class Beam:
    """One continuation.

    Attributes:
        ids: prompt and new tokens.
        score: sum of the log-probabilities of the new tokens; of a finished beam, divided by length**length_penalty.
        origins: for each new token, the row of the batch in which it was chosen.
        stop_state: what :class:`StopStrings` remembers of it.
        finished: it has ended, by whatever criterion.
    """

    ids: list[int]
    score: float
    origins: list[int]
    stop_state: Any = None
    finished: bool = False


@dataclasses.dataclass
class Candidates:
    """The best continuations of one prompt in one step, in the order in which they were found.

    Attributes:
        scores: [k] float32, the score of the beam and of the token.
        beams: [k] which running beam each continues.
        tokens: [k] with which token.
        ended: [k] whether it ends there.
        stop_states: of each.
    """

    scores: np.ndarray
    beams: list[int]
    tokens: list[int]
    ended: list[bool] = dataclasses.field(default_factory=list)
    stop_states: list[Any] = dataclasses.field(default_factory=list)


class BeamSearch:
    """The beams of one prompt.

    - At first only beam 0 counts, for all are equal: the others start at -1e9.
    - A candidate that ends is finished if it is among the first ``num_beams``; the rest are there so that as many
      beams can go on. Of all finished so far the best ``num_beams`` are kept.
    - ``early_stopping=True``: done when ``num_beams`` are finished. Otherwise done when the best running beam cannot
      overtake the worst of ``num_beams`` finished ones, judged by its score now over the length now (False), or, for
      "never" and a positive length penalty, over the greatest possible length.
    - Done, too, when every candidate of a step ends.

    Args:
        prompt: which prompt.
        ids: its ids.
        max_new: the most new tokens.
        plan: the settings.

    Attributes:
        running: the beams that go on, best first.
        finished: the best that have ended, best first; to begin with, as many that have not.
        parents: of each running beam, which of those before the last step it continues.
        done: nothing more is to be found.
    """

    def __init__(self, prompt: int, ids: list[int], max_new: int, plan: DecodePlan) -> None:
        self.prompt = prompt
        self.running = [Beam(list(ids), 0.0 if beam == 0 else float(_LOST), []) for beam in range(plan.num_beams)]
        self.finished = [Beam(list(ids), float(_LOST), []) for _ in range(plan.num_beams)]
        self.parents: list[int] = []
        self.done = False
        self._plan = plan
        self.max_new = max_new
        self._prompt_length = len(ids)

    @property
    def num_new(self) -> int:
        """New tokens of each running beam."""
        return len(self.running[0].ids) - self._prompt_length

    @property
    def full(self) -> bool:
        """Whether as many beams as asked for are finished."""
        return all(beam.finished for beam in self.finished)

    def advance(self, found: Candidates) -> None:
        """Take the candidates of a step: running beams, finished ones, and whether this was the last step."""
        plan, count = self._plan, self._plan.num_beams
        length = self.num_new + 1
        ended = np.array(found.ended)
        closed = plan.early_stopping is True and self.full
        if not closed and ended[:count].any():
            self._collect(found, found.scores / self._penalty(length))
        ranks = found.scores + np.where(ended, _LOST, np.float32(0))
        order = _best(ranks, count)
        self.parents = [found.beams[i] for i in order]
        self.running = [self._continued(found, i, float(ranks[i])) for i in order]
        self.done = bool(ended.all()) or (plan.early_stopping is True and self.full) or not self._can_improve(length)

    def _continued(self, found: Candidates, i: int, score: float, finished: bool = False) -> Beam:
        parent = self.running[found.beams[i]]
        origin = self.prompt * self._plan.num_beams + found.beams[i]
        ids, origins = [*parent.ids, found.tokens[i]], [*parent.origins, origin]
        return Beam(ids, score, origins, found.stop_states[i], finished)

    def _collect(self, found: Candidates, scores: np.ndarray) -> None:
        """Keep the best of the finished beams and of the candidates that end."""
        count = self._plan.num_beams
        ends = np.array(found.ended) & (np.arange(len(found.ended)) < count)
        old = np.array([beam.score for beam in self.finished], dtype=np.float32)
        merged = np.concatenate([old, scores + np.where(ends, np.float32(0), _LOST)])
        self.finished = [
            self.finished[i]
            if i < count
            else self._continued(found, i - count, float(merged[i]), finished=bool(ends[i - count]))
            for i in _best(merged, count)
        ]

    def _penalty(self, length: int) -> np.float32:
        """length**length_penalty, kept where a score divided by it is a number of float32."""
        with np.errstate(over="ignore", under="ignore"):
            value = np.power(np.float64(length), self._plan.length_penalty)
        return np.float32(np.clip(value, 1e-28, np.finfo(np.float32).max))

    def _can_improve(self, length: int) -> bool:
        plan = self._plan
        possible = self.max_new if plan.early_stopping == "never" and plan.length_penalty > 0 else length
        best = np.float32(self.running[0].score) / self._penalty(possible)
        return bool(best > (np.float32(self.finished[-1].score) if self.full else _LOST))


def _best(scores: np.ndarray, count: int) -> list[int]:
    """Where the largest are. Beams that have lost are often equal, and among equals torch's order is transformers'."""
    return torch.from_numpy(scores).topk(count).indices.tolist()


class BeamDecoder:
    """Runs one call of ``generate`` with beams; a drop-in for :class:`Decoder`.

    Args:
        plan: what to do, with ``num_beams`` above 1.

    Attributes:
        rows: when ``steps`` has ended, the best ``num_return_sequences`` continuations of each prompt, best first.
        sequences_scores: of each row, its score over length**length_penalty.
        origins: of each row, for each new token the row of the batch (prompt * num_beams + beam) it was chosen in.
        scores, logits: recorded steps, each [batch * num_beams, vocab_size] float32, if asked for: log-probabilities
            after the processors, and the model's logits. Prompts that are done have 0.
        moves: of each step, [batch * num_beams] each: the row whose past each running beam continues (itself where the
            prompt is done) and its newest token.
        past: of each layer, keys and values of the running beams at the end, if asked for.
        cache: the KV cache.
    """

    def __init__(self, plan: DecodePlan) -> None:
        self.plan = plan
        self.cache = _make_cache(plan)
        self.searches = [
            BeamSearch(index, ids, limit - len(ids), plan)
            for index, (ids, limit) in enumerate(zip(plan.prompts, plan.max_lengths, strict=True))
        ]
        self.rows: list[Row] = []
        self.sequences_scores: list[float] = []
        self.origins: list[list[int]] = []
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.moves: list[tuple[list[int], list[int]]] = []
        self.past: LayerPairs | None = None
        lengths = [length for length in cache_lengths(plan) for _ in range(plan.num_beams)]
        self.cached = CachedRows(plan.executor, self.cache, lengths)
        self._requests = prompt_keys(plan)
        self._history = make_history(plan)
        self._began = 0.0

    def steps(self) -> Generator[list[int], None, None]:
        """Search, step by step; each item holds the newest token of every running beam.

        All KV blocks are free again when the iterator ends, is closed or raises.

        Raises:
            NumericsError: the logits of a beam hold NaN or infinity.
            RequestError: the processors left a prompt no token.
        """
        plan = self.plan
        self._began = time.monotonic()
        if plan.stop_strings is not None:
            for search in self.searches:
                for beam in search.running:
                    beam.stop_state = plan.stop_strings.begin(beam.ids)
        live = self.searches
        try:
            logits = self.cached.prefill(plan.prompts, plan.num_beams, plan.starts, plan.prefill_chunk_size)
            while True:
                found = self._candidates(self._log_probs(logits, live), live)
                self._mark_ended(found, live)
                for search, candidates in zip(live, found, strict=True):
                    search.advance(candidates)
                self._reorder(live)
                yield self.moves[-1][1]
                for search in live:
                    if search.done and not plan.output_past:
                        self.cached.free(self._rows_of(search))
                live = [search for search in live if not search.done]
                if not live:
                    self._finish()
                    return
                logits = self._next(live)
        finally:
            self.cached.free(range(plan.num_rows))

    def _rows_of(self, search: BeamSearch) -> range:
        return range(search.prompt * self.plan.num_beams, (search.prompt + 1) * self.plan.num_beams)

    def _live_rows(self, live: list[BeamSearch]) -> list[int]:
        return [row for search in live for row in self._rows_of(search)]

    # ---- the model -----------------------------------------------------------------------------------------------

    def _next(self, live: list[BeamSearch]) -> Tensor:
        """[number of running beams, vocab_size]: the logits after each beam's newest token."""
        rows = self._live_rows(live)
        beams = [beam for search in live for beam in search.running]
        if self.plan.use_cache:
            return self.cached.next([beam.ids[-1] for beam in beams], rows)
        for row in rows:
            self.cached.truncate(row, 0)
        return self.cached.compute([beam.ids for beam in beams], rows)

    def _reorder(self, live: list[BeamSearch]) -> None:
        """Give each running beam the cache of the beam it continues."""
        count = self.plan.num_beams
        num_rows = self.plan.num_rows
        origins, tokens = list(range(num_rows)), [self.plan.pad_token_id] * num_rows
        for search in live:
            first = search.prompt * count
            self.cached.reorder(first, search.parents)
            origins[first : first + count] = [first + parent for parent in search.parents]
            tokens[first : first + count] = [beam.ids[-1] for beam in search.running]
        self.moves.append((origins, tokens))
        if self._history is not None:
            rows = self._live_rows(live)
            self._history.reorder(rows, [origins[row] for row in rows])
            self._history.put(live[0].num_new - 1, rows, [tokens[row] for row in rows])

    # ---- candidates ----------------------------------------------------------------------------------------------

    def _log_probs(self, logits: Tensor, live: list[BeamSearch]) -> Tensor:
        """[number of running beams, vocab_size] float32: log-probabilities after the processors."""
        plan, rows, step = self.plan, self._live_rows(live), live[0].num_new
        if not plan.remove_invalid_values:
            check_logits(logits, rows)
        if plan.output_logits:
            self.logits.append(spread(logits, rows, plan.num_rows).clone())
        with quiet_threads(logits):
            scores = torch.log_softmax(logits, dim=-1)
        scores = processed_scores(plan, self._history, scores, rows, step)
        with quiet_threads(scores):
            scores = plan.warpers(NO_IDS, scores)
        if plan.output_scores:
            self.scores.append(spread(scores, rows, plan.num_rows).clone())
        return scores

    def _candidates(self, log_probs: Tensor, live: list[BeamSearch]) -> list[Candidates]:
        """The best continuations of each prompt, or a sample of them."""
        plan, vocab_size = self.plan, log_probs.size(1)
        running = torch.tensor([beam.score for search in live for beam in search.running], device=log_probs.device)
        # [number of prompts, num_beams * vocab_size]
        totals = (log_probs + running[:, None]).view(len(live), -1)
        # enough that num_beams can go on although others end
        count = min(max(2, 1 + len(plan.eos_token_ids)) * plan.num_beams, totals.size(1))
        with quiet_threads(totals):
            best = totals.topk(count, dim=1)
            _check_best(best.values[:, 0].tolist(), live)
            chosen, values = best.indices, best.values
            if plan.do_sample:
                chosen = torch.stack([self._draw(row, search, count) for row, search in zip(totals, live, strict=True)])
                values = totals.gather(1, chosen)
        return [
            Candidates(scores, [place // vocab_size for place in places], [place % vocab_size for place in places])
            for scores, places in zip(values.cpu().numpy(), chosen.tolist(), strict=True)
        ]

    def _draw(self, totals: Tensor, search: BeamSearch, count: int) -> Tensor:
        """[count] int64: places drawn from softmax(totals) one after another, none twice."""
        plan = self.plan
        request, choice = self._requests[search.prompt]
        position = len(search.running[0].ids)
        numbers = [uniform(plan.seed, request, choice * count + draw, position) for draw in range(count)]
        return sample_without_replacement(totals, numbers)

    def _mark_ended(self, found: list[Candidates], live: list[BeamSearch]) -> None:
        """Find out which candidates end."""
        plan = self.plan
        late = plan.max_time is not None and time.monotonic() - self._began > plan.max_time
        for search, candidates in zip(live, found, strict=True):
            at_limit = late or search.num_new + 1 >= search.max_new
            candidates.ended = [at_limit or token in plan.eos_token_ids for token in candidates.tokens]
            candidates.stop_states = [None] * len(candidates.tokens)
            if plan.stop_strings is None:
                continue
            for i, (beam, token) in enumerate(zip(candidates.beams, candidates.tokens, strict=True)):
                state, hit = plan.stop_strings.put(search.running[beam].stop_state, token)
                candidates.stop_states[i] = state
                candidates.ended[i] = candidates.ended[i] or hit
        if plan.user_criteria:
            self._apply_criteria(found, live)

    def _apply_criteria(self, found: list[Candidates], live: list[BeamSearch]) -> None:
        """The caller's criteria see the candidates of all prompts; for those that are done, the running beams' rows."""
        plan, step, per_prompt = self.plan, live[0].num_new, len(found[0].tokens)
        assert self._history is not None
        columns = self._history.columns(step + 1)
        rows = torch.arange(len(self.searches)).repeat_interleave(per_prompt) * plan.num_beams
        newest = torch.full((len(rows),), plan.pad_token_id, dtype=torch.int64)
        for search, candidates in zip(live, found, strict=True):
            places = slice(search.prompt * per_prompt, (search.prompt + 1) * per_prompt)
            rows[places] += torch.tensor(candidates.beams)
            newest[places] = torch.tensor(candidates.tokens)
        ids = columns[rows.to(columns.device)]
        ids[:, -1] = newest.to(ids.device)
        scores = tuple(self.scores) if plan.output_scores else None
        stopped = StoppingCriteriaList(plan.user_criteria)(ids, scores).tolist()
        for search, candidates in zip(live, found, strict=True):
            first = search.prompt * per_prompt
            candidates.ended = [a or b for a, b in zip(candidates.ended, stopped[first:], strict=False)]

    # ---- the end -------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Take the best finished beams as rows, and the cache if it is wanted."""
        plan = self.plan
        for search, prompt, limit in zip(self.searches, plan.prompts, plan.max_lengths, strict=True):
            request, choice = self._requests[search.prompt]
            for rank, beam in enumerate(search.finished[: plan.num_return_sequences]):
                reason = "length" if len(beam.ids) >= limit and beam.ids[-1] not in plan.eos_token_ids else "stop"
                self.rows.append(
                    Row(search.prompt, beam.ids, len(prompt), limit, request, choice + rank, finish_reason=reason)
                )
                self.sequences_scores.append(beam.score)
                self.origins.append(beam.origins)
        if plan.output_past:
            columns = cache_columns(plan, plan.num_beams, len(self.moves) - 1)
            self.past = read_sequences(self.cached.sequences, columns, self.cache, plan.executor.plan.dtype)


def _check_best(highest: list[float], live: list[BeamSearch]) -> None:
    """The best score of each prompt is a number.

    Raises:
        RequestError: every token of every beam of a prompt is excluded.
        NumericsError: the scores of a prompt hold NaN or plus infinity.
    """
    for search, score in zip(live, highest, strict=True):
        if score == -math.inf:
            raise RequestError(
                f"prompt {search.prompt}: every token of every beam is excluded; loosen bad_words_ids, "
                "suppress_tokens, no_repeat_ngram_size or your own logits processors"
            )
        if not math.isfinite(score):
            raise NumericsError(f"prompt {search.prompt}: the scores hold {score} after the logits processors")


def _make_cache(plan: DecodePlan) -> PagedKVCache:
    """A cache that holds the running beams of all prompts at their full length, and not a block more.

    Raises:
        RequestError: it would not fit into this machine's memory.
    """
    num_blocks = 0
    for index, (prompt, limit) in enumerate(zip(plan.prompts, plan.max_lengths, strict=True)):
        hidden = 0 if plan.starts is None else plan.starts.rows[index].hidden
        # the last token of a beam is never computed
        begin, end = hidden + len(prompt), hidden + limit - 1
        shared = begin // BLOCK_SIZE if plan.use_cache else 0
        num_blocks += shared + plan.num_beams * (-(-max(begin, end) // BLOCK_SIZE) - shared)
    return new_cache(
        plan.executor,
        num_blocks,
        f"{len(plan.prompts)} prompts with num_beams={plan.num_beams}",
        "ask for fewer beams or fewer new tokens",
        plan.kv_cache_dtype,
    )
