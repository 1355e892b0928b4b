"""GPT-2's tokenizer: byte-level BPE, with transformers' names.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2; BPE after Sennrich et
al., arXiv:1508.07909. The merging itself is done by the ``tokenizers`` library; decoding is done here, byte by byte, so
that ``errors`` is honoured and streams never show half a character.
"""

import codecs
import json
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.base import guarded
from gpt2rt.tokenizers.bpe import BpeTokenizer, Merges, PathLike, Vocabulary, build_bpe
from gpt2rt.tokenizers.bytelevel import token_to_bytes
from gpt2rt.tokenizers.files import BpeFiles, read_tokenizer_json
from gpt2rt.tokenizers.load import GENERIC_CLASSES
from gpt2rt.tokenizers.pretrained import check_switches, first_given
from gpt2rt.tokenizers.special import as_added_token

if TYPE_CHECKING:
    from tokenizers import AddedToken

END_OF_TEXT = "<|endoftext|>"


class GPT2Tokenizer(BpeTokenizer):
    """Byte-level BPE tokenizer.

    Both of transformers' spellings work: ``GPT2Tokenizer(vocab, merges)`` with a dictionary and a list of pairs or with
    paths, ``GPT2Tokenizer(vocab_file=..., merges_file=...)``, and ``GPT2Tokenizer(tokenizer_file=...)``.

    Args:
        vocab, vocab_file: token -> id, or the path of a ``vocab.json``.
        merges, merges_file: pairs, best first, or the path of a ``merges.txt``.
        errors: what decoding does with invalid UTF-8: "replace", "strict", "ignore" or another codec error handler.
        unk_token, bos_token, eos_token, pad_token: special tokens, added to the vocabulary if it lacks them; the first
            three are "<|endoftext|>" unless given.
        add_prefix_space: put a space before a text that does not begin with one.
        add_bos_token, add_eos_token: put the token before, or after, every text.
        tokenizer_file: the path of a ``tokenizer.json``; everything in it is checked, see ``files``.
        **common: the arguments of :class:`gpt2rt.tokenizers.pretrained.PreTrainedTokenizerBase`.
    Raises:
        CheckpointError: a file is missing or unreadable.
        TokenizerError: the files do not describe a byte-level BPE tokenizer, or do not fit together.
    """

    saved_class_name: ClassVar[str] = "GPT2Tokenizer"
    runnable_classes: ClassVar[tuple[str, ...]] = ("GPT2Tokenizer", *GENERIC_CLASSES)

    def __init__(
        self,
        vocab: Vocabulary = None,
        merges: Merges = None,
        errors: str = "replace",
        unk_token: "str | AddedToken | None" = None,
        bos_token: "str | AddedToken | None" = None,
        eos_token: "str | AddedToken | None" = None,
        pad_token: "str | AddedToken | None" = None,
        add_prefix_space: bool | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        *,
        vocab_file: PathLike | None = None,
        merges_file: PathLike | None = None,
        tokenizer_file: PathLike | None = None,
        **common: Any,
    ) -> None:
        parts = self._read_parts(
            vocab_file if vocab is None else vocab, merges_file if merges is None else merges, tokenizer_file
        )
        check_switches(
            {"add_prefix_space": add_prefix_space, "add_bos_token": add_bos_token, "add_eos_token": add_eos_token}
        )
        self.errors = _known_error_handler(errors)
        self._vocab, self._merges = parts.vocab, parts.merges
        implied = parts.settings
        unknown = as_added_token(first_given(unk_token, END_OF_TEXT), special=True)
        super().__init__(
            _build_backend(parts, unknown.content),
            {"type": "ByteLevel"},
            listed=parts.added_tokens,
            unk_token=unknown,
            bos_token=first_given(bos_token, implied.get("bos_token"), END_OF_TEXT),
            eos_token=first_given(eos_token, implied.get("eos_token"), END_OF_TEXT),
            pad_token=pad_token,
            add_prefix_space=first_given(add_prefix_space, implied.get("add_prefix_space")),
            add_bos_token=first_given(add_bos_token, implied.get("add_bos_token")),
            add_eos_token=first_given(add_eos_token, implied.get("add_eos_token")),
            **common,
        )

    @classmethod
    def _read_json(cls, path: Path) -> BpeFiles:
        return read_tokenizer_json(path)

    def _pre_tokenizer(self, add_prefix_space: bool) -> Any:
        from tokenizers import pre_tokenizers

        return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool, clean: bool | None) -> str:
        data = b"".join(self.id_to_bytes(operator.index(token_id), skip_special_tokens) for token_id in ids)
        return data.decode("utf-8", self.errors)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens in the alphabet of the vocabulary."""
        added = self.added_tokens_encoder
        return b"".join(self._token_bytes(token, token in added) for token in tokens).decode("utf-8", self.errors)

    def _token_bytes(self, token: str, added: bool) -> bytes:
        # an added token stands for its own text, a token of the vocabulary is spelled in the byte alphabet
        return token.encode("utf-8") if added else token_to_bytes(token)

    def _own_config(self) -> dict[str, Any]:
        return {
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
            "add_prefix_space": bool(self.add_prefix_space),
            "errors": self.errors,
        }

    @classmethod
    def train_from_iterator(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Iterable[str] = (END_OF_TEXT,),
        min_frequency: int = 2,
        **kwargs: Any,
    ) -> Self:
        """Train a byte-level BPE vocabulary.

        Args:
            texts: the training texts.
            vocab_size: tokens in all: 256 bytes, the merges, and the special tokens, which come last as in GPT-2. Small
                texts may give fewer.
            special_tokens: never split.
            min_frequency: pairs seen less often are not merged.
            **kwargs: constructor arguments.
        Raises:
            TokenizerError: ``vocab_size`` is smaller than 256 and the special tokens.
        """
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        specials = list(special_tokens)
        if vocab_size < 256 + len(specials):
            raise TokenizerError(
                f"vocab_size = {vocab_size}, but it must be at least {256 + len(specials)}: 256 bytes and "
                f"{len(specials)} special tokens"
            )
        trainee = Tokenizer(models.BPE())
        trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(specials),
            min_frequency=min_frequency,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        guarded(trainee.train_from_iterator, texts, trainer=trainer)
        model = json.loads(trainee.to_str())["model"]
        vocab: dict[str, int] = model["vocab"]
        for token in specials:
            vocab[token] = len(vocab)
        return cls(vocab, model["merges"], **kwargs)


GPT2TokenizerFast = GPT2Tokenizer


def _build_backend(parts: BpeFiles, unknown: str) -> Any:
    from tokenizers import decoders, pre_tokenizers

    # characters outside a vocabulary that lacks some of the 256 bytes become the unknown token, not nothing
    backend = build_bpe(parts, unknown if unknown in parts.vocab else None)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _known_error_handler(errors: str) -> str:
    try:
        codecs.lookup_error(errors)
    except (LookupError, TypeError):
        raise TokenizerError(
            f"errors = {errors!r} is no codec error handler; use 'replace', 'strict', 'ignore' or 'backslashreplace'"
        ) from None
    return errors
