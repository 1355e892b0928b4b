"""``BitsAndBytesConfig``: transformers' class for the formats of bitsandbytes, without bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from .config import QuantizationConfig

_STORAGE_DTYPES = ("float16", "float32", "int8", "uint8", "float64", "bfloat16")
_QUANT_TYPES = ("fp4", "nf4")


class BitsAndBytesConfig:
    """What to quantise with bitsandbytes' formats: arguments, defaults and attributes are transformers'.

    Args:
        load_in_8bit: int8 weights, one scale a row.
        load_in_4bit: ``bnb_4bit_quant_type`` in blocks of 64.
        llm_int8_threshold: accepted; it has no effect, because activations have a scale for every 64 columns, so that
            large ones do not spoil the others.
        llm_int8_skip_modules: names of layers that stay as they are.
        llm_int8_enable_fp32_cpu_offload: accepted; it has no effect, because models are not split.
        llm_int8_has_fp16_weight: must be False.
        bnb_4bit_compute_dtype: accepted and kept in the record; the model computes in its own dtype and sums in
            float32.
        bnb_4bit_quant_type: "fp4" or "nf4".
        bnb_4bit_use_double_quant: round the scales to 8 bits too.
        bnb_4bit_quant_storage: dtype under which the codes are stored in bitsandbytes' layout.

    Raises:
        ValueError: arguments contradict each other, or one has a value that does not exist.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        llm_int8_threshold: float = 6.0,
        llm_int8_skip_modules: list[str] | None = None,
        llm_int8_enable_fp32_cpu_offload: bool = False,
        llm_int8_has_fp16_weight: bool = False,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_quant_type: str = "fp4",
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
    ) -> None:
        self.quant_method = "bitsandbytes"
        self.load_in_8bit = load_in_8bit
        self.load_in_4bit = load_in_4bit
        self.llm_int8_threshold = llm_int8_threshold
        self.llm_int8_skip_modules = llm_int8_skip_modules
        self.llm_int8_enable_fp32_cpu_offload = llm_int8_enable_fp32_cpu_offload
        self.llm_int8_has_fp16_weight = llm_int8_has_fp16_weight
        self.bnb_4bit_compute_dtype = _dtype("bnb_4bit_compute_dtype", bnb_4bit_compute_dtype, torch.float32)
        self.bnb_4bit_quant_type = bnb_4bit_quant_type
        self.bnb_4bit_use_double_quant = bnb_4bit_use_double_quant
        self.bnb_4bit_quant_storage = _dtype("bnb_4bit_quant_storage", bnb_4bit_quant_storage, torch.uint8)
        self._validate()

    def _validate(self) -> None:
        for name in (
            "load_in_8bit",
            "load_in_4bit",
            "llm_int8_enable_fp32_cpu_offload",
            "llm_int8_has_fp16_weight",
            "bnb_4bit_use_double_quant",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both True; a model is quantised in one of them")
        if isinstance(self.llm_int8_threshold, bool) or not isinstance(self.llm_int8_threshold, float | int):
            raise TypeError(f"llm_int8_threshold must be a number, got {self.llm_int8_threshold!r}")
        skip = self.llm_int8_skip_modules
        if skip is not None and (not isinstance(skip, list) or not all(isinstance(name, str) for name in skip)):
            raise TypeError(f"llm_int8_skip_modules must be a list of names of modules, got {skip!r}")
        if self.bnb_4bit_quant_type not in _QUANT_TYPES:
            raise ValueError(f"bnb_4bit_quant_type must be 'fp4' or 'nf4', got {self.bnb_4bit_quant_type!r}")
        storage = str(self.bnb_4bit_quant_storage).removeprefix("torch.")
        if storage not in _STORAGE_DTYPES:
            raise ValueError(f"bnb_4bit_quant_storage must be one of {', '.join(_STORAGE_DTYPES)}, got {storage!r}")

    def is_quantizable(self) -> bool:
        """Whether it asks for anything."""
        return self.load_in_8bit or self.load_in_4bit

    def quantization_method(self) -> str | None:
        """transformers' name of what it asks for: "llm_int8", "fp4", "nf4", or None."""
        if self.load_in_8bit:
            return "llm_int8"
        return self.bnb_4bit_quant_type if self.load_in_4bit else None

    def to_dict(self) -> dict[str, Any]:
        """The arguments and ``quant_method``, as they stand in config.json."""
        fields = dict(vars(self))
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            fields[name] = str(fields[name]).removeprefix("torch.")
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields of :meth:`to_dict` that are not the defaults."""
        defaults = BitsAndBytesConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The fields as JSON; only those that are not the defaults if ``use_diff``."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BitsAndBytesConfig:
        """The config of :meth:`to_dict`; missing fields have their defaults.

        Raises:
            ValueError: a field is unknown, or one has an invalid value.
            TypeError: a field has the wrong type.
        """
        # transformers also writes the two private fields behind its properties
        fields = {name: value for name, value in fields.items() if name not in ("_load_in_4bit", "_load_in_8bit")}
        method = fields.pop("quant_method", "bitsandbytes")
        if method != "bitsandbytes":
            raise ValueError(f"quant_method = {method!r}, expected 'bitsandbytes'")
        known = cls().to_dict()
        for name in fields:
            if name not in known:
                raise ValueError(f"{name!r} is no field of a bitsandbytes config; they are {', '.join(known)}")
        return cls(**fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BitsAndBytesConfig) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string(use_diff=False)}"


def from_bitsandbytes(config: Any) -> QuantizationConfig | None:
    """The config that a ``BitsAndBytesConfig`` of any library means: by its attributes; None if it asks for nothing.

    The token embedding and the output layer stay as they are, as in transformers.

    Raises:
        ValueError: it asks for both widths, for an unknown type, or for 16-bit weights beside the int8 ones.
    """

    def field(name: str, default: Any) -> Any:
        return getattr(config, name, default)

    eight, four = bool(field("load_in_8bit", False)), bool(field("load_in_4bit", False))
    if eight and four:
        raise ValueError("load_in_4bit and load_in_8bit are both True; a model is quantised in one of them")
    if field("llm_int8_has_fp16_weight", False):
        raise ValueError(
            "llm_int8_has_fp16_weight=True keeps 16-bit weights for training; gpt2rt does not train quantised weights, "
            "leave it False"
        )
    skip = tuple(field("llm_int8_skip_modules", None) or ())
    if eight:
        return QuantizationConfig("int8", embeddings="none", skip_modules=skip)
    if not four:
        return None
    quant_type = field("bnb_4bit_quant_type", "fp4")
    if quant_type not in _QUANT_TYPES:
        raise ValueError(f"bnb_4bit_quant_type must be 'fp4' or 'nf4', got {quant_type!r}")
    nested = bool(field("bnb_4bit_use_double_quant", False))
    return QuantizationConfig(quant_type, double_quant=nested, embeddings="none", skip_modules=skip)


def to_bitsandbytes(config: QuantizationConfig, quant_storage: str | torch.dtype | None = None) -> BitsAndBytesConfig:
    """The ``BitsAndBytesConfig`` under which transformers reads weights quantised as ``config`` says.

    Raises:
        ValueError: bitsandbytes has no such format.
    """
    if config.scheme == "int4":
        raise ValueError("bitsandbytes has no int4 in groups; save as quantization_format='gpt2rt', or use nf4 or fp4")
    # a list of one's own replaces transformers' default, which is the output layer
    skip = [*config.skip_modules, "lm_head"] if config.skip_modules else None
    if config.scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=skip,
        bnb_4bit_quant_type=config.scheme,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_quant_storage=quant_storage,
    )


def _dtype(name: str, value: Any, default: torch.dtype) -> torch.dtype:
    """A dtype by its name; ``default`` for None."""
    if value is None:
        return default
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} must be a torch dtype or the name of one, got {value!r}")
    return found
