"""Texts to token ids and back: the calls that all tokenizers share."""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.encoding import BatchEncoding
from gpt2rt.tokenizers.special import SpecialTokens, check_text
from gpt2rt.tokenizers.truncation import Layout, pad_target, plan_layout, truncate

NO_PAD_TOKEN = (
    "Asking to pad but the tokenizer does not have a padding token. Set one with `tokenizer.pad_token = "
    "tokenizer.eos_token`, or add a new one with `tokenizer.add_special_tokens({'pad_token': '[PAD]'})` and resize the "
    "model's embeddings."
)

NO_OFFSETS = (
    "offsets are not known with use_ftfy_spacy: ftfy and spaCy rewrite the text before it is split; make the tokenizer "
    "without use_ftfy_spacy to get them"
)


def guarded(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call into the tokenizer library; its panics, which are no ``Exception``, become TokenizerError."""
    try:
        return call(*args, **kwargs)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"the tokenizer library gave up: {error}; is the tokenizer file damaged?") from None


class CallableTokenizer(SpecialTokens):
    """Encoding and decoding on top of a ``tokenizers.Tokenizer`` without post-processor.

    A subclass gives ``_backend_for``, ``_template`` and ``_decode``.
    """

    padding_side: str
    truncation_side: str
    model_max_length: int
    model_input_names: list[str]
    clean_up_tokenization_spaces: bool
    split_special_tokens: bool
    add_prefix_space: bool
    pad_token_type_id = 0
    is_fast = True
    _warned_long = False
    #: whether tokens can be traced to characters of the text
    _has_offsets = True

    def _backend_for(self, add_prefix_space: bool, split_special_tokens: bool) -> Any:
        """The ``tokenizers.Tokenizer`` for these settings."""
        raise NotImplementedError

    def _template(self) -> Any:
        """The post-processor that adds special tokens and marks the texts of a pair."""
        raise NotImplementedError

    # ---- encoding --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        *,
        truncation_side: str | None = None,
        add_prefix_space: bool | None = None,
        split_special_tokens: bool | None = None,
    ) -> BatchEncoding:
        """Token ids of a text, a pair of texts, or a batch of either.

        Args:
            text: a string; a list of strings (a batch); with ``is_split_into_words`` a list of words or a list of such
                lists. A batch may also hold pairs of strings.
            text_pair: the partner of ``text``, of the same form.
            text_target, text_pair_target: encoded as well; their ids become ``labels`` when ``text`` is given too.
            add_special_tokens: add what ``add_bos_token`` and ``add_eos_token`` ask for.
            padding: False, True or "longest", or "max_length".
            truncation: False, True or "longest_first", "only_first", "only_second"; ``max_length`` alone means True.
            max_length: tokens; defaults to ``model_max_length`` where one is needed and set.
            stride: tokens that overflowing pieces share.
            is_split_into_words: the words were split before; each gets a space in front, the first one too.
            pad_to_multiple_of: round padded lengths up to a multiple of this.
            padding_side, truncation_side: "left" or "right" for this call.
            return_tensors: "pt" for torch, "np" for numpy, [batch, seq] int64.
            return_token_type_ids: 0 for tokens of the first text, 1 for those of the second.
            return_attention_mask: 1 for tokens, 0 for padding; on by default.
            return_overflowing_tokens: what truncation cut off becomes further rows, with
                ``overflow_to_sample_mapping``.
            return_special_tokens_mask: 1 for added special tokens and padding.
            return_offsets_mapping: (start, end) characters of each token.
            return_length: tokens in each row.
            add_prefix_space, split_special_tokens: override the tokenizer's setting for this call.
            verbose: False silences the warning about rows longer than ``model_max_length``.
        Returns:
            a :class:`BatchEncoding`; values have no batch dimension for a single text without ``return_tensors``.
        Raises:
            ValueError: an argument is invalid, a text is not a string or holds a lone surrogate, or padding is asked
                for without a padding token.
        """
        if text is None and text_target is None:
            raise TokenizerError("pass text or text_target, both are None")
        if return_offsets_mapping and not self._has_offsets:
            raise TokenizerError(NO_OFFSETS)
        layout = plan_layout(padding, truncation, max_length, stride, pad_to_multiple_of, self.model_max_length)
        self._require_pad_token(layout.padding is not None)
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in self.model_input_names
        wanted = {
            "input_ids": True,
            "token_type_ids": return_token_type_ids,
            "attention_mask": return_attention_mask,
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
            "length": return_length,
        }
        options = {
            "add_special_tokens": add_special_tokens,
            "words": is_split_into_words,
            "prefix": self.add_prefix_space if add_prefix_space is None else add_prefix_space,
            "split": self.split_special_tokens if split_special_tokens is None else split_special_tokens,
            "pad_side": _side("padding_side", padding_side, self.padding_side),
            "cut_side": _side("truncation_side", truncation_side, self.truncation_side),
        }
        results = [
            self._encode_call(a, b, layout, wanted, options, return_overflowing_tokens, return_tensors, verbose)
            for a, b in ((text, text_pair), (text_target, text_pair_target))
            if a is not None
        ]
        if len(results) == 2:
            results[0]["labels"] = results[1]["input_ids"]
        return results[0]

    def _encode_call(
        self,
        text: Any,
        pair: Any,
        layout: Layout,
        wanted: Mapping[str, bool],
        options: Mapping[str, Any],
        overflowing: bool,
        return_tensors: str | None,
        verbose: bool,
    ) -> BatchEncoding:
        batched, firsts, seconds = _as_batch(text, pair, options["words"])
        encodings = self._encode_rows(firsts, seconds, layout, options)
        groups = [[row, *row.overflowing] if overflowing else [row] for row in encodings]
        target = pad_target([len(row.ids) for row in encodings], layout)
        rows = list(itertools.chain.from_iterable(groups))
        if target is not None:
            pad_id = self.convert_tokens_to_ids(self.pad_token)
            for row in rows:
                row.pad(
                    target,
                    direction=options["pad_side"],
                    pad_id=pad_id,
                    pad_type_id=self.pad_token_type_id,
                    pad_token=self.pad_token,
                )
        getters: dict[str, Callable[[Any], Any]] = {
            "input_ids": lambda row: row.ids,
            "token_type_ids": lambda row: row.type_ids,
            "attention_mask": lambda row: row.attention_mask,
            "special_tokens_mask": lambda row: row.special_tokens_mask,
            "offset_mapping": lambda row: row.offsets,
            "length": lambda row: len(row.ids),
        }
        data = {name: [getters[name](row) for row in rows] for name, asked in wanted.items() if asked}
        if overflowing:
            data["overflow_to_sample_mapping"] = [i for i, group in enumerate(groups) for _ in group]
        self._warn_if_long(data["input_ids"], layout, verbose)
        if not batched and return_tensors is None and not overflowing:
            # transformers keeps the length of a single text in a list of one
            data = {name: value if name == "length" else value[0] for name, value in data.items()}
        return BatchEncoding(data, rows, return_tensors, no_offsets=None if self._has_offsets else NO_OFFSETS)

    def _encode_rows(
        self, firsts: list[Any], seconds: list[Any] | None, layout: Layout, options: Mapping[str, Any]
    ) -> list[Any]:
        words = options["words"]
        template = self._template()
        add = options["add_special_tokens"]
        for texts in (firsts, seconds or ()):
            for index, text in enumerate(texts):
                for part in text if words else (text,):
                    check_text(part, f"text {index}")
        left = self._encode_texts(firsts, options)
        right = [None] * len(left) if seconds is None else self._encode_texts(seconds, options)
        rows = []
        for first, second in zip(left, right, strict=True):
            if layout.truncation is not None and layout.max_length is not None:
                extra = template.num_special_tokens_to_add(second is not None) if add else 0
                room = layout.max_length - extra
                if room < 0:
                    raise ValueError(f"max_length = {layout.max_length} leaves no room for {extra} special tokens")
                truncate(first, second, room, layout.truncation, layout.stride, options["cut_side"])
            rows.append(guarded(template.process, first, second, add))
        return rows

    def _encode_texts(self, texts: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
        """One ``tokenizers.Encoding`` per text (or list of words), without special tokens."""
        # words that were split elsewhere lost the space in front of them, which GPT-2's tokens contain
        backend = self._backend_for(options["prefix"] or options["words"], options["split"])
        return guarded(backend.encode_batch, texts, add_special_tokens=False, is_pretokenized=options["words"])

    def _require_pad_token(self, needed: bool) -> None:
        if needed and (self.pad_token is None or self.convert_tokens_to_ids(self.pad_token) is None):
            raise TokenizerError(NO_PAD_TOKEN)

    def _warn_if_long(self, rows: list[list[int]], layout: Layout, verbose: bool) -> None:
        longest = max(map(len, rows), default=0)
        if verbose and not self._warned_long and layout.max_length is None and longest > self.model_max_length:
            self._warned_long = True
            warnings.warn(
                f"a text has {longest} tokens, more than the {self.model_max_length} positions of the model; pass "
                "truncation=True to cut it",
                stacklevel=4,
            )

    def encode(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The ``input_ids`` of one text or pair, a list of ints (a tensor with ``return_tensors``).

        The arguments are those of calling the tokenizer.
        """
        encoding = self(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            stride=stride,
            padding_side=padding_side,
            return_tensors=return_tensors,
            **kwargs,
        )
        return encoding["input_ids"]

    def encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """transformers' older name for calling the tokenizer with one text."""
        return self(text, text_pair, **kwargs)

    def batch_encode_plus(self, batch_text_or_text_pairs: Any, **kwargs: Any) -> BatchEncoding:
        """transformers' older name for calling the tokenizer with a batch."""
        return self(list(batch_text_or_text_pairs), **kwargs)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The tokens of a text or pair, in the alphabet of the vocabulary."""
        return self(text, pair, add_special_tokens=add_special_tokens, **kwargs).tokens()

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens a call adds to a text or a pair."""
        return self._template().num_special_tokens_to_add(pair)

    @property
    def max_len_single_sentence(self) -> int:
        """The longest text in tokens, its special tokens not counted."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """The longest pair of texts in tokens, its special tokens not counted."""
        return self.model_max_length - self.num_special_tokens_to_add(True)

    # ---- padding of ids --------------------------------------------------------------------------------------------

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad encodings to one length; usable as a collate function.

        Args:
            encoded_inputs: a dictionary of lists or of lists of lists, or a list of dictionaries; ``input_ids``
                required, ``attention_mask``, ``token_type_ids`` and ``special_tokens_mask`` are padded along, other
                values stay. Tensors are accepted and make the result a tensor.
            padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask, return_tensors, verbose: as in
                calling the tokenizer.
        Raises:
            ValueError: no ``input_ids``, no padding token, or rows that differ in number.
        """
        if isinstance(encoded_inputs, list | tuple):
            if not encoded_inputs or not all(isinstance(row, Mapping) for row in encoded_inputs):
                raise TokenizerError("pad needs a dictionary or a non-empty list of dictionaries")
            encoded_inputs = {key: [row[key] for row in encoded_inputs] for key in encoded_inputs[0]}
        if "input_ids" not in encoded_inputs:
            raise TokenizerError(f"pad needs 'input_ids', got {', '.join(map(repr, encoded_inputs)) or 'nothing'}")
        data = {}
        for key, value in encoded_inputs.items():
            data[key], kind = _as_lists(value)
            if key == "input_ids" and return_tensors is None:
                return_tensors = kind
        layout = plan_layout(padding, None, max_length, 0, pad_to_multiple_of, self.model_max_length)
        layout = layout._replace(truncation=None)
        self._require_pad_token(layout.padding is not None)
        side = _side("padding_side", padding_side, self.padding_side)
        single = not data["input_ids"] or not isinstance(data["input_ids"][0], list)
        if single:
            data = {key: [value] for key, value in data.items()}
        rows = data["input_ids"]
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        if return_attention_mask and "attention_mask" not in data:
            data["attention_mask"] = [[1] * len(row) for row in rows]
        fills = {"attention_mask": 0, "token_type_ids": self.pad_token_type_id, "special_tokens_mask": 1}
        target = pad_target([len(row) for row in rows], layout)
        if target is not None:
            fills["input_ids"] = self.convert_tokens_to_ids(self.pad_token)
            for key, fill in fills.items():
                if key not in data:
                    continue
                if len(data[key]) != len(rows):
                    raise TokenizerError(f"{key!r} has {len(data[key])} rows, input_ids has {len(rows)}")
                data[key] = [_fill(row, target, fill, side) for row in data[key]]
        if single and return_tensors is None:
            data = {key: value[0] for key, value in data.items()}
        return BatchEncoding(data, None, return_tensors)

    # ---- decoding --------------------------------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The text of token ids; ids that no token has stand for nothing.

        Args:
            token_ids: an id, a list of ids, or a tensor or array [seq]; a batch [batch, seq] gives a list of texts.
            skip_special_tokens: leave special tokens out.
            clean_up_tokenization_spaces: remove spaces before punctuation and English endings; None takes the
                tokenizer's setting. Without effect on BPE, as in transformers 5.
        Returns:
            the text; bytes that are no UTF-8 become U+FFFD, or what the ``errors`` of a GPT2Tokenizer says.
        Raises:
            UnicodeDecodeError: with ``errors="strict"``, where the bytes are no UTF-8.
            ValueError: an id is negative.
            TypeError: an id is no integer, or an unknown keyword.
        """
        # transformers' switch between source and target vocabulary and its spacing option have nothing to act on here
        for name in ("use_source_tokenizer", "spaces_between_special_tokens"):
            kwargs.pop(name, None)
        if kwargs:
            raise TypeError(f"decode got unknown keywords: {', '.join(sorted(kwargs))}")
        ids, _ = _as_lists(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list | tuple):
            return [self._decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        return self._decode(ids, skip_special_tokens, clean_up_tokenization_spaces)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool, clean: bool | None) -> str:
        """The text of one sequence."""
        raise NotImplementedError

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """A list of texts, one per row of ``sequences``, or one for a single row [seq]; see :meth:`decode`."""
        rows = _as_lists(sequences)[0]
        if rows and not isinstance(rows[0], list | tuple):
            rows = [rows]
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, **kwargs) for row in rows]


def _side(name: str, value: str | None, default: str) -> str:
    value = default if value is None else value
    if value not in ("left", "right"):
        raise ValueError(f"{name} = {value!r}, but it must be 'left' or 'right'")
    return value


def _fill(row: list[Any], target: int, fill: Any, side: str) -> list[Any]:
    missing = [fill] * max(0, target - len(row))
    return row + missing if side == "right" else missing + row


def _as_lists(value: Any) -> tuple[Any, str | None]:
    """Python numbers or lists from tensors and arrays, at any depth, and the kind of tensor found ("pt", "np")."""
    if isinstance(value, torch.Tensor):
        return value.tolist(), "pt"
    if hasattr(value, "tolist"):
        return value.tolist(), "np"
    if isinstance(value, list | tuple):
        if value and (isinstance(value[0], torch.Tensor) or hasattr(value[0], "tolist")):
            kind = "pt" if isinstance(value[0], torch.Tensor) else "np"
            return [row.tolist() for row in value], kind
        return list(value), None
    if isinstance(value, Mapping):
        return _as_lists(value["input_ids"])
    return value, None


def _as_batch(text: Any, pair: Any, words: bool) -> tuple[bool, list[Any], list[Any] | None]:
    """(was it a batch, first texts, second texts or None), each text checked to be a string or a list of words."""

    def is_words(item: Any) -> bool:
        return isinstance(item, list | tuple) and all(isinstance(word, str) for word in item)

    if words:
        batched = isinstance(text, list | tuple) and bool(text) and isinstance(text[0], list | tuple)
    else:
        batched = isinstance(text, list | tuple)
    firsts = list(text) if batched else [text]
    seconds = None if pair is None else list(pair) if batched and isinstance(pair, list | tuple) else [pair]
    if not words and batched and pair is None and firsts and all(is_words(t) and len(t) == 2 for t in firsts):
        firsts, seconds = [t[0] for t in firsts], [t[1] for t in firsts]
    if seconds is not None and len(seconds) != len(firsts):
        raise TokenizerError(f"text has {len(firsts)} rows and text_pair has {len(seconds)}; they must be equally many")
    for name, texts in (("text", firsts), ("text_pair", seconds or [])):
        for index, item in enumerate(texts):
            if not (is_words(item) if words else isinstance(item, str)):
                expected = "a list of words" if words else "a string"
                hint = "; pass is_split_into_words=True for lists of words" if is_words(item) else ""
                raise TokenizerError(f"{name} {index} is {type(item).__name__}, expected {expected}{hint}")
    return batched, firsts, seconds
