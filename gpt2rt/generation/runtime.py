"""The executor of a model: made from its weights when first needed, and again when they have changed."""

from __future__ import annotations

import dataclasses
import threading
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from gpt2rt.graph import Executor, executor_names, make_executor

from .modules import NAME as MODULES
from .modules import ModuleExecutor

# elements of each parameter that are compared, to notice changes that torch does not count
_SAMPLES = 8

# keyed weakly, and beside the model rather than in it: a model stays copyable and picklable
_RUNTIMES: weakref.WeakKeyDictionary[nn.Module, _Runtime] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class _Runtime:
    """What is kept for one model."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # by name, and the one chosen automatically also under None
        self.executors: dict[str | None, Executor] = {}
        self.preferred: str | None = None
        self.warned_of: str | None = None
        # the weights are as they were loaded
        self.from_files = False
        self._identity: Any = None
        self._samples: list[list[Tensor]] = []
        self._content: Any = None

    def weights_changed(self, model: Any) -> bool:
        """Whether weights, their place or the config differ from the last call."""
        parameters = _parameters(model)
        # tensors made in inference mode have no version
        versions = [-1 if p.is_inference() else p._version for p in parameters]
        identity = [p.data_ptr() for p in parameters], versions, [p.dtype for p in parameters], dict(vars(model.config))
        if identity != self._identity:
            self._identity, self._samples = identity, _samples(parameters)
            self._content = self._read()
            return True
        # writes through .data change neither place nor version, so look at a few elements as well
        content = self._read()
        if content == self._content:
            return False
        self._content = content
        return True

    def _read(self) -> Any:
        # as bytes, so that NaN equals itself
        return [torch.cat(alike).view(torch.uint8).cpu().numpy().tobytes() for alike in self._samples]


def _parameters(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, where quantised weights are; tied ones as often as they stand.

    Ten times faster than ``module.parameters()``.
    """
    found: list[Tensor] = [parameter for parameter in module._parameters.values() if parameter is not None]
    found += [buffer for buffer in module._buffers.values() if buffer is not None]
    for child in module._modules.values():
        if child is not None:
            found += _parameters(child)
    return found


def _samples(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Views of a few elements of each parameter; those of one dtype and device stand together."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in parameters:
        sample = p.detach().reshape(-1)[:: p.numel() // _SAMPLES | 1][: _SAMPLES + 1]
        alike.setdefault((p.dtype, p.device), []).append(sample)
    return list(alike.values())


def note_loaded(model: Any) -> None:
    """Note that a model's weights are now those of a checkpoint's files; forgotten when they change."""
    with _LOCK:
        runtime = _RUNTIMES.setdefault(model, _Runtime())
    with runtime.lock:
        runtime.weights_changed(model)
        runtime.from_files = True


def executor_for(model: Any, name: str | None = None, rebuild: bool = False) -> Executor:
    """The executor that runs a model's generation steps.

    Args:
        model: a model with ``config``, ``build_graph()`` and ``changed_layer()``.
        name: "cpu", "cuda", "eager" or "modules", which is also used from now on; None: the one chosen before, else the
            fastest that computes what the model's forward does: the modules themselves if they have hooks, or others
            stand in their place.
        rebuild: make it anew although no change of the weights was noticed.

    Raises:
        ValueError: there is no such executor, or it cannot run this model.
    """
    names = (*executor_names(), MODULES)
    if name is not None and name not in names:
        raise ValueError(f"there is no executor {name!r}; choose one of {', '.join(names)}")
    with _LOCK:
        runtime = _RUNTIMES.setdefault(model, _Runtime())
    with runtime.lock:
        if runtime.weights_changed(model) or rebuild:
            # the old ones go first: both together might not fit
            runtime.executors.clear()
            runtime.from_files = False
        wanted = chosen = name or runtime.preferred
        changed = model.changed_layer() if wanted is None else None
        if changed is not None:
            wanted = MODULES
            if changed != runtime.warned_of:
                warnings.warn(f"{changed}, so generate() runs modules one by one, slower than its graph", stacklevel=4)
        runtime.warned_of = changed
        if wanted not in runtime.executors:
            if wanted == MODULES:
                executor: Executor = ModuleExecutor(model)
            else:
                plan = dataclasses.replace(model.build_graph(), from_files=runtime.from_files)
                executor = make_executor(plan, wanted)
            runtime.executors[wanted] = runtime.executors.setdefault(executor.name, executor)
        # only now: a choice that cannot run this model is not kept
        runtime.preferred = chosen
        return runtime.executors[wanted]
