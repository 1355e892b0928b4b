"""A ``tokenizer.json`` of any kind, checked part by part.

The file is a small program for the ``tokenizers`` library: normalizer, pre-tokenizer, model, post-processor, decoder,
each with a type and its fields. Known types with fields of the right kind are copied into a new description, anything
else is refused; only that copy reaches the library. Patterns are checked by ``patterns``.
"""

import base64
import binascii
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.base import guarded
from gpt2rt.tokenizers.files import check_merge, check_vocab, read_added_tokens
from gpt2rt.tokenizers.patterns import check_pattern

Check = Callable[[Any, str], Any]


class Components(NamedTuple):
    """What a tokenizer is made of."""

    backend: Any  # tokenizers.Tokenizer with normalizer, pre-tokenizer, model and decoder
    post_processor: Any | None
    decoder: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    added_tokens: list[dict[str, Any]]
    settings: dict[str, Any]  # constructor arguments that the file implies


def build_components(data: dict[str, Any], where: str) -> Components:
    """The parts of a ``tokenizer.json``.

    Args:
        data: the JSON object.
        where: the file, for messages.
    Raises:
        TokenizerError: a part is unknown, malformed or does not fit the others.
    """
    from tokenizers import Tokenizer

    model = _model(data.get("model"), f"{where}: model")
    parts = {name: _part(data.get(name), name, f"{where}: {name}") for name in ("normalizer", "pre_tokenizer")}
    decoder = _part(data.get("decoder"), "decoder", f"{where}: decoder")
    _check_decoder_order(decoder, f"{where}: decoder")
    post = _part(data.get("post_processor"), "post_processor", f"{where}: post_processor")
    vocab = {token: i for i, (token, _) in enumerate(model["vocab"])} if model["type"] == "Unigram" else model["vocab"]
    added = read_added_tokens(data.get("added_tokens"), vocab, where)
    _check_template_ids(post, {**vocab, **{token["content"]: token["id"] for token in added}}, where)
    clean: dict[str, Any] = {
        "version": "1.0",
        "model": model,
        **parts,
        "decoder": decoder,
        "post_processor": post,
        "added_tokens": [],
    }
    try:
        backend = guarded(Tokenizer.from_str, json.dumps(clean))
        # what a file can only get wrong at run time shows here
        guarded(backend.encode_batch, ["a B.\n1é東", ""], add_special_tokens=False)
    except TokenizerError:
        raise
    except Exception as error:
        raise TokenizerError(f"{where}: the parts make no tokenizer: {error}") from error
    processor, backend.post_processor = backend.post_processor, None
    return Components(backend, processor, decoder, parts["pre_tokenizer"], added, _settings(data))


