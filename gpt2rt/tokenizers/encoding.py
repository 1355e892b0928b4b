"""What a tokenizer returns: a dictionary of lists or tensors that also maps between tokens, words and characters."""

from collections import UserDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch


class CharSpan(NamedTuple):
    """Characters ``start`` to ``end`` (exclusive) of the text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens ``start`` to ``end`` (exclusive) of the encoding."""

    start: int
    end: int


class BatchEncoding(UserDict):
    """The result of calling a tokenizer: ``input_ids``, ``attention_mask`` and whatever else was asked for.

    Values are lists of ints (one text) or lists of such lists (a batch), or tensors [batch, seq] int64 with
    ``return_tensors``. Every value is an attribute too.

    Args:
        data: the values by name.
        encodings: one ``tokenizers.Encoding`` per row, for the mapping methods.
        tensor_type: None, "pt" (torch) or "np" (numpy).
        prepend_batch_axis: with ``tensor_type``: treat the values as those of one row.
        no_offsets: why tokens cannot be traced to characters; None if they can.
    Raises:
        ValueError: rows of unequal length cannot become a tensor, or ``tensor_type`` is unknown.
    """

    def __init__(
        self,
        data: dict[str, Any] | None = None,
        encodings: Sequence[Any] | None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        no_offsets: str | None = None,
    ) -> None:
        super().__init__(data or {})
        self._no_offsets = no_offsets
        self._encodings = list(encodings) if encodings is not None else None
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, item: Any) -> Any:
        """The value of a name; the ``tokenizers.Encoding`` of a row number; the rows of a slice."""
        if isinstance(item, str):
            return self.data[item]
        if isinstance(item, slice):
            return {key: value[item] for key, value in self.data.items()}
        return self._rows()[item]

    def __getattr__(self, name: str) -> Any:
        # "data" is absent while a copy or an unpickled object is being built
        data = self.__dict__.get("data", {})
        if name in data:
            return data[name]
        raise AttributeError(f"BatchEncoding has no {name!r}; it holds {', '.join(map(repr, data)) or 'nothing'}")

    def _rows(self) -> list[Any]:
        if self._encodings is None:
            raise ValueError(
                "this BatchEncoding was made from plain values: its tokens, words and characters are unknown"
            )
        return self._encodings

    def _row(self, first: int, second: int | None) -> tuple[Any, int]:
        """transformers' double signature: (row, index), or one index into row 0."""
        row, index = (0, first) if second is None else (first, second)
        encoding = self._rows()[row]
        return encoding, index

    def _traced_row(self, first: int, second: int | None) -> tuple[Any, int]:
        """:meth:`_row`, for the methods that know about characters."""
        if self._no_offsets is not None:
            raise ValueError(self._no_offsets)
        return self._row(first, second)

    @property
    def is_fast(self) -> bool:
        """Whether the mapping methods work."""
        return self._encodings is not None

    @property
    def encodings(self) -> list[Any] | None:
        """One ``tokenizers.Encoding`` per row, or None."""
        return self._encodings

    @property
    def n_sequences(self) -> int | None:
        """1 for single texts, 2 for pairs, None when unknown."""
        return self._encodings[0].n_sequences if self._encodings else None

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, in the alphabet of the vocabulary."""
        return self._rows()[batch_index].tokens

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Per token 0 or 1, the text of the pair it comes from; None for special tokens and padding."""
        return self._rows()[batch_index].sequence_ids

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Per token the number of its word; None for special tokens and padding."""
        return self._rows()[batch_index].word_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """Which text of the pair a token comes from."""
        encoding, index = self._row(batch_or_token_index, token_index)
        return encoding.token_to_sequence(index % len(encoding.ids) if index < 0 else index)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The number of a token's word."""
        encoding, index = self._row(batch_or_token_index, token_index)
        return encoding.token_to_word(index % len(encoding.ids) if index < 0 else index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """The characters a token covers; None for special tokens and padding."""
        encoding, index = self._traced_row(batch_or_token_index, token_index)
        span = encoding.token_to_chars(index)
        return CharSpan(*span) if span is not None else None

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word."""
        encoding, index = self._row(batch_or_word_index, word_index)
        span = encoding.word_to_tokens(index, sequence_index)
        return TokenSpan(*span) if span is not None else None

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """The characters of a word."""
        encoding, index = self._traced_row(batch_or_word_index, word_index)
        span = encoding.word_to_chars(index, sequence_index)
        return CharSpan(*span) if span is not None else None

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token that covers a character of the text; None where no token does."""
        encoding, index = self._traced_row(batch_or_char_index, char_index)
        return encoding.char_to_token(index, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The number of the word that covers a character of the text."""
        encoding, index = self._traced_row(batch_or_char_index, char_index)
        return encoding.char_to_word(index, sequence_index)

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> Self:
        """Turn every value into a tensor in place.

        Args:
            tensor_type: None (leave as is), "pt" or "np".
            prepend_batch_axis: put each value into a batch of one first.
        Raises:
            ValueError: rows have unequal lengths, or ``tensor_type`` is unknown.
        """
        if tensor_type is None:
            return self
        if tensor_type not in ("pt", "np"):
            raise ValueError(f"return_tensors = {tensor_type!r}, but it must be 'pt' (torch), 'np' (numpy) or None")
        for key, value in self.data.items():
            value = [value] if prepend_batch_axis else value
            lengths = {len(row) for row in value if isinstance(row, list | tuple)} if isinstance(value, list) else set()
            if len(lengths) > 1:
                raise ValueError(
                    f"{key!r} has rows of {min(lengths)} to {max(lengths)} tokens, which make no tensor; "
                    "pass padding=True (and truncation=True for long texts) to get rows of one length"
                )
            self.data[key] = _to_tensor(value, tensor_type)
        return self

    def to(self, device: str | torch.device | int, *, non_blocking: bool = False) -> Self:
        """Move the torch tensors to a device, in place."""
        self.data = {
            key: value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value
            for key, value in self.data.items()
        }
        return self


def _to_tensor(value: Any, tensor_type: str) -> Any:
    if tensor_type == "np":
        import numpy as np

        array = np.asarray(value)
        # an empty list has no integers to take the dtype from
        return array.astype(np.int64) if array.size == 0 else array
    if isinstance(value, torch.Tensor):
        return value
    tensor = torch.as_tensor(value)
    return tensor.to(torch.int64) if tensor.numel() == 0 else tensor
