"""Guesses at the next tokens of a row, for :class:`speculation.SpeculativeDecoder` to check.

Sources: a smaller model over the same vocabulary, or the first layers of the model itself (Leviathan, Kalman, Matias,
"Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192; Chen et al., arXiv:2302.01318); the row's
own earlier text (Saxena, "Prompt Lookup Decoding", 2023); a model with another tokenizer (``translate.py``).
A guess can be wrong without harm: what is generated does not depend on it.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListLike
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt2rt.errors import NumericsError, RequestError
from gpt2rt.graph import Executor, make_executor
from gpt2rt.graph.plan import Head, NormQKV

from .batch import CachedRows
from .decode import DecodePlan, Row, make_cache
from .history import History
from .processors import LogitsProcessorList
from .random import uniform
from .sampling import check_logits, greedy, quiet_threads, sample
from .scores import NO_IDS


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How candidates are found.

    Attributes:
        num_tokens: candidates of a row in one round, at first.
        schedule: "constant"; "heuristic": two more after a round in which all were right, else one less, and the next
            call begins with the number that this one ended with; "heuristic_transient": the same for one call.
        draft: the executor of a smaller model, or None to look the row's own text up.
        assistant: the smaller model itself, which "heuristic" is remembered for.
        confidence: a draft ends with the first token that it gives a smaller probability, in [0, 1].
        max_ngram: the most tokens of a row's end that are looked up.
        tokenizers: (the model's, the draft's), if the draft has another vocabulary.
        lookbehind: tokens of a row's end that are encoded together with a translated draft.
    """

    num_tokens: int
    schedule: str = "constant"
    draft: Executor | None = None
    assistant: Any = None
    confidence: float = 0.0
    max_ngram: int = 2
    tokenizers: tuple[Any, Any] | None = None
    lookbehind: int = 10


