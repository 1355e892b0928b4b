"""Filling a model that was built on the meta device with the weights of a checkpoint."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from gpt2rt.checkpoint.matching import WEIGHT_DTYPES, Match, listing, stored_dtype
from gpt2rt.checkpoint.safetensors_file import TensorInfo
from gpt2rt.checkpoint.weights import Weights, progress
from gpt2rt.config import torch_dtype_of
from gpt2rt.errors import CheckpointError


def choose_device(device: object, device_map: object) -> torch.device:
    """The one device that ``device`` or ``device_map`` asks for, the CPU by default.

    Args:
        device: a name, a number (of a CUDA device) or a ``torch.device``.
        device_map: the same, or "auto" (CUDA if there is one, else the CPU), or ``{"": device}``.
    Raises:
        ValueError: both are given, the map has several entries, or the device does not exist here.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"device = {device!r} and device_map = {device_map!r} were both given; pass one of them")
    wanted = device if device is not None else device_map
    if isinstance(wanted, Mapping):
        if list(wanted) != [""]:
            raise ValueError(
                f"device_map = {dict(wanted)!r} splits the model, but gpt2rt puts a model on one device; pass "
                '{"": device}, a device or "auto"'
            )
        wanted = wanted[""]
    if wanted is None:
        return torch.device("cpu")
    if wanted == "auto" and device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # mypy cannot see that an int has been dealt with
        chosen = torch.device("cuda", wanted) if type(wanted) is int else torch.device(wanted)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise ValueError(
            f"{wanted!r} is no device; use 'cpu', 'cuda', 'cuda:1', a number, or device_map='auto'"
        ) from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {chosen} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    if chosen.type == "meta":
        raise ValueError("device 'meta' holds no weights; build the model from its config instead")
    return chosen


def choose_dtype(
    asked: "str | torch.dtype | None", infos: Mapping[str, TensorInfo], match: Match, device: torch.device
) -> torch.dtype:
    """The dtype of the loaded weights.

    Args:
        asked: a dtype; "auto": as stored; None: as stored, but float16 on a CPU becomes float32, because CPUs compute
            float16 slowly and GPT-2's activations can pass its largest value, 65504.
        infos: the checkpoint's tensors.
        match: those that the model takes.
        device: where the weights go.
    Raises:
        ValueError: ``asked`` is no floating-point dtype that gpt2rt runs.
    """
    if asked is not None and asked != "auto":
        dtype = torch_dtype_of(asked)
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(f"dtype = {asked!r}, but gpt2rt runs float32, float16 and bfloat16 (or 'auto')")
        return dtype
    stored = stored_dtype(infos[name] for name in match.sources.values())
    if asked is None and stored == torch.float16 and device.type == "cpu":
        return torch.float32
    return stored


