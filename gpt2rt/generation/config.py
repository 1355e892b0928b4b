"""GenerationConfig: what may be asked of ``generate``, under transformers' names and with its defaults.

A field is None until somebody sets it. ``generate`` looks for a value in its keyword arguments, then in the
``generation_config`` argument, then in the model's own ``generation_config``, and last in :data:`DEFAULTS`.

All of transformers' fields can be read from a file and written back. Those that ``generate`` does not do yet are
refused by name when it is called, never ignored.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from gpt2rt.errors import RequestError

from .validation import validate_fields

CONFIG_NAME = "generation_config.json"

#: fields that ``generate`` honours, with the value they have when nobody sets them
DEFAULTS: dict[str, Any] = {
    # length
    "max_length": 20,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "stop_strings": None,
    # how
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "seed": None,
    # scores
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    # output
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    # special tokens
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

#: fields of transformers that ``generate`` does not do yet, with the values that ask for nothing (besides None)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "early_stopping": (False,),
    "use_mtp": (False,),
    "cache_implementation": (),
    "cache_config": (),
    "max_cache_len": (),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "renormalize_logits": (False,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "token_healing": (False,),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "decoder_start_token_id": (),
    "is_assistant": (False,),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "assistant_confidence_threshold": (0.4,),
    "prompt_lookup_num_tokens": (),
    "max_matching_ngram_size": (),
    "assistant_early_exit": (),
    "assistant_lookbehind": (10,),
    "target_lookbehind": (10,),
    "assistant_ensemble_weight": (),
    "speculation_type": (),
    "compile_config": (),
    # nothing is compiled, so asking for that or for the opposite of it is already done
    "disable_compile": (False, True),
    "continuous_batching_config": (),
    "low_memory": (False,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "diversity_penalty": (0.0,),
    "num_beam_groups": (1,),
    "constraints": (),
    "force_words_ids": (),
    "prefill_chunk_size": (),
}

#: bookkeeping of transformers: kept, without effect
_METADATA = ("_from_model_config", "transformers_version")

FIELDS = (*DEFAULTS, *UNSUPPORTED)

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
        temperature: above 0; the logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: in (0, 1]; keep the likeliest tokens that together have this probability.
        min_p: in [0, 1]; keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: above 0; scores of tokens already in the row are divided by it (multiplied if negative).
        no_repeat_ngram_size: no n-gram of this length twice; 0 allows all.
        bad_words_ids: token sequences that must not appear.
        suppress_tokens, begin_suppress_tokens: ids never drawn, or not as the first new token.
        num_return_sequences: continuations of each prompt; more than one needs ``do_sample``.
        seed: signed 64-bit; the same seed, prompt and settings give the same text. Unset, one is drawn from torch's
            global generator, so ``torch.manual_seed`` governs it.
        use_cache: False recomputes the whole row for every token.
        eos_token_id: the end token or several; pad_token_id: fills rows that ended early (default: the first end
            token); bos_token_id: the prompt when none is given.
        return_dict_in_generate, output_scores, output_logits: what ``generate`` returns.
        **kwargs: transformers' other fields; ``generate`` refuses those it does not do yet when they ask for something.

    Raises:
        RequestError: (a ValueError) an unknown field, or a value outside its range.
    """

    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    max_time: float | None
    stop_strings: str | list[str] | None
    do_sample: bool | None
    num_beams: int | None
    num_return_sequences: int | None
    use_cache: bool | None
    seed: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words_ids: list[list[int]] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    return_dict_in_generate: bool | None
    output_scores: bool | None
    output_logits: bool | None
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
        """Raise if a field asks for something that ``generate`` does not do yet.

        Raises:
            RequestError: naming the field and its value.
        """
        for name, nothing in UNSUPPORTED.items():
            value = getattr(self, name)
            if value is not None and not any(type(value) in (type(no), int) and value == no for no in nothing):
                hint = f"leave it unset or {nothing[0]!r}" if nothing else "leave it unset"
                raise RequestError(f"generate does not support {name}={value!r} yet; {hint}")
        if self.num_beams not in (None, 1):
            raise RequestError(f"generate does not support num_beams={self.num_beams!r} yet; leave it unset or 1")

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
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """A config from a mapping, as it stands in a file; keys that are no field are kept, without effect."""
        values = dict(config_dict)
        values.update(kwargs)
        unknown = {name: values.pop(name) for name in list(values) if name not in FIELDS and name not in _METADATA}
        unknown.pop("_commit_hash", None)
        config = cls(**values)
        config.__dict__.update(unknown)
        return config

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
        **kwargs: Any,
    ) -> Self:
        """The generation config of a checkpoint: a folder, an embedded id (``gpt2rt/...``) or a hub id.

        Args:
            pretrained_model_name: what to read.
            config_file_name: its name, ``generation_config.json`` by default.
            cache_dir, force_download, local_files_only, token, revision, subfolder: as in ``huggingface_hub``.
            **kwargs: fields that override what the file says.

        Raises:
            CheckpointError: (an OSError) the file is missing, unreachable or not a JSON object.
            RequestError: (a ValueError) an unknown keyword or a value outside its range.
        """
        from gpt2rt.checkpoint.json_files import read_json_object
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
        config = cls.from_dict(read_json_object(source.require(config_file_name or CONFIG_NAME)))
        unknown = config.update(**kwargs)
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
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

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
