"""Text from tokens, one token at a time: the decoders of the ``tokenizers`` library as streams.

A decoder is described by its entry of ``tokenizer.json``. Some can only say what a token becomes when the next one is
known (the last "</w>" is dropped, a run of byte tokens is text only as a whole), so each stage may hold text back; what
it has given out never changes. All pieces and the end together are what the library makes of the whole sequence, which
the tests compare.
"""

import codecs
import re
from collections.abc import Mapping
from typing import Any, Protocol

from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.bytelevel import token_to_bytes

# in this order, as transformers and the WordPiece decoder apply them
_CONTRACTIONS = ((" n't", "n't"), (" 'm", "'m"))
_ENDINGS = ((" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))
_MARKS = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"))
CLEAN_UP = (*_MARKS, *_CONTRACTIONS, *_ENDINGS)
_WORDPIECE_CLEAN_UP = (*_MARKS, *_CONTRACTIONS, (" do not", " don't"), *_ENDINGS)
# the library reads the digits with a function that takes a sign as well
_BYTE_TOKEN = re.compile(r"<0x(\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")


def clean_up(text: str) -> str:
    """Text without the spaces before punctuation and English endings that joining words leaves."""
    return _replace_all(text, CLEAN_UP)


def _replace_all(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


class Stage(Protocol):
    """One step from tokens to text."""

    def put(self, piece: str) -> list[str]:
        """What a further piece lets out."""

    def end(self) -> list[str]:
        """The rest."""


class _Stateless:
    def end(self) -> list[str]:
        return []


class _Joined(_Stateless):
    """No decoder: the tokens with spaces between them."""

    def __init__(self) -> None:
        self._first = True

    def put(self, piece: str) -> list[str]:
        first, self._first = self._first, False
        return [piece if first else f" {piece}"]


class _WordPiece(_Stateless):
    """A space before each token that does not begin with the prefix of a word's later pieces."""

    def __init__(self, prefix: str, cleanup: bool) -> None:
        self._prefix, self._cleanup = prefix, cleanup
        self._first = True

    def put(self, piece: str) -> list[str]:
        if not self._first:
            piece = piece.replace(self._prefix, "", 1) if piece.startswith(self._prefix) else f" {piece}"
        self._first = False
        return [_replace_all(piece, _WORDPIECE_CLEAN_UP) if self._cleanup else piece]


class _WordEnd:
    """A space for each end-of-word mark, except in the last token."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        # from the first mark of the newest token on
        self._held = ""

    def put(self, piece: str) -> list[str]:
        before = self._held.replace(self._suffix, " ")
        at = piece.find(self._suffix)
        self._held = piece[at:] if at >= 0 else ""
        return [before + (piece[:at] if at >= 0 else piece)]

    def end(self) -> list[str]:
        rest, self._held = self._held.replace(self._suffix, ""), ""
        return [rest]


class _Metaspace(_Stateless):
    """Spaces for the character that stands for them; none at the start, where the tokenizer had put one."""

    def __init__(self, replacement: str, drop_first: bool) -> None:
        self._replacement, self._drop = replacement, drop_first

    def put(self, piece: str) -> list[str]:
        drop, self._drop = self._drop, False
        return [piece.replace(self._replacement, "" if drop else " ")]


class _Replace(_Stateless):
    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def put(self, piece: str) -> list[str]:
        return [piece.replace(self._old, self._new)]


class _ByteFallback:
    """Characters for runs of tokens such as "<0xE6>"; U+FFFD for each token of a run that is no UTF-8."""

    def __init__(self) -> None:
        self._run = bytearray()

    def put(self, piece: str) -> list[str]:
        byte = fallback_byte(piece)
        if byte is not None:
            self._run.append(byte)
            return []
        return [*self.end(), piece]

    def end(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


def fallback_byte(token: str) -> int | None:
    """The byte of a token of the form "<0xE6>", else None."""
    found = _BYTE_TOKEN.fullmatch(token)
    return int(found[1], 16) if found else None


class _Strip:
    """Up to ``start`` and ``stop`` occurrences of a character less at the ends: of each piece, or of the whole text."""

    def __init__(self, content: str, start: int, stop: int, whole: bool) -> None:
        self._content, self._start, self._stop, self._whole = content, start, stop, whole
        self._left = start
        self._held = ""

    def put(self, piece: str) -> list[str]:
        if not self._whole:
            return [self._cut_end(self._cut_start(piece, self._start)[0])]
        piece, self._left = self._cut_start(piece, self._left)
        text = self._held + piece
        kept = text
        for _ in range(self._stop):
            kept = kept.removesuffix(self._content)
        self._held = text[len(kept) :]
        return [kept]

    def _cut_start(self, piece: str, left: int) -> tuple[str, int]:
        """(the rest of a piece, how many may still be cut from the next one)."""
        while left and piece.startswith(self._content):
            piece, left = piece[len(self._content) :], left - 1
        return piece, 0 if piece else left

    def _cut_end(self, piece: str) -> str:
        for _ in range(self._stop):
            piece = piece.removesuffix(self._content)
        return piece

    def end(self) -> list[str]:
        rest, self._held, self._left = self._cut_end(self._held), "", self._start
        return [rest]


class _ByteLevel:
    """Characters for the byte alphabet of GPT-2; U+FFFD for what is no UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, piece: str) -> list[str]:
        return [self._decoder.decode(token_to_bytes(piece))]

    def end(self) -> list[str]:
        return [self._decoder.decode(b"", True)]


class _CleanUp:
    """:func:`clean_up` of the whole text; a word is held back until the next one begins."""

    def __init__(self) -> None:
        self._held = ""

    def put(self, piece: str) -> list[str]:
        text = self._held + piece
        # nothing reaches over a space between two characters that are neither spaces nor apostrophes
        for at in range(len(text) - 2, max(0, len(self._held) - 2), -1):
            if text[at] == " " and text[at - 1] not in " '" and text[at + 1] not in " '":
                self._held = text[at:]
                return [clean_up(text[:at])]
        self._held = text
        return []

    def end(self) -> list[str]:
        rest, self._held = clean_up(self._held), ""
        return [rest]


class TokenStream:
    """Text of a growing sequence of tokens.

    Args:
        decoder: the ``decoder`` of a ``tokenizer.json``, checked (see ``components``); None joins tokens with spaces.
        cleaned: apply :func:`clean_up` to the text.
    """

    def __init__(self, decoder: Mapping[str, Any] | None, cleaned: bool = False) -> None:
        self._stages = [*_stages(decoder), *([_CleanUp()] if cleaned else [])]

    def put(self, token: str) -> str:
        """The text that one more token lets out."""
        pieces = [token]
        for stage in self._stages:
            pieces = [out for piece in pieces for out in stage.put(piece)]
        return "".join(pieces)

    def end(self) -> str:
        """The rest."""
        pieces: list[str] = []
        for stage in self._stages:
            pieces = [*(out for piece in pieces for out in stage.put(piece)), *stage.end()]
        return "".join(pieces)


def _stages(decoder: Mapping[str, Any] | None) -> list[Stage]:
    if decoder is None:
        return [_Joined()]
    listed = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    stages: list[Stage] = []
    whole = False
    for part in listed:
        if part["type"] == "Fuse":
            # the pieces are those of one text from here on
            whole = True
        else:
            stages.append(_stage(part, whole))
    return stages


def _stage(part: Mapping[str, Any], whole: bool) -> Stage:
    match part["type"]:
        case "WordPiece":
            return _WordPiece(part.get("prefix", "##"), part.get("cleanup", True))
        case "BPEDecoder":
            return _WordEnd(part.get("suffix", "</w>"))
        case "Metaspace":
            return _Metaspace(part.get("replacement", "▁"), part.get("prepend_scheme", "always") != "never")
        case "Replace":
            return _Replace(part["pattern"]["String"], part["content"])
        case "ByteFallback":
            return _ByteFallback()
        case "Strip":
            return _Strip(part["content"], part["start"], part["stop"], whole)
        case "ByteLevel":
            return _ByteLevel()
    raise TokenizerError(f"decoder {part['type']!r} is not known")


def inner_bytes(decoder: Mapping[str, Any] | None, token: str) -> bytes:
    """The UTF-8 bytes that a token adds in the middle of a text."""
    if decoder is None:
        return f" {token}".encode()
    for part in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match part["type"]:
            case "WordPiece":
                stage = _stage(part, False)
                stage.put("")
                token = "".join(stage.put(token))
            case "BPEDecoder":
                token = token.replace(part.get("suffix", "</w>"), " ")
            case "Metaspace":
                token = token.replace(part.get("replacement", "▁"), " ")
            case "Replace":
                token = token.replace(part["pattern"]["String"], part["content"])
            case "ByteFallback":
                byte = fallback_byte(token)
                if byte is not None:
                    return bytes([byte])
            case "ByteLevel":
                return token_to_bytes(token)
    return token.encode("utf-8", "replace")
