"""The project's single ``torch.library`` and the choice, made once, of the form each op runs in.

Every op has up to three forms: plain torch (``gpt2rt.kernels.refs``, registered for every backend), C++ for CPU
(``csrc``, loaded here) and Triton for CUDA. A more specific registration wins in torch's dispatcher, so nothing is
decided per call. ``gpt2rt env`` prints what was chosen and why.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import pathlib
import warnings
from collections.abc import Callable

import torch

LIB = torch.library.Library("gpt2rt", "DEF")

#: ops with forms of their own, in the order they were defined: name -> (plain torch form, Triton launcher or None)
_FORMS: dict[str, tuple[Callable | None, str | None]] = {}


@dataclasses.dataclass(frozen=True)
class ExtensionStatus:
    """Whether the C++ extension is loaded.

    Attributes:
        loaded: ops on CPU tensors run in C++.
        path: the shared library, or None.
        reason: one sentence that says why it is not loaded; empty when it is.
    """

    loaded: bool
    path: str | None
    reason: str


def _load_extension() -> ExtensionStatus:
    required = os.environ.get("GPT2RT_REQUIRE_CPP", "0") not in ("", "0")
    path = pathlib.Path(__file__).resolve().parent.parent / "_C.abi3.so"
    if not path.exists():
        reason = (
            f"{path.name} was not built; reinstall with a C++20 compiler: pip install --force-reinstall --no-deps ."
        )
    else:
        try:
            torch.ops.load_library(str(path))
            return ExtensionStatus(True, str(path), "")
        except OSError as error:
            reason = f"{path.name} could not be loaded by torch {torch.__version__}: {error}"
    if required:
        raise ImportError(f"GPT2RT_REQUIRE_CPP is set, but {reason}")
    warnings.warn(f"gpt2rt runs on its plain torch path, which is slower: {reason}", RuntimeWarning, stacklevel=4)
    return ExtensionStatus(False, None, reason)


def define(
    name: str,
    schema: str,
    *,
    reference: Callable | None,
    triton: str | None = None,
    fake: Callable,
) -> Callable:
    """Define an op, give it its plain torch and Triton forms, and return its callable.

    Args:
        name: the op's name in the ``gpt2rt`` namespace.
        schema: its arguments and results in torch's schema language, without the name.
        reference: the plain torch form, used on every backend that has no better one; None for ops that exist
            only in C++.
        triton: ``module:function`` below ``gpt2rt.kernels``, imported at the first call on CUDA tensors so that
            machines without a GPU never import triton; None where there is no Triton form.
        fake: the shape function for ``torch.compile`` and ``torch.export``.

    Returns:
        The op's default overload.
    """
    LIB.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"gpt2rt::{name}", fake, lib=LIB)
    if reference is not None:
        LIB.impl(name, reference, "CompositeExplicitAutograd")
    if triton is not None and importlib.util.find_spec("triton") is not None:
        LIB.impl(name, _lazy_triton(triton), "CUDA")
    _FORMS[name] = (reference, triton)
    return getattr(torch.ops.gpt2rt, name).default


def _lazy_triton(target: str) -> Callable:
    module_name, function_name = target.split(":")
    launcher: Callable | None = None

    def call(*args):
        nonlocal launcher
        if launcher is None:
            module = importlib.import_module(f"gpt2rt.kernels.{module_name}")
            launcher = getattr(module, function_name)
        return launcher(*args)

    return call


@functools.cache
def extension_status() -> ExtensionStatus:
    """Load the C++ extension on the first call; the same answer afterwards.

    Raises:
        ImportError: the extension is missing and ``GPT2RT_REQUIRE_CPP=1``.
    """
    return _load_extension()


def op_forms() -> dict[str, dict[str, str]]:
    """For each op, the form that runs on ``cpu`` and on ``cuda`` tensors: "C++", "Triton", "torch" or "none"."""
    loaded = extension_status().loaded
    has_triton = importlib.util.find_spec("triton") is not None
    forms = {}
    for name, (reference, triton) in _FORMS.items():
        plain = "torch" if reference is not None else "none"
        # not every op has a C++ form; those without a reference have no other
        in_cpp = torch._C._dispatch_has_kernel_for_dispatch_key(f"gpt2rt::{name}", "CPU")
        in_cpp = in_cpp or (loaded and reference is None)
        forms[name] = {
            "cpu": "C++" if in_cpp else plain,
            "cuda": "Triton" if triton is not None and has_triton else plain,
        }
    return forms
