"""Which weights of a model are quantised, and how: the ``quantization_config`` of config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .weight import ACTIVATIONS, INT4_GROUP_SIZES, SCHEMES

METHODS = ("rtn", "gptq")
#: formats of the token embedding and the output layer
EMBEDDINGS = ("none", "float16", "bfloat16", "int8", "int4")
#: block sizes of nf4 and fp4
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_GROUP_SIZE = 64


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How a model is quantised.

    The linear layers of the blocks take ``scheme``; the token embedding and the output layer take ``embeddings``;
    norms, biases, position embeddings and the heads of tasks stay as they are.

    Attributes:
        scheme: "int8", "int4", "nf4" or "fp4".
        group_size: columns that share a scale: int4: 32, 64 (the default) or 128; nf4, fp4: 32 to 4096, powers of two,
            64 by default; int8: None, one scale a row.
        symmetric: int4 without zero points; always True for the others.
        double_quant: nf4, fp4: the scales are rounded to 8 bits with a scale of their own (QLoRA, arXiv:2305.14314,
            section 3).
        embeddings: "int8" (the default), "int4", "float16", "bfloat16", or "none", which leaves them alone.
        activations: "int8" or "float32", see :class:`QuantizedWeight`; by default "int8" for int8 and int4, and
            "float32" for nf4 and fp4, which have nothing else.
        skip_modules: layers that stay as they are: names such as "lm_head" or "h.0.attn.c_attn", or parts of names
            between dots, such as "mlp".
        method: how the codes were found: "rtn" (each weight to the nearest code) or "gptq".

    Raises:
        ValueError: a field has a value that does not exist, or that ``scheme`` does not have.
    """

    scheme: str
    group_size: int | None = None
    symmetric: bool = True
    double_quant: bool = False
    embeddings: str | None = None
    activations: str | None = None
    skip_modules: tuple[str, ...] = ()
    method: str = "rtn"

    def __post_init__(self) -> None:
        _check_choice("scheme", self.scheme, SCHEMES)
        floating = self.scheme in ("nf4", "fp4")
        if self.scheme != "int8" and self.group_size is None:
            object.__setattr__(self, "group_size", DEFAULT_GROUP_SIZE)
        if self.embeddings is None:
            object.__setattr__(self, "embeddings", "int8")
        if self.activations is None:
            object.__setattr__(self, "activations", "float32" if floating else "int8")
        # a list is what comes out of JSON
        if isinstance(self.skip_modules, list):
            object.__setattr__(self, "skip_modules", tuple(self.skip_modules))
        if not isinstance(self.skip_modules, tuple) or not all(isinstance(n, str) and n for n in self.skip_modules):
            raise ValueError(f"skip_modules = {self.skip_modules!r}, expected a list of names of modules")
        _check_choice("embeddings", self.embeddings, EMBEDDINGS)
        _check_choice("activations", self.activations, ACTIVATIONS)
        _check_choice("method", self.method, METHODS)
        for name in ("symmetric", "double_quant"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} = {getattr(self, name)!r}, expected true or false")
        self._check_scheme(floating)

    def _check_scheme(self, floating: bool) -> None:
        """Raise ValueError for fields that contradict the scheme."""
        allowed: tuple[int | None, ...] = (None,)
        if self.scheme == "int4":
            allowed = INT4_GROUP_SIZES
        elif floating:
            allowed = BLOCK_SIZES
        if type(self.group_size) is bool or self.group_size not in allowed:
            what = "None: it has one scale a row" if self.scheme == "int8" else f"one of {allowed}"
            raise ValueError(f"group_size = {self.group_size!r}, but for {self.scheme} it must be {what}")
        if not self.symmetric and self.scheme != "int4":
            raise ValueError(f"symmetric = False, but only int4 has zero points, and the scheme is {self.scheme}")
        if self.double_quant and not floating:
            raise ValueError(f"double_quant = True, but only nf4 and fp4 have it, and the scheme is {self.scheme}")
        if floating and self.activations != "float32":
            raise ValueError(f"activations = {self.activations!r}, but {self.scheme} has only 'float32'")
        if floating and self.method != "rtn":
            raise ValueError(f"method = {self.method!r}, but {self.scheme} has only 'rtn'; gptq makes int4 and int8")

    def group_size_of(self, in_features: int, scheme: str | None = None) -> int:
        """``group_size`` of a :class:`QuantizedWeight` with ``in_features`` columns under this config.

        Blocks of nf4 and fp4 run over the flattened matrix; where rows are no multiple of them, a weight holds the
        largest part that divides the rows, each with the scale of its block.

        Args:
            in_features: K.
            scheme: of the weight, where it is not the config's own: the embedding's.
        """
        scheme = scheme or self.scheme
        if scheme == "int8":
            return in_features
        size = self.group_size
        if scheme == "int4":
            return size if size in INT4_GROUP_SIZES else DEFAULT_GROUP_SIZE
        assert size is not None
        return math.gcd(size, in_features)

    def skips(self, name: str) -> bool:
        """Whether ``skip_modules`` names the module ``name`` or one that it lies in."""
        return any(f".{part}." in f".{name}." for part in self.skip_modules)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as they stand in config.json beside ``quant_method``."""
        fields = dataclasses.asdict(self)
        return {"quant_method": "gpt2rt", **fields, "skip_modules": list(self.skip_modules)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantizationConfig:
        """The config of :meth:`to_dict`; missing fields have their defaults.

        Raises:
            ValueError: a field is unknown or has an invalid value, or ``quant_method`` is another.
        """
        fields = dict(fields)
        method = fields.pop("quant_method", "gpt2rt")
        if method != "gpt2rt":
            raise ValueError(f"quant_method = {method!r}, expected 'gpt2rt'")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known), key=str)
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no field of a quantisation config; they are {', '.join(known)}")
        if "scheme" not in fields:
            raise ValueError(f"a quantisation config needs a scheme: one of {', '.join(SCHEMES)}")
        return cls(**fields)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}, but it must be one of {', '.join(choices)}")
