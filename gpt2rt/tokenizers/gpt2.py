"""GPT-2's tokenizer: byte-level BPE, with transformers' names.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2; BPE after Sennrich et
al., arXiv:1508.07909. The merging itself is done by the ``tokenizers`` library; decoding is done here, byte by byte, so
that ``errors`` is honoured and streams never show half a character.
"""

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.base import CallableTokenizer, guarded
from gpt2rt.tokenizers.files import (
    check_merge,
    check_merges,
    check_vocab,
    read_merges,
    read_tokenizer_json,
    read_vocab,
)
from gpt2rt.tokenizers.special import SPECIAL_TOKEN_NAMES, as_added_token

if TYPE_CHECKING:
    from tokenizers import AddedToken

END_OF_TEXT = "<|endoftext|>"
# transformers' "no limit"
VERY_LARGE_INTEGER = int(1e30)


class GPT2Tokenizer(CallableTokenizer):
    """Byte-level BPE tokenizer.

    Both of transformers' spellings work: ``GPT2Tokenizer(vocab, merges)`` with a dictionary and a list of pairs or with
    paths, ``GPT2Tokenizer(vocab_file=..., merges_file=...)``, and ``GPT2Tokenizer(tokenizer_file=...)``.

    Args:
        vocab, vocab_file: token -> id, or the path of a ``vocab.json``.
        merges, merges_file: pairs, best first, or the path of a ``merges.txt``.
        tokenizer_file: the path of a ``tokenizer.json``; everything in it is checked, see ``files``.
        errors: what decoding does with invalid UTF-8: "replace", "strict", "ignore" or another codec error handler.
        unk_token, bos_token, eos_token, pad_token, sep_token, cls_token, mask_token: special tokens, added to the
            vocabulary if it lacks them.
        additional_special_tokens, extra_special_tokens: further special tokens.
        add_prefix_space: put a space before a text that does not begin with one.
        add_bos_token, add_eos_token: put the token before, or after, every text.
        model_max_length: the longest text of the model in tokens.
        padding_side, truncation_side: "right" or "left".
        split_special_tokens: treat special tokens in texts like any other characters.
        clean_up_tokenization_spaces: kept and saved; has no effect on byte-level text.
        model_input_names: what a call returns by default.
        added_tokens_decoder: id -> added token, as in ``tokenizer_config.json``.
        name_or_path: where the tokenizer was read from.
        init_kwargs: entries of a ``tokenizer_config.json`` without a meaning here; kept and saved again.
    Raises:
        CheckpointError: a file is missing or unreadable.
        TokenizerError: the files do not describe a byte-level BPE tokenizer, or do not fit together.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}

    def __init__(
        self,
        vocab: "str | os.PathLike[str] | Mapping[str, int] | None" = None,
        merges: "str | os.PathLike[str] | Iterable[Any] | None" = None,
        errors: str = "replace",
        unk_token: "str | AddedToken | None" = None,
        bos_token: "str | AddedToken | None" = None,
        eos_token: "str | AddedToken | None" = None,
        pad_token: "str | AddedToken | None" = None,
        add_prefix_space: bool | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        *,
        vocab_file: str | os.PathLike[str] | None = None,
        merges_file: str | os.PathLike[str] | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        additional_special_tokens: Iterable[Any] | None = None,
        extra_special_tokens: Iterable[Any] | None = None,
        added_tokens_decoder: Mapping[Any, Any] | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        split_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        model_input_names: Iterable[str] = ("input_ids", "attention_mask"),
        name_or_path: str = "",
        sep_token: "str | AddedToken | None" = None,
        cls_token: "str | AddedToken | None" = None,
        mask_token: "str | AddedToken | None" = None,
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        vocab, merges = vocab_file if vocab is None else vocab, merges_file if merges is None else merges
        implied: dict[str, Any] = {}
        listed: list[dict[str, Any]] = []
        if tokenizer_file is not None and vocab is None and merges is None:
            parts = read_tokenizer_json(Path(tokenizer_file))
            vocab_map, pairs, listed, implied = parts.vocab, parts.merges, parts.added_tokens, parts.settings
        else:
            vocab_map, pairs = _vocab_and_merges(vocab, merges)
        self._vocab, self._merges = vocab_map, pairs
        object.__setattr__(self, "_special", dict.fromkeys(SPECIAL_TOKEN_NAMES))
        self._extra_special = []
        self._bytes = None
        self._variants: dict[tuple[bool, bool], Any] = {}
        self._processor: Any = None

        switches = {
            "add_prefix_space": add_prefix_space,
            "add_bos_token": add_bos_token,
            "add_eos_token": add_eos_token,
            "split_special_tokens": split_special_tokens,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        for field, value in switches.items():
            if value is not None and type(value) is not bool:
                raise TokenizerError(f"{field} = {value!r}, but it must be True or False")
        if model_max_length is not None and (isinstance(model_max_length, bool | str) or not model_max_length > 0):
            raise TokenizerError(f"model_max_length = {model_max_length!r}, but it must be a positive number of tokens")
        self.errors = _known_error_handler(errors)
        self.add_prefix_space = _first(add_prefix_space, implied.get("add_prefix_space"), False)
        self.split_special_tokens = split_special_tokens
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.model_max_length = VERY_LARGE_INTEGER if model_max_length is None else int(model_max_length)
        self.padding_side, self.truncation_side = padding_side, truncation_side
        for field, side in (("padding_side", padding_side), ("truncation_side", truncation_side)):
            if side not in ("left", "right"):
                raise TokenizerError(f"{field} = {side!r}, but it must be 'left' or 'right'")
        self.model_input_names = list(model_input_names)
        self.name_or_path = name_or_path
        self.init_kwargs = dict(init_kwargs or {})

        unknown = as_added_token(unk_token if unk_token is not None else END_OF_TEXT, special=True)
        self._backend = _build_backend(vocab_map, pairs, unknown.content)
        self._special["unk_token"] = unknown.content
        self._add_listed(listed, added_tokens_decoder)
        given: dict[str, Any] = {
            "bos_token": _first(bos_token, implied.get("bos_token"), END_OF_TEXT),
            "eos_token": _first(eos_token, implied.get("eos_token"), END_OF_TEXT),
            "unk_token": unknown,
            "pad_token": pad_token,
            "sep_token": sep_token,
            "cls_token": cls_token,
            "mask_token": mask_token,
        }
        special = {name: value for name, value in given.items() if value is not None}
        extra = list(extra_special_tokens or additional_special_tokens or ())
        self.add_special_tokens({**special, **({"extra_special_tokens": extra} if extra else {})})
        self._add_bos_token = bool(_first(add_bos_token, implied.get("add_bos_token"), False))
        self._add_eos_token = bool(_first(add_eos_token, implied.get("add_eos_token"), False))
        self._tokens_changed()

    def _add_listed(self, listed: list[dict[str, Any]], decoder: Mapping[Any, Any] | None) -> None:
        """Add tokens whose ids a file fixes, lowest id first, and check that they got those ids."""
        by_id = {token["id"]: {key: value for key, value in token.items() if key != "id"} for token in listed}
        for token_id, token in (decoder or {}).items():
            by_id[int(token_id)] = token
        for token_id in sorted(by_id):
            token = as_added_token(by_id[token_id], special=False)
            if token.special:
                self._backend.add_special_tokens([token])
            else:
                self._backend.add_tokens([token])
            found = self._backend.token_to_id(token.content)
            if found != token_id:
                raise TokenizerError(
                    f"the added token {token.content!r} is listed with id {token_id}, but after the tokens before it "
                    f"its id is {found}; are tokenizer_config.json and the vocabulary from one tokenizer?"
                )

    # ---- settings that change what is built ------------------------------------------------------------------------

    def _tokens_changed(self) -> None:
        super()._tokens_changed()
        self._variants.clear()
        self._processor = None

    @property
    def add_bos_token(self) -> bool:
        """Whether ``bos_token`` is put before every text."""
        return self._add_bos_token

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_bos_token = bool(value)
        self._processor = None

    @property
    def add_eos_token(self) -> bool:
        """Whether ``eos_token`` is put after every text."""
        return self._add_eos_token

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos_token = bool(value)
        self._processor = None

    def _backend_for(self, add_prefix_space: bool, split_special_tokens: bool) -> Any:
        key = (bool(add_prefix_space), bool(split_special_tokens))
        found = self._variants.get(key)
        if found is None:
            from tokenizers import Tokenizer, pre_tokenizers

            # a copy: the settings sit inside the object, which other threads may be using
            found = Tokenizer.from_str(self._backend.to_str())
            found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=key[0])
            found.encode_special_tokens = key[1]
            self._variants[key] = found
        return found

    def _template(self) -> Any:
        processor = self._processor
        if processor is None:
            from tokenizers import processors

            bos = self.bos_token if self._add_bos_token else None
            eos = self.eos_token if self._add_eos_token else None
            for name, token, wanted in (("bos", bos, self._add_bos_token), ("eos", eos, self._add_eos_token)):
                if wanted and token is None:
                    raise TokenizerError(f"add_{name}_token is on without a {name}_token; set one or turn it off")
            processor = processors.TemplateProcessing(
                single=[*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])],
                pair=[
                    *([f"{bos}:0"] if bos else []),
                    "$A:0",
                    *([f"{eos}:0"] if eos else []),
                    *([f"{bos}:1"] if bos else []),
                    "$B:1",
                    *([f"{eos}:1"] if eos else []),
                ],
                special_tokens=[
                    (token, self.convert_tokens_to_ids(token)) for token in {bos, eos} if token is not None
                ],
            )
            self._processor = processor
        return processor

    @property
    def backend_tokenizer(self) -> Any:
        """A ``tokenizers.Tokenizer`` that does the same; a copy, changes to it have no effect here."""
        from tokenizers import Tokenizer, pre_tokenizers

        copy = Tokenizer.from_str(self._backend.to_str())
        copy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(self.add_prefix_space))
        copy.encode_special_tokens = bool(self.split_special_tokens)
        copy.post_processor = self._template()
        return copy

    # ---- reading and writing ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        subfolder: str = "",
        trust_remote_code: bool | None = None,
        use_fast: bool = True,
        **kwargs: Any,
    ) -> Self:
        """The tokenizer of a checkpoint: a folder, an embedded id (``gpt2rt/...``) or a hub id.

        Read are ``tokenizer.json``, or else ``vocab.json`` and ``merges.txt``; with ``tokenizer_config.json``,
        ``special_tokens_map.json`` and ``added_tokens.json`` where they exist.

        Args:
            pretrained_model_name_or_path: what to read.
            cache_dir, force_download, local_files_only, token, revision, subfolder: as in ``huggingface_hub``.
            trust_remote_code: must not be True; gpt2rt never runs code from a checkpoint.
            use_fast: either value gives this class.
            **kwargs: constructor arguments that override the files.
        Raises:
            TypeError: an unknown keyword.
            CheckpointError: the files are missing or unreachable.
            TokenizerError: they describe another kind of tokenizer, or do not fit together.
        """
        from gpt2rt.checkpoint.options import refuse_options
        from gpt2rt.checkpoint.resolve import Source
        from gpt2rt.config import refuse_remote_code
        from gpt2rt.tokenizers.load import read_checkpoint_tokenizer

        refuse_remote_code(trust_remote_code)
        overrides = refuse_options(kwargs)
        known = set(inspect.signature(cls).parameters)
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise TypeError(
                f"{cls.__name__}.from_pretrained got unknown keywords: {', '.join(map(repr, unknown))}; they are "
                "neither its arguments nor those of the class"
            )
        source = Source(
            pretrained_model_name_or_path,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
            subfolder=subfolder,
        )
        found = read_checkpoint_tokenizer(source)
        arguments = {key: value for key, value in found.items() if key in known}
        arguments["init_kwargs"] = {key: value for key, value in found.items() if key not in known}
        return cls(**{**arguments, "name_or_path": str(pretrained_model_name_or_path), **overrides})

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, str]:
        """Write ``vocab.json`` and ``merges.txt``, without the added tokens.

        Args:
            save_directory: an existing folder.
            filename_prefix: put before both names, with a hyphen.
        Returns:
            the two paths.
        Raises:
            CheckpointError: the folder does not exist, or writing failed; older files are left as they were.
        """
        from gpt2rt.checkpoint.atomic import make_folder, write_text

        folder = make_folder(save_directory)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        vocab_path, merges_path = folder / f"{prefix}vocab.json", folder / f"{prefix}merges.txt"
        by_id = dict(sorted(self._vocab.items(), key=lambda item: item[1]))
        write_text(vocab_path, json.dumps(by_id, ensure_ascii=False, indent=2) + "\n")
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self._merges)]
        write_text(merges_path, "\n".join(lines) + "\n")
        return str(vocab_path), str(merges_path)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Write the whole tokenizer so that this class and transformers read it back.

        Args:
            save_directory: a folder, made if needed.
            legacy_format: True leaves ``tokenizer.json`` out, False leaves ``vocab.json`` and ``merges.txt`` out, None
                writes both.
            filename_prefix: put before the names of the vocabulary files.
        Returns:
            the paths written.
        Raises:
            CheckpointError: writing failed.
        """
        from gpt2rt.checkpoint.atomic import make_folder, write_text

        folder = make_folder(save_directory)
        paths = []
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        if legacy_format is not True:
            paths.append(folder / f"{prefix}tokenizer.json")
            write_text(paths[-1], self.backend_tokenizer.to_str(pretty=True) + "\n")
        paths.append(folder / f"{prefix}tokenizer_config.json")
        write_text(paths[-1], json.dumps(self._config(), indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        written = tuple(map(str, paths))
        if legacy_format is not False:
            written += self.save_vocabulary(folder, filename_prefix)
        return written

    def _config(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.init_kwargs.items() if _is_json(value)}
        config = {
            **kept,
            **self.special_tokens_map,
            "add_bos_token": self._add_bos_token,
            "add_eos_token": self._add_eos_token,
            "add_prefix_space": bool(self.add_prefix_space),
            "added_tokens_decoder": {
                str(token_id): {
                    "content": token.content,
                    "lstrip": token.lstrip,
                    "normalized": token.normalized,
                    "rstrip": token.rstrip,
                    "single_word": token.single_word,
                    "special": token.special,
                }
                for token_id, token in self.added_tokens_decoder.items()
            },
            "clean_up_tokenization_spaces": bool(self.clean_up_tokenization_spaces),
            "errors": self.errors,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "split_special_tokens": bool(self.split_special_tokens),
            "tokenizer_class": "GPT2Tokenizer",
            "truncation_side": self.truncation_side,
        }
        config["pad_token"] = self._special["pad_token"]
        if self._extra_special:
            config["additional_special_tokens"] = list(self._extra_special)
        return config

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


def _vocab_and_merges(vocab: Any, merges: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if vocab is None or merges is None:
        raise TokenizerError(
            f"{'vocab' if vocab is None else 'merges'} is missing: pass vocab and merges (or vocab_file and "
            "merges_file), or tokenizer_file, or use GPT2Tokenizer.from_pretrained"
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
    return vocab_map, pairs


def _build_backend(vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # characters outside a vocabulary that lacks some of the 256 bytes become the unknown token, not nothing
    unk = {"unk_token": unknown} if unknown in vocab else {}
    try:
        model = guarded(models.BPE, vocab=vocab, merges=merges, **unk)
    except TokenizerError:
        raise
    except Exception as error:
        raise TokenizerError(f"vocabulary and merges make no BPE model: {error}") from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _known_error_handler(errors: str) -> str:
    import codecs

    try:
        codecs.lookup_error(errors)
    except (LookupError, TypeError):
        raise TokenizerError(
            f"errors = {errors!r} is no codec error handler; use 'replace', 'strict', 'ignore' or 'backslashreplace'"
        ) from None
    return errors


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
