"""What every model's configuration shares: labels, output switches, reading, writing, and the tools to check fields."""

import copy
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from gpt2rt.errors import ConfigError

if TYPE_CHECKING:
    from gpt2rt.checkpoint.resolve import Source

SUPPORTED_MODEL_TYPES = ("gpt2", "openai-gpt")

# model type -> how the names of its classes begin, and a field that only its config.json has
_CLASSES = {"gpt2": "GPT2", "openai-gpt": "OpenAIGPT"}
_OWN_FIELDS = {"gpt2": "activation_function", "openai-gpt": "afn"}

# names of labels are made and kept for each of them
MAX_LABELS = 1_000_000

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# sampling settings that old checkpoints keep in config.json; they belong to the generation config
# fmt: off
GENERATION_FIELDS = frozenset((
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "target_lookbehind",
    "temperature", "top_k", "top_p", "typical_p",
))
# fmt: on


def torch_dtype_of(value: "str | torch.dtype | None", field: str = "dtype") -> torch.dtype | None:
    """The ``torch.dtype`` meant by ``"float16"``, ``"torch.float16"`` or a dtype itself; None stays None.

    Raises:
        ConfigError: ``value`` names no floating-point dtype of torch.
    """
    if value is None or isinstance(value, torch.dtype):
        dtype = value
    else:
        dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"{field} = {value!r} is no torch dtype; use 'float32', 'float16' or 'bfloat16'")
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"{field} = {dtype} is not a floating-point dtype; use 'float32', 'float16' or 'bfloat16'")
    return dtype


