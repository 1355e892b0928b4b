"""Reading tokenizer files, and checking them before any of their content reaches the tokenizer library.

A ``tokenizer.json`` is a small program: it names components, patterns and templates. Those that a GPT-2 or an OpenAI
GPT tokenizer is made of are known, so only they are accepted here, and the tokenizer is built anew from the vocabulary,
the merges and the added tokens. The file itself is never handed to the library, where a crafted one can panic or run a
pattern forever. Other tokenizers are read by ``components``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpt2rt.checkpoint.json_files import read_json_object
from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.load import read_text
from gpt2rt.tokenizers.special import check_text

#: what OpenAI GPT's vocabulary appends to the last piece of a word
END_OF_WORD = "</w>"
# switches of the library's BPE that neither model has
BPE_SWITCHES = ("byte_fallback", "ignore_merges", "fuse_unk")
USE_AUTO = "; gpt2rt.AutoTokenizer.from_pretrained chooses the class that fits a checkpoint's files"


class BpeFiles(NamedTuple):
    """What a BPE tokenizer is made of."""

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
    for token in vocab if _holds_surrogate("".join(vocab)) else ():
        check_text(token, f"{where}: token {vocab[token]}")
    return vocab


def _holds_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a ``merges.txt``, best first; a ``#version`` line, a byte order mark and blank lines are skipped.

    Raises:
        CheckpointError: the file is missing, too large or not UTF-8.
        TokenizerError: a line does not hold two tokens.
    """
    text = read_text(path)
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
    return _bpe_files(path, gpt2_settings)


def read_openai_gpt_json(path: Path) -> BpeFiles:
    """The parts of a ``tokenizer.json``, if it describes OpenAI GPT's tokenizer.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
        TokenizerError: it uses a component that OpenAI GPT's tokenizer does not have, or its parts do not fit together.
    """
    return _bpe_files(path, openai_gpt_settings)


def _bpe_files(path: Path, settings_of: Callable[[dict[str, Any], str], dict[str, Any]]) -> BpeFiles:
    data, where = read_json_object(path), str(path)
    settings, model = settings_of(data, where), data["model"]
    vocab = check_vocab(model.get("vocab"), where)
    merges_in = model.get("merges")
    if not isinstance(merges_in, list):
        raise TokenizerError(f"{where}: model.merges must be a list of pairs, got {type(merges_in).__name__}")
    merges = [check_merge(merge, f"{where}, merge {rank}") for rank, merge in enumerate(merges_in)]
    check_merges(vocab, merges, where)
    return BpeFiles(vocab, merges, read_added_tokens(data.get("added_tokens"), vocab, where), settings)


