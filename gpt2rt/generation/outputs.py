"""What ``generate`` returns with ``return_dict_in_generate=True``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

#: for each step, a tensor of each layer
Steps = tuple[tuple[Tensor, ...], ...]


class _Output:
    """Fields read as attributes, by name or by number; those that are None do not count."""

    def keys(self) -> list[str]:
        """Names of the fields that are not None."""
        # every subclass is a dataclass; mypy cannot know that here
        return [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]  # type: ignore[attr-defined]

    def values(self) -> list[Any]:
        """The fields that are not None."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Names and values of the fields that are not None."""
        return list(zip(self.keys(), self.values(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        """A field, or ``default`` if it is None or there is none of that name."""
        return getattr(self, key) if key in self.keys() else default

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, key: str) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclasses.dataclass
class GenerateDecoderOnlyOutput(_Output):
    """The result of greedy search, sampling and assisted decoding.

    Attributes:
        sequences: [num_rows, length] int64, prompts and continuations.
        scores: for each step [num_rows, vocab_size] float32, after all processors; 0 in rows that were finished.
        logits: for each step [num_rows, vocab_size] float32, as the model gave them; 0 in rows that were finished.
        attentions: for each step, of each layer [num_rows, n_head, query_len, key_len]; in the first step the queries
            are the prompt's tokens, later the newest token. 0 for queries and keys that are padding. With
            ``use_cache=False``, and for OpenAI GPT as in transformers, the queries are all tokens so far in every step.
        hidden_states: for each step, of the embeddings and each layer [num_rows, query_len, n_embd].
        past_key_values: a cache of the prompt and all new tokens but the last, for forward or another generate;
            None with ``use_cache=False``.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: Steps | None = None
    hidden_states: Steps | None = None
    past_key_values: Any = None


@dataclasses.dataclass
class GenerateBeamDecoderOnlyOutput(_Output):
    """The result of beam search and beam sampling.

    Attributes:
        sequences: [batch * num_return_sequences, length] int64, prompts and continuations, the best of a prompt first.
        sequences_scores: [batch * num_return_sequences] float32, the sum of a row's scores divided by
            length**length_penalty, with ``output_scores``.
        scores: for each step [batch * num_beams, vocab_size] float32, log-probabilities after all processors, of the
            beams that were running; 0 where the prompt was done.
        logits: as ``scores``, as the model gave them.
        beam_indices: [batch * num_return_sequences, num_new_tokens] int32: in which row of ``scores`` each token was
            chosen; -1 after the end of a row.
        attentions, hidden_states, past_key_values: as in :class:`GenerateDecoderOnlyOutput`, of the running beams:
            [batch * num_beams, ...].
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    attentions: Steps | None = None
    hidden_states: Steps | None = None
    past_key_values: Any = None