class PretrainedConfig:
    """What every model's config shares: labels, output switches, dtype, reading and writing.

    Args:
        architectures: class names that the checkpoint was saved from.
        dtype: dtype of the weights, as a name or a ``torch.dtype``; ``torch_dtype`` is an alias.
        id2label, label2id: names of the labels; keys become integers.
        num_labels: number of labels, 2 by default; not stored but derived from ``id2label``.
        problem_type: None or one of ``PROBLEM_TYPES``.
        output_hidden_states, output_attentions, return_dict: defaults of the forward arguments of the same name.
        **kwargs: any other key is kept as an attribute and saved again, as transformers does.
    Raises:
        ConfigError: a field breaks its rule.
    """

    model_type: ClassVar[str] = ""
    # transformers' general name -> this model's own name; both can be read, written and passed
    attribute_map: ClassVar[dict[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    # fields written to config.json only when they differ from these
    _common_defaults: ClassVar[dict[str, Any]] = {
        "architectures": None,
        "dtype": None,
        "id2label": {0: "LABEL_0", 1: "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "problem_type": None,
        "output_hidden_states": False,
        "output_attentions": False,
        "return_dict": True,
        "is_encoder_decoder": False,
        "chunk_size_feed_forward": 0,
    }

    id2label: dict[int, str]
    label2id: dict[str, int]
    dtype: torch.dtype | None

    def __init__(
        self,
        *,
        architectures: list[str] | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        id2label: Mapping[Any, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        num_labels: int | None = None,
        problem_type: str | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        is_encoder_decoder: bool = False,
        chunk_size_feed_forward: int = 0,
        name_or_path: str = "",
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.architectures = architectures
        self.dtype = torch_dtype_of(dtype if dtype is not None else torch_dtype)
        self._set_labels(id2label, label2id, num_labels)
        self.problem_type = problem_type
        self.output_hidden_states = output_hidden_states
        self.output_attentions = output_attentions
        self.return_dict = return_dict
        self.is_encoder_decoder = is_encoder_decoder
        self.chunk_size_feed_forward = chunk_size_feed_forward
        self._name_or_path = str(kwargs.pop("_name_or_path", name_or_path) or name_or_path)
        self._attn_implementation = attn_implementation
        for key in ("model_type", "_commit_hash", "auto_map"):
            kwargs.pop(key, None)
        for key, value in kwargs.items():
            if hasattr(type(self), key):
                raise ConfigError(f"{type(self).__name__}: a field cannot be called {key!r}, the class uses that name")
            if key not in GENERATION_FIELDS and not key.startswith("_attn_implementation"):
                setattr(self, key, value)
        self.validate()
        self._drop_foreign_token_ids()

    def _set_labels(
        self, id2label: Mapping[Any, str] | None, label2id: Mapping[str, int] | None, num_labels: int | None
    ) -> None:
        name = type(self).__name__
        if label2id is not None and not isinstance(label2id, Mapping):
            raise ConfigError(f"{name}: label2id = {label2id!r}, but it must map names of labels to numbers")
        if id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
            if label2id is not None:
                self.label2id = dict(label2id)
            return
        try:
            self.id2label = {int(key): value for key, value in id2label.items()}
            # names are keys of the other table
            hash(frozenset(self.id2label.values()))
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(f"{name}: id2label = {id2label!r}, but it must map label numbers to names") from None
        if num_labels is not None and num_labels != len(self.id2label):
            raise ConfigError(
                f"{name}: num_labels = {num_labels}, but id2label names {len(self.id2label)} labels; pass one of them"
            )
        self.label2id = dict(label2id) if label2id is not None else {v: k for k, v in self.id2label.items()}

    # ---- attributes under both names -------------------------------------------------------------------------------

    def __setattr__(self, key: str, value: Any) -> None:
        object.__setattr__(self, type(self).attribute_map.get(key, key), value)

    def __getattr__(self, key: str) -> Any:
        # only reached for names that are not set: transformers' general name of a field
        own = type(self).attribute_map.get(key)
        if own is None:
            raise AttributeError(f"{type(self).__name__} has no field {key!r}")
        return getattr(self, own)

    @property
    def name_or_path(self) -> str:
        """The id or folder that the config was read from, or an empty string."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, value: str | os.PathLike[str]) -> None:
        self._name_or_path = str(value)

    @property
    def num_labels(self) -> int:
        """Number of labels; setting it replaces ``id2label`` and ``label2id`` when the number changes."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        if type(value) is not int or not 1 <= value <= MAX_LABELS:
            raise ConfigError(
                f"{type(self).__name__}: num_labels = {value!r}, but it must be an integer from 1 to {MAX_LABELS}"
            )
        if "id2label" not in self.__dict__ or len(self.id2label) != value:
            self.id2label = {i: f"LABEL_{i}" for i in range(value)}
            self.label2id = {label: i for i, label in self.id2label.items()}

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """transformers' older name of ``dtype``."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: str | torch.dtype | None) -> None:
        self.dtype = torch_dtype_of(value)

    @property
    def use_return_dict(self) -> bool:
        """transformers' older name of ``return_dict``."""
        return bool(self.return_dict)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Self:
        """The config itself: transformers' caches ask, for models of several parts."""
        return self

    @property
    def per_layer_config(self) -> list[Self]:
        """What transformers' caches read of each block: they are all alike."""
        return [self] * self.num_hidden_layers

    # ---- rules -----------------------------------------------------------------------------------------------------

    def _broken(self, field: str, rule: str) -> ConfigError:
        return ConfigError(f"{type(self).__name__}: {field} = {getattr(self, field)!r}, but it must be {rule}")

    def _check_int(self, field: str, low: int, high: int = 2**31 - 1) -> None:
        value = getattr(self, field)
        if type(value) is not int or not low <= value <= high:
            raise self._broken(field, f"an integer from {low} to {high}")

    def _check_number(self, field: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, field)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not ok or not low <= value <= high or (above and value == low):
            raise self._broken(
                field, f"a number {'above' if above else 'from'} {low} {'up to' if above else 'to'} {high}"
            )

    def _check_bool(self, *fields: str) -> None:
        for field in fields:
            if type(getattr(self, field)) is not bool:
                raise self._broken(field, "true or false")

    def _check_choice(self, field: str, choices: Any, *, optional: bool = False) -> None:
        value = getattr(self, field)
        if not (optional and value is None) and not (isinstance(value, str) and value in choices):
            raise self._broken(field, f"one of {', '.join(sorted(choices))}{' or None' if optional else ''}")

    def validate(self) -> None:
        """Check every rule.

        Raises:
            ConfigError: with the field, its value and the rule it breaks.
        """
        self._check_bool("output_hidden_states", "output_attentions", "return_dict")
        self._check_choice("problem_type", PROBLEM_TYPES, optional=True)
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ConfigError(
                f"{type(self).__name__}: problem_type = 'single_label_classification' needs num_labels >= 2, got 1; "
                "use 'regression' for one output"
            )
        if self.architectures is not None and not (
            isinstance(self.architectures, list) and all(isinstance(name, str) for name in self.architectures)
        ):
            raise self._broken("architectures", "a list of class names or None")

    def _drop_foreign_token_ids(self) -> None:
        """Hook: treat special ids outside the vocabulary as unset."""

    # ---- reading and writing ---------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values (``dtype`` as its name), with ``model_type``."""
        out = {key: value for key, value in self.__dict__.items() if not key.startswith("_")}
        out = copy.deepcopy(out)
        quantization = out.get("quantization_config")
        # of a loaded model it is an object, as in transformers
        if quantization is not None and hasattr(quantization, "to_dict"):
            out["quantization_config"] = quantization.to_dict()
        dtype = out.get("dtype")
        out["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        out["_name_or_path"] = self._name_or_path
        out["model_type"] = type(self).model_type
        return out

    def to_diff_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds: all model fields, and the shared fields that differ from their defaults."""
        out = self.to_dict()
        out.pop("_name_or_path")
        return {
            key: value
            for key, value in out.items()
            if key not in PretrainedConfig._common_defaults or value != PretrainedConfig._common_defaults[key]
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of ``config.json``: sorted keys, two spaces, a final newline."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write :meth:`to_json_string` to a file; an older file survives a failed write."""
        from gpt2rt.checkpoint.atomic import write_text

        write_text(Path(json_file_path), self.to_json_string(use_diff))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``config.json`` into a folder, which is made if needed.

        Raises:
            ConfigError: a field was set to something invalid.
            CheckpointError: the folder is a file, or writing failed; an older ``config.json`` is left as it was.
        """
        from gpt2rt.checkpoint.atomic import make_folder

        self.validate()
        self.to_json_file(make_folder(save_directory) / "config.json")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A config from the content of a ``config.json``; ``kwargs`` that are fields override it.

        Returns:
            the config, or with ``return_unused_kwargs`` the pair (config, kwargs that are no field of it).
        Raises:
            ConfigError: a field breaks its rule, or a field is given under both of its names with different values.
            TypeError: a keyword is no field and ``return_unused_kwargs`` is False.
        """
        values = dict(config_dict)
        for general, own in cls.attribute_map.items():
            if general in values and own in values and values[general] != values[own]:
                raise ConfigError(
                    f"{cls.__name__}: {own} = {values[own]!r} and {general} = {values[general]!r} name the same "
                    "field; keep one of them"
                )
        known = set(cls().__dict__) | set(values) | set(cls.attribute_map)
        known |= {"num_labels", "torch_dtype", "attn_implementation", "name_or_path"}
        unused = {key: value for key, value in kwargs.items() if key not in known}
        if unused and not return_unused_kwargs:
            raise TypeError(
                f"{', '.join(map(repr, unused))}: no such field of {cls.__name__}; "
                "pass return_unused_kwargs=True to get such keywords back"
            )
        for key, value in kwargs.items():
            if key in unused:
                continue
            own = cls.attribute_map.get(key, key)
            for general, mapped in cls.attribute_map.items():
                if mapped == own:
                    values.pop(general, None)
            if own == "num_labels" and value is not None:
                values.pop("id2label", None)
                values.pop("label2id", None)
            elif own == "id2label":
                values.pop("num_labels", None)
                values.pop("label2id", None)
            elif own in ("dtype", "torch_dtype"):
                values.pop("dtype", None)
                values.pop("torch_dtype", None)
            values[own] = value
        if values.get("id2label") is not None:
            # some published files hold both and disagree; the names are the ones in use
            values.pop("num_labels", None)
        if "self" in values:
            raise ConfigError(f"{cls.__name__}: a field cannot be called 'self', the class uses that name")
        config = cls(**{str(key): value for key, value in values.items()})
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Self:
        """A config from one JSON file.

        Raises:
            CheckpointError: the file is missing, is not JSON or holds no object.
            ConfigError: it is the config of another kind of model, or a field breaks its rule.
        """
        from gpt2rt.checkpoint.json_files import MAX_SETTINGS_BYTES, read_json_object

        values = read_json_object(Path(json_file), MAX_SETTINGS_BYTES)
        check_model_type(values, str(json_file), (cls.model_type,))
        return cls.from_dict(values)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The content of a checkpoint's ``config.json`` and, as transformers returns it, an empty dict."""
        from gpt2rt.checkpoint.json_files import MAX_SETTINGS_BYTES, read_json_object
        from gpt2rt.checkpoint.resolve import find_config

        values = read_json_object(find_config(pretrained_model_name_or_path, **hub), MAX_SETTINGS_BYTES)
        check_model_type(values, os.fspath(pretrained_model_name_or_path), (cls.model_type,))
        return values, {}

    @classmethod
    def read_source(cls, source: "Source") -> dict[str, Any]:
        """The content of ``config.json`` of a checkpoint whose files were located, checked to be of this kind.

        Raises:
            CheckpointError: the file is missing, unreachable, not JSON or not an object.
            ConfigError: it is the config of another kind of model.
        """
        from gpt2rt.checkpoint.json_files import MAX_SETTINGS_BYTES, read_json_object

        values = read_json_object(source.require("config.json"), MAX_SETTINGS_BYTES)
        check_model_type(values, source.name, (cls.model_type,))
        return values

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        *,
        subfolder: str = "",
        return_unused_kwargs: bool = False,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The config of a checkpoint: a folder, a JSON file, an embedded id (``gpt2rt/...``) or a hub id.

        Args:
            pretrained_model_name_or_path: what to read.
            cache_dir, force_download, local_files_only, token, revision, subfolder: as in ``huggingface_hub``.
            return_unused_kwargs: return the pair (config, kwargs that are no field) instead of refusing those.
            trust_remote_code: must not be True; gpt2rt never runs code from a checkpoint.
            **kwargs: fields that override what the file says.
        Raises:
            CheckpointError: the file is missing, unreachable, not JSON or not an object.
            ConfigError: another kind of model, or a field that breaks its rule.
            TypeError: a keyword that is no field.
        """
        from gpt2rt.checkpoint.options import refuse_options

        refuse_remote_code(trust_remote_code)
        kwargs = refuse_options(kwargs)
        values, _ = cls.get_config_dict(
            pretrained_model_name_or_path,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
            subfolder=subfolder,
        )
        values["_name_or_path"] = str(pretrained_model_name_or_path)
        return cls.from_dict(values, return_unused_kwargs, **kwargs)

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Set several fields, then check all rules.

        Raises:
            ConfigError: a rule is broken; the fields are as they were before.
        """
        before = dict(self.__dict__)
        try:
            for key, value in config_dict.items():
                setattr(self, key, value)
            self.validate()
        except ConfigError:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PretrainedConfig) and type(self) is type(other) and self.to_dict() == other.to_dict()

    # fields can be assigned; None is how Python marks a class as unhashable, though mypy expects a method
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string().rstrip()}"


PreTrainedConfig = PretrainedConfig


def refuse_remote_code(trust_remote_code: bool | None) -> None:
    """Raise ValueError if code from a checkpoint was asked for."""
    if trust_remote_code:
        raise ValueError(
            "trust_remote_code=True: gpt2rt never runs code that comes with a checkpoint; leave the argument out"
        )


def check_model_type(values: Mapping[str, Any], where: str, expected: tuple[str, ...] = SUPPORTED_MODEL_TYPES) -> None:
    """Check that the content of a ``config.json`` is that of a model gpt2rt runs; warn about remote code.

    Args:
        values: the JSON object.
        where: name of the checkpoint, for the message.
        expected: model types that are accepted.
    Raises:
        ConfigError: another ``model_type``, or none and nothing else that says which of them it is.
    """
    runs = f"gpt2rt runs {' and '.join(SUPPORTED_MODEL_TYPES)} models"
    found, architectures = values.get("model_type"), values.get("architectures") or []
    if found is None:
        found = _guessed_type(values, architectures)
        if found is None and architectures:
            raise ConfigError(f"{runs}; {where} names no model_type, and its architectures are {architectures}")
        if found is None and not {"n_embd", "n_layer", "n_head"} & set(values):
            raise ConfigError(
                f"{runs}; {where} has neither model_type nor architectures nor any of n_embd, n_layer and n_head: "
                'is it a model\'s config.json? Add "model_type": "gpt2" if it is'
            )
    if found in SUPPORTED_MODEL_TYPES and found not in expected:
        raise ConfigError(
            f"{where} has model_type {found!r} (architectures: {architectures or 'not given'}), which no class named "
            f"{' or '.join(_CLASSES[name] for name in expected)}... reads; use {_CLASSES[found]}Config and the models "
            f"named {_CLASSES[found]}..., such as {_CLASSES[found]}LMHeadModel"
        )
    if found is not None and found not in expected:
        raise ConfigError(f"{runs}; {where} has model_type {found!r} (architectures: {architectures or 'not given'})")
    if values.get("auto_map"):
        warnings.warn(
            f"{where}: config.json points to its own code (auto_map); gpt2rt never runs it and uses its own classes",
            stacklevel=3,
        )


def _guessed_type(values: Mapping[str, Any], architectures: Any) -> str | None:
    """The model type of an old ``config.json`` that does not say it, or None."""
    for model_type, prefix in _CLASSES.items():
        if any(str(name).startswith(prefix) for name in architectures):
            return model_type
    if not architectures:
        for model_type, field in _OWN_FIELDS.items():
            if field in values:
                return model_type
    return None
