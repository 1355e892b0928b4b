"""The constructor arguments of a tokenizer, collected from a checkpoint's files."""

import warnings
from pathlib import Path
from typing import Any, Protocol

from gpt2rt.checkpoint.json_files import read_json_object
from gpt2rt.errors import CheckpointError, TokenizerError
from gpt2rt.tokenizers.special import SPECIAL_TOKEN_NAMES

# names under which transformers saves a tokenizer that GPT2Tokenizer can run, if its tokenizer.json passes the check
RUNNABLE_CLASSES = (
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "PreTrainedTokenizer",
)

# files of other tokenizers, to say what was found instead of GPT-2's
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


class FileSource(Protocol):
    """Where a checkpoint's files come from."""

    name: str

    def find(self, filename: str) -> Path | None:
        """The local path of a file, or None if the checkpoint has no such file."""

    def offline_hint(self) -> str:
        """The end of a "has no such file" message when only a cache could be asked."""


def read_checkpoint_tokenizer(source: FileSource) -> dict[str, Any]:
    """Constructor arguments of GPT2Tokenizer.

    Raises:
        CheckpointError: the checkpoint holds no tokenizer files.
        TokenizerError: it holds those of another kind of tokenizer.
    """
    config_path = source.find("tokenizer_config.json")
    config = read_json_object(config_path) if config_path else {}
    found_class = config.get("tokenizer_class")
    if found_class is not None and found_class not in RUNNABLE_CLASSES:
        raise TokenizerError(
            f"{source.name}: tokenizer_config.json asks for {found_class!r}, which GPT2Tokenizer cannot replace; "
            "tokenize with that class of transformers and pass the ids to the model"
        )
    if config.get("auto_map"):
        warnings.warn(
            f"{source.name}: tokenizer_config.json points to its own code (auto_map); gpt2rt never runs it",
            stacklevel=3,
        )
    arguments = {key: value for key, value in config.items() if key not in DESCRIPTIONS}
    if "model_max_length" not in arguments and config.get("max_len") is not None:
        arguments["model_max_length"] = config["max_len"]
    special_path = source.find("special_tokens_map.json")
    if special_path:
        known = (*SPECIAL_TOKEN_NAMES, "additional_special_tokens", "extra_special_tokens")
        special = read_json_object(special_path)
        # the config is the newer of the two files and wins
        arguments = {**{key: value for key, value in special.items() if key in known}, **arguments}

    whole = source.find("tokenizer.json")
    if whole:
        arguments["tokenizer_file"] = whole
        return _without_none(arguments)
    vocab, merges = source.find("vocab.json"), source.find("merges.txt")
    if vocab is None or merges is None:
        foreign = [f"{name}, {what}" for name, what in FOREIGN_FILES.items() if source.find(name)]
        if foreign:
            raise TokenizerError(
                f"{source.name} has {'; '.join(foreign)}; GPT2Tokenizer needs tokenizer.json, or vocab.json and "
                "merges.txt. Tokenize with that library and pass the ids to the model"
            )
        have = [name for name, path in (("vocab.json", vocab), ("merges.txt", merges)) if path]
        raise CheckpointError(
            f"{source.name} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
            + (f"; only {have[0]} is there" if have else "")
            + source.offline_hint()
        )
    arguments.update(vocab_file=vocab, merges_file=merges)
    added_path = source.find("added_tokens.json")
    if added_path:
        added = read_json_object(added_path)
        listed = {int(key) for key in arguments.get("added_tokens_decoder", {})}
        specials = {str(arguments.get(name)) for name in SPECIAL_TOKEN_NAMES}
        extra = {
            str(token_id): {"content": content, "special": content in specials, "normalized": content not in specials}
            for content, token_id in added.items()
            if token_id not in listed
        }
        arguments["added_tokens_decoder"] = {**extra, **arguments.get("added_tokens_decoder", {})}
    return _without_none(arguments)


def _without_none(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if value is not None}