def _settings(data: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments that the file's own padding and truncation imply."""
    settings: dict[str, Any] = {}
    padding, truncation = data.get("padding"), data.get("truncation")
    if isinstance(padding, dict):
        if isinstance(padding.get("pad_token"), str):
            settings["pad_token"] = padding["pad_token"]
        if padding.get("direction") in ("Left", "Right"):
            settings["padding_side"] = padding["direction"].lower()
    if isinstance(truncation, dict) and truncation.get("direction") in ("Left", "Right"):
        settings["truncation_side"] = truncation["direction"].lower()
    return settings


# ---- kinds of fields -------------------------------------------------------------------------------------------------


def _expect(test: Callable[[Any], bool], words: str) -> Check:
    def check(value: Any, where: str) -> Any:
        if not test(value):
            raise TokenizerError(f"{where} = {value!r:.80}, expected {words}")
        return value

    return check


_flag = _expect(lambda value: type(value) is bool, "true or false")
_flag_or_none = _expect(lambda value: value is None or type(value) is bool, "true, false or null")
_text = _expect(lambda value: isinstance(value, str), "a string")
_text_or_none = _expect(lambda value: value is None or isinstance(value, str), "a string or null")
_char = _expect(lambda value: isinstance(value, str) and len(value) == 1, "one character")
_count = _expect(lambda value: type(value) is int and 0 <= value <= 100_000, "an integer from 0 to 100000")
_positive = _expect(lambda value: type(value) is int and 1 <= value <= 100_000, "an integer from 1 to 100000")
_BEHAVIOURS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_behaviour = _expect(lambda value: value in _BEHAVIOURS, f"one of {', '.join(_BEHAVIOURS)}")
_scheme = _expect(lambda value: value in ("always", "never", "first"), "'always', 'never' or 'first'")
_off = _expect(lambda value: value in (None, 0), "none: gpt2rt tokenizes the same text the same way each time")


def _pattern(value: Any, where: str) -> dict[str, str]:
    kind = next(iter(value), None) if isinstance(value, dict) and len(value) == 1 else None
    if kind not in ("String", "Regex") or not isinstance(value[kind], str) or not value[kind]:
        raise TokenizerError(f"{where} = {value!r:.80}, expected a non-empty {{'String': ...}} or {{'Regex': ...}}")
    if kind == "Regex":
        check_pattern(value[kind], where)
    return {kind: value[kind]}


def _string_pattern(value: Any, where: str) -> dict[str, str]:
    clean = _pattern(value, where)
    if "String" not in clean:
        raise TokenizerError(f"{where} is a regular expression, but a decoder's pattern must be a plain string")
    return clean


def _charsmap(value: Any, where: str) -> str:
    try:
        if isinstance(value, str) and base64.b64decode(value, validate=True):
            return value
    except binascii.Error:
        pass
    raise TokenizerError(f"{where} is no base64 text")


def _token_and_id(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not isinstance(value[0], str) or not _is_id(value[1]):
        raise TokenizerError(f"{where} = {value!r:.80}, expected [token, id]")
    return list(value)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _template(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > 64:
        raise TokenizerError(f"{where} must be a list of at most 64 items")
    clean = []
    for item in value:
        kind = str(next(iter(item))) if isinstance(item, dict) and len(item) == 1 else ""
        inner = item[kind] if kind in ("Sequence", "SpecialToken") else None
        if not isinstance(inner, dict) or not isinstance(inner.get("id"), str) or not _is_id(inner.get("type_id", 0)):
            raise TokenizerError(f"{where} holds {item!r:.80}, expected a Sequence or a SpecialToken")
        if kind == "Sequence" and inner["id"] not in ("A", "B"):
            raise TokenizerError(f"{where} names the text {inner['id']!r:.20}, expected A or B")
        clean.append({kind: {"id": inner["id"], "type_id": inner.get("type_id", 0)}})
    return clean


def _template_tokens(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TokenizerError(f"{where} must be an object of token: ids")
    clean = {}
    for name, token in value.items():
        ids, tokens = (token.get("ids"), token.get("tokens")) if isinstance(token, dict) else (None, None)
        if (
            not isinstance(ids, list)
            or not isinstance(tokens, list)
            or not 0 < len(ids) == len(tokens) <= 64
            or not all(map(_is_id, ids))
            or not all(isinstance(text, str) for text in tokens)
        ):
            raise TokenizerError(f"{where}.{name} = {token!r:.80}, expected as many ids as tokens")
        clean[name] = {"id": name, "ids": ids, "tokens": tokens}
    return clean


# ---- types of components: field -> check; a field ending in "?" may be absent ----------------------------------------

_BYTE_LEVEL: dict[str, Check] = {"add_prefix_space?": _flag, "trim_offsets?": _flag, "use_regex?": _flag}
_METASPACE: dict[str, Check] = {
    "replacement": _char,
    "prepend_scheme?": _scheme,
    "split?": _flag,
    # the spelling of tokenizers < 0.14
    "add_prefix_space?": _flag,
    "str_rep?": _char,
}
_NONE: dict[str, Check] = {}

_TYPES: dict[str, dict[str, dict[str, Check]]] = {
    "normalizer": {
        "BertNormalizer": {
            "clean_text": _flag,
            "handle_chinese_chars": _flag,
            "strip_accents": _flag_or_none,
            "lowercase": _flag,
        },
        "ByteLevel": _NONE,
        "Lowercase": _NONE,
        "NFC": _NONE,
        "NFD": _NONE,
        "NFKC": _NONE,
        "NFKD": _NONE,
        "Nmt": _NONE,
        "Precompiled": {"precompiled_charsmap": _charsmap},
        "Prepend": {"prepend": _text},
        "Replace": {"pattern": _pattern, "content": _text},
        "Strip": {"strip_left": _flag, "strip_right": _flag},
        "StripAccents": _NONE,
    },
    "pre_tokenizer": {
        "BertPreTokenizer": _NONE,
        "ByteLevel": _BYTE_LEVEL,
        "CharDelimiterSplit": {"delimiter": _char},
        "Digits": {"individual_digits": _flag},
        "Metaspace": _METASPACE,
        "Punctuation": {"behavior?": _behaviour},
        "Split": {"pattern": _pattern, "behavior": _behaviour, "invert": _flag},
        "UnicodeScripts": _NONE,
        "Whitespace": _NONE,
        "WhitespaceSplit": _NONE,
    },
    "decoder": {
        "BPEDecoder": {"suffix": _text},
        "ByteFallback": _NONE,
        "ByteLevel": _BYTE_LEVEL,
        "Fuse": _NONE,
        "Metaspace": _METASPACE,
        "Replace": {"pattern": _string_pattern, "content": _text},
        "Strip": {"content": _char, "start": _count, "stop": _count},
        "WordPiece": {"prefix": _text, "cleanup": _flag},
    },
    "post_processor": {
        "BertProcessing": {"sep": _token_and_id, "cls": _token_and_id},
        "ByteLevel": _BYTE_LEVEL,
        "RobertaProcessing": {
            "sep": _token_and_id,
            "cls": _token_and_id,
            "trim_offsets": _flag,
            "add_prefix_space": _flag,
        },
        "TemplateProcessing": {"single": _template, "pair": _template, "special_tokens": _template_tokens},
    },
}
#: what the list of a Sequence is called
_SEQUENCES = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}
_MODELS: dict[str, dict[str, Check]] = {
    "BPE": {
        "dropout?": _off,
        "unk_token?": _text_or_none,
        "continuing_subword_prefix?": _text_or_none,
        "end_of_word_suffix?": _text_or_none,
        "fuse_unk?": _flag,
        "byte_fallback?": _flag,
        "ignore_merges?": _flag,
    },
    "WordPiece": {"unk_token": _text, "continuing_subword_prefix": _text, "max_input_chars_per_word": _positive},
    "WordLevel": {"unk_token": _text},
    "Unigram": {"byte_fallback?": _flag},
}


def _fields(part: dict[str, Any], checks: dict[str, Check], where: str) -> dict[str, Any]:
    clean = {"type": part.get("type")}
    for field, check in checks.items():
        name = field.removesuffix("?")
        if name in part:
            clean[name] = check(part[name], f"{where}.{name}")
        elif not field.endswith("?"):
            raise TokenizerError(f"{where} has no {name!r}")
    unknown = sorted(set(part) - {"type", *(field.removesuffix("?") for field in checks)})
    if unknown:
        raise TokenizerError(f"{where} has unknown fields: {', '.join(map(repr, unknown))}")
    return clean


def _part(part: Any, name: str, where: str, inside: bool = False) -> dict[str, Any] | None:
    if part is None and not inside:
        return None
    kind = part.get("type") if isinstance(part, dict) else repr(part)
    if kind == "Sequence" and not inside and isinstance(part, dict):
        listed = part.get(_SEQUENCES[name])
        if not isinstance(listed, list) or not 0 < len(listed) <= 64 or set(part) != {"type", _SEQUENCES[name]}:
            raise TokenizerError(f"{where}: a Sequence must have 1 to 64 {_SEQUENCES[name]}")
        items = [_part(item, name, f"{where}[{i}]", inside=True) for i, item in enumerate(listed)]
        return {"type": "Sequence", _SEQUENCES[name]: items}
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in _TYPES[name]:
        raise TokenizerError(f"{where} is {kind!r:.80}, which is not run; known: {', '.join(_TYPES[name])}")
    clean = _fields(part, _TYPES[name][kind], where)
    if kind == "Metaspace":
        clean.setdefault("prepend_scheme", "never" if clean.pop("add_prefix_space", True) is False else "always")
        clean.pop("add_prefix_space", None)
        clean.pop("str_rep", None)
    return clean


def _check_decoder_order(decoder: dict[str, Any] | None, where: str) -> None:
    """Some decoders look at the neighbours of a token, which a stream can follow in their usual places only."""
    if decoder is None or decoder["type"] != "Sequence":
        return
    kinds = [part["type"] for part in decoder["decoders"]]
    for alone in ("BPEDecoder", "ByteLevel"):
        if alone in kinds and len(kinds) > 1:
            raise TokenizerError(f"{where}: {alone} must be the only decoder, got {', '.join(kinds)}")
    if "Fuse" in kinds and set(kinds[kinds.index("Fuse") + 1 :]) - {"Strip"}:
        raise TokenizerError(f"{where}: only Strip may follow Fuse, got {', '.join(kinds)}")
    if kinds.count("Strip") and "Fuse" not in kinds:
        raise TokenizerError(f"{where}: Strip must follow Fuse, got {', '.join(kinds)}")


def _check_template_ids(post: dict[str, Any] | None, vocab: dict[str, int], where: str) -> None:
    """Check that the tokens which the post-processor adds have the ids that it says."""
    listed = [] if post is None else post["processors"] if post["type"] == "Sequence" else [post]
    for part in listed:
        pairs: list[tuple[str, int]] = []
        if part["type"] == "TemplateProcessing":
            named = part["special_tokens"]
            for item in (*part["single"], *part["pair"]):
                name = item.get("SpecialToken", {}).get("id")
                if name is not None and name not in named:
                    raise TokenizerError(f"{where}: post_processor adds {name!r}, which special_tokens does not list")
            for token in named.values():
                pairs += zip(token["tokens"], token["ids"], strict=True)
        elif part["type"] in ("BertProcessing", "RobertaProcessing"):
            pairs = [tuple(part["sep"]), tuple(part["cls"])]
        for token, token_id in pairs:
            if vocab.get(token) != token_id:
                raise TokenizerError(
                    f"{where}: post_processor adds {token!r} as id {token_id}, but the vocabulary has it as "
                    f"{vocab.get(token)}"
                )


# ---- models ----------------------------------------------------------------------------------------------------------


def _model(model: Any, where: str) -> dict[str, Any]:
    if not isinstance(model, dict):
        raise TokenizerError(f"{where} is {type(model).__name__}, expected an object")
    # files of tokenizers < 0.10 leave the type out
    kind = model.get("type") or next((k for k, field in _TELLTALE.items() if field in model), None)
    if not isinstance(kind, str) or kind not in _MODELS:
        raise TokenizerError(f"{where} is {kind!r:.80}, which is not run; known: {', '.join(_MODELS)}")
    own = {name: model[name] for name in model if name not in ("vocab", "merges", "unk_id", "type")}
    clean = {**_fields(own, _MODELS[kind], where), "type": kind}
    if kind == "Unigram":
        return {**clean, **_unigram(model, where)}
    vocab = check_vocab(model.get("vocab"), where)
    if kind == "BPE":
        clean["merges"] = _bpe_merges(model, vocab, where)
    unknown = clean.get("unk_token")
    if unknown is not None and unknown not in vocab and (kind != "BPE" or not clean.get("byte_fallback")):
        raise TokenizerError(f"{where}.unk_token = {unknown!r} is not among the {len(vocab)} tokens of the vocabulary")
    return {**clean, "vocab": vocab}


_TELLTALE = {"BPE": "merges", "Unigram": "unk_id", "WordPiece": "max_input_chars_per_word"}


def _bpe_merges(model: dict[str, Any], vocab: dict[str, int], where: str) -> list[list[str]]:
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise TokenizerError(f"{where}.merges must be a list of pairs, got {type(merges).__name__}")
    prefix = model.get("continuing_subword_prefix") or ""
    clean = []
    for rank, merge in enumerate(merges):
        left, right = check_merge(merge, f"{where}, merge {rank}")
        for token in (left, right, left + right.removeprefix(prefix)):
            if token not in vocab:
                raise TokenizerError(
                    f"{where}: merge {rank} ({left!r} + {right!r}) needs the token {token!r}, which is not among the "
                    f"{len(vocab)} of the vocabulary"
                )
        clean.append([left, right])
    return clean


def _unigram(model: dict[str, Any], where: str) -> dict[str, Any]:
    vocab, unk_id = model.get("vocab"), model.get("unk_id")
    if not isinstance(vocab, list) or not vocab:
        raise TokenizerError(f"{where}.vocab must be a non-empty list of [token, score]")
    seen: dict[str, int] = {}
    for index, item in enumerate(vocab):
        good = isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str)
        if not good or isinstance(item[1], bool) or not isinstance(item[1], int | float) or not math.isfinite(item[1]):
            raise TokenizerError(f"{where}.vocab[{index}] = {item!r:.80}, expected [token, finite score]")
        if item[0] in seen:
            raise TokenizerError(f"{where}: token {item[0]!r} has the ids {seen[item[0]]} and {index}")
        seen[item[0]] = index
    if unk_id is not None and not (type(unk_id) is int and 0 <= unk_id < len(vocab)):
        raise TokenizerError(f"{where}.unk_id = {unk_id!r:.80}, expected a number below {len(vocab)} or null")
    return {"vocab": [list(item) for item in vocab], "unk_id": unk_id}
