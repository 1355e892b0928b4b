"""SentencePiece models, read without the sentencepiece package and turned into the parts of a ``tokenizer.json``.

Source: Kudo & Richardson 2018, "SentencePiece", arXiv:1808.06226; the file is one protocol buffer message
(google/sentencepiece, src/sentencepiece_model.proto), of which only the fields named below are read.

Ids are those of the sentencepiece package, with one exception that transformers' fast tokenizers share: the library's
``Precompiled`` normalizer loses a combining mark that follows a character which it replaces.
"""

import base64
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt2rt.checkpoint.json_files import MAX_JSON_BYTES
from gpt2rt.errors import CheckpointError, TokenizerError

SPACE = "▁"
# enum values of the .proto
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6


class SpmFile(NamedTuple):
    """What a ``.model`` file says."""

    pieces: list[tuple[str, float, int]]  # text, score, type
    model_type: int
    byte_fallback: bool
    split_by_whitespace: bool
    special_ids: dict[str, int]  # "unk", "bos", "eos", "pad" -> id, -1 if there is none
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the content of an equivalent ``tokenizer.json``, constructor arguments that the model implies).

    Raises:
        CheckpointError: the file cannot be read.
        TokenizerError: it is damaged, or of a kind that is not run.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {MAX_JSON_BYTES}; is it the right file?")
        data = path.read_bytes()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        spm = _parse(data)
    except (ValueError, IndexError, struct.error) as error:
        raise TokenizerError(f"{path} is no SentencePiece model, or damaged: {error}") from None
    return _convert(spm, str(path))


# ---- the file --------------------------------------------------------------------------------------------------------


def _parse(data: bytes) -> SpmFile:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _message(data):
        if number == 1:
            fields = dict(_message(_bytes(value)))
            pieces.append((_bytes(fields.get(1, b"")).decode("utf-8"), _float(fields.get(2)), int(fields.get(3, 1))))
        elif number == 2:
            trainer = dict(_message(_bytes(value)))
        elif number == 3:
            normalizer = dict(_message(_bytes(value)))
    if not pieces:
        raise ValueError("it has no pieces")
    # defaults of the .proto
    numbers = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
    ids = {name: int(trainer.get(number, default)) for name, (number, default) in numbers.items()}
    return SpmFile(
        pieces=pieces,
        model_type=int(trainer.get(3, _UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        split_by_whitespace=bool(trainer.get(22, 1)),
        # -1 is written as a negative 64-bit number
        special_ids={name: value - 2**64 if value >= 2**63 else value for name, value in ids.items()},
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _message(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, int or bytes) of a protocol buffer message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field has the wire type {wire}")
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes reaches over the end")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than ten bytes")


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where text should be")
    return value


def _float(value: Any) -> float:
    number = struct.unpack("<f", value)[0] if isinstance(value, bytes) else 0.0
    if not math.isfinite(number):
        raise ValueError(f"a piece has the score {number}")
    return number


# ---- the same as a tokenizer.json ------------------------------------------------------------------------------------


def _convert(spm: SpmFile, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if spm.model_type not in (_UNIGRAM, _BPE):
        raise TokenizerError(f"{where} is a word or character model, expected a unigram or BPE model")
    texts = [text for text, _, _ in spm.pieces]
    for name, index in spm.special_ids.items():
        if not -1 <= index < len(texts):
            raise TokenizerError(f"{where}: {name}_id = {index}, but there are {len(texts)} pieces")
    unk_id = spm.special_ids["unk"]
    if unk_id < 0:
        raise TokenizerError(f"{where} has no unknown piece")
    if spm.model_type == _UNIGRAM:
        model: dict[str, Any] = {
            "type": "Unigram",
            "unk_id": unk_id,
            "vocab": [[text, score] for text, score, _ in spm.pieces],
            "byte_fallback": spm.byte_fallback,
        }
    else:
        model = {
            "type": "BPE",
            "unk_token": texts[unk_id],
            "fuse_unk": True,
            "byte_fallback": spm.byte_fallback,
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": _merges(spm.pieces),
        }
        if len(model["vocab"]) != len(texts):
            raise TokenizerError(f"{where}: some of the {len(texts)} pieces are equal")
    scheme = "always" if spm.add_dummy_prefix else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme}
    special = set(spm.special_ids.values())
    content = {
        "normalizer": _normalizer(spm),
        "pre_tokenizer": {**metaspace, "split": spm.split_by_whitespace},
        "model": model,
        "decoder": _decoder(spm, metaspace),
        "added_tokens": [
            {"id": i, "content": text, "special": kind != _USER_DEFINED or i in special, "normalized": False}
            for i, (text, _, kind) in enumerate(spm.pieces)
            if text and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
    }
    settings = {f"{name}_token": texts[index] for name, index in spm.special_ids.items() if index >= 0}
    return content, settings


def _normalizer(spm: SpmFile) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if spm.charsmap:
        charsmap = base64.b64encode(spm.charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spm.remove_extra_whitespaces:
        for pattern, content in (("^ +| +$", ""), (" {2,}", " ")):
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _decoder(spm: SpmFile, metaspace: dict[str, Any]) -> dict[str, Any]:
    # a piece that begins with several spaces loses one of them, where Metaspace would drop them all
    if not spm.byte_fallback and spm.split_by_whitespace:
        return metaspace
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spm.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    """Every way to make a piece of two others, the pieces with the highest scores first."""
    mergeable = {text: i for i, (text, _, kind) in enumerate(pieces) if kind not in (_UNKNOWN, _CONTROL, _BYTE)}
    ranked = sorted(mergeable, key=lambda text: (-pieces[mergeable[text]][1], mergeable[text]))
    merges = []
    for text in ranked:
        halves = [(text[:at], text[at:]) for at in range(1, len(text))]
        known = [pair for pair in halves if pair[0] in mergeable and pair[1] in mergeable]
        merges += [list(pair) for pair in sorted(known, key=lambda pair: (mergeable[pair[0]], mergeable[pair[1]]))]
    return merges
