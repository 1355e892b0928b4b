"""What the two BPE tokenizers, GPT-2's and OpenAI GPT's, share: a vocabulary, merges, and their two files."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.base import guarded
from gpt2rt.tokenizers.files import BpeFiles, check_merge, check_merges, check_vocab, read_merges, read_vocab
from gpt2rt.tokenizers.load import FileSource, no_files, read_added_tokens
from gpt2rt.tokenizers.pretrained import PreTrainedTokenizerBase

Vocabulary = str | os.PathLike[str] | Mapping[str, int] | None
Merges = str | os.PathLike[str] | Iterable[Any] | None
PathLike = str | os.PathLike[str]


class BpeTokenizer(PreTrainedTokenizerBase):
    """A tokenizer made of ``vocab.json`` and ``merges.txt``, or of a ``tokenizer.json`` that says the same."""

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
    _vocab: dict[str, int]
    _merges: list[tuple[str, str]]

    @classmethod
    def _read_json(cls, path: Path) -> BpeFiles:
        """The parts of a ``tokenizer.json``, checked to be a tokenizer of this class."""
        raise NotImplementedError

    @classmethod
    def _read_parts(cls, vocab: Vocabulary, merges: Merges, tokenizer_file: PathLike | None) -> BpeFiles:
        """The parts of the tokenizer, from whichever arguments were given.

        Raises:
            CheckpointError: a file is missing or unreadable.
            TokenizerError: an argument is missing, or the parts do not fit together.
        """
        if tokenizer_file is not None and vocab is None and merges is None:
            return cls._read_json(Path(tokenizer_file))
        if vocab is None or merges is None:
            raise TokenizerError(
                f"{'vocab' if vocab is None else 'merges'} is missing: pass vocab and merges (or vocab_file and "
                f"merges_file), or tokenizer_file, or use {cls.__name__}.from_pretrained"
            )
        if isinstance(vocab, str | os.PathLike):
            vocab_map = read_vocab(Path(vocab))
        else:
            vocab_map = check_vocab(dict(vocab), "vocab")
        if isinstance(merges, str | os.PathLike):
            pairs = read_merges(Path(merges))
        else:
            pairs = [check_merge(merge, f"merge {rank}") for rank, merge in enumerate(merges)]
        check_merges(vocab_map, pairs, "vocab and merges")
        return BpeFiles(vocab_map, pairs, [], {})

    @classmethod
    def _find_files(cls, source: FileSource, settings: dict[str, Any]) -> dict[str, Any]:
        whole = source.find("tokenizer.json")
        if whole:
            return {**settings, "tokenizer_file": whole}
        vocab, merges = source.find("vocab.json"), source.find("merges.txt")
        if vocab is None or merges is None:
            raise no_files(source, cls.__name__, ("vocab.json", "merges.txt"))
        return {**read_added_tokens(source, settings), "vocab_file": vocab, "merges_file": merges}

    def _vocabulary_files(self) -> dict[str, str]:
        by_id = dict(sorted(self._vocab.items(), key=lambda item: item[1]))
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self._merges)]
        return {
            "vocab.json": json.dumps(by_id, ensure_ascii=False, indent=2) + "\n",
            "merges.txt": "\n".join(lines) + "\n",
        }


def build_bpe(parts: BpeFiles, unknown: str | None, end_of_word_suffix: str | None = None) -> Any:
    """A ``tokenizers.Tokenizer`` with a BPE model and nothing else.

    Args:
        parts: the vocabulary and the merges.
        unknown: the token for characters outside the vocabulary; without it they are left out.
        end_of_word_suffix: what the last character of each word carries.
    Raises:
        TokenizerError: the library refuses them.
    """
    from tokenizers import Tokenizer, models

    options = {"unk_token": unknown} if unknown is not None else {}
    if end_of_word_suffix is not None:
        options["end_of_word_suffix"] = end_of_word_suffix
    try:
        return Tokenizer(guarded(models.BPE, vocab=parts.vocab, merges=parts.merges, **options))
    except TokenizerError:
        raise
    except Exception as error:
        raise TokenizerError(f"vocabulary and merges make no BPE model: {error}") from error
