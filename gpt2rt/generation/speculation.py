"""Assisted decoding: several tokens in one step of the model, and never another text than without.

A cheap source proposes the next tokens of each row. One ragged step computes the model's logits after each of them.
Then the tokens are chosen as in plain decoding: from these logits, by the same processors, warpers and sampler, with
the same random number for the same place. As long as the token so chosen is the one proposed, the logits after it are
there already; at the first that differs the rest is thrown away. A proposal only decides how many steps are needed.

Sources: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, and
Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", arXiv:2302.01318, whose acceptance
rule keeps the distribution; here the draft draws with the same random numbers instead, which keeps the very tokens.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Generator
from typing import Any

from torch import Tensor

from gpt2rt.errors import RequestError
from gpt2rt.graph import Executor
from gpt2rt.graph.plan import Head

from .candidates import CandidateSource, Draft, PromptLookup, Speculation, early_exit
from .config import GenerationConfig
from .decode import DecodePlan, Decoder
from .runtime import executor_for
from .translate import TranslatedDraft

# the most tokens whose logits one step returns, unless there are more rows: 200 MB for GPT-2's vocabulary
_MAX_LOGITS = 1024

# a row without a single right candidate in as many rounds goes on without for a while
_PATIENCE = 4
_REST = 16

# the number of candidates that "heuristic" ended with, for each assistant
_REMEMBERED: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@dataclasses.dataclass
class SpeculationStatistics:
    """What speculation did in one call.

    Attributes:
        steps: steps of the model that checked candidates or went on without.
        proposed: candidates.
        accepted: those of them that became tokens.
    """

    steps: int = 0
    proposed: int = 0
    accepted: int = 0


class SpeculativeDecoder(Decoder):
    """Runs one call of ``generate`` with candidates; otherwise as :class:`Decoder`, bit for bit.

    That needs an executor whose logits do not depend on how many tokens a step computes: the cpu executor's do not.
    With the eager executor a row can take the other of two tokens that are equally likely up to rounding.

    Rows accept different numbers of tokens. Only where the caller's own processors or criteria look at all rows
    together do rows wait for each other, so that these see what they see without candidates.

    Args:
        plan: what to do, with ``speculation`` set.

    Attributes:
        rows, scores, logits, cache, past: as in Decoder.
        statistics: how many candidates were proposed and accepted.

    Raises:
        RequestError: the caches would not fit into this machine's memory, or ids of prompts are missing.
    """

    def __init__(self, plan: DecodePlan) -> None:
        assert plan.speculation is not None
        if plan.starts is not None and any(start.hidden for start in plan.starts.rows):
            raise RequestError(
                "assisted decoding needs the ids of whole prompts, but a part of them came as inputs_embeds or in "
                "past_key_values; pass all ids, or generate without candidates"
            )
        super().__init__(plan)
        self.statistics = SpeculationStatistics()
        self._speculation = plan.speculation
        self._source = self._make_source(plan.speculation)
        self._together = bool(plan.user_processors or plan.user_criteria)
        self._counts = [plan.speculation.num_tokens] * len(self.rows)
        # rounds in a row without a right candidate; below 0, rounds to rest
        self._failures = [0] * len(self.rows)

    def _make_source(self, speculation: Speculation) -> CandidateSource:
        if speculation.draft is None:
            return PromptLookup(self.rows, speculation.max_ngram)
        if speculation.tokenizers is not None:
            return TranslatedDraft(speculation, self.rows, self.plan.executor.plan.vocab_size)
        return Draft(speculation, self.plan, self.rows, self._history)

    def steps(self) -> Generator[list[int], None, None]:
        """As :meth:`Decoder.steps`: an item is the new token of every row.

        Items come as soon as all rows that go on have that token, several after one step of the model.

        Raises:
            NumericsError: the logits of a row, or of the draft model, hold NaN or infinity.
            RequestError: the processors left a row no token.
        """
        self._begin()
        try:
            live = list(range(len(self.rows)))
            candidates: dict[int, list[int]] = {}
            logits = self._prefill()
            shown = 0
            while True:
                self._accept(logits, live, candidates)
                lengths = [row.num_new for row in self.rows]
                going_on = [index for index in live if self.rows[index].finish_reason is None]
                complete = min(lengths[index] for index in going_on) if going_on else max(lengths)
                while shown < complete:
                    yield [self._shown(index, shown) for index in range(len(self.rows))]
                    shown += 1
                if not going_on:
                    self._remember()
                    self._end()
                    return
                live = going_on
                candidates = self._propose(live)
                newest = [self.rows[index].ids[-1] for index in live]
                if any(candidates.values()):
                    tokens = [[token, *candidates.get(i, ())] for i, token in zip(live, newest, strict=True)]
                    logits = self.cached.compute_all(tokens, live)
                else:
                    logits = self.cached.next(newest, live)
                self.statistics.steps += 1
        finally:
            self.cached.free(range(len(self.rows)))
            self._source.free(range(len(self.rows)))

    def _shown(self, index: int, step: int) -> int:
        row = self.rows[index]
        place = row.prompt_length + step
        return row.ids[place] if place < len(row.ids) else self.plan.pad_token_id

    # ---- candidates ----------------------------------------------------------------------------------------------

    def _propose(self, live: list[int]) -> dict[int, list[int]]:
        counts = {}
        for index in live:
            row = self.rows[index]
            if self._failures[index] < 0:
                self._failures[index] += 1
                continue
            # the model adds a token of its own after the candidates
            room = row.max_length - len(row.ids) - 1
            count = min(self._counts[index], room, max(1, _MAX_LOGITS // len(live) - 1))
            if count > 0:
                counts[index] = count
        return self._source.propose(counts) if counts else {}

    def _settle(self, index: int, proposed: int, accepted: int) -> None:
        """A row has been checked: forget what was wrong, and decide how much to try next."""
        self.statistics.proposed += proposed
        self.statistics.accepted += accepted
        row = self.rows[index]
        if row.finish_reason is not None:
            self._release([index])
            self._source.free([index])
        else:
            # nothing has been computed from the newest token
            self.cached.truncate(index, len(row.ids) - 1)
            self._source.settle(index)
        if not proposed:
            return
        if self._speculation.schedule != "constant":
            self._counts[index] = self._counts[index] + 2 if accepted == proposed else max(1, self._counts[index] - 1)
        self._failures[index] = 0 if accepted else self._failures[index] + 1
        if self._failures[index] == _PATIENCE:
            self._failures[index] = -_REST

    def _remember(self) -> None:
        if self._speculation.schedule == "heuristic" and self._speculation.assistant is not None:
            _REMEMBERED[self._speculation.assistant] = round(sum(self._counts) / len(self._counts))

    # ---- the check -----------------------------------------------------------------------------------------------

    def _accept(self, logits: Tensor, live: list[int], candidates: dict[int, list[int]]) -> None:
        """Choose the next tokens of the rows as far as there are logits for them.

        Args:
            logits: [sum over rows of 1 + number of candidates, vocab_size], after each row's newest token and after
                each of its candidates.
            live: the rows.
            candidates: of each row that has any.
        """
        # place of the logits that a row's next token is chosen from
        place, start = {}, 0
        before = {}
        # rows that can be given a token, by how many new ones they have: processors see rows of one length together
        ready: dict[int, list[int]] = {}
        for index in live:
            place[index] = start
            start += 1 + len(candidates.get(index, ()))
            before[index] = len(self.rows[index].ids)
            ready.setdefault(self.rows[index].num_new, []).append(index)
        while ready:
            step = min(ready)
            group = sorted(ready.pop(step))
            places = [place[index] for index in group]
            chosen_from = logits
            if len(places) < len(logits):
                # a slice costs a tenth of indexing by a list
                chosen_from = logits[places[0] : places[0] + 1] if len(places) == 1 else logits[places]
            tokens = self._chooser.choose(chosen_from, group)
            self._append(group, tokens)
            right = []
            for index, token in zip(group, tokens, strict=True):
                row = self.rows[index]
                guesses = candidates.get(index, [])
                checked = len(row.ids) - 1 - before[index]
                if row.finish_reason is None and checked < len(guesses) and guesses[checked] == token:
                    place[index] += 1
                    right.append(index)
            going_on = sum(self.rows[index].finish_reason is None for index in group)
            if right and not (self._together and len(right) < going_on):
                ready.setdefault(step + 1, []).extend(right)
        self._apply_clock(live)
        for index in live:
            guesses = candidates.get(index, [])
            new = self.rows[index].ids[before[index] :]
            accepted = sum(1 for guess, token in zip(guesses, new, strict=False) if guess == token)
            self._settle(index, len(guesses), accepted)


# ---- from the arguments of generate --------------------------------------------------------------------------------


def make_speculation(
    executor: Executor,
    config: GenerationConfig,
    assistant_model: Any = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
) -> Speculation | None:
    """How a call of ``generate`` finds candidates; None if it asks for none.

    Args:
        executor: of the model.
        config: the settings of the call.
        assistant_model: a smaller model, or None.
        tokenizer, assistant_tokenizer: of the model and of the smaller one, if these have different vocabularies.

    Raises:
        RequestError: several sources are asked for, the assistant does not fit, or a setting does not go with it.
    """
    sources = {
        "assistant_model": assistant_model,
        "assistant_early_exit": config.assistant_early_exit,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens,
    }
    asked = [name for name, value in sources.items() if value is not None]
    if assistant_tokenizer is not None and assistant_model is None:
        raise RequestError("assistant_tokenizer was given without assistant_model; pass both or neither")
    if not asked:
        return None
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(asked)} are all sources of candidates; choose one of them")
    _check_combination(config, asked[0])
    schedule = config.get("num_assistant_tokens_schedule")
    if config.prompt_lookup_num_tokens is not None:
        ngram = config.max_matching_ngram_size or 2
        return Speculation(config.prompt_lookup_num_tokens, schedule, max_ngram=ngram)
    confidence = config.get("assistant_confidence_threshold")
    if config.assistant_early_exit is not None:
        layers = executor.plan.n_layer
        if not 1 <= config.assistant_early_exit <= layers:
            raise RequestError(
                f"assistant_early_exit={config.assistant_early_exit}, expected a number of layers from 1 to {layers}, "
                "as many as the model has"
            )
        draft = early_exit(executor, config.assistant_early_exit)
        return Speculation(config.get("num_assistant_tokens"), schedule, draft, confidence=confidence)
    draft = _assistant_executor(assistant_model)
    tokenizers = _check_vocabularies(executor, draft, tokenizer, assistant_tokenizer)
    # what the caller says goes before the assistant's own settings, which transformers looks at alone
    own = getattr(assistant_model, "generation_config", None) or GenerationConfig()
    merged = config.filled_from(own)
    schedule = merged.get("num_assistant_tokens_schedule")
    count = merged.get("num_assistant_tokens")
    if schedule == "heuristic":
        count = _REMEMBERED.get(assistant_model, count)
    return Speculation(
        count,
        schedule,
        draft,
        assistant_model,
        merged.get("assistant_confidence_threshold"),
        tokenizers=tokenizers,
        lookbehind=merged.get("target_lookbehind"),
    )


def _check_combination(config: GenerationConfig, source: str) -> None:
    """Refuse what candidates do not go with."""
    if config.get("num_beams") > 1:
        raise RequestError(f"{source} does not go with num_beams={config.num_beams}; candidates continue single rows")
    if not config.get("use_cache"):
        raise RequestError(f"{source} requires `use_cache=True`: candidates are checked against cached keys and values")
    if config.get("context_policy") == "sliding":
        raise RequestError(f"{source} does not go with context_policy='sliding'; leave one of them out")


def _assistant_executor(assistant_model: Any) -> Executor:
    if not hasattr(assistant_model, "build_graph"):
        raise RequestError(
            f"assistant_model is a {type(assistant_model).__module__}.{type(assistant_model).__name__}, expected a "
            "language model of gpt2rt: load the checkpoint with gpt2rt's class"
        )
    draft = executor_for(assistant_model)
    head = draft.plan.nodes[-1]
    assert isinstance(head, Head)
    if head.linear is None:
        raise RequestError(
            f"assistant_model is a {type(assistant_model).__name__} without an output layer; load it as a language "
            "model (GPT2LMHeadModel)"
        )
    return draft


def _check_vocabularies(
    executor: Executor, draft: Executor, tokenizer: Any, assistant_tokenizer: Any
) -> tuple[Any, Any] | None:
    """The tokenizers between two vocabularies; None where both are one."""
    mine, its = executor.plan.vocab_size, draft.plan.vocab_size
    if mine == its:
        if assistant_tokenizer is not None:
            raise RequestError(
                f"`assistant_tokenizer` is not required when the main and assistant models have the same {mine} "
                "tokens; leave it out"
            )
        return None
    if tokenizer is None or assistant_tokenizer is None:
        raise RequestError(
            f"the model has {mine} tokens and assistant_model {its}; models with different tokenizers need both: "
            "generate(..., tokenizer=tokenizer, assistant_tokenizer=assistant_tokenizer)"
        )
    return tokenizer, assistant_tokenizer
