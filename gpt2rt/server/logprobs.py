"""Log-probabilities as OpenAI's two APIs show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpt2rt.generation.detokenize import text_decoder

#: JSON has no infinity; vLLM shows this instead
LOWEST = -9999.0


class TokenTexts:
    """The texts of single tokens.

    A token that is no whole character is shown by its bytes, ``bytes:\\xf0\\x9f``, as OpenAI does, so that different
    tokens have different texts and a dictionary of them loses none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def text(self, token: int, *, as_id: bool = False) -> str:
        """The text of a token; its number without a tokenizer, or if asked for."""
        if as_id or self.tokenizer is None:
            return f"token_id:{token}"
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._read(token)
        return known

    def data(self, token: int) -> bytes:
        """The bytes of a token."""
        if hasattr(self.tokenizer, "id_to_bytes"):
            return self.tokenizer.id_to_bytes(token)
        return b"" if self.tokenizer is None else self.tokenizer.decode([token]).encode()

    def _read(self, token: int) -> str:
        data = self.data(token)
        if not data:
            return f"token_id:{token}"
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Offsets:
    """Where in a text each token of it begins.

    Args:
        tokenizer: or None, then all offsets are the start.
        prompt_ids: what stands before; its last character may go on in the first token.
        start: characters before the first token.
        skip_special_tokens: they have no text.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int] = (), start: int = 0, skip_special_tokens: bool = True
    ) -> None:
        self._decoder = None if tokenizer is None else text_decoder(tokenizer, prompt_ids, skip_special_tokens)
        self.at = start

    def put(self, token: int) -> int:
        """The offset of the next token."""
        begin = self.at
        if self._decoder is not None:
            self.at += len(self._decoder.put([token]))
        return begin


def finite(value: float) -> float:
    """A log-probability that JSON can hold."""
    return value if value > LOWEST else LOWEST


def completion_logprobs(
    texts: TokenTexts,
    tokens: Iterable[int],
    rows: Iterable[Mapping[int, Any] | None],
    offsets: Offsets,
    most: int,
    *,
    as_ids: bool = False,
) -> dict[str, list[Any]]:
    """``logprobs`` of a completion: lists with an item for each token.

    Args:
        texts: of tokens.
        tokens: their ids.
        rows: for each token: id -> ``Logprob`` of it and of the likeliest; None for the first token of a prompt.
        offsets: where each begins.
        most: likeliest tokens to show beside the token itself.
        as_ids: show numbers of tokens instead of texts.
    """
    out: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token, row in zip(tokens, rows, strict=True):
        out["text_offset"].append(offsets.put(token))
        out["tokens"].append(texts.text(token, as_id=as_ids))
        if row is None:
            out["token_logprobs"].append(None)
            out["top_logprobs"].append(None)
            continue
        out["token_logprobs"].append(finite(row[token].logprob))
        top: dict[str, float] = {}
        for other, entry in _ordered(row, token, most):
            top.setdefault(texts.text(other, as_id=as_ids), finite(entry.logprob))
        out["top_logprobs"].append(top)
    return out


def chat_logprobs(
    texts: TokenTexts,
    tokens: Iterable[int],
    rows: Iterable[Mapping[int, Any]],
    most: int,
    *,
    as_ids: bool = False,
) -> list[dict[str, Any]]:
    """``logprobs.content`` of a chat completion: an object for each token."""

    def entry(token: int, value: float) -> dict[str, Any]:
        data = list(texts.data(token)) or None
        return {"token": texts.text(token, as_id=as_ids), "logprob": finite(value), "bytes": data}

    return [
        {
            **entry(token, row[token].logprob),
            "top_logprobs": [entry(other, found.logprob) for other, found in _ordered(row, token, most)[:most]],
        }
        for token, row in zip(tokens, rows, strict=True)
    ]


def prompt_logprobs(texts: TokenTexts, rows: Sequence[Mapping[int, Any] | None]) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each token of the prompt, id -> log-probability, rank and text."""
    return [
        None
        if row is None
        else {
            str(token): {"logprob": finite(found.logprob), "rank": found.rank, "decoded_token": texts.text(token)}
            for token, found in row.items()
        }
        for row in rows
    ]


def _ordered(row: Mapping[int, Any], token: int, most: int) -> list[tuple[int, Any]]:
    """The likeliest tokens, and the token itself wherever it stands."""
    # equal ones keep the engine's order
    ranked = sorted(row.items(), key=lambda item: -item[1].logprob)
    return [item for place, item in enumerate(ranked) if place < most or item[0] == token]
