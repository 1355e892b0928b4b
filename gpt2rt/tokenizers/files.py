"""Reading tokenizer files, and checking them before any of their content reaches the tokenizer library.

A ``tokenizer.json`` is a small program: it names components, patterns and templates. Those a GPT-2 tokenizer is made
of are known, so only they are accepted, and the tokenizer is built anew from the vocabulary, the merges and the added
tokens. The file itself is never handed to the library, where a crafted one can panic or run a pattern forever.
"""

from pathlib import Path
from typing import Any, NamedTuple

from gpt2rt.checkpoint.json_files import MAX_JSON_BYTES, read_json_object
from gpt2rt.errors import CheckpointError, TokenizerError


class BpeFiles(NamedTuple):
    """What a byte-level BPE tokenizer is made of."""

    vocab: dict[str, int]  # token -> id
    merges: list[tuple[str, str]]  # best first
    added_tokens: list[dict[str, Any]]  # fields of tokenizers.AddedToken and "id", in the order of their ids
    settings: dict[str, Any]  # constructor arguments that the file implies


def read_vocab(path: Path) -> dict[str, int]:
    """Token -> id from a ``vocab.json``.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
        TokenizerError: the ids are not 0, 1, ... without a gap or a repetition.
    """
    return check_vocab(read_json_object(path), str(path))


def check_vocab(vocab: Any, where: str) -> dict[str, int]:
    """Check token -> id: the ids are 0, 1, ... without a gap or a repetition.

    Raises:
        TokenizerError: they are not.
    """
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"{where}: the vocabulary must be a non-empty object of token: id")
    owner: dict[int, str] = {}
    for token, token_id in vocab.items():
        if not isinstance(token, str) or type(token_id) is not int or not 0 <= token_id < len(vocab):
            raise TokenizerError(
                f"{where}: token {token!r} has id {token_id!r}, expected an integer from 0 to {len(vocab) - 1}, since "
                f"there are {len(vocab)} tokens; does the vocabulary have a gap?"
            )
        if token_id in owner:
            raise TokenizerError(f"{where}: tokens {owner[token_id]!r} and {token!r} both have id {token_id}")
        owner[token_id] = token
    return vocab


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a ``merges.txt``, best first; a ``#version`` line, a byte order mark and blank lines are skipped.

    Raises:
        CheckpointError: the file is missing, too large or not UTF-8.
        TokenizerError: a line does not hold two tokens.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start}); is it the right file?") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    merges = []
    # split on line feeds only: str.splitlines would also cut at characters that are part of the alphabet
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        merges.append(check_merge(line, f"{path}, line {number}"))
    return merges


def check_merge(merge: Any, where: str) -> tuple[str, str]:
    """One merge, given as "left right" or as a pair.

    Raises:
        TokenizerError: it is neither.
    """
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list | tuple) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
        raise TokenizerError(f"{where}: {merge!r} is not a pair of tokens separated by one space")
    return parts[0], parts[1]


def check_merges(vocab: dict[str, int], merges: list[tuple[str, str]], where: str) -> None:
    """Check that vocabulary and merges belong together.

    Raises:
        TokenizerError: a merge uses or makes a token that the vocabulary lacks.
    """
    for rank, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in vocab:
                raise TokenizerError(
                    f"{where}: merge {rank} ({left!r} + {right!r}) needs the token {token!r}, which is not among the "
                    f"{len(vocab)} of the vocabulary; do vocab.json and merges.txt come from one tokenizer?"
                )


def read_tokenizer_json(path: Path) -> BpeFiles:
    """The parts of a ``tokenizer.json``, if it describes a byte-level BPE tokenizer as GPT-2's.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
        TokenizerError: it uses a component that GPT-2 tokenizers do not have, or its parts do not fit together.
    """
    data, where = read_json_object(path), str(path)
    model = _component(data, "model", ("BPE",), where)
    _expect_off(model, ("dropout", "continuing_subword_prefix", "end_of_word_suffix"), where)
    _expect_off(model, ("byte_fallback", "ignore_merges", "fuse_unk"), where)
    vocab = check_vocab(model.get("vocab"), where)
    merges_in = model.get("merges")
    if not isinstance(merges_in, list):
        raise TokenizerError(f"{where}: model.merges must be a list of pairs, got {type(merges_in).__name__}")
    merges = [check_merge(merge, f"{where}, merge {rank}") for rank, merge in enumerate(merges_in)]
    check_merges(vocab, merges, where)

    settings: dict[str, Any] = {}
    _component(data, "normalizer", (None,), where)
    pre = _component(data, "pre_tokenizer", ("ByteLevel",), where)
    settings["add_prefix_space"] = _flag(pre, "add_prefix_space", False, where)
    if not _flag(pre, "use_regex", True, where):
        raise TokenizerError(
            f"{where}: pre_tokenizer.use_regex = false, but GPT-2 splits text by its own pattern first"
        )
    _component(data, "decoder", ("ByteLevel",), where)
    added = _read_added_tokens(data.get("added_tokens"), vocab, where)
    post = _component(data, "post_processor", (None, "ByteLevel", "TemplateProcessing"), where)
    if post.get("type") == "TemplateProcessing":
        settings.update(_read_template(post, where))
    return BpeFiles(vocab, merges, added, settings)


