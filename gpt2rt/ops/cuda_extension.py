"""The library of CUDA C++ kernels, ``gpt2rt/_C_cuda.so``: whether it is loaded, and what is made to use it.

It holds the fused linear layer for few rows of 4-bit weights, which Triton has too, and a whole decode step of one
sequence in one launch (csrc/cuda/). It is built only where nvcc is, and it is opened only by a torch that has CUDA, at
the first question: its symbols are in torch's CUDA library. Its kernels are not the default anywhere:
``GPT2RT_CUDA_INT4=1`` and ``GPT2RT_CUDA_PERSISTENT=1`` make the cuda executor use them.
"""

from __future__ import annotations

import functools
import os
import pathlib

import torch

from ._library import ExtensionStatus

__all__ = ["cuda_extension_status", "use_cuda_rows", "use_persistent_decode"]


@functools.cache
def cuda_extension_status() -> ExtensionStatus:
    """Load ``_C_cuda.so`` on the first call, if this torch has CUDA; the same answer afterwards."""
    if torch.version.cuda is None:
        return ExtensionStatus(False, None, f"torch {torch.__version__} is built without CUDA")
    path = pathlib.Path(__file__).resolve().parent.parent / "_C_cuda.so"
    if not path.exists():
        reason = f"{path.name} was not built; with nvcc installed: GPT2RT_CUDA=1 pip install --no-build-isolation ."
        return ExtensionStatus(False, None, reason)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = f"{path.name} could not be loaded by torch {torch.__version__}: {error}"
        return ExtensionStatus(False, None, reason)
    return ExtensionStatus(True, str(path), "")


def use_cuda_rows(device: torch.device) -> bool:
    """Let products of few rows and 4-bit weights take the kernel of CUDA C++ from now on, if ``GPT2RT_CUDA_INT4=1``.

    Args:
        device: where the model is.

    Returns:
        Whether the variable is set and the device is a CUDA one.

    Raises:
        ImportError: the variable is set, but the library is not there.
        ValueError: the variable is set, but the device has none of the instructions (compute capability below 8.0).
    """
    if not _asked_for("GPT2RT_CUDA_INT4", device):
        return False
    from gpt2rt.kernels.linear_rows_cuda import enable

    enable()
    return True


def use_persistent_decode(device: torch.device) -> bool:
    """Whether decode steps of one sequence are to be one launch of the persistent kernel: ``GPT2RT_CUDA_PERSISTENT=1``.

    Args:
        device: where the model is.

    Returns:
        Whether the variable is set and the device is a CUDA one.

    Raises:
        ImportError: the variable is set, but the library is not there.
        ValueError: the variable is set, but the device has none of the instructions (compute capability below 8.0).
    """
    return _asked_for("GPT2RT_CUDA_PERSISTENT", device)


def _asked_for(variable: str, device: torch.device) -> bool:
    if os.environ.get(variable, "0") in ("", "0") or device.type != "cuda":
        return False
    status = cuda_extension_status()
    if not status.loaded:
        raise ImportError(f"{variable} is set, but {status.reason}; unset it to use the Triton kernels")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ValueError(
            f"{variable} is set, but the device has compute capability {capability[0]}.{capability[1]}, expected "
            "8.0 or later; unset it to use the Triton kernels"
        )
    return True
