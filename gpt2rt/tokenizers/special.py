"""Special and added tokens: their attributes, their ids, and adding new ones."""

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpt2rt.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def as_added_token(value: "str | AddedToken | Mapping[str, Any]", special: bool) -> "AddedToken":
    """An ``AddedToken`` from a string, from its JSON form, or as it is."""
    from tokenizers import AddedToken

    if isinstance(value, AddedToken):
        return value
    if isinstance(value, str):
        check_text(value, "the token")
        return AddedToken(value, special=special, normalized=not special)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        check_text(value["content"], "the token")
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return AddedToken(value["content"], **{"special": special, **{f: bool(value[f]) for f in flags if f in value}})
    raise TokenizerError(f"{value!r} is no token: pass a string, an AddedToken or an object with 'content'")


class SpecialTokens:
    """The part of a tokenizer that knows vocabulary, added and special tokens.

    ``bos_token``, ``eos_token``, ``unk_token``, ``sep_token``, ``pad_token``, ``cls_token`` and ``mask_token`` are
    strings or None; each has an ``..._id``. All can be set.
    """

    _backend: "Tokenizer"
    _special: dict[str, str | None]
    _extra_special: list[str]
    _bytes: list[bytes] | None
    _special_ids: frozenset[int]

    def __getattr__(self, name: str) -> Any:
        token_name = name.removesuffix("_id")
        if token_name in SPECIAL_TOKEN_NAMES and "_special" in self.__dict__:
            token = self._special[token_name]
            return token if token is None or name == token_name else self.convert_tokens_to_ids(token)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        token_name = name.removesuffix("_id")
        if token_name not in SPECIAL_TOKEN_NAMES:
            object.__setattr__(self, name, value)
            return
        if value is not None and name != token_name:
            value = self.convert_ids_to_tokens(int(value))
            if value is None:
                raise TokenizerError(f"{name}: no token has that id; ids go from 0 to {len(self) - 1}")
        if value is not None and not isinstance(value, str):
            value = as_added_token(value, special=True).content
        self._special[token_name] = value
        if value is not None and self._backend.token_to_id(value) is None:
            warnings.warn(
                f"{token_name} = {value!r} is not in the vocabulary, so its id is that of the unknown token; to add it "
                f"use add_special_tokens({{{token_name!r}: {value!r}}}) and model.resize_token_embeddings",
                stacklevel=2,
            )
        self._tokens_changed()

    def _tokens_changed(self) -> None:
        """Drop what was derived from the set of tokens."""
        self._bytes = None
        added = self._backend.get_added_tokens_decoder()
        ids = {token_id for token_id, token in added.items() if token.special}
        known = (self._backend.token_to_id(token) for token in self.all_special_tokens)
        self._special_ids = frozenset(ids | {token_id for token_id in known if token_id is not None})

    # ---- vocabulary ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of tokens with the added ones."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id with the added tokens."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        """The same as :meth:`get_vocab`."""
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> "dict[int, AddedToken]":
        """Id -> added token, by id."""
        return dict(sorted(self._backend.get_added_tokens_decoder().items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Added token -> id, by id."""
        return {token.content: token_id for token_id, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """The same as ``added_tokens_encoder``."""
        return self.added_tokens_encoder

    def _token_bytes(self, token: str, added: bool) -> bytes:
        """The UTF-8 bytes that a token of the vocabulary, or an added one, stands for in the middle of a text."""
        raise NotImplementedError

    def id_to_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """The bytes that a token stands for; empty for an id that no token has, and for a skipped special token.

        They are exact for byte-level tokenizers. For the others they are what the token adds in the middle of a text,
        with the space before or after it; at the ends of a text ``decode`` may drop that space.

        Raises:
            ValueError: ``token_id`` is negative.
        """
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative; ids go from 0 to {len(self) - 1}")
        if skip_special_tokens and token_id in self._special_ids:
            return b""
        table = self._bytes
        if table is None:
            added = self._backend.get_added_tokens_decoder()
            vocab = self._backend.get_vocab(with_added_tokens=True)
            table = [b""] * (max(vocab.values(), default=-1) + 1)
            for token, index in vocab.items():
                table[index] = self._token_bytes(token, index in added)
            self._bytes = table
        return table[token_id] if token_id < len(table) else b""

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or a list of ids; an unknown token has the id of ``unk_token``, or None without one."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self._backend.token_to_id(tokens)
        unknown = self._special["unk_token"]
        if token_id is None and unknown is not None:
            token_id = self._backend.token_to_id(unknown)
        return token_id

    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> Any:
        """The token of an id (None if there is none), or a list of tokens.

        Raises:
            ValueError: an id is negative.
            TypeError: an id is no integer.
        """
        if isinstance(ids, int):
            if ids < 0:
                raise ValueError(f"token id {ids} is negative; ids go from 0 to {len(self) - 1}")
            return self._backend.id_to_token(ids)
        left_out = self._special_ids if skip_special_tokens else ()
        return [self.convert_ids_to_tokens(i) for i in map(operator.index, ids) if i not in left_out]

    def get_special_tokens_mask(
        self,
        token_ids_0: Iterable[int],
        token_ids_1: Iterable[int] | None = None,
        already_has_special_tokens: bool = True,
    ) -> list[int]:
        """1 for each special token of an encoded text, 0 for each other.

        Args:
            token_ids_0: ids with their special tokens.
            token_ids_1: must be None.
            already_has_special_tokens: must be True; call the tokenizer with ``return_special_tokens_mask`` otherwise.
        Raises:
            ValueError: the ids are those of texts without special tokens.
        """
        if token_ids_1 is not None or not already_has_special_tokens:
            raise TokenizerError(
                "get_special_tokens_mask takes encoded ids with their special tokens; to get a mask while encoding, "
                "call the tokenizer with return_special_tokens_mask=True"
            )
        special = set(self.all_special_ids)
        return [int(int(token_id) in special) for token_id in token_ids_0]

    # ---- adding ----------------------------------------------------------------------------------------------------

    def add_tokens(
        self, new_tokens: "str | AddedToken | Sequence[str | AddedToken]", special_tokens: bool = False
    ) -> int:
        """Append tokens to the vocabulary; those it has already are left as they are.

        Args:
            new_tokens: one token or several.
            special_tokens: they are special: never split, and left out by ``skip_special_tokens``.
        Returns:
            how many were new; pass ``len(tokenizer)`` to ``model.resize_token_embeddings``.
        """
        listed = [new_tokens] if isinstance(new_tokens, str) or not isinstance(new_tokens, Sequence) else new_tokens
        tokens = [as_added_token(token, special=special_tokens) for token in listed]
        before = len(self)
        if special_tokens:
            self._backend.add_special_tokens(tokens)
        else:
            self._backend.add_tokens(tokens)
        self._tokens_changed()
        return len(self) - before

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Set special tokens by name and add those that the vocabulary lacks.

        Args:
            special_tokens_dict: e.g. ``{"pad_token": "<|pad|>"}``; ``additional_special_tokens`` (or
                ``extra_special_tokens``) takes a list.
            replace_extra_special_tokens: whether such a list replaces the older one.
        Returns:
            how many tokens were new.
        Raises:
            ValueError: an unknown name.
        """
        extra_names = ("extra_special_tokens", "additional_special_tokens")
        for name in special_tokens_dict:
            if name not in SPECIAL_TOKEN_NAMES + extra_names:
                raise TokenizerError(
                    f"{name!r} is no special token; known: {', '.join(SPECIAL_TOKEN_NAMES + extra_names)}"
                )
        added = 0
        for name, value in special_tokens_dict.items():
            if name in extra_names:
                tokens = [as_added_token(token, special=True) for token in value]
                added += self.add_tokens(tokens, special_tokens=True)
                kept = [] if replace_extra_special_tokens else self._extra_special
                new = [token.content for token in tokens]
                self._extra_special = [*kept, *(token for token in new if token not in kept)]
            else:
                token = as_added_token(value, special=True)
                added += self.add_tokens(token, special_tokens=True)
                setattr(self, name, token.content)
        self._tokens_changed()
        return added

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens without a name of their own."""
        return list(self._extra_special)

    @additional_special_tokens.setter
    def additional_special_tokens(self, value: Sequence[str]) -> None:
        self._extra_special = [as_added_token(token, special=True).content for token in value or ()]
        self._tokens_changed()

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Their ids."""
        return self.convert_tokens_to_ids(self._extra_special)

    @property
    def extra_special_tokens(self) -> list[str]:
        """transformers 5's name of ``additional_special_tokens``."""
        return list(self._extra_special)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Name -> token for the special tokens that are set."""
        return {name: token for name, token in self._special.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """All special tokens, each once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra_special]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of ``all_special_tokens``."""
        return self.convert_tokens_to_ids(self.all_special_tokens)


def check_text(text: str, what: str) -> None:
    """Raise TokenizerError if the text cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{what} holds the lone surrogate {text[error.start]!r} at character {error.start}, which is no text; "
            "clean it with text.encode('utf-8', 'replace').decode('utf-8')"
        ) from None
