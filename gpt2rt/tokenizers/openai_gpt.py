"""OpenAI GPT's tokenizer: lower-case words in BPE pieces, with transformers' names.

Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 4.1; BPE after
Sennrich et al., arXiv:1508.07909. As in transformers' fast tokenizer, words are those of BERT's basic tokenizer; the
words of the paper are an option, see :mod:`gpt2rt.tokenizers.published`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.base import guarded
from gpt2rt.tokenizers.bpe import BpeTokenizer, Merges, PathLike, Vocabulary, build_bpe
from gpt2rt.tokenizers.files import END_OF_WORD, BpeFiles, read_openai_gpt_json
from gpt2rt.tokenizers.load import GENERIC_CLASSES
from gpt2rt.tokenizers.pretrained import check_switches, first_given
from gpt2rt.tokenizers.published import PublishedWords
from gpt2rt.tokenizers.special import as_added_token

if TYPE_CHECKING:
    from tokenizers import AddedToken


class OpenAIGPTTokenizer(BpeTokenizer):
    """Word-level BPE tokenizer: texts are lower-cased and lose their accents; decoding joins words with spaces.

    Args:
        vocab, vocab_file: token -> id, or the path of a ``vocab.json``.
        merges, merges_file: pairs, best first, or the path of a ``merges.txt``.
        unk_token: stands for characters that the vocabulary lacks, "<unk>" unless given.
        tokenizer_file: the path of a ``tokenizer.json``; everything in it is checked, see ``files``.
        use_ftfy_spacy: split texts into words as the paper did, with ftfy and spaCy (the extra ``openai-gpt``). Offsets
            into the text and words split elsewhere are refused then.
        **common: the arguments of :class:`gpt2rt.tokenizers.pretrained.PreTrainedTokenizerBase`. There are no ``bos``,
            ``eos`` and ``pad`` tokens unless given.
    Raises:
        CheckpointError: a file is missing or unreadable.
        TokenizerError: the files do not describe such a tokenizer, or do not fit together.
        ImportError: ``use_ftfy_spacy`` without ftfy and spaCy.
    """

    saved_class_name: ClassVar[str] = "OpenAIGPTTokenizer"
    runnable_classes: ClassVar[tuple[str, ...]] = ("OpenAIGPTTokenizer", *GENERIC_CLASSES)

    def __init__(
        self,
        vocab: Vocabulary = None,
        merges: Merges = None,
        unk_token: "str | AddedToken | None" = None,
        *,
        vocab_file: PathLike | None = None,
        merges_file: PathLike | None = None,
        tokenizer_file: PathLike | None = None,
        use_ftfy_spacy: bool = False,
        **common: Any,
    ) -> None:
        parts = self._read_parts(
            vocab_file if vocab is None else vocab, merges_file if merges is None else merges, tokenizer_file
        )
        check_switches({"use_ftfy_spacy": use_ftfy_spacy})
        self._vocab, self._merges = parts.vocab, parts.merges
        self._published = PublishedWords() if use_ftfy_spacy else None
        self._has_offsets = self._published is None
        implied = parts.settings
        unknown = as_added_token(first_given(unk_token, implied.get("unk_token"), "<unk>"), special=True)
        if unknown.content not in parts.vocab:
            raise TokenizerError(
                f"unk_token = {unknown.content!r} is not among the {len(parts.vocab)} tokens of the vocabulary, so "
                "characters outside the vocabulary could not be encoded; add it to the vocabulary or name another"
            )
        for name in ("bos_token", "eos_token", "add_bos_token", "add_eos_token"):
            common[name] = first_given(common.get(name), implied.get(name))
        super().__init__(
            _build_backend(parts, unknown.content),
            {"type": "BPEDecoder", "suffix": END_OF_WORD},
            listed=parts.added_tokens,
            unk_token=unknown,
            **common,
        )

    @classmethod
    def _read_json(cls, path: Path) -> BpeFiles:
        return read_openai_gpt_json(path)

    @property
    def do_lower_case(self) -> bool:
        """True: the vocabulary has lower-case letters only."""
        return True

    @property
    def use_ftfy_spacy(self) -> bool:
        """Whether texts are split into words as the paper did."""
        return self._published is not None

    def _own_config(self) -> dict[str, Any]:
        switches = {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        return {name: on for name, on in {**switches, "use_ftfy_spacy": self.use_ftfy_spacy}.items() if on}

    # ---- the words of the paper ------------------------------------------------------------------------------------

    def _encode_texts(self, texts: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
        if self._published is None:
            return super()._encode_texts(texts, options)
        if options["words"]:
            raise TokenizerError(
                "is_split_into_words=True: with use_ftfy_spacy the words are spaCy's; pass whole texts, or make the "
                "tokenizer without use_ftfy_spacy"
            )
        rows = [list(self._words(text, options["split"])) for text in texts]
        backend = self._backend_for(False, options["split"])
        return guarded(backend.encode_batch, rows, add_special_tokens=False, is_pretokenized=True)

    def _words(self, text: str, split_special_tokens: bool) -> Iterator[str]:
        """The words of a text; an added token in it is a word of its own."""
        assert self._published is not None
        added = [
            token.content
            for token in self._backend.get_added_tokens_decoder().values()
            if not (split_special_tokens and token.special)
        ]
        # the longest first, where one begins with another
        pattern = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))
        for index, piece in enumerate(re.split(f"({pattern})", text) if pattern else [text]):
            if index % 2:
                yield piece
            else:
                yield from self._published(piece)

    def _copy_backend(self, add_prefix_space: bool, split_special_tokens: bool) -> Any:
        copy = super()._copy_backend(add_prefix_space, split_special_tokens)
        if self._published is not None:
            # the words come ready
            copy.normalizer = None
            copy.pre_tokenizer = None
        return copy

    @property
    def backend_tokenizer(self) -> Any:
        """A ``tokenizers.Tokenizer`` that does the same; a copy, changes to it have no effect here.

        The words of the paper are no part of it: with ``use_ftfy_spacy`` it splits texts as without.
        """
        copy = super()._copy_backend(False, bool(self.split_special_tokens))
        copy.post_processor = self._template()
        return copy

    @classmethod
    def train_from_iterator(
        cls, texts: Iterable[str], vocab_size: int, unk_token: str = "<unk>", min_frequency: int = 2, **kwargs: Any
    ) -> Self:
        """Train a vocabulary of lower-case pieces.

        Args:
            texts: the training texts.
            vocab_size: tokens in all: ``unk_token``, every character alone and at the end of a word, and the merges.
                Small texts may give fewer.
            unk_token: stands for characters that the texts lack.
            min_frequency: pairs seen less often are not merged.
            **kwargs: constructor arguments.
        Raises:
            TokenizerError: ``vocab_size`` is smaller than the characters need.
        """
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

        trainee = Tokenizer(models.BPE(unk_token=unk_token, end_of_word_suffix=END_OF_WORD))
        trainee.normalizer = normalizers.BertNormalizer(lowercase=True)
        trainee.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[unk_token],
            end_of_word_suffix=END_OF_WORD,
            show_progress=False,
        )
        guarded(trainee.train_from_iterator, texts, trainer=trainer)
        model = json.loads(trainee.to_str())["model"]
        if len(model["vocab"]) > vocab_size:
            raise TokenizerError(
                f"vocab_size = {vocab_size}, but the texts' characters and {unk_token!r} need {len(model['vocab'])}"
            )
        return cls(model["vocab"], model["merges"], unk_token=unk_token, **kwargs)


OpenAIGPTTokenizerFast = OpenAIGPTTokenizer


def _build_backend(parts: BpeFiles, unknown: str) -> Any:
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = build_bpe(parts, unknown, END_OF_WORD)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    return backend
