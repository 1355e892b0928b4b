"""What every tokenizer class shares: its settings, special tokens and templates, and reading and writing folders."""

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gpt2rt.checkpoint.upload import PushToHub, upload, upload_options
from gpt2rt.collector import collector_paused
from gpt2rt.errors import TokenizerError
from gpt2rt.tokenizers.base import CallableTokenizer
from gpt2rt.tokenizers.chat import ChatTemplates
from gpt2rt.tokenizers.decoding import TokenStream, clean_up, inner_bytes
from gpt2rt.tokenizers.load import FileSource, check_class, read_settings
from gpt2rt.tokenizers.special import SPECIAL_TOKEN_NAMES, as_added_token

if TYPE_CHECKING:
    from tokenizers import AddedToken

# transformers' "no limit"
VERY_LARGE_INTEGER = int(1e30)


class PreTrainedTokenizerBase(PushToHub, ChatTemplates, CallableTokenizer):
    """A tokenizer on top of a ``tokenizers.Tokenizer``.

    A subclass builds the backend, says which files it reads, and hands the rest of its arguments to this class.

    Args:
        backend: the ``tokenizers.Tokenizer``, without post-processor; owned by this object from now on.
        decoder: the ``decoder`` of its ``tokenizer.json``, or None.
        listed: added tokens whose ids a file fixes, as ``files.check_added_token`` returns them.
        unk_token, bos_token, eos_token, pad_token, sep_token, cls_token, mask_token: special tokens, added to the
            vocabulary if it lacks them.
        additional_special_tokens, extra_special_tokens: further special tokens.
        added_tokens_decoder: id -> added token, as in ``tokenizer_config.json``.
        add_prefix_space: put a space before a text that does not begin with one; has an effect on byte-level
            tokenizers.
        add_bos_token, add_eos_token: put the token before, or after, every text.
        model_max_length: the longest text of the model in tokens.
        padding_side, truncation_side: "right" or "left".
        split_special_tokens: treat special tokens in texts like any other characters.
        clean_up_tokenization_spaces: remove spaces before punctuation and English endings from decoded text; has no
            effect on BPE, whose text has its own spaces.
        model_input_names: what a call returns by default.
        chat_template: Jinja text, or name -> text; see ``apply_chat_template``.
        name_or_path: where the tokenizer was read from.
        init_kwargs: entries of a ``tokenizer_config.json`` without a meaning here; kept and saved again.
    Raises:
        TokenizerError: an argument is invalid.
    """

    #: argument -> file name
    vocab_files_names: ClassVar[dict[str, str]] = {}
    #: the name in ``tokenizer_config.json``; transformers knows it
    saved_class_name: ClassVar[str]
    #: names in ``tokenizer_config.json`` that this class can stand for
    runnable_classes: ClassVar[tuple[str, ...]]
    default_input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def __init__(
        self,
        backend: Any,
        decoder: Mapping[str, Any] | None,
        *,
        listed: Sequence[dict[str, Any]] = (),
        bos_token: "str | AddedToken | None" = None,
        eos_token: "str | AddedToken | None" = None,
        unk_token: "str | AddedToken | None" = None,
        sep_token: "str | AddedToken | None" = None,
        pad_token: "str | AddedToken | None" = None,
        cls_token: "str | AddedToken | None" = None,
        mask_token: "str | AddedToken | None" = None,
        additional_special_tokens: Iterable[Any] | None = None,
        extra_special_tokens: Iterable[Any] | None = None,
        added_tokens_decoder: Mapping[Any, Any] | None = None,
        add_prefix_space: bool | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        split_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        model_input_names: Iterable[str] | None = None,
        chat_template: str | Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        name_or_path: str = "",
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._backend = backend
        self._decoder = decoder
        object.__setattr__(self, "_special", dict.fromkeys(SPECIAL_TOKEN_NAMES))
        self._extra_special = []
        self._bytes = None
        self._variants: dict[tuple[bool, bool], Any] = {}
        self._processor: Any = None
        # the post-processor of a file, until add_bos_token or add_eos_token is set
        self._fixed_template: Any = None
        switches = {
            "add_prefix_space": add_prefix_space,
            "add_bos_token": add_bos_token,
            "add_eos_token": add_eos_token,
            "split_special_tokens": split_special_tokens,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        check_switches(switches)
        limit = model_max_length
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0):
            raise TokenizerError(f"model_max_length = {model_max_length!r}, but it must be a positive number of tokens")
        for field, side in (("padding_side", padding_side), ("truncation_side", truncation_side)):
            if side not in ("left", "right"):
                raise TokenizerError(f"{field} = {side!r}, but it must be 'left' or 'right'")
        self.add_prefix_space = bool(add_prefix_space)
        self.split_special_tokens = split_special_tokens
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.model_max_length = VERY_LARGE_INTEGER if model_max_length is None else int(model_max_length)
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self.model_input_names = list(self.default_input_names if model_input_names is None else model_input_names)
        self.name_or_path = name_or_path
        self.init_kwargs = dict(init_kwargs or {})
        self._set_chat_template(chat_template)

        self._add_listed(listed, added_tokens_decoder)
        given: dict[str, Any] = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "unk_token": unk_token,
            "sep_token": sep_token,
            "pad_token": pad_token,
            "cls_token": cls_token,
            "mask_token": mask_token,
        }
        special = {name: value for name, value in given.items() if value is not None}
        extra = extra_special_tokens or additional_special_tokens or ()
        # some checkpoints name their extra tokens: {"image_token": "<image>"}
        extra = list(extra.values() if isinstance(extra, Mapping) else extra)
        self.add_special_tokens({**special, **({"extra_special_tokens": extra} if extra else {})})
        self._add_bos_token, self._add_eos_token = bool(add_bos_token), bool(add_eos_token)
        self._tokens_changed()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, special_tokens={self.special_tokens_map})"
        )

    def _add_listed(self, listed: Sequence[dict[str, Any]], decoder: Mapping[Any, Any] | None) -> None:
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
        self._fixed_template = self._processor = None

    @property
    def add_eos_token(self) -> bool:
        """Whether ``eos_token`` is put after every text."""
        return self._add_eos_token

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos_token = bool(value)
        self._fixed_template = self._processor = None

    def _pre_tokenizer(self, add_prefix_space: bool) -> Any:
        """The pre-tokenizer for this setting; None: that of the backend, which has no such setting."""
        return None

    def _copy_backend(self, add_prefix_space: bool, split_special_tokens: bool) -> Any:
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(self._backend.to_str())
        pre_tokenizer = self._pre_tokenizer(add_prefix_space)
        if pre_tokenizer is not None:
            copy.pre_tokenizer = pre_tokenizer
        copy.encode_special_tokens = split_special_tokens
        return copy

    def _backend_for(self, add_prefix_space: bool, split_special_tokens: bool) -> Any:
        key = (bool(add_prefix_space), bool(split_special_tokens))
        found = self._variants.get(key)
        if found is None:
            # a copy: the settings sit inside the object, which other threads may be using
            found = self._variants[key] = self._copy_backend(*key)
        return found

    def _template(self) -> Any:
        processor = self._processor
        if processor is None:
            processor = self._processor = self._make_template()
        return processor

    def _make_template(self) -> Any:
        """[bos] A [eos] and [bos] A [eos] [bos] B [eos], unless a file has its own."""
        from tokenizers import processors

        if self._fixed_template is not None:
            return self._fixed_template
        bos = self.bos_token if self._add_bos_token else None
        eos = self.eos_token if self._add_eos_token else None
        for name, token, wanted in (("bos", bos, self._add_bos_token), ("eos", eos, self._add_eos_token)):
            if wanted and token is None:
                raise TokenizerError(f"add_{name}_token is on without a {name}_token; set one or turn it off")
        before, after = [bos] if bos else [], [eos] if eos else []
        single = [*before, "$A", *after]
        return processors.TemplateProcessing(
            single=[f"{item}:0" for item in single],
            pair=[*(f"{item}:0" for item in single), *(f"{item}:1" for item in (*before, "$B", *after))],
            special_tokens=[(token, self.convert_tokens_to_ids(token)) for token in {*before, *after}],
        )

    @property
    def backend_tokenizer(self) -> Any:
        """A ``tokenizers.Tokenizer`` that does the same; a copy, changes to it have no effect here."""
        copy = self._copy_backend(bool(self.add_prefix_space), bool(self.split_special_tokens))
        copy.post_processor = self._template()
        return copy

    # ---- decoding --------------------------------------------------------------------------------------------------

    @property
    def _is_bpe(self) -> bool:
        return type(self._backend.model).__name__ == "BPE"

    def token_stream(self, clean_up_tokenization_spaces: bool | None = None) -> TokenStream:
        """A new stream from tokens to text, see :class:`gpt2rt.tokenizers.decoding.TokenStream`."""
        wanted = (
            self.clean_up_tokenization_spaces
            if clean_up_tokenization_spaces is None
            else (clean_up_tokenization_spaces)
        )
        return TokenStream(self._decoder, bool(wanted) and not self._is_bpe)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool, clean: bool | None) -> str:
        stream = self.token_stream(clean)
        tokens = self.convert_ids_to_tokens(ids, skip_special_tokens)
        return "".join(stream.put(token) for token in tokens if token is not None) + stream.end()

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens."""
        stream = TokenStream(self._decoder)
        return "".join(map(stream.put, tokens)) + stream.end()

    def clean_up_tokenization(self, text: str) -> str:
        """Text without the spaces before punctuation and English endings that joining words leaves."""
        return clean_up(text)

    def _token_bytes(self, token: str, added: bool) -> bytes:
        return inner_bytes(self._decoder, token)

    # ---- reading and writing ---------------------------------------------------------------------------------------

    @classmethod
    def _arguments(cls) -> set[str]:
        """The names that the constructor takes."""
        names = {*inspect.signature(cls).parameters, *inspect.signature(PreTrainedTokenizerBase).parameters}
        return names - {"backend", "decoder", "listed", "common"}

    @classmethod
    def _find_files(cls, source: FileSource, settings: dict[str, Any]) -> dict[str, Any]:
        """``settings`` with the arguments that name the checkpoint's vocabulary files.

        Raises:
            CheckpointError: there are none.
            TokenizerError: there are those of another kind of tokenizer.
        """
        raise NotImplementedError

    # a vocabulary's file becomes some 100 000 lists and pairs: looking for garbage among them took half of the time
    @classmethod
    @collector_paused()
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

        Read are ``tokenizer.json``, or else the vocabulary files of the class; with ``tokenizer_config.json``,
        ``special_tokens_map.json``, ``added_tokens.json`` and ``chat_template.jinja`` where they exist.

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
        return cls._from_source(source, refuse_options(kwargs))

    @classmethod
    def _from_source(cls, source: FileSource, overrides: dict[str, Any]) -> Self:
        known = cls._arguments()
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise TypeError(
                f"{cls.__name__}.from_pretrained got unknown keywords: {', '.join(map(repr, unknown))}; they are "
                "neither its arguments nor those of the class"
            )
        settings, found_class = read_settings(source)
        check_class(source, found_class, cls.__name__, cls.runnable_classes)
        found = cls._find_files(source, settings)
        arguments = {key: value for key, value in found.items() if key in known and value is not None}
        rest = {key: value for key, value in found.items() if key not in known and value is not None}
        return cls(**{**arguments, "init_kwargs": rest, "name_or_path": source.name, **overrides})

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the vocabulary without the added tokens, in the files of the class.

        Args:
            save_directory: a folder, made if needed.
            filename_prefix: put before the names, with a hyphen.
        Returns:
            the paths.
        Raises:
            CheckpointError: writing failed; older files are left as they were.
        """
        from gpt2rt.checkpoint.atomic import AtomicFiles, make_folder

        folder = make_folder(save_directory)
        paths = []
        with AtomicFiles() as files:
            for name, text in self._vocabulary_files().items():
                paths.append(prefixed(folder, name, filename_prefix))
                files.add(paths[-1], _writer(text))
        return tuple(map(str, paths))

    def _vocabulary_files(self) -> dict[str, str]:
        """File name -> content."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        *,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Write the whole tokenizer so that this class and transformers read it back.

        Args:
            save_directory: a folder, made if needed.
            legacy_format: True leaves ``tokenizer.json`` out, False leaves the vocabulary files of the class out, None
                writes both.
            filename_prefix: put before the names of the files.
            push_to_hub: upload the files written afterwards; further keywords are those of :meth:`push_to_hub`, and
                ``repo_id`` is the folder's name by default.
            token: access token for ``push_to_hub``.
        Returns:
            the paths written.
        Raises:
            CheckpointError: writing or uploading failed.
            ValueError: an argument is one of transformers' that gpt2rt does not honour.
            TypeError: an unknown keyword.
        """
        from gpt2rt.checkpoint.atomic import make_folder, write_text

        options = upload_options(kwargs, push_to_hub)
        folder = make_folder(save_directory)
        contents = {}
        if legacy_format is True and not self.vocab_files_names:
            raise TokenizerError(f"legacy_format=True: {type(self).__name__} has no other file than tokenizer.json")
        if legacy_format is not True:
            contents["tokenizer.json"] = self.backend_tokenizer.to_str(pretty=True) + "\n"
        contents["tokenizer_config.json"] = json.dumps(self._config(), indent=2, sort_keys=True, ensure_ascii=False)
        paths = []
        for name, text in contents.items():
            paths.append(prefixed(folder, name, filename_prefix))
            write_text(paths[-1], text.rstrip("\n") + "\n")
        if isinstance(self.chat_template, str):
            paths.append(folder / "chat_template.jinja")
            write_text(paths[-1], self.chat_template)
        written = tuple(map(str, paths))
        if legacy_format is not False and self.vocab_files_names:
            written += self.save_vocabulary(folder, filename_prefix)
        if push_to_hub:
            upload(folder, [Path(path).name for path in written], token=token, **options)
        return written

    def _config(self) -> dict[str, Any]:
        """The content of ``tokenizer_config.json``."""
        kept = {key: value for key, value in self.init_kwargs.items() if _is_json(value)}
        config = {
            **kept,
            **self.special_tokens_map,
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
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "split_special_tokens": bool(self.split_special_tokens),
            "tokenizer_class": self.saved_class_name,
            "truncation_side": self.truncation_side,
            **self._own_config(),
        }
        config["pad_token"] = self._special["pad_token"]
        if tuple(self.model_input_names) != self.default_input_names:
            config["model_input_names"] = list(self.model_input_names)
        if self._extra_special:
            config["additional_special_tokens"] = list(self._extra_special)
        if isinstance(self.chat_template, dict):
            config["chat_template"] = [{"name": n, "template": text} for n, text in self.chat_template.items()]
        return config

    def _own_config(self) -> dict[str, Any]:
        """What a class adds to ``tokenizer_config.json``."""
        return {}


def prefixed(folder: Path, name: str, prefix: str | None) -> Path:
    """``folder/name``, or ``folder/prefix-name``.

    Raises:
        TokenizerError: the prefix leads to another folder.
    """
    if prefix and Path(prefix).name != prefix:
        raise TokenizerError(f"filename_prefix = {prefix!r} must be a plain name without folders")
    return folder / (f"{prefix}-{name}" if prefix else name)


def check_switches(switches: Mapping[str, Any]) -> None:
    """Raise TokenizerError for a switch that is neither None, True nor False."""
    for field, value in switches.items():
        if value is not None and type(value) is not bool:
            raise TokenizerError(f"{field} = {value!r}, but it must be True or False")


def first_given(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _writer(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(text.encode("utf-8"))

    return write


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
