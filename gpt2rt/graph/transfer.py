"""Small values on their way to a device and back, without a wait that is not needed.

A copy from pageable memory to a GPU, and every copy back, makes the host wait for all that was queued before it. Copies
from and to pinned memory are queued like kernels; torch keeps pinned memory until such a copy has been made.

Source: CUDA programming guide, "Asynchronous concurrent execution" (overlap of transfers, page-locked memory).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on a device.

    Args:
        values: numbers, or rows of numbers of one length.
        dtype: of the tensor.
        device: where it goes; the copy to a GPU is queued on its current stream, and nothing waits.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def fetch(*tensors: Tensor) -> list[list[Any]]:
    """The numbers of tensors, as nested lists, with one wait for all of them together.

    Args:
        tensors: any, of one device; what computes them is queued on its current stream.
    """
    device = tensors[0].device
    if device.type != "cuda":
        return [tensor.tolist() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return [copy.tolist() for copy in copies]
