"""Text from token ids as they come, one complete character at a time."""

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from gpt2rt.tokenizers.decoding import TokenStream

# a UTF-8 character has at most four bytes, and a byte-level token at least one
_MAX_CHARACTER_BYTES = 4


class DecodingTokenizer(Protocol):
    """What the decoder needs of a byte-level tokenizer; one without ``errors`` has ``token_stream`` instead."""

    errors: str

    def id_to_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """The bytes of one token; empty for a skipped or unknown one."""


class StreamDecoder:
    """Decode a growing sequence of token ids without ever showing half a character.

    What a piece says never changes afterwards: a character whose bytes are spread over several tokens comes out with
    the token that completes it, and text that the next token may still change (the space after a word) comes with that
    token. Without a prompt, all pieces together are exactly ``tokenizer.decode(new_ids)``.

    With a prompt they are what the new ids add to its text. For byte-level tokenizers that is ``decode(new_ids)`` too;
    where words are joined with spaces, the space between the prompt and the first new word is included. When the prompt
    ends inside a character, the new ids may complete it: then that character comes out once, and nothing of the prompt
    before it; otherwise the prompt's half is dropped, since it was shown with the prompt.

    Args:
        tokenizer: one of gpt2rt's tokenizers.
        prompt_ids: the ids before the first new one.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        # only byte-level tokenizers can meet half a character and have to say what to do with it
        kind = _ByteDecoder if hasattr(tokenizer, "errors") else _TokenDecoder
        self._decoder: _ByteDecoder | _TokenDecoder = kind(tokenizer, prompt_ids, skip_special_tokens)

    def put(self, ids: Sequence[int]) -> str:
        """The text that these further ids complete; empty while nothing is sure.

        Raises:
            UnicodeDecodeError: invalid UTF-8, with a tokenizer whose ``errors`` is "strict".
        """
        return self._decoder.put(ids)

    def end(self) -> str:
        """The rest: what an unfinished character decodes to, ...; the decoder is ready for another text without prompt.

        Raises:
            UnicodeDecodeError: an unfinished character, with a tokenizer whose ``errors`` is "strict".
        """
        return self._decoder.end()


class _ByteDecoder:
    """By the bytes of the tokens."""

    def __init__(self, tokenizer: DecodingTokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(tokenizer.errors)
        # bytes of a character that the prompt began and no new id has touched yet
        self._prompt_tail = self._open_character(prompt_ids)

    def _open_character(self, prompt_ids: Sequence[int]) -> bytes:
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self._tokenizer.id_to_bytes(int(token_id), self._skip) + tail
            if len(tail) >= _MAX_CHARACTER_BYTES:
                break
        for length in range(1, min(len(tail), _MAX_CHARACTER_BYTES - 1) + 1):
            start = tail[-length:]
            if start[0] < 0x80 or start[0] >= 0xC0:
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                return start if decoder.decode(start) == "" else b""
        return b""

    def put(self, ids: Sequence[int]) -> str:
        data = b"".join(self._tokenizer.id_to_bytes(int(token_id), self._skip) for token_id in ids)
        if not data:
            return ""
        if self._prompt_tail:
            # a byte of the form 10xxxxxx goes on with the prompt's character, any other starts its own
            continues = 0x80 <= data[0] < 0xC0
            probe = codecs.getincrementaldecoder("utf-8")("strict")
            if continues:
                try:
                    probe.decode(self._prompt_tail + data[:1])
                except UnicodeDecodeError:
                    continues = False
            if continues:
                data = self._prompt_tail + data
            self._prompt_tail = b""
        return self._decoder.decode(data)

    def end(self) -> str:
        self._prompt_tail = b""
        rest = self._decoder.decode(b"", True)
        self._decoder.reset()
        return rest


class _TokenDecoder:
    """By the tokens, for tokenizers whose words are joined in some other way."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream: TokenStream = tokenizer.token_stream()
        # what the prompt's text ended with, as far as the next token may still change it
        self._shown = ""
        if len(prompt_ids):
            settled = self.put(prompt_ids)
            self._shown = tokenizer.decode(list(map(int, prompt_ids)), skip_special_tokens)[len(settled) :]

    def put(self, ids: Sequence[int]) -> str:
        tokens = self._tokenizer.convert_ids_to_tokens([int(token_id) for token_id in ids], self._skip)
        return self._unseen("".join(self._stream.put(token) for token in tokens if token is not None))

    def end(self) -> str:
        rest = self._unseen(self._stream.end())
        self._stream, self._shown = self._tokenizer.token_stream(), ""
        return rest

    def _unseen(self, text: str) -> str:
        if not text or not self._shown:
            return text
        pairs = enumerate(zip(text, self._shown, strict=False))
        known = next((i for i, (new, old) in pairs if new != old), min(len(text), len(self._shown)))
        self._shown = self._shown[known:] if known == len(text) else ""
        return text[known:]


IncrementalDetokenizer = StreamDecoder
