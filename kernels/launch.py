"""What every launcher needs: the device context of its tensors, and options that hold for every kernel.

Imports torch alone.
"""

import contextlib
import functools

import torch
from torch import Tensor

# options of every launch. Fusing multiply and add is the default today, and triton announces the opposite default for a
# later version: said aloud, the numbers do not move with the version
OPTIONS = {"enable_fp_fusion": True}


# what launches on CPU tensors are compiled for, without a device: 10 * major + minor, or 0 for any; the ahead-of-time
# check sets it
compiled_for = 0


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture_of(x: Tensor) -> int:
    """The compute capability of the device of ``x`` as a number, 90 for 9.0; of CPU tensors ``compiled_for``."""
    return _architecture(x.get_device()) if x.is_cuda else compiled_for


def aligned(x: Tensor) -> Tensor:
    """``x`` [num_rows, n] as few compiled kernels serve it: it begins at a multiple of 16 bytes, or is a copy.

    Triton compiles a kernel for pointers and strides that are multiples of 16, and again for others. Rows of scores
    that are cut out of many may begin anywhere, and the first of them would wait for the compiler. The stride of a
    single row means nothing: it is such a multiple too, as for the rows of a step.
    """
    if x.data_ptr() % 16:
        x = x.clone()
    return x.as_strided(x.shape, (-(-x.size(1) // 16) * 16, 1)) if x.size(0) == 1 else x


def architecture_of_device(device: torch.device | str) -> int:
    """:func:`architecture_of` for tensors that are still to be made."""
    device = torch.device(device)
    if device.type != "cuda":
        return compiled_for
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which triton launches on the device of ``x``.

    Triton launches on the current CUDA device, which need not be the one that holds the tensors. Tensors of other
    devices (the interpreter runs on CPU tensors) need no context.
    """
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
