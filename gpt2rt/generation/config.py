"""GenerationConfig: what may be asked of ``generate``, under transformers' names and with its defaults.

A field is None until somebody sets it. ``generate`` looks for a value in its keyword arguments, then in the
``generation_config`` argument, then in the model's own ``generation_config``, and last in :data:`DEFAULTS`.

All of transformers' fields can be read from a file and written back. Those that ``generate`` does not do are refused
by name when it is called, never ignored: :data:`FIELD_STATUS` says which, and why.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from gpt2rt.errors import RequestError

from .fields import DEFAULTS as DEFAULTS
from .fields import FIELD_STATUS as FIELD_STATUS
from .fields import FIELDS as FIELDS
from .fields import UNSUPPORTED as UNSUPPORTED
from .validation import validate_fields

CONFIG_NAME = "generation_config.json"

#: bookkeeping of transformers: kept, without effect
_METADATA = ("_from_model_config", "transformers_version")

#: arguments of ``generate`` that are sometimes mistaken for fields
_GENERATE_ARGUMENTS = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "streamer",
)


class GenerationConfig:
    """Settings of ``generate``.

    Args:
        max_new_tokens: the most tokens to add; unset, ``max_length`` counts, and with neither 20 are added.
        max_length: the most tokens of prompt and continuation together.
        min_new_tokens, min_length: no end token before as many.
        max_time: seconds after which no further token is begun.
        stop_strings: one text or several; a row ends with the token that completes one (``generate`` needs
            ``tokenizer=`` then).
        do_sample: draw from the distribution instead of taking the likeliest token.
        temperature: above 0; the logits are divided by it. 0 is accepted where ``do_sample`` is not set.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: in (0, 1]; keep the likeliest tokens that together have this probability.
        min_p: in [0, 1]; keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: above 0; scores of tokens already in the row are divided by it (multiplied if negative).
        no_repeat_ngram_size: no n-gram of this length twice; 0 allows all.
        bad_words_ids: token sequences that must not appear.
        suppress_tokens, begin_suppress_tokens: ids never drawn, or not as the first new token.
        num_beams, length_penalty, early_stopping: beam search.
        num_return_sequences: continuations of each prompt; more than one needs ``do_sample`` or as many beams.
        seed: signed 64-bit; the same seed, prompt and settings give the same text. Unset, one is drawn from torch's
            global generator, so ``torch.manual_seed`` governs it.
        use_cache: False recomputes the whole row for every token.
        kv_cache_dtype: what keys and values are stored in: "auto", the model's dtype, but bfloat16 where layers are
            int8 or int4 with int8 activations and the CPU has products of bfloat16; "float32", "bfloat16", "float16",
            "int8" or "float8" (e4m3fn; not on the cpu executor). The 8-bit ones take a quarter of float32's memory and
            change the numbers slightly.
        eos_token_id: the end token or several; pad_token_id: fills rows that ended early (default: the first end
            token); bos_token_id: the prompt when none is given.
        context_policy: what happens when a row needs more than the model's ``n_positions``: "stop" ends it there,
            "error" refuses the call, "truncate_left" drops the beginning of a prompt that is too long, "sliding" goes
            on with the last tokens, of which ``context_stride`` are dropped at a time.
        return_dict_in_generate, output_scores, output_logits, output_attentions, output_hidden_states: what
            ``generate`` returns.
        **kwargs: transformers' other fields; :data:`FIELD_STATUS` has a sentence about each. ``generate`` refuses those
            it does not do when they ask for something.

    Raises:
        RequestError: (a ValueError) an unknown field, or a value outside its range.
    """

    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    early_stopping: bool | str | None
    max_time: float | None
    stop_strings: str | list[str] | None
    context_policy: str | None
    context_stride: int | None
    do_sample: bool | None
    num_beams: int | None
    num_return_sequences: int | None
    seed: int | None
    use_cache: bool | None
    cache_implementation: str | None
    cache_config: Any
    kv_cache_dtype: str | None
    max_cache_len: int | None
    prefill_chunk_size: int | None
    low_memory: bool | None
    compile_config: Any
    disable_compile: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    top_h: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    length_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: list[list[int]] | None
    renormalize_logits: bool | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | list[int] | None
    remove_invalid_values: bool | None
    exponential_decay_length_penalty: tuple[int, float] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    sequence_bias: dict[tuple[int, ...], float] | list[list[Any]] | None
    token_healing: bool | None
    guidance_scale: float | None
    is_assistant: bool | None
    num_assistant_tokens: int | None
    num_assistant_tokens_schedule: str | None
    assistant_confidence_threshold: float | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    assistant_early_exit: int | None
    assistant_lookbehind: int | None
    target_lookbehind: int | None
    return_dict_in_generate: bool | None
    output_scores: bool | None
    output_logits: bool | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None

    def __init__(self, **kwargs: Any) -> None:
        for name in FIELDS:
            setattr(self, name, None)
        for name in _METADATA:
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
        kwargs.pop("_commit_hash", None)
        misplaced = [name for name in _GENERATE_ARGUMENTS if name in kwargs]
        if misplaced:
            raise RequestError(f"{', '.join(misplaced)} belongs in the call of generate(), not in a GenerationConfig")
        unknown = sorted(set(kwargs) - set(FIELDS))
        if unknown:
            raise RequestError(f"GenerationConfig has no field named {', '.join(unknown)}; is there a typing error?")
        for name, value in kwargs.items():
            setattr(self, name, value)
        self.validate()

    def validate(self) -> None:
        """Check every field that is set.

        Raises:
            RequestError: a value is outside its range; the message names the field, the value and the range.
        """
        validate_fields({name: getattr(self, name) for name in DEFAULTS if getattr(self, name) is not None})

    def refuse_unsupported(self) -> None:
        """Raise if a field asks for something that ``generate`` does not do.

        Raises:
            RequestError: naming the field, its value and the reason.
        """
        for name, (neutral, reason) in UNSUPPORTED.items():
            value = getattr(self, name)
            if value is not None and not any(type(value) in (type(no), int) and value == no for no in neutral):
                hint = f"leave it unset or {neutral[0]!r}" if neutral else "leave it unset"
                raise RequestError(f"generate does not support {name}={value!r}: {reason}; {hint}")

    def get(self, name: str) -> Any:
        """A field's value, or its default from :data:`DEFAULTS` if it is unset."""
        value = getattr(self, name)
        return DEFAULTS.get(name) if value is None else value

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set fields and return the arguments that are none.

        Raises:
            RequestError: a value is outside its range; then nothing has changed.
        """
        known = {name: value for name, value in kwargs.items() if name in FIELDS}
        probe = copy.copy(self)
        probe.__dict__.update(known)
        probe.validate()
        self.__dict__.update(known)
        return {name: value for name, value in kwargs.items() if name not in known}

    def filled_from(self, other: GenerationConfig) -> GenerationConfig:
        """A copy whose unset fields have ``other``'s values."""
        merged = copy.copy(self)
        merged.__dict__.update(
            {name: value for name, value in other.__dict__.items() if self.__dict__.get(name) is None}
        )
        return merged

    # ---- reading and writing -------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """A config from a mapping, as it stands in a file; keys that are no field are kept, without effect.

        Args:
            config_dict: fields and values.
            **kwargs: go before it. With ``return_unused_kwargs=True`` those that are no field are returned beside the
                config instead of kept.
        """
        unused = None
        if kwargs.pop("return_unused_kwargs", False):
            unused = {name: kwargs.pop(name) for name in list(kwargs) if name not in FIELDS}
        values = dict(config_dict)
        values.update(kwargs)
        if isinstance(values.get("sequence_bias"), Mapping):
            values["sequence_bias"] = {_as_ids(key): bias for key, bias in values["sequence_bias"].items()}
        unknown = {name: values.pop(name) for name in list(values) if name not in FIELDS and name not in _METADATA}
        unknown.pop("_commit_hash", None)
        config = cls(**values)
        config.__dict__.update(unknown)
        return config if unused is None else (config, unused)

    @classmethod
    def read(cls, given: Any) -> GenerationConfig:
        """What a caller passes as a generation config: ours as it is, transformers' as one of ours.

        Raises:
            RequestError: it is neither, or one of its values is outside its range.
        """
        if isinstance(given, GenerationConfig):
            return given
        if not hasattr(given, "to_dict"):
            raise RequestError(f"generation_config must be a GenerationConfig, got {type(given).__name__}")
        return cls.from_dict(given.to_dict())

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """What a model's config says about generation: its special tokens and, in old files, sampling settings.

        Args:
            model_config: a model config with ``to_dict()``, or a mapping.
        """
        values = dict(model_config) if isinstance(model_config, Mapping) else model_config.to_dict()
        # output_* switches of a model config are about forward
        found = {
            name: values[name] for name in FIELDS if values.get(name) is not None and not name.startswith("output_")
        }
        return cls(**found, _from_model_config=True)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        config_file_name: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        *,
        subfolder: str = "",
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The generation config of a checkpoint: a folder, an embedded id (``gpt2rt/...``) or a hub id.

        Args:
            pretrained_model_name: what to read.
            config_file_name: its name, ``generation_config.json`` by default.
            cache_dir, force_download, local_files_only, token, revision, subfolder: as in ``huggingface_hub``.
            **kwargs: fields that override what the file says. With ``return_unused_kwargs=True`` those that are no
                field are returned beside the config instead of refused.

        Raises:
            CheckpointError: (an OSError) the file is missing, unreachable or not a JSON object.
            RequestError: (a ValueError) an unknown keyword or a value outside its range.
        """
        from gpt2rt.checkpoint.json_files import MAX_SETTINGS_BYTES, read_json_object
        from gpt2rt.checkpoint.resolve import Source

        source = Source(
            pretrained_model_name,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
            subfolder=subfolder,
        )
        config = cls.from_dict(read_json_object(source.require(config_file_name or CONFIG_NAME), MAX_SETTINGS_BYTES))
        unknown = config.update(**kwargs)
        if return_unused_kwargs:
            return config, unknown
        if unknown:
            raise RequestError(f"GenerationConfig has no field named {', '.join(sorted(unknown))}")
        return config

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], config_file_name: str | None = None, **kwargs: Any
    ) -> None:
        """Write ``generation_config.json`` into a folder, which is made if needed; an older file survives a failure.

        Args:
            save_directory: the folder.
            config_file_name: another file name.
            **kwargs: must be empty; uploading is not done here.

        Raises:
            RequestError: a field was set to something invalid, or a keyword is unknown.
            CheckpointError: writing failed.
        """
        from gpt2rt.checkpoint.atomic import make_folder, write_text

        if any(value for value in kwargs.values()):
            raise RequestError(f"save_pretrained does not know {', '.join(sorted(kwargs))}; it only writes the file")
        self.validate()
        write_text(Path(make_folder(save_directory)) / (config_file_name or CONFIG_NAME), self.to_json_string())

    def to_dict(self) -> dict[str, Any]:
        """All fields, set or not."""
        return copy.deepcopy(self.__dict__)

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in self.to_dict().items() if value is not None}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of ``generation_config.json``: sorted keys, two spaces, a final newline."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        if isinstance(self.sequence_bias, Mapping):
            # JSON has no keys but texts; transformers reads this form too
            values["sequence_bias"] = [[list(ids), bias] for ids, bias in self.sequence_bias.items()]
        return json.dumps(values, indent=2, sort_keys=True, default=_as_json) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write :meth:`to_json_string` to a file; an older one survives a failure."""
        from gpt2rt.checkpoint.atomic import write_text

        write_text(Path(json_file_path), self.to_json_string(use_diff))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerationConfig):
            return NotImplemented
        mine, theirs = self.to_diff_dict(), other.to_diff_dict()
        for name in _METADATA:
            mine.pop(name, None)
            theirs.pop(name, None)
        return mine == theirs

    # fields can be assigned, so equal configs need not stay equal; None is how Python says so, mypy expects a method
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"GenerationConfig {self.to_json_string()}"


def _as_json(value: Any) -> Any:
    """What stands in a file for an object that JSON does not know."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    raise RequestError(f"{value!r}, a {type(value).__name__}, cannot be written to a JSON file; use plain values")


def _as_ids(key: Any) -> Any:
    """The key of a ``sequence_bias`` in a file that transformers wrote: ``"(5, 6)"``."""
    if not isinstance(key, str) or not re.fullmatch(r"\(\d+(, ?\d+)*,?\)", key):
        return key
    return tuple(int(token) for token in re.findall(r"\d+", key))
