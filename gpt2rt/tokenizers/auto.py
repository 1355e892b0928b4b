"""The right tokenizer for a checkpoint."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2rt.checkpoint.json_files import read_json_object
from gpt2rt.collector import collector_paused
from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.bert import BertTokenizer
from gpt2rt.tokenizers.fast import SENTENCEPIECE_FILES, PreTrainedTokenizerFast
from gpt2rt.tokenizers.files import bert_settings, gpt2_settings, openai_gpt_settings
from gpt2rt.tokenizers.gpt2 import GPT2Tokenizer
from gpt2rt.tokenizers.load import GENERIC_CLASSES, FileSource, base_name, no_files
from gpt2rt.tokenizers.openai_gpt import OpenAIGPTTokenizer
from gpt2rt.tokenizers.pretrained import PreTrainedTokenizerBase

#: the name in tokenizer_config.json, without "Fast" -> class
CLASSES: dict[str, type[PreTrainedTokenizerBase]] = {
    "GPT2Tokenizer": GPT2Tokenizer,
    "OpenAIGPTTokenizer": OpenAIGPTTokenizer,
    "BertTokenizer": BertTokenizer,
    **dict.fromkeys(GENERIC_CLASSES, PreTrainedTokenizerFast),
}
#: model_type -> class, for the argument ``tokenizer_type`` and for checkpoints that name no class
MODEL_TYPES: dict[str, type[PreTrainedTokenizerBase]] = {
    "gpt2": GPT2Tokenizer,
    "openai-gpt": OpenAIGPTTokenizer,
    "bert": BertTokenizer,
}
#: class -> the check that a ``tokenizer.json`` describes a tokenizer of this class
CONTENTS: dict[type[PreTrainedTokenizerBase], Callable[[dict[str, Any], str], Any]] = {
    GPT2Tokenizer: gpt2_settings,
    OpenAIGPTTokenizer: openai_gpt_settings,
    BertTokenizer: bert_settings,
}


class AutoTokenizer:
    """Chooses the tokenizer class; made by :meth:`from_pretrained` only."""

    def __init__(self) -> None:
        raise OSError("AutoTokenizer is not made directly; use AutoTokenizer.from_pretrained(name)")

    # a vocabulary's file becomes some 100 000 lists and pairs: looking for garbage among them took half of the time
    @classmethod
    @collector_paused()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: Any = None,
        tokenizer_type: str | None = None,
        use_fast: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        subfolder: str = "",
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> PreTrainedTokenizerBase:
        """The tokenizer of a checkpoint.

        The class is the one that ``tokenizer_config.json`` names, or else ``config.json``; without a name it follows
        from the files and the model type. Where ``tokenizer.json`` describes another tokenizer than the named class,
        the file counts, with a warning. A warning also says when the tokenizer has ids that the model lacks.

        Args:
            pretrained_model_name_or_path: a folder, an embedded id (``gpt2rt/...``) or a hub id.
            config: the model's configuration, instead of the checkpoint's ``config.json``.
            tokenizer_type: "gpt2", "openai-gpt" or "bert": this class, whatever the files say.
            use_fast: either value gives the same class.
            cache_dir, force_download, local_files_only, token, revision, subfolder: as in ``huggingface_hub``.
            trust_remote_code: must not be True; gpt2rt never runs code from a checkpoint.
            **kwargs: constructor arguments of the class.
        Returns:
            a GPT2Tokenizer, OpenAIGPTTokenizer, BertTokenizer or PreTrainedTokenizerFast.
        Raises:
            CheckpointError: the files are missing or unreachable.
            TokenizerError: they name a class that gpt2rt does not have, or do not fit it.
        """
        from gpt2rt.checkpoint.options import refuse_options
        from gpt2rt.checkpoint.resolve import Source
        from gpt2rt.config import refuse_remote_code

        refuse_remote_code(trust_remote_code)
        source = Source(
            pretrained_model_name_or_path,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
            subfolder=subfolder,
        )
        options = refuse_options(kwargs)
        model_config = _model_config(source, config)
        if tokenizer_type is not None:
            if tokenizer_type not in MODEL_TYPES:
                raise TokenizerError(f"tokenizer_type = {tokenizer_type!r}, known: {', '.join(MODEL_TYPES)}")
            chosen = MODEL_TYPES[tokenizer_type]
        else:
            chosen = _choose(source, model_config)
        tokenizer = chosen._from_source(source, options)
        _compare_sizes(tokenizer, model_config, source.name)
        return tokenizer


def _model_config(source: FileSource, config: Any) -> dict[str, Any]:
    """The fields of the model's configuration; empty if there is none."""
    if config is not None:
        return config if isinstance(config, dict) else config.to_dict()
    path = source.find("config.json")
    return read_json_object(path) if path else {}


