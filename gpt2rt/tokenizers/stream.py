"""Text from token ids as they come, one complete character at a time."""

import codecs
from collections.abc import Sequence
from typing import Protocol

# a UTF-8 character has at most four bytes, and a byte-level token at least one
_MAX_CHARACTER_BYTES = 4


class DecodingTokenizer(Protocol):
    """What the decoder needs of a tokenizer."""

    errors: str

    def id_to_bytes(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """The bytes of one token; empty for a skipped or unknown one."""


class StreamDecoder:
    """Decode a growing sequence of token ids without ever showing half a character.

    A character whose bytes are spread over several tokens comes out with the token that completes it. With a prompt
    that ends on a character boundary (or none), all pieces together are exactly ``tokenizer.decode(new_ids)``. When the
    prompt ends inside a character, the new ids may complete it: then that character comes out once, and nothing of the
    prompt before it; otherwise the prompt's half is dropped, since it was shown with the prompt.

    Args:
        tokenizer: gives the bytes of a token and says what to do with invalid UTF-8 (``errors``).
        prompt_ids: the ids before the first new one; only the last few matter.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: DecodingTokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
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
        """The text that these further ids complete; empty while a character is incomplete.

        Raises:
            UnicodeDecodeError: invalid UTF-8, with a tokenizer whose ``errors`` is "strict".
        """
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
        """The rest: what an unfinished character decodes to under ``errors``; the decoder is ready for reuse.

        Raises:
            UnicodeDecodeError: an unfinished character, with a tokenizer whose ``errors`` is "strict".
        """
        self._prompt_tail = b""
        rest = self._decoder.decode(b"", True)
        self._decoder.reset()
        return rest


IncrementalDetokenizer = StreamDecoder