def _slot(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    owner, _, name = key.rpartition(".")
    return model.get_submodule(owner), name


def put(model: nn.Module, key: str, value: Tensor) -> None:
    """Replace a parameter or buffer of the state dict's ``key``."""
    owner, name = _slot(model, key)
    if name in owner._parameters:
        old = owner._parameters[name]
        owner._parameters[name] = nn.Parameter(value, requires_grad=old is None or old.requires_grad)
    else:
        owner._buffers[name] = value


def fill_model(
    model: nn.Module,
    weights: Weights,
    match: Match,
    dtype: torch.dtype,
    device: torch.device,
    check_finite: bool,
    otherwise: Mapping[str, Callable[[], None]] = MappingProxyType({}),
) -> None:
    """Give every matched key of ``model`` its tensor.

    Args:
        model: built on the meta device; its floating-point parameters and buffers are replaced.
        weights: the checkpoint.
        match: from :func:`~gpt2rt.checkpoint.matching.match_names`, with shapes checked.
        dtype, device: of the new tensors.
        check_finite: refuse NaN and infinity, which costs one pass over memory.
        otherwise: key -> what fills it in another way, such as by quantising it.
    Raises:
        CheckpointError: reading failed, or a tensor holds NaN or infinity.
    """
    total = sum(weights.infos[name].nbytes for name in match.sources.values())
    for key in progress(list(match.sources), total):
        if key in otherwise:
            otherwise[key]()
            continue
        name = match.sources[key]
        tensor = read_finite(weights, name, check_finite)
        if tensor.dtype != dtype:
            tensor = convert(tensor, weights.infos[name], dtype, check_finite)
        elif weights.borrowed:
            # a state dict stays its owner's, and a mapped .bin file may shrink while the model is used
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        put(model, key, tensor.to(device))


def read_finite(weights: Weights, name: str, check_finite: bool) -> Tensor:
    """The tensor ``name`` as stored, on the CPU.

    Raises:
        CheckpointError: reading failed, or ``check_finite`` and the tensor holds NaN or infinity.
    """
    tensor = weights.read(name)
    if check_finite:
        _require_finite(tensor, weights.infos[name], None)
    return tensor


def convert(tensor: Tensor, info: TensorInfo, dtype: torch.dtype, check_finite: bool) -> Tensor:
    """``tensor`` in another floating-point dtype.

    Raises:
        CheckpointError: ``check_finite`` and a value is beyond the largest of ``dtype``.
    """
    converted = tensor.to(dtype)
    if check_finite and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        _require_finite(converted, info, dtype)
    return converted


def _require_finite(tensor: Tensor, info: TensorInfo, target: torch.dtype | None) -> None:
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    if target is not None:
        raise CheckpointError(
            f"{info.path}: tensor {info.name!r} holds values beyond {torch.finfo(target).max:g}, the largest of "
            f"{target}; load it with a wider dtype, such as torch.float32"
        )
    bad = int((~torch.isfinite(tensor)).sum())
    raise CheckpointError(
        f"{info.path}: tensor {info.name!r} holds {bad} NaN or infinite values of {tensor.numel()}; the checkpoint is "
        "damaged. Pass check_finite=False to load it all the same"
    )


def initialize_missing(
    model: nn.Module, keys: list[str], init: Callable[[nn.Module], None], dtype: torch.dtype, device: torch.device
) -> None:
    """Allocate and initialise the weights ``keys``, which the checkpoint lacks, without touching loaded ones.

    Args:
        model: filled except for ``keys``.
        keys: of the state dict.
        init: the model's ``_init_weights``.
        dtype, device: of the new weights.
    """
    owners: dict[int, tuple[nn.Module, set[str]]] = {}
    for key in keys:
        owner, name = _slot(model, key)
        owners.setdefault(id(owner), (owner, set()))[1].add(name)
        old = owner._parameters.get(name)
        # a name is a parameter or a buffer, and neither is None here
        shape = old.shape if old is not None else owner._buffers[name].shape  # type: ignore[union-attr]
        put(model, key, torch.zeros(shape, dtype=dtype, device=device))
    with torch.no_grad():
        for owner, names in owners.values():
            kept = {n: p.detach().clone() for n, p in owner.named_parameters(recurse=False) if n not in names}
            init(owner)
            for name, value in kept.items():
                owner.get_parameter(name).copy_(value)


def compare_tied(weights: Weights, match: Match, tied: Mapping[str, str]) -> list[str]:
    """Keys of tied weights whose second copy in the checkpoint differs from the shared tensor.

    Such a checkpoint was trained with separate tensors, whatever its config says.
    """
    different = []
    for target, name in match.tied_copies.items():
        source_name = match.sources[tied[target]]
        if not weights.same(source_name, name):
            different.append(target)
    return different


def require_filled(model: nn.Module, where: str) -> None:
    """Check that nothing is left on the meta device.

    Raises:
        CheckpointError: listing what is.
    """
    left = [name for name, p in model.named_parameters() if p.is_meta]
    left += [name for name, b in model.named_buffers() if b.is_meta]
    if left:
        raise CheckpointError(f"{where}: after loading, these weights are still without data: {listing(left)}")
