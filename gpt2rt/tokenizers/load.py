"""The constructor arguments of a tokenizer, collected from a checkpoint's files."""

import warnings
from pathlib import Path
from typing import Any, Protocol

from gpt2rt.checkpoint.json_files import MAX_JSON_BYTES, read_json_object
from gpt2rt.errors import CheckpointError, TokenizerError
from gpt2rt.tokenizers.chat import MAX_TEMPLATE_CHARACTERS
from gpt2rt.tokenizers.special import SPECIAL_TOKEN_NAMES

# names under which transformers saves a tokenizer that has no class of its own
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")

#: vocabulary file -> what it is
FOREIGN_FILES = {
    "vocab.txt": "a WordPiece vocabulary (BertTokenizer)",
    "spiece.model": "a SentencePiece model",
    "tokenizer.model": "a SentencePiece model",
    "sentencepiece.bpe.model": "a SentencePiece model",
}

# entries of tokenizer_config.json that describe the file, not the tokenizer
DESCRIPTIONS = (
    "tokenizer_class",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "added_tokens_file",
    "auto_map",
    "backend",
    "is_local",
    "local_files_only",
    "max_len",
    "processor_class",
    "transformers_version",
)

_TOKEN = (str, dict)
# entries that reach a constructor, and the JSON types they may have; None always means "not given"
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(SPECIAL_TOKEN_NAMES, _TOKEN),
    "additional_special_tokens": (list,),
    "extra_special_tokens": (list, dict),
    "added_tokens_decoder": (dict,),
    "model_input_names": (list,),
    "model_max_length": (int, float),
    "errors": (str,),
    "padding_side": (str,),
    "truncation_side": (str,),
    "chat_template": (str, list, dict),
    "tokenizer_class": (str,),
}


class FileSource(Protocol):
    """Where a checkpoint's files come from."""

    name: str

    def find(self, filename: str) -> Path | None:
        """The local path of a file, or None if the checkpoint has no such file."""

    def offline_hint(self) -> str:
        """The end of a "has no such file" message when only a cache could be asked."""


def read_settings(source: FileSource) -> tuple[dict[str, Any], str | None]:
    """(constructor arguments that a checkpoint's settings files hold, the class that they name, if any).

    Read are ``tokenizer_config.json``, ``special_tokens_map.json`` and ``chat_template.jinja``.

    Raises:
        CheckpointError: a file is no JSON object.
        TokenizerError: an entry has a type that its name does not allow.
    """
    config_path = source.find("tokenizer_config.json")
    config = read_json_object(config_path) if config_path else {}
    _check_types(config, str(config_path))
    if config.get("auto_map"):
        warnings.warn(
            f"{source.name}: tokenizer_config.json points to its own code (auto_map); gpt2rt never runs it",
            stacklevel=4,
        )
    settings = {key: value for key, value in config.items() if key not in DESCRIPTIONS}
    if "model_max_length" not in settings and config.get("max_len") is not None:
        settings["model_max_length"] = config["max_len"]
    special_path = source.find("special_tokens_map.json")
    if special_path:
        known = (*SPECIAL_TOKEN_NAMES, "additional_special_tokens", "extra_special_tokens")
        special = read_json_object(special_path)
        _check_types(special, str(special_path))
        # the config is the newer of the two files and wins
        settings = {**{key: value for key, value in special.items() if key in known}, **settings}
    template_path = source.find("chat_template.jinja")
    if template_path:
        settings["chat_template"] = read_text(template_path, 4 * MAX_TEMPLATE_CHARACTERS)
    kept = {key: value for key, value in settings.items() if value is not None}
    return kept, config.get("tokenizer_class")


def _check_types(config: dict[str, Any], where: str) -> None:
    for name, types in _TYPES.items():
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
            expected = " or ".join(kind.__name__ for kind in types)
            raise TokenizerError(f"{where}: {name} is {value!r:.80}, expected {expected}")
    for token_id in config.get("added_tokens_decoder") or {}:
        if not token_id.isdecimal() or len(token_id) > 10:
            raise TokenizerError(f"{where}: added_tokens_decoder has the id {token_id!r}, expected a number")


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The UTF-8 text of a file, without a byte order mark.

    Raises:
        CheckpointError: the file is missing, too large or not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {max_bytes}; is it the right file?")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start}); is it the right file?") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def base_name(class_name: str) -> str:
    """A tokenizer class without the "Fast" that transformers appends."""
    return class_name if class_name in GENERIC_CLASSES else class_name.removesuffix("Fast")


def check_class(source: FileSource, found: str | None, asked: str, runnable: tuple[str, ...]) -> None:
    """Check that a class can stand for the one that ``tokenizer_config.json`` names.

    Raises:
        TokenizerError: it cannot.
    """
    if found is not None and runnable and base_name(found) not in runnable:
        raise TokenizerError(
            f"{source.name}: tokenizer_config.json asks for {found!r}, which {asked} cannot replace; use "
            "gpt2rt.AutoTokenizer.from_pretrained, which chooses the class that fits the files"
        )


def no_files(source: FileSource, asked: str, needed: tuple[str, ...]) -> Exception:
    """The error for a checkpoint without the files that a class reads: what is there instead, and what to do."""
    foreign = {**FOREIGN_FILES, "vocab.json": "a BPE vocabulary", "merges.txt": "BPE merges"}
    have = [name for name in foreign if source.find(name)]
    expected = " and ".join(needed)
    others = [f"{name}, {foreign[name]}" for name in have if name not in needed]
    if others:
        return TokenizerError(
            f"{source.name} has {'; '.join(others)}; {asked} needs tokenizer.json, or {expected}. Use "
            "gpt2rt.AutoTokenizer.from_pretrained, which chooses the class that fits the files"
        )
    return CheckpointError(
        f"{source.name} has no tokenizer: expected tokenizer.json, or {expected}"
        + (f"; only {have[0]} is there" if have else "")
        + source.offline_hint()
    )


def read_added_tokens(source: FileSource, settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with the tokens of ``added_tokens.json``, which checkpoints without ``tokenizer.json`` may have.

    Raises:
        CheckpointError: the file is no JSON object.
        TokenizerError: it holds something else than token: id.
    """
    path = source.find("added_tokens.json")
    if path is None:
        return settings
    listed = settings.get("added_tokens_decoder", {})
    specials = {token["content"] if isinstance(token, dict) else token for token in _named_tokens(settings)}
    extra = {}
    for content, token_id in read_json_object(path).items():
        if type(token_id) is not int or token_id < 0:
            raise TokenizerError(f"{path}: token {content!r} has id {token_id!r}, expected a number >= 0")
        if str(token_id) not in listed:
            special = content in specials
            extra[str(token_id)] = {"content": content, "special": special, "normalized": not special}
    return {**settings, "added_tokens_decoder": {**extra, **listed}}


def _named_tokens(settings: dict[str, Any]) -> list[Any]:
    tokens = [settings.get(name) for name in SPECIAL_TOKEN_NAMES]
    return [token for token in tokens if isinstance(token, str) or (isinstance(token, dict) and "content" in token)]
