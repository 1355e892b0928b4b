"""Loading quantised models: which layers are quantised, and how each gets its weight, from codes or from floats."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpt2rt.checkpoint.json_files import MAX_SETTINGS_BYTES, read_json_object
from gpt2rt.checkpoint.load import convert, put, read_finite
from gpt2rt.checkpoint.matching import Match
from gpt2rt.checkpoint.resolve import Source
from gpt2rt.checkpoint.weights import Weights
from gpt2rt.errors import CheckpointError
from gpt2rt.quantization.bitsandbytes import BitsAndBytesConfig
from gpt2rt.quantization.blockwise import quantize_blocks
from gpt2rt.quantization.config import QuantizationConfig
from gpt2rt.quantization.resolve import StoredQuantization, from_checkpoint_config, resolve_quantization
from gpt2rt.quantization.rtn import check_weight, quantize_rtn
from gpt2rt.quantization.stored import QuantizedCheckpoint, StoredMatrix, open_own
from gpt2rt.quantization.stored_bitsandbytes import FourBitMatrix, open_bitsandbytes
from gpt2rt.quantization.stored_gptq import GPTQMatrix, open_gptq
from gpt2rt.quantization.weight import QuantizedWeight

from .layers import Conv1D
from .quantized import QuantizedConv1D, quantized_form, weight_shape
from .rounded_weights import RoundedWeights

# formats of embeddings that are narrower floats
_NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class AskedQuantization:
    """What a caller of ``from_pretrained`` wants.

    Attributes:
        config: how to quantise.
        face: what ``model.config.quantization_config`` shows: the config, or a ``BitsAndBytesConfig`` if it was asked
            for in that shape.
    """

    config: QuantizationConfig
    face: QuantizationConfig | BitsAndBytesConfig


def asked_quantization(
    quantization: Any, quantization_config: Any, load_in_4bit: bool | None, load_in_8bit: bool | None
) -> AskedQuantization | None:
    """What the keywords of ``from_pretrained`` ask for; None if nothing.

    Raises:
        ValueError: several of them ask, or one has an invalid value.
    """
    given = {
        "quantization": quantization,
        "quantization_config": quantization_config,
        "load_in_4bit": {"load_in_4bit": True} if load_in_4bit else None,
        "load_in_8bit": {"load_in_8bit": True} if load_in_8bit else None,
    }
    asking = {name: value for name, value in given.items() if value is not None}
    if not asking:
        return None
    if len(asking) > 1:
        raise ValueError(f"{' and '.join(asking)} were given, and each says how to quantise; give one of them")
    (value,) = asking.values()
    config = resolve_quantization(value)
    own = isinstance(value, str | QuantizationConfig) or (isinstance(value, Mapping) and "scheme" in value)
    return AskedQuantization(config, config if own else _known_fields(value))


def _known_fields(value: Any) -> BitsAndBytesConfig:
    """The ``BitsAndBytesConfig`` with the fields of an object, or of a dictionary, that may know more."""
    names = set(BitsAndBytesConfig().to_dict()) - {"quant_method"}
    fields = (
        value if isinstance(value, Mapping) else {name: getattr(value, name) for name in names if hasattr(value, name)}
    )
    return BitsAndBytesConfig.from_dict({name: fields[name] for name in names if name in fields})


def stored_quantization(config: Any, source: Source | None) -> StoredQuantization | None:
    """How the weights of a checkpoint are quantised, by its config.json; None: they are floats.

    Args:
        config: the model's; its ``quantization_config`` is taken out, and put back as an object if it is bitsandbytes'.
        source: where AutoGPTQ's quantize_config.json may be, which is looked for in folders only.
    Raises:
        CheckpointError: it cannot be understood, or is of a kind that gpt2rt does not read.
    """
    fields = getattr(config, "quantization_config", None)
    if "quantization_config" in vars(config):
        del config.quantization_config
    where = f"{config.name_or_path or 'the config'}: quantization_config"
    if fields is None:
        path = source.find("quantize_config.json") if source is not None and not source.is_hub else None
        if path is None:
            return None
        fields, where = read_json_object(path, MAX_SETTINGS_BYTES), str(path)
    try:
        fields = fields.to_dict() if hasattr(fields, "to_dict") else fields
        stored = from_checkpoint_config(fields)
        if stored.layout == "bitsandbytes":
            config.quantization_config = _known_fields(fields)
        return stored
    # fields may hold anything that JSON can
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def file_names(stored: StoredQuantization | None) -> tuple[str, ...]:
    """Other names than model.safetensors under which such weights are saved."""
    if stored is None or not stored.layout.startswith("gptq"):
        return ()
    return (f"gptq_model-4bit-{stored.group_size}g.safetensors",)


def open_stored(weights: Weights, stored: StoredQuantization) -> QuantizedCheckpoint:
    """The weights of a quantised checkpoint, a matrix for a name."""
    if stored.layout == "gpt2rt":
        return open_own(weights, stored.config)
    if stored.layout == "bitsandbytes":
        return open_bitsandbytes(weights, stored.config)
    assert stored.group_size is not None
    assert stored.config.activations is not None
    return open_gptq(weights, stored.group_size, 1 if stored.layout == "gptq" else 0, stored.config.activations)


def agree(stored: StoredQuantization | None, asked: AskedQuantization | None, where: str) -> None:
    """Check that a quantised checkpoint is not to be quantised in another way; warn of what has no effect.

    Raises:
        ValueError: it is.
    """
    if stored is None or asked is None:
        return
    if asked.config.scheme != stored.config.scheme:
        raise ValueError(
            f"{where} is quantised as {stored.config.scheme} already and cannot be quantised as {asked.config.scheme}; "
            "load the float checkpoint, or load it as it is"
        )
    if asked.config != stored.config:
        warnings.warn(
            f"{where} is quantised already, as {stored.config}; what else was asked for has no effect", stacklevel=3
        )


def formats(model: Any, config: QuantizationConfig) -> dict[str, str]:
    """Key of each weight that ``config`` quantises -> its format: a scheme, "float16" or "bfloat16".

    A tied output layer is not among them: it shares the embedding's weight.
    """
    found = {}
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): name for name, module in model.named_modules()}
    skips_table = any(config.skips(names[id(table)]) for table in tables if table is not None)
    for name, module in model.named_modules():
        if any(module is table for table in tables):
            # layers that share a weight are quantised both or not at all
            skipped = skips_table if model._active_ties() else config.skips(name)
            form = config.embeddings
        elif isinstance(module, Conv1D | QuantizedConv1D):
            skipped, form = config.skips(name), config.scheme
        else:
            continue
        if form is not None and form != "none" and not skipped and f"{name}.weight" not in model._active_ties():
            found[f"{name}.weight"] = form
    return found


class QuantizedFill:
    """How the quantised layers of a model get their weights.

    Headers are checked when it is made, before anything is allocated.

    Args:
        model: on the meta device; layers are replaced as they get their weights.
        weights: the checkpoint; a :class:`QuantizedCheckpoint` if it is quantised.
        match: which names fill which keys.
        stored: how the checkpoint is quantised, or None.
        asked: how to quantise floats, or None.
    Raises:
        CheckpointError: the headers and the config disagree.
    """

    def __init__(
        self,
        model: Any,
        weights: Weights,
        match: Match,
        stored: StoredQuantization | None,
        asked: AskedQuantization | None,
    ) -> None:
        self._model, self._weights, self._stored = model, weights, stored
        self.config: QuantizationConfig | None = None
        self.face: QuantizationConfig | BitsAndBytesConfig | None = None
        if stored is not None:
            self.config = stored.config
            self.face = getattr(model.config, "quantization_config", stored.config)
        elif asked is not None:
            self.config, self.face = asked.config, asked.face
        self._formats: dict[str, str] = {}
        self._matrices: Mapping[str, StoredMatrix] = getattr(weights, "matrices", {})
        self._rounded: list[RoundedWeights] = []
        self.check(match)

    def _owner(self, key: str) -> tuple[str, nn.Module]:
        name = key.rpartition(".")[0]
        return name, self._model.get_submodule(name)

    def check(self, match: Match) -> None:
        """Check the headers of what ``match`` takes.

        Raises:
            CheckpointError: they and the config disagree.
        """
        # asked again: an output layer may have been untied
        self._formats |= {} if self.config is None else formats(self._model, self.config)
        for key, name in match.sources.items():
            matrix, form = self._matrices.get(name), self._formats.get(key)
            if matrix is not None:
                self._check_matrix(key, matrix, form)
            elif self._stored is not None and form is not None:
                found = self._weights.infos[name].dtype
                if self._may_skip:
                    del self._formats[key]
                elif found != _NARROW.get(form):
                    raise self._contradiction(key, name, f"holds {found}", f"{form} for it")

    @property
    def _may_skip(self) -> bool:
        """Whether layers may be floats by a rule that is not known here: transformers' lists hold expressions."""
        stored = self._stored
        return stored is not None and stored.layout == "bitsandbytes" and bool(stored.config.skip_modules)

    def _check_matrix(self, key: str, matrix: StoredMatrix, form: str | None) -> None:
        assert self.config is not None
        _, module = self._owner(key)
        try:
            shape = weight_shape(module)
        except TypeError as error:
            raise matrix.wrong(f"holds codes, but is for {key}: {error}") from None
        if form is None:
            assert self._stored is not None
            if self._stored.layout == "gpt2rt" and not self._is_task_head(module):
                raise self._contradiction(key, matrix.name, "holds codes", "that it is not quantised")
            # any linear layer may be
            form = self._formats[key] = self.config.scheme
        if form in _NARROW:
            raise self._contradiction(key, matrix.name, "holds codes", f"{form} for it")
        matrix.check(shape, form)

    def _is_task_head(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module is not self._model.get_output_embeddings()

    def _contradiction(self, key: str, name: str, found: str, said: str) -> CheckpointError:
        info = self._weights.infos[name]
        return CheckpointError(
            f"{info.path}: tensor {info.name!r} {found}, but quantization_config says {said} ({key}); do the files "
            "belong together?"
        )

    def float_match(self, match: Match) -> Match:
        """The part of ``match`` whose tensors say in which dtype the model computes."""
        stays = {key: name for key, name in match.sources.items() if not self._is_stored_narrow(key, name)}
        return Match(sources=stays)

    def _is_stored_narrow(self, key: str, name: str) -> bool:
        return name in self._matrices or (self._stored is not None and key in self._formats)

    def jobs(
        self, match: Match, dtype: torch.dtype, device: torch.device, check_finite: bool
    ) -> dict[str, Callable[[], None]]:
        """Key -> what gives the layer its quantised weight."""
        rounded = self._open_rounded(match)

        def job(key: str, name: str) -> Callable[[], None]:
            def fill() -> None:
                value, file_scales = self._value(key, name, check_finite, rounded)
                owner, module = self._owner(key)
                if name in self._matrices and isinstance(value, Tensor):
                    # no format here holds it exactly: floats, in the layer's own orientation
                    put(
                        self._model,
                        key,
                        (value.t().contiguous() if isinstance(module, Conv1D) else value).to(device, dtype),
                    )
                    return
                layer = quantized_form(module, value.to(device), dtype)
                layer.file_scales = file_scales
                self._model.set_submodule(owner, layer)

            return fill

        return {
            key: job(key, name) for key, name in match.sources.items() if name in self._matrices or key in self._formats
        }

    def _open_rounded(self, match: Match) -> RoundedWeights | None:
        """The codes that an earlier process found for these floats; None where none are kept."""
        if self._stored is not None or self.config is None or self._weights.borrowed:
            return None
        # nested scales are kept in their file's form as well, which is not stored
        nested = self.config.scheme if self.config.double_quant else None
        forms = {
            key: (name, self._formats[key], isinstance(self._owner(key)[1], Conv1D))
            for key, name in match.sources.items()
            if key in self._formats and self._formats[key] not in (*_NARROW, nested)
        }
        rounded = RoundedWeights.open(self._weights, forms, self.config)
        if rounded is not None:
            self._rounded.append(rounded)
        return rounded

    def _value(
        self, key: str, name: str, check_finite: bool, rounded: RoundedWeights | None
    ) -> tuple[QuantizedWeight | Tensor, Any]:
        """The weight [out_features, in_features], and the scales as bitsandbytes' files hold them."""
        assert self.config is not None
        form = self._formats[key]
        _, module = self._owner(key)
        if name in self._matrices:
            matrix = self._matrices[name]
            return matrix.read(self._weights, weight_shape(module), form, check_finite), matrix.file_scales
        if rounded is not None and key in rounded.found:
            return rounded.found[key], None
        tensor = read_finite(self._weights, name, check_finite)
        info = self._weights.infos[name]
        if form in _NARROW:
            return convert(tensor, info, _NARROW[form], check_finite).clone(), None
        floats = tensor.t() if isinstance(module, Conv1D) else tensor
        try:
            if form == self.config.scheme and self.config.double_quant:
                check_weight(floats)
                assert self.config.group_size is not None
                return quantize_blocks(floats, form, self.config.group_size, double_quant=True)
            weight = quantize_rtn(floats, self.config, scheme=form)
            if rounded is not None:
                rounded.add(key, weight)
            return weight, None
        except ValueError as error:
            raise CheckpointError(f"{info.path}: tensor {info.name!r} cannot be quantised: {error}") from None

    def finish(self) -> None:
        """Note in the model how it is quantised now."""
        for rounded in self._rounded:
            rounded.store()
        model, config, face = self._model, self.config, self.face
        if config is None:
            return
        reordered = [m for m in self._matrices.values() if isinstance(m, GPTQMatrix) and m.is_reordered]
        if reordered:
            warnings.warn(
                f"{self._weights.where}: {len(reordered)} layers were quantised with desc_act=True: their inputs "
                "belong to groups in no order, which no format here holds. They are floats with the same numbers now",
                stacklevel=3,
            )
        layers = model._quantized_layers().values()
        if not layers:
            return
        sizes = {m.block_size for m in self._matrices.values() if isinstance(m, FourBitMatrix)}
        if len(sizes) == 1:
            config = dataclasses.replace(config, group_size=sizes.pop())
        weights = [layer.quantized for layer in layers if isinstance(layer.quantized, QuantizedWeight)]
        if config.symmetric and any(weight.zeros is not None for weight in weights):
            # files of gptq say sym for any zero points
            config = dataclasses.replace(config, symmetric=False)
        model.note_quantization(config, config if isinstance(face, QuantizationConfig) else face)
