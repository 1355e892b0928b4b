"""From what a caller or a checkpoint says about quantisation to a :class:`QuantizationConfig`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from .bitsandbytes import BitsAndBytesConfig, from_bitsandbytes
from .config import QuantizationConfig
from .weight import INT4_GROUP_SIZES, SCHEMES

# "int4", "int4-g32"
_NAME = re.compile(rf"({'|'.join(SCHEMES)})(?:-g(\d+))?")

_GPTQ_FORMATS = ("gptq", "gptq_v2")


def resolve_quantization(value: Any) -> QuantizationConfig:
    """The config that a caller means.

    Args:
        value: "int8", "int4", "nf4" or "fp4", also with a group size as in "int4-g32"; a :class:`QuantizationConfig`;
            the dictionary of one, or of a ``BitsAndBytesConfig``; or any object with the attributes of transformers'
            ``BitsAndBytesConfig``.

    Raises:
        ValueError: it is none of these, contradicts itself, or asks for nothing.
    """
    if isinstance(value, QuantizationConfig):
        return value
    if isinstance(value, str):
        found = _NAME.fullmatch(value)
        if found is None:
            raise ValueError(
                f"quantization = {value!r} is not known; use one of {', '.join(SCHEMES)}, with a group size as in "
                "'int4-g32', or a QuantizationConfig"
            )
        return QuantizationConfig(found[1], group_size=int(found[2]) if found[2] else None)
    if isinstance(value, Mapping):
        method = value.get("quant_method", "gpt2rt" if "scheme" in value else "bitsandbytes")
        if method == "gpt2rt":
            return QuantizationConfig.from_dict(value)
        if method == "gptq":
            raise ValueError(
                "quant_method = 'gptq' needs a calibration text, which loading has not; use gpt2rt.quantize_model, or "
                "gpt2rt quantize SRC DST --method gptq --calibration FILE"
            )
        if method != "bitsandbytes":
            raise ValueError(f"quant_method = {method!r}, but weights are quantised as 'gpt2rt' or 'bitsandbytes'")
        value = BitsAndBytesConfig.from_dict(value)
    if not (hasattr(value, "load_in_4bit") or hasattr(value, "load_in_8bit")):
        raise ValueError(
            f"quantization = {value!r}, a {type(value).__name__}; expected one of {', '.join(SCHEMES)}, a "
            "QuantizationConfig, a BitsAndBytesConfig, or the dictionary of one"
        )
    config = from_bitsandbytes(value)
    if config is None:
        raise ValueError("the BitsAndBytesConfig asks for nothing; set load_in_4bit=True or load_in_8bit=True")
    return config


@dataclasses.dataclass(frozen=True)
class StoredQuantization:
    """How the weights of a checkpoint are stored.

    Attributes:
        layout: "gpt2rt", "bitsandbytes", "gptq" (zero points stored less one) or "gptq_v2" (as they are).
        config: what the weights are.
        group_size: of "gptq" as the file says it: columns that share a scale, -1 for all of them; else None.
        desc_act: of "gptq": columns may belong to groups in any order.
    """

    layout: str
    config: QuantizationConfig
    group_size: int | None = None
    desc_act: bool = False


def from_checkpoint_config(fields: Mapping[str, Any]) -> StoredQuantization:
    """How the weights are stored, by the ``quantization_config`` of config.json, or by quantize_config.json.

    Raises:
        ValueError: the method is one that gpt2rt does not read, or a field has an invalid value.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"quantization_config is {fields!r}, expected an object with a quant_method")
    method = fields.get("quant_method")
    if method is None:
        # older files of both kinds do not say
        if "bits" in fields:
            method = "gptq"
        elif "load_in_4bit" in fields or "load_in_8bit" in fields:
            method = "bitsandbytes"
        else:
            raise ValueError(f"quantization_config has no quant_method; its fields are {', '.join(map(str, fields))}")
    if method == "gpt2rt":
        return StoredQuantization("gpt2rt", QuantizationConfig.from_dict(fields))
    if method == "bitsandbytes":
        # newer versions of other libraries may know more fields; those that matter are read
        config = from_bitsandbytes(SimpleNamespace(**{str(name): value for name, value in fields.items()}))
        if config is None:
            raise ValueError("quantization_config is bitsandbytes', but neither load_in_4bit nor load_in_8bit is true")
        return StoredQuantization("bitsandbytes", config)
    if method == "gptq":
        return _stored_gptq(fields)
    raise ValueError(
        f"quant_method = {method!r} is not read; gpt2rt reads its own, bitsandbytes and 4-bit gptq. Load the "
        "checkpoint before quantisation with quantization='int4', or dequantise it with the library that wrote it"
    )


def _stored_gptq(fields: Mapping[str, Any]) -> StoredQuantization:
    bits, group_size = fields.get("bits"), fields.get("group_size", 128)
    if bits != 4 or type(bits) is bool:
        raise ValueError(
            f"gptq with bits = {bits!r} is not read, only 4; quantise the original with scheme int4 or int8"
        )
    if type(group_size) is bool or group_size not in (*INT4_GROUP_SIZES, -1):
        raise ValueError(f"gptq with group_size = {group_size!r} is not read, only {INT4_GROUP_SIZES} and -1")
    layout = fields.get("checkpoint_format", fields.get("format")) or "gptq"
    if layout not in _GPTQ_FORMATS:
        raise ValueError(f"gptq in checkpoint_format = {layout!r} is not read, only {' and '.join(_GPTQ_FORMATS)}")
    if fields.get("is_marlin_format"):
        raise ValueError("gptq in marlin's order of weights is not read; convert it to checkpoint_format 'gptq'")
    if fields.get("dynamic"):
        raise ValueError("gptq with settings for single layers (the field 'dynamic') is not read")
    config = QuantizationConfig(
        "int4",
        # one group a row is held as groups with the same scale
        group_size=128 if group_size == -1 else group_size,
        symmetric=bool(fields.get("sym", True)),
        embeddings="none",
        method="gptq",
    )
    return StoredQuantization(layout, config, group_size, bool(fields.get("desc_act", False)))