def gpt2_settings(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Constructor arguments of GPT2Tokenizer that a ``tokenizer.json`` implies; its vocabulary is not looked at.

    Raises:
        TokenizerError: it is no GPT-2 tokenizer.
    """
    model = _component(data, "model", ("BPE",), where, "GPT-2")
    _expect_off(model, ("dropout", "continuing_subword_prefix", "end_of_word_suffix", *BPE_SWITCHES), where, "GPT-2")
    _component(data, "normalizer", (None,), where, "GPT-2")
    pre = _component(data, "pre_tokenizer", ("ByteLevel",), where, "GPT-2")
    settings = {"add_prefix_space": _flag(pre, "add_prefix_space", False, where)}
    if not _flag(pre, "use_regex", True, where):
        raise TokenizerError(
            f"{where}: pre_tokenizer.use_regex = false, but GPT-2 splits text by its own pattern first{USE_AUTO}"
        )
    _component(data, "decoder", ("ByteLevel",), where, "GPT-2")
    return {**settings, **_read_post_processor(data, where, "GPT-2")}


def openai_gpt_settings(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Constructor arguments of OpenAIGPTTokenizer that a ``tokenizer.json`` implies; its vocabulary is not looked at.

    Raises:
        TokenizerError: it is no OpenAI GPT tokenizer.
    """
    model = _component(data, "model", ("BPE",), where, "OpenAI GPT")
    _expect_off(model, ("dropout", "continuing_subword_prefix", *BPE_SWITCHES), where, "OpenAI GPT")
    if model.get("end_of_word_suffix") != END_OF_WORD:
        raise TokenizerError(
            f"{where}: model.end_of_word_suffix = {model.get('end_of_word_suffix')!r}, but OpenAI GPT's BPE marks the "
            f"ends of words with {END_OF_WORD!r}{USE_AUTO}"
        )
    normalizer = _component(data, "normalizer", ("BertNormalizer",), where, "OpenAI GPT")
    for name in ("clean_text", "handle_chinese_chars", "lowercase"):
        if not _flag(normalizer, name, True, where):
            raise TokenizerError(f"{where}: normalizer.{name} = False, but OpenAI GPT has True{USE_AUTO}")
    if normalizer.get("strip_accents") not in (None, True):
        raise TokenizerError(
            f"{where}: normalizer.strip_accents = {normalizer['strip_accents']!r}, but OpenAI GPT strips them{USE_AUTO}"
        )
    _component(data, "pre_tokenizer", ("BertPreTokenizer",), where, "OpenAI GPT")
    _component(data, "decoder", ("BPEDecoder",), where, "OpenAI GPT")
    settings = _read_post_processor(data, where, "OpenAI GPT")
    if isinstance(model.get("unk_token"), str):
        settings["unk_token"] = model["unk_token"]
    return settings


def read_bert_json(path: Path) -> BpeFiles:
    """The parts of a ``tokenizer.json`` (without merges), if it describes BERT's tokenizer.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
        TokenizerError: it uses a component that BERT's tokenizer does not have, or its parts do not fit together.
    """
    data, where = read_json_object(path), str(path)
    settings = bert_settings(data, where)
    vocab = check_vocab(data["model"].get("vocab"), where)
    return BpeFiles(vocab, [], read_added_tokens(data.get("added_tokens"), vocab, where), settings)


def bert_settings(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Constructor arguments of BertTokenizer that a ``tokenizer.json`` implies; its vocabulary is not looked at.

    Raises:
        TokenizerError: it is no BERT tokenizer.
    """
    model = _component(data, "model", ("WordPiece",), where, "BERT")
    if model.get("continuing_subword_prefix", "##") != "##" or model.get("max_input_chars_per_word", 100) != 100:
        raise TokenizerError(
            f"{where}: continuing_subword_prefix = {model.get('continuing_subword_prefix')!r} and "
            f"max_input_chars_per_word = {model.get('max_input_chars_per_word')!r}, but BERT has '##' and 100{USE_AUTO}"
        )
    normalizer = _component(data, "normalizer", ("BertNormalizer",), where, "BERT")
    if not _flag(normalizer, "clean_text", True, where):
        raise TokenizerError(f"{where}: normalizer.clean_text = false, but BERT has true{USE_AUTO}")
    settings: dict[str, Any] = {
        "do_lower_case": _flag(normalizer, "lowercase", True, where),
        "tokenize_chinese_chars": _flag(normalizer, "handle_chinese_chars", True, where),
    }
    if normalizer.get("strip_accents") is not None:
        settings["strip_accents"] = _flag(normalizer, "strip_accents", False, where)
    if isinstance(model.get("unk_token"), str):
        settings["unk_token"] = model["unk_token"]
    _component(data, "pre_tokenizer", ("BertPreTokenizer",), where, "BERT")
    _component(data, "decoder", (None, "WordPiece"), where, "BERT")
    # the class adds "[CLS]" and "[SEP]" itself
    _component(data, "post_processor", (None, "BertProcessing", "TemplateProcessing"), where, "BERT")
    return settings


def _read_post_processor(data: dict[str, Any], where: str, kind: str) -> dict[str, Any]:
    post = _component(data, "post_processor", (None, "ByteLevel", "TemplateProcessing"), where, kind)
    return _read_template(post, where) if post.get("type") == "TemplateProcessing" else {}


def _component(
    data: dict[str, Any], name: str, allowed: tuple[str | None, ...], where: str, kind: str
) -> dict[str, Any]:
    part = data.get(name)
    found = None
    if part is not None:
        found = part.get("type") if isinstance(part, dict) else repr(part)
        # files of tokenizers < 0.10 leave the model's type out
        if name == "model" and found is None and isinstance(part, dict) and "merges" in part:
            found = "BPE"
        if found is None:
            found = "(no type)"
    if found not in allowed:
        raise TokenizerError(
            f"{where}: {name} is {found!r}, but a{'n' if kind[0] in 'AO' else ''} {kind} tokenizer has "
            f"{' or '.join(map(str, allowed))}{USE_AUTO}"
        )
    return part if isinstance(part, dict) else {}


def _expect_off(part: dict[str, Any], fields: tuple[str, ...], where: str, kind: str) -> None:
    for field in fields:
        if part.get(field) not in (None, False, "", 0):
            raise TokenizerError(
                f"{where}: model.{field} = {part[field]!r}, but {kind}'s BPE does not use it{USE_AUTO}"
            )


def _flag(part: dict[str, Any], field: str, default: bool, where: str) -> bool:
    value = part.get(field, default)
    if type(value) is not bool:
        raise TokenizerError(f"{where}: {field} = {value!r}, expected true or false")
    return value


def read_added_tokens(listed: Any, vocab: dict[str, int], where: str) -> list[dict[str, Any]]:
    """The added tokens of a ``tokenizer.json``, see :func:`check_added_token` and :func:`order_added_tokens`."""
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
        f"{where}: post_processor has the template {single} / {pair}; this class knows only an optional token before "
        f"and after each text{USE_AUTO}"
    )
