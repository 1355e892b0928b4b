"""Candidates from a model with another vocabulary, by way of text.

The row is decoded to text and encoded for the draft model; what that adds is decoded and encoded back. Encoding the
end of the row together with the new text keeps tokens from being split where the two meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from typing import Any

from torch import Tensor

from .batch import CachedRows
from .candidates import Choice, Speculation, check_draft_logits, roll
from .decode import Row
from .reserve import new_cache
from .sampling import greedy
from .starts import BLOCK_SIZE


class TranslatedDraft:
    """A draft model over another vocabulary; it proposes its likeliest text.

    Args:
        speculation: with ``draft``, ``tokenizers`` and ``lookbehind``.
        rows: the rows of the call.
        vocab_size: of the model; a tokenizer can know more tokens than its model.

    Raises:
        RequestError: the draft's cache would not fit into this machine's memory.
    """

    def __init__(self, speculation: Speculation, rows: ListLike[Row], vocab_size: int) -> None:
        assert speculation.draft is not None
        assert speculation.tokenizers is not None
        self._rows = rows
        self._lookbehind = speculation.lookbehind
        self._tokenizer, self._draft_tokenizer = speculation.tokenizers
        model = speculation.draft.plan
        self._n_positions = model.n_positions
        self._vocab_size, self._draft_vocab_size = vocab_size, model.vocab_size
        cache = new_cache(
            speculation.draft,
            len(rows) * -(-model.n_positions // BLOCK_SIZE),
            f"{len(rows)} rows of the assistant model",
            "ask for fewer",
        )
        self._cached = CachedRows(speculation.draft, cache, [model.n_positions] * len(rows))
        # the draft's tokens that are in its cache
        self._known: list[list[int]] = [[] for _ in rows]

    def propose(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        """As :class:`candidates.CandidateSource` says.

        Raises:
            NumericsError: the draft model's logits hold NaN or infinity.
        """
        wholes, tokens, room = {}, {}, {}
        for row, count in counts.items():
            whole = self._encoded(self._draft_tokenizer, self._decoded(self._tokenizer, self._rows[row].ids))
            # the last token that is added needs no position
            if whole and len(whole) <= self._n_positions and max(whole) < self._draft_vocab_size:
                wholes[row], room[row] = whole, min(count, self._n_positions + 1 - len(whole))
                tokens[row] = self._unknown(row, whole)
        added = roll(self._cached, tokens, room, self._choose)
        found = {}
        for row, new in added.items():
            self._known[row] = (wholes[row] + new)[: self._cached.sequence(row).length]
            found[row] = self._translated(row, wholes[row], new)[: counts[row]]
        return found

    def settle(self, row: int) -> None:
        # the next proposal keeps what is common, which shows only after encoding
        pass

    def free(self, rows: ListLike[int]) -> None:
        self._cached.free(rows)

    def _unknown(self, row: int, whole: list[int]) -> list[int]:
        """Those of a row's draft tokens that the cache does not hold, at least the last; it forgets all others."""
        common = 0
        for known, token in zip(self._known[row], whole[:-1], strict=False):
            if known != token:
                break
            common += 1
        if self._cached.sequences[row] is None:
            self._cached.begin(row)
        self._cached.truncate(row, common)
        return whole[common:]

    def _choose(self, logits: Tensor, rows: list[int], added: Mapping[int, list[int]]) -> Choice:
        check_draft_logits(logits, rows)
        return list(greedy(logits)), [True] * len(rows)

    def _translated(self, row: int, whole: list[int], new: list[int]) -> list[int]:
        """The model's tokens for what the draft added."""
        before = self._decoded(self._draft_tokenizer, whole)
        after = self._decoded(self._draft_tokenizer, whole + new)
        if not after.startswith(before):
            return []
        text = after[len(before) :]
        end = self._rows[row].ids[-self._lookbehind :]
        together = self._encoded(self._tokenizer, self._decoded(self._tokenizer, end) + text)
        found = together[len(end) :] if together[: len(end)] == end else self._encoded(self._tokenizer, text)
        unknown = [place for place, token in enumerate(found) if token >= self._vocab_size]
        return found[: unknown[0]] if unknown else found

    @staticmethod
    def _decoded(tokenizer: Any, ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @staticmethod
    def _encoded(tokenizer: Any, text: str) -> list[int]:
        # a row is longer than some tokenizers think a text may be, which is no concern here
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False)) if text else []
