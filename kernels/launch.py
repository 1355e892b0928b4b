"""What every launcher needs: the device context of its tensors, and options that hold for every kernel.

Imports torch alone.
"""

import contextlib

import torch
from torch import Tensor

# options of every launch. Fusing multiply and add is the default today, and triton announces the opposite default for a
# later version: said aloud, the numbers do not move with the version
OPTIONS = {"enable_fp_fusion": True}


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which triton launches on the device of ``x``.

    Triton launches on the current CUDA device, which need not be the one that holds the tensors. Tensors of other
    devices (the interpreter runs on CPU tensors) need no context.
    """
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