def _choose(source: FileSource, model_config: dict[str, Any]) -> type[PreTrainedTokenizerBase]:
    path = source.find("tokenizer_config.json")
    named = read_json_object(path).get("tokenizer_class") if path else None
    where = "tokenizer_config.json"
    if named is None:
        named, where = model_config.get("tokenizer_class"), "config.json"
    if named is None:
        return _choose_by_files(source, model_config.get("model_type"))
    if isinstance(named, str) and base_name(named) in CLASSES:
        chosen, whole = CLASSES[base_name(named)], source.find("tokenizer.json")
        if whole and chosen in CONTENTS and not _is_one(chosen, read_json_object(whole), str(whole)):
            warnings.warn(
                f"{source.name}: {where} names {named}, but tokenizer.json describes another tokenizer; it is run as "
                "it stands, as a PreTrainedTokenizerFast",
                stacklevel=3,
            )
            return PreTrainedTokenizerFast
        return chosen
    hint = (
        "if its tokenizer.json says everything, gpt2rt.PreTrainedTokenizerFast.from_pretrained runs that"
        if source.find("tokenizer.json")
        else "tokenize with that class of transformers and pass the ids to the model"
    )
    raise TokenizerError(
        f"{source.name}: {where} asks for {named!r:.80}, which gpt2rt does not have (it has "
        f"{', '.join(sorted(set(CLASSES)))}); {hint}"
    )


def _choose_by_files(source: FileSource, model_type: Any) -> type[PreTrainedTokenizerBase]:
    whole = source.find("tokenizer.json")
    if whole:
        return _choose_by_content(whole)
    if source.find("vocab.json") and source.find("merges.txt"):
        return OpenAIGPTTokenizer if model_type == "openai-gpt" else GPT2Tokenizer
    if source.find("vocab.txt"):
        return BertTokenizer
    if any(source.find(name) for name in SENTENCEPIECE_FILES):
        return PreTrainedTokenizerFast
    raise no_files(source, "AutoTokenizer", ("vocab.json", "merges.txt"))


def _choose_by_content(path: Path) -> type[PreTrainedTokenizerBase]:
    """GPT-2's or OpenAI GPT's class for a ``tokenizer.json`` of theirs, else the general one."""
    data = read_json_object(path)
    # BERT's class would add "[CLS]" and "[SEP]", which only a name in the checkpoint can ask for
    fitting = (kind for kind in (GPT2Tokenizer, OpenAIGPTTokenizer) if _is_one(kind, data, str(path)))
    return next(fitting, PreTrainedTokenizerFast)


def _is_one(kind: type[PreTrainedTokenizerBase], data: dict[str, Any], where: str) -> bool:
    try:
        CONTENTS[kind](data, where)
    except TokenizerError:
        return False
    return True


def _compare_sizes(tokenizer: PreTrainedTokenizerBase, model_config: dict[str, Any], name: str) -> None:
    size = model_config.get("vocab_size")
    if type(size) is int and len(tokenizer) > size:
        warnings.warn(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {size}; ids from {size} on have no "
            "embedding. Is it the model's own tokenizer? After adding tokens call "
            "model.resize_token_embeddings(len(tokenizer))",
            stacklevel=3,
        )
