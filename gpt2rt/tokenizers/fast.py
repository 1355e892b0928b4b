"""Tokenizers without a class of their own: whatever a ``tokenizer.json`` or a SentencePiece model describes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gpt2rt.checkpoint.json_files import read_json_object
from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.bpe import PathLike
from gpt2rt.tokenizers.components import build_components
from gpt2rt.tokenizers.load import FileSource, no_files, read_added_tokens
from gpt2rt.tokenizers.pretrained import PreTrainedTokenizerBase, first_given
from gpt2rt.tokenizers.sentencepiece import read_sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: files of SentencePiece models, in the order in which they are looked for
SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


class PreTrainedTokenizerFast(PreTrainedTokenizerBase):
    """The tokenizer that a file describes: BPE, WordPiece, Unigram or whole words, with its own steps around them.

    Everything in the file is checked, see ``components``; code and patterns that could run away are refused.

    Args:
        tokenizer_object: a ``tokenizers.Tokenizer``; copied.
        tokenizer_file: the path of a ``tokenizer.json``.
        vocab_file: the path of a SentencePiece model.
        add_bos_token, add_eos_token: where given, they replace the special tokens that the file adds to texts.
        **common: the arguments of :class:`gpt2rt.tokenizers.pretrained.PreTrainedTokenizerBase`. A file does not say
            which of its tokens are ``bos``, ``eos``, ...; ``tokenizer_config.json`` does.
    Raises:
        CheckpointError: the file is missing or unreadable.
        TokenizerError: a part of it is not run, or the parts do not fit together.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {}
    saved_class_name: ClassVar[str] = "PreTrainedTokenizerFast"
    # a tokenizer.json describes the tokenizer whatever class saved it
    runnable_classes: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        tokenizer_object: "Tokenizer | None" = None,
        *,
        tokenizer_file: PathLike | None = None,
        vocab_file: PathLike | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        **common: Any,
    ) -> None:
        content, implied, where = _content(tokenizer_object, tokenizer_file, vocab_file)
        parts = build_components(content, where)
        # a top-level step that the call's add_prefix_space can change
        byte_level = parts.pre_tokenizer is not None and parts.pre_tokenizer["type"] == "ByteLevel"
        self._byte_level = parts.pre_tokenizer if byte_level else None
        if self._byte_level is not None:
            implied["add_prefix_space"] = self._byte_level.get("add_prefix_space", True)
        for name, value in {**parts.settings, **implied}.items():
            common[name] = first_given(common.get(name), value)
        super().__init__(
            parts.backend,
            parts.decoder,
            listed=parts.added_tokens,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            **common,
        )
        if add_bos_token is None and add_eos_token is None:
            self._fixed_template = parts.post_processor

    def _pre_tokenizer(self, add_prefix_space: bool) -> Any:
        if self._byte_level is None:
            return None
        from tokenizers import pre_tokenizers

        fields = {name: value for name, value in self._byte_level.items() if name != "type"}
        return pre_tokenizers.ByteLevel(**{**fields, "add_prefix_space": add_prefix_space})

    def _encode_texts(self, texts: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
        if options["words"] and self._byte_level is None and "ByteLevel" in str(self._backend.pre_tokenizer):
            raise TokenizerError(
                "is_split_into_words=True: this tokenizer splits bytes in a step among others, which would glue the "
                "words together; join them with spaces and pass the text"
            )
        return super()._encode_texts(texts, options)

    @classmethod
    def _find_files(cls, source: FileSource, settings: dict[str, Any]) -> dict[str, Any]:
        whole = source.find("tokenizer.json")
        if whole:
            # the template of the file says which tokens are added, as in transformers 5
            kept = {name: value for name, value in settings.items() if name not in ("add_bos_token", "add_eos_token")}
            return {**kept, "tokenizer_file": whole}
        for name in SENTENCEPIECE_FILES:
            path = source.find(name)
            if path:
                return {**read_added_tokens(source, settings), "vocab_file": path}
        raise no_files(source, cls.__name__, ("a SentencePiece model (.model)",))

    def save_vocabulary(self, save_directory: PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Not for this class: its one file, ``tokenizer.json``, is written by ``save_pretrained``.

        Raises:
            TokenizerError: always.
        """
        raise TokenizerError(f"{type(self).__name__} has no files besides tokenizer.json; use save_pretrained")

    def _own_config(self) -> dict[str, Any]:
        return {"add_prefix_space": self.add_prefix_space} if self._byte_level is not None else {}


def _content(
    tokenizer_object: Any, tokenizer_file: PathLike | None, vocab_file: PathLike | None
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(the content of a ``tokenizer.json``, constructor arguments that it implies, its name for messages)."""
    if tokenizer_object is not None:
        return json.loads(tokenizer_object.to_str()), {}, "tokenizer_object"
    if tokenizer_file is not None:
        return read_json_object(Path(tokenizer_file)), {}, str(tokenizer_file)
    if vocab_file is not None:
        return *read_sentencepiece(Path(vocab_file)), str(vocab_file)
    raise TokenizerError(
        "pass tokenizer_file (a tokenizer.json), vocab_file (a SentencePiece model) or tokenizer_object, or use "
        "PreTrainedTokenizerFast.from_pretrained"
    )