class CandidateSource(Protocol):
    """Proposes tokens for rows."""

    def propose(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        """For rows, each with the most candidates it can use (at least 1), what may follow their newest token."""
        ...

    def settle(self, row: int) -> None:
        """The row has its next tokens: forget the candidates that were wrong."""
        ...

    def free(self, rows: ListLike[int]) -> None:
        """These rows are finished; they may be finished already."""
        ...


class PromptLookup:
    """What followed the last tokens of a row when they first stood in it.

    Args:
        rows: the rows of the call.
        max_ngram: first as many tokens are looked up, then fewer, down to one.
    """

    def __init__(self, rows: ListLike[Row], max_ngram: int) -> None:
        self._rows = rows
        self._max_ngram = max_ngram
        # n-gram -> the place after its first occurrence
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in rows]
        self._known = [0] * len(rows)

    def propose(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        return {row: self._continuation(row, count) for row, count in counts.items()}

    def _continuation(self, row: int, count: int) -> list[int]:
        ids, places = self._rows[row].ids, self._places[row]
        for place in range(self._known[row], len(ids)):
            for n in range(1, min(self._max_ngram, place) + 1):
                places.setdefault(tuple(ids[place - n : place]), place)
        self._known[row] = len(ids)
        for n in range(min(self._max_ngram, len(ids)), 0, -1):
            found = places.get(tuple(ids[-n:]))
            if found is not None:
                return ids[found : found + count]
        return []

    def settle(self, row: int) -> None:
        pass

    def free(self, rows: ListLike[int]) -> None:
        for row in rows:
            self._places[row] = {}


#: the tokens chosen for rows, None where there is none, and whether to go on after them
Choice = tuple[list[int | None], list[bool]]


def roll(
    cached: CachedRows,
    tokens: Mapping[int, list[int]],
    counts: Mapping[int, int],
    choose: Callable[[Tensor, list[int], Mapping[int, list[int]]], Choice],
) -> dict[int, list[int]]:
    """Let a draft model continue rows, token by token.

    Args:
        cached: its cache.
        tokens: for each row, its tokens that are not in the cache yet, at least one.
        counts: for each row, the most tokens to add.
        choose: from logits [len(rows), vocab_size], the rows, and what was added to them, their next tokens.

    Returns:
        What was added to each row. The last of it is not in the cache.
    """
    rows = list(tokens)
    added: dict[int, list[int]] = {row: [] for row in rows}
    if not rows:
        return added
    logits = cached.compute([tokens[row] for row in rows], rows)
    while True:
        chosen, goes_on = choose(logits, rows, added)
        following = []
        for row, token, more in zip(rows, chosen, goes_on, strict=True):
            if token is not None:
                added[row].append(token)
                if more and len(added[row]) < counts[row]:
                    following.append(row)
        if not following:
            return added
        rows = following
        logits = cached.next([added[row][-1] for row in rows], rows)


class Draft:
    """A smaller model that continues rows by the same rules as the model itself.

    Its scores go through the same processors and warpers, but for processors that treat the rows of a call differently,
    and it draws with the same random numbers: where the two models agree about the distribution, they draw the same
    token.

    Args:
        speculation: with ``draft``.
        plan: the call.
        rows: its rows.
        history: what processors look at; None if there are none.
    """

    def __init__(
        self, speculation: Speculation, plan: DecodePlan, rows: ListLike[Row], history: History | None
    ) -> None:
        assert speculation.draft is not None
        self._plan = plan
        self._rows = rows
        self._history = history
        # what treats rows differently is left out: guidance takes a step of its own for each token, and a caller's
        # function that lists the allowed tokens must not be asked about guesses
        self._processors = LogitsProcessorList(item for item in plan.processors if not hasattr(item, "for_rows"))
        self._confidence = speculation.confidence
        self._n_positions = speculation.draft.plan.n_positions
        limits = [min(row.max_length, self._n_positions) for row in rows]
        self._cached = CachedRows(speculation.draft, make_cache(plan, speculation.draft), limits)

    def propose(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        """As :class:`CandidateSource` says.

        Raises:
            NumericsError: the draft model's logits hold NaN or infinity.
        """
        if all(sequence is None for sequence in self._cached.sequences):
            self._begin()
        # the last candidate needs no position
        fits = {row: min(count, self._n_positions + 1 - len(self._rows[row].ids)) for row, count in counts.items()}
        fits = {row: count for row, count in fits.items() if count > 0}
        tokens = {row: self._rows[row].ids[self._cached.sequence(row).length :] for row in fits}
        return roll(self._cached, tokens, fits, self._choose)

    def settle(self, row: int) -> None:
        self._cached.truncate(row, len(self._rows[row].ids) - 1)

    def free(self, rows: ListLike[int]) -> None:
        self._cached.free(rows)

    def _begin(self) -> None:
        # a prompt longer than the draft's positions gets no candidates, so one token stands for it
        prompts = [ids if len(ids) <= self._n_positions else ids[:1] for ids in self._plan.prompts]
        self._cached.prefill(prompts, self._plan.num_return_sequences)

    def _choose(self, logits: Tensor, rows: list[int], added: Mapping[int, list[int]]) -> Choice:
        plan = self._plan
        if not plan.remove_invalid_values:
            check_draft_logits(logits, rows)
        scores = logits.to(plan.executor.plan.device)
        with quiet_threads(scores):
            if self._processors:
                scores = self._processed(scores, rows, added)
            # a prefix that is no more than a guess may leave no token: then the draft ends before it
            possible = torch.isfinite(scores.amax(dim=-1)).tolist()
            places = [place for place, fine in enumerate(possible) if fine]
            chosen: list[int | None] = [None] * len(rows)
            goes_on = [False] * len(rows)
            if not places:
                return chosen, goes_on
            scores = plan.warpers(NO_IDS, scores if len(places) == len(rows) else scores[places])
            tokens = self._pick(scores, [rows[place] for place in places], added)
            sure = self._sure(scores, tokens)
        for place, token, certain in zip(places, tokens, sure, strict=True):
            chosen[place] = token
            goes_on[place] = certain and token not in plan.eos_token_ids
        return chosen, goes_on

    def _processed(self, scores: Tensor, rows: list[int], added: Mapping[int, list[int]]) -> Tensor:
        """The scores after the processors, which see the row as if the candidates were part of it."""
        assert self._history is not None
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(self._rows[row].num_new, []).append(place)
        result = torch.empty_like(scores)
        for step, places in groups.items():
            members = [rows[place] for place in places]
            guesses = torch.tensor([added[row] for row in members], dtype=torch.int64, device=scores.device)
            ids = torch.cat([self._history.ids(step, members), guesses.view(len(members), -1)], dim=1)
            result[places] = self._processors(ids, scores[places])
        return result

    def _pick(self, scores: Tensor, rows: list[int], added: Mapping[int, list[int]]) -> list[int]:
        if not self._plan.do_sample:
            return greedy(scores)
        numbers = []
        for index in rows:
            row = self._rows[index]
            position = len(row.ids) + len(added[index])
            numbers.append(uniform(self._plan.seed, row.request, row.choice, position))
        return sample(scores, numbers)

    def _sure(self, scores: Tensor, tokens: list[int]) -> list[bool]:
        """Whether the draft gives its tokens as much probability as they need for going on."""
        if self._confidence <= 0:
            return [True] * len(tokens)
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return (torch.softmax(scores, dim=-1).gather(1, chosen).squeeze(1) >= self._confidence).tolist()


def check_draft_logits(logits: Tensor, rows: list[int]) -> None:
    """As :func:`check_logits`, saying which model it was.

    Raises:
        NumericsError: a row holds NaN or infinity.
    """
    try:
        check_logits(logits, rows)
    except NumericsError as error:
        raise NumericsError(f"the assistant model, not the model itself: {error}") from None


# ---- the first layers of a model as its own draft ------------------------------------------------------------------

# packed once for each model: when its weights change it gets another executor, and this entry goes with the old one
_EARLY_EXITS: weakref.WeakKeyDictionary[Executor, dict[int, Executor]] = weakref.WeakKeyDictionary()


def early_exit(executor: Executor, num_layers: int) -> Executor:
    """An executor of the model's first layers and its output layer.

    Neither the model nor its config are touched; the cpu executor packs these layers a second time.

    Args:
        executor: of the whole model.
        num_layers: 1 to ``executor.plan.n_layer``.

    Raises:
        RequestError: the model runs module by module, so it has no graph to cut.
    """
    if not executor.plan.nodes:
        raise RequestError(
            "assistant_early_exit runs the first layers of the model's graph, but this model runs module by module; "
            "remove its hooks, or merge what was put in place of its layers"
        )
    made = _EARLY_EXITS.setdefault(executor, {})
    if num_layers not in made:
        plan = executor.plan
        nodes: list[Any] = []
        for node in plan.nodes[:-1]:
            if isinstance(node, NormQKV) and node.layer == num_layers:
                break
            nodes.append(node)
        head = plan.nodes[-1]
        assert isinstance(head, Head)
        shorter = dataclasses.replace(plan, nodes=(*nodes, head), n_layer=num_layers)
        made[num_layers] = make_executor(shorter, executor.name)
    return made[num_layers]
