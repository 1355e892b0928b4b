"""BERT's tokenizer, WordPiece, which Chinese GPT-2 models use.

Source: Devlin et al. 2019, "BERT", arXiv:1810.04805, section 3; WordPiece after Wu et al., arXiv:1609.08144.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.base import guarded
from gpt2rt.tokenizers.bpe import PathLike, Vocabulary
from gpt2rt.tokenizers.files import BpeFiles, check_vocab, read_bert_json
from gpt2rt.tokenizers.load import GENERIC_CLASSES, FileSource, no_files, read_added_tokens, read_text
from gpt2rt.tokenizers.pretrained import PreTrainedTokenizerBase, check_switches, first_given
from gpt2rt.tokenizers.special import as_added_token

if TYPE_CHECKING:
    from tokenizers import AddedToken

PREFIX = "##"


class BertTokenizer(PreTrainedTokenizerBase):
    """WordPiece tokenizer: words and Chinese characters in pieces, "[CLS]" before and "[SEP]" after each text.

    Args:
        vocab, vocab_file: token -> id, or the path of a ``vocab.txt`` with one token a line.
        do_lower_case: lower-case texts.
        unk_token, sep_token, pad_token, cls_token, mask_token: special tokens, added to the vocabulary if it lacks
            them; "[UNK]", "[SEP]", "[PAD]", "[CLS]" and "[MASK]" unless given.
        tokenize_chinese_chars: make each Chinese character a word.
        strip_accents: remove accents; None does it when lower-casing.
        tokenizer_file: the path of a ``tokenizer.json``; everything in it is checked, see ``files``.
        **common: the arguments of :class:`gpt2rt.tokenizers.pretrained.PreTrainedTokenizerBase`.
    Raises:
        CheckpointError: a file is missing or unreadable.
        TokenizerError: the files do not describe such a tokenizer, or do not fit together.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "vocab.txt"}
    saved_class_name: ClassVar[str] = "BertTokenizer"
    runnable_classes: ClassVar[tuple[str, ...]] = ("BertTokenizer", *GENERIC_CLASSES)
    default_input_names: ClassVar[tuple[str, ...]] = ("input_ids", "token_type_ids", "attention_mask")

    def __init__(
        self,
        vocab: Vocabulary = None,
        do_lower_case: bool | None = None,
        unk_token: "str | AddedToken | None" = None,
        sep_token: "str | AddedToken | None" = None,
        pad_token: "str | AddedToken | None" = None,
        cls_token: "str | AddedToken | None" = None,
        mask_token: "str | AddedToken | None" = None,
        tokenize_chinese_chars: bool | None = None,
        strip_accents: bool | None = None,
        *,
        vocab_file: PathLike | None = None,
        tokenizer_file: PathLike | None = None,
        **common: Any,
    ) -> None:
        parts = _read_parts(vocab_file if vocab is None else vocab, tokenizer_file)
        implied = parts.settings
        self.do_lower_case = first_given(do_lower_case, implied.get("do_lower_case"), True)
        self.tokenize_chinese_chars = first_given(tokenize_chinese_chars, implied.get("tokenize_chinese_chars"), True)
        self.strip_accents = first_given(strip_accents, implied.get("strip_accents"))
        check_switches(
            {
                "do_lower_case": self.do_lower_case,
                "tokenize_chinese_chars": self.tokenize_chinese_chars,
                "strip_accents": self.strip_accents,
            }
        )
        self._vocab = parts.vocab
        unknown = as_added_token(first_given(unk_token, implied.get("unk_token"), "[UNK]"), special=True)
        super().__init__(
            self._build_backend(unknown.content),
            {"type": "WordPiece", "prefix": PREFIX, "cleanup": True},
            listed=parts.added_tokens,
            unk_token=unknown,
            sep_token=first_given(sep_token, "[SEP]"),
            pad_token=first_given(pad_token, "[PAD]"),
            cls_token=first_given(cls_token, "[CLS]"),
            mask_token=first_given(mask_token, "[MASK]"),
            **common,
        )

    def _build_backend(self, unknown: str) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

        if unknown not in self._vocab:
            raise TokenizerError(
                f"unk_token = {unknown!r} is not among the {len(self._vocab)} tokens of the vocabulary, so words "
                "outside the vocabulary could not be encoded; add it to the vocabulary or name another"
            )
        backend = Tokenizer(guarded(models.WordPiece, vocab=self._vocab, unk_token=unknown))
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=self.tokenize_chinese_chars,
            strip_accents=self.strip_accents,
            lowercase=self.do_lower_case,
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix=PREFIX)
        return backend

    def _make_template(self) -> Any:
        from tokenizers import processors

        cls, sep = self.cls_token, self.sep_token
        if self.add_bos_token or self.add_eos_token:
            raise TokenizerError(
                f"add_bos_token and add_eos_token have no place here: BertTokenizer puts {cls} before and {sep} after "
                "each text; turn them off"
            )
        for name, token in (("cls_token", cls), ("sep_token", sep)):
            if token is None:
                raise TokenizerError(f"{name} is None, but texts begin and end with it; set it")
        return processors.TemplateProcessing(
            single=[f"{cls}:0", "$A:0", f"{sep}:0"],
            pair=[f"{cls}:0", "$A:0", f"{sep}:0", "$B:1", f"{sep}:1"],
            special_tokens=[(token, self.convert_tokens_to_ids(token)) for token in dict.fromkeys((cls, sep))],
        )

    @classmethod
    def _find_files(cls, source: FileSource, settings: dict[str, Any]) -> dict[str, Any]:
        whole = source.find("tokenizer.json")
        if whole:
            return {**settings, "tokenizer_file": whole}
        vocab = source.find("vocab.txt")
        if vocab is None:
            raise no_files(source, cls.__name__, ("vocab.txt",))
        return {**read_added_tokens(source, settings), "vocab_file": vocab}

    def _vocabulary_files(self) -> dict[str, str]:
        return {"vocab.txt": "".join(f"{token}\n" for token in sorted(self._vocab, key=self._vocab.__getitem__))}

    def _own_config(self) -> dict[str, Any]:
        return {
            "do_lower_case": self.do_lower_case,
            "tokenize_chinese_chars": self.tokenize_chinese_chars,
            "strip_accents": self.strip_accents,
        }


BertTokenizerFast = BertTokenizer


def _read_parts(vocab: Vocabulary, tokenizer_file: PathLike | None) -> BpeFiles:
    if vocab is None and tokenizer_file is not None:
        return read_bert_json(Path(tokenizer_file))
    if vocab is None:
        raise TokenizerError(
            "vocab is missing: pass vocab (or vocab_file), or tokenizer_file, or use BertTokenizer.from_pretrained"
        )
    if isinstance(vocab, str | os.PathLike):
        return BpeFiles(_read_vocab_txt(Path(vocab)), [], [], {})
    assert isinstance(vocab, Mapping)
    return BpeFiles(check_vocab(dict(vocab), "vocab"), [], [], {})


def _read_vocab_txt(path: Path) -> dict[str, int]:
    vocab: dict[str, int] = {}
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines):
        token = line.removesuffix("\r")
        if token in vocab:
            raise TokenizerError(f"{path}: token {token!r} stands on the lines {vocab[token] + 1} and {number + 1}")
        vocab[token] = number
    return check_vocab(vocab, str(path))