def _component(data: dict[str, Any], name: str, allowed: tuple[str | None, ...], where: str) -> dict[str, Any]:
    part = data.get(name)
    kind = None
    if part is not None:
        kind = part.get("type") if isinstance(part, dict) else repr(part)
        # files of tokenizers < 0.10 leave the model's type out
        if name == "model" and kind is None and isinstance(part, dict) and "merges" in part:
            kind = "BPE"
        if kind is None:
            kind = "(no type)"
    if kind not in allowed:
        raise TokenizerError(
            f"{where}: {name} is {kind!r}, but a GPT-2 tokenizer has {' or '.join(map(str, allowed))}; other "
            "tokenizers are not run: use their own library and pass token ids"
        )
    return part if isinstance(part, dict) else {}


def _expect_off(part: dict[str, Any], fields: tuple[str, ...], where: str) -> None:
    for field in fields:
        if part.get(field) not in (None, False, "", 0):
            raise TokenizerError(f"{where}: model.{field} = {part[field]!r}, but GPT-2's BPE does not use it")


def _flag(part: dict[str, Any], field: str, default: bool, where: str) -> bool:
    value = part.get(field, default)
    if type(value) is not bool:
        raise TokenizerError(f"{where}: {field} = {value!r}, expected true or false")
    return value


def _read_added_tokens(listed: Any, vocab: dict[str, int], where: str) -> list[dict[str, Any]]:
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise TokenizerError(f"{where}: added_tokens must be a list, got {type(listed).__name__}")
    return order_added_tokens([check_added_token(token, where) for token in listed], vocab, where)


def check_added_token(token: Any, where: str) -> dict[str, Any]:
    """The fields of one added token: ``id`` and ``content``, and the flags of ``tokenizers.AddedToken``.

    Raises:
        TokenizerError: a field is missing or of the wrong type.
    """
    if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
        raise TokenizerError(f"{where}: added token {token!r} has no content")
    out: dict[str, Any] = {"content": token["content"]}
    if type(token.get("id")) is not int or token["id"] < 0:
        raise TokenizerError(f"{where}: added token {token['content']!r} has id {token.get('id')!r}, expected >= 0")
    out["id"] = token["id"]
    for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"):
        if flag in token:
            out[flag] = _flag(token, flag, False, where)
    return out


def order_added_tokens(added: list[dict[str, Any]], vocab: dict[str, int], where: str) -> list[dict[str, Any]]:
    """Added tokens by id, each either a token of the vocabulary or the next id after it.

    Raises:
        TokenizerError: an id is taken, differs from the vocabulary's, or leaves a gap.
    """
    added = sorted(added, key=lambda token: token["id"])
    next_id = len(vocab)
    for token in added:
        expected = vocab.get(token["content"], next_id)
        if token["id"] != expected:
            raise TokenizerError(
                f"{where}: added token {token['content']!r} has id {token['id']}, expected {expected} "
                f"({len(vocab)} tokens in the vocabulary, ids given in order)"
            )
        next_id += token["content"] not in vocab
    return added


def _read_template(post: dict[str, Any], where: str) -> dict[str, Any]:
    """add_bos_token / add_eos_token from a template [bos] A [eos]; the pair must repeat it."""

    def names(field: str) -> list[str]:
        items = post.get(field)
        if not isinstance(items, list):
            raise TokenizerError(f"{where}: post_processor.{field} must be a list")
        out = []
        for item in items:
            kind = next(iter(item), None) if isinstance(item, dict) else None
            if kind not in ("Sequence", "SpecialToken") or not isinstance(item[kind], dict):
                raise TokenizerError(f"{where}: post_processor.{field} holds {item!r}")
            out.append("$" + str(item[kind].get("id")) if kind == "Sequence" else str(item[kind].get("id")))
        return out

    single, pair = names("single"), names("pair")
    if single.count("$A") == 1:
        at = single.index("$A")
        before, after = single[:at], single[at + 1 :]
        if len(before) <= 1 and len(after) <= 1 and pair == [*single, *before, "$B", *after]:
            settings: dict[str, Any] = {"add_bos_token": bool(before), "add_eos_token": bool(after)}
            if before:
                settings["bos_token"] = before[0]
            if after:
                settings["eos_token"] = after[0]
            return settings
    raise TokenizerError(
        f"{where}: post_processor has the template {single} / {pair}; gpt2rt knows only an optional token before and "
        "after each text"
    )
