"""What ``generate`` returns with ``return_dict_in_generate=True``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor


@dataclasses.dataclass
class GenerateDecoderOnlyOutput:
    """Fields read as attributes, by name or by number; those that are None do not count.

    Attributes:
        sequences: [num_rows, length] int64, prompts and continuations.
        scores: for each step [num_rows, vocab_size] float32, after all processors; 0 in rows that were finished.
        logits: for each step [num_rows, vocab_size] float32, as the model gave them; 0 in rows that were finished.
        attentions, hidden_states, past_key_values: always None.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: None = None
    hidden_states: None = None
    past_key_values: None = None

    def keys(self) -> list[str]:
        """Names of the fields that are not None."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]

    def values(self) -> list[Any]:
        """The fields that are not None."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Names and values of the fields that are not None."""
        return list(zip(self.keys(), self.values(), strict=True))

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
