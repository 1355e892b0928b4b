"""Which tensor of a checkpoint belongs to which weight of a model; decided from names, shapes and dtypes alone."""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from gpt2rt.checkpoint.safetensors_file import TensorInfo
from gpt2rt.errors import CheckpointError

# names listed in a message before it says "and N more"
MAX_LISTED = 12

# what gpt2rt computes with; float64 checkpoints are rounded to float32
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_LAYER = re.compile(r"(?:^|\.)h\.([0-9]{1,9})\.")


@dataclass
class Match:
    """How a checkpoint fills a model.

    Attributes:
        sources: key of the model's state dict -> name in the checkpoint.
        missing: keys that the checkpoint does not fill.
        unexpected: names in the checkpoint that no key takes.
        mismatched: (key, shape in the checkpoint, shape in the model) of weights left out on request.
        tied_copies: key of a tied weight -> name of a second copy of it in the checkpoint.
    """

    sources: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    tied_copies: dict[str, str] = field(default_factory=dict)


def listing(names: Iterable[str]) -> str:
    """Names for a message, the first few of them."""
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def match_names(
    infos: Mapping[str, TensorInfo],
    keys: Iterable[str],
    prefix: str,
    ignored: Iterable[str],
    tied: Mapping[str, str],
    where: str,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Match:
    """Pair names in a checkpoint with the keys of a model, with and without the prefix of the bare model.

    Args:
        infos: the checkpoint's tensors.
        keys: the model's state-dict keys.
        prefix: ``base_model_prefix``, such as "transformer".
        ignored: regular expressions; names that match carry no weights.
        tied: key of a tied weight -> key whose tensor it shares; empty when weights are not tied.
        where: the checkpoint, for messages.
        aliases: key of the model -> another name that its tensor may have in the checkpoint, taken if the key's own
            name is not there.
    Raises:
        CheckpointError: two names of the checkpoint mean the same key.
    """
    patterns = [re.compile(pattern) for pattern in ignored]
    names = {name for name in infos if not any(pattern.search(name) for pattern in patterns)}
    match = Match()
    taken: set[str] = set()

    def name_of(key: str) -> str | None:
        forms = [key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")]
        found = [name for name in dict.fromkeys(forms) if name in names]
        if len(found) > 1:
            raise CheckpointError(
                f"{where} holds both {found[0]!r} and {found[1]!r}, which are the same weight {key!r}"
            )
        return found[0] if found else None

    for key in keys:
        if key in tied:
            continue
        name = name_of(key)
        if name is not None:
            match.sources[key] = name
            taken.add(name)
        else:
            match.missing.append(key)
    for target, source in tied.items():
        name = name_of(target)
        if name is None:
            continue
        taken.add(name)
        if source in match.sources:
            match.tied_copies[target] = name
        elif source in match.missing:
            # some published files keep the shared tensor under the name of the output layer only
            match.sources[source] = name
            match.missing.remove(source)
    for key, name in aliases.items():
        if key in match.missing and name in names:
            match.sources[key] = name
            match.missing.remove(key)
            taken.add(name)
    match.unexpected = sorted(names - taken)
    return match


def check_layers(infos: Mapping[str, TensorInfo], num_layers: int, where: str) -> None:
    """Check that the checkpoint holds as many blocks as the config says.

    Raises:
        CheckpointError: it does not.
    """
    numbers = {int(found.group(1)) for name in infos if (found := _LAYER.search(name))}
    if numbers and max(numbers) + 1 != num_layers:
        raise CheckpointError(
            f"{where} holds weights of {max(numbers) + 1} blocks, but config.json says n_layer = {num_layers}; do both "
            "files belong to one model?"
        )


def check_tensors(
    infos: Mapping[str, TensorInfo],
    match: Match,
    shapes: Mapping[str, tuple[int, ...]],
    may_differ: Iterable[str],
    apart: Container[str] = (),
) -> None:
    """Check dtypes and shapes; weights in ``may_differ`` whose shape is wrong move to ``match.mismatched``.

    Names in ``apart``, quantised weights, are not looked at.

    Raises:
        CheckpointError: a tensor is not floating-point, or its shape is wrong.
    """
    lenient = set(may_differ)
    for key, name in list(match.sources.items()):
        if name in apart:
            continue
        info, shape = infos[name], tuple(shapes[key])
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{info.path}: tensor {name!r} has dtype {info.dtype}, expected float32, float16, bfloat16 or float64; "
                "a quantised checkpoint says so by quantization_config in its config.json"
            )
        if info.shape == shape:
            continue
        if key in lenient:
            match.mismatched.append((key, info.shape, shape))
            del match.sources[key]
            continue
        hint = "config.json and weights do not belong together, or config values were overridden"
        if len(shape) == 2 and info.shape == shape[::-1]:
            hint = "it is stored transposed: GPT models keep these weights as [inputs, outputs]; save its .T"
        raise CheckpointError(
            f"{info.path}: tensor {name!r} has shape {list(info.shape)}, the model expects {list(shape)}; {hint}"
        )


def stored_dtype(infos: Iterable[TensorInfo]) -> torch.dtype:
    """The dtype that holds all of these tensors without loss; float64 counts as float32, no tensors give float32."""
    dtypes = {torch.float32 if info.dtype == torch.float64 else info.dtype for info in infos}
    result = dtypes.pop() if dtypes else torch.float32
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result
