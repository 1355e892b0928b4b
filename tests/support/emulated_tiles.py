"""The C++ kernels on AMX tiles on a processor without them, built from the sources of the extension, for tests.

Two forms: ``emulated``, where the tiles are plain C++, and ``trapped``, the machine code for AMX, whose instructions a
signal handler carries out.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import shlex
import subprocess
from ctypes import c_int, c_int64, c_void_p

import torch
from cpu_step_model import aligned_bytes
from quantized_cases import Case
from torch import Tensor

import gpt2rt.ops as ops

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "support" / "emulated_tiles.cpp"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BFLOAT16, INT8, INT4 = 1, 3, 4
ACTIVATIONS = {None: 0, "gelu_new": 1}

SIGNATURES = {
    "new_args": (c_void_p, []),
    "delete_args": (None, [c_void_p]),
    "set_weight": (None, [c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64, c_int]),
    "set_rows": (None, [c_void_p, c_void_p, c_int64, c_int64]),
    "set_epilogue": (None, [c_void_p, c_void_p, c_int, c_void_p, c_int64]),
    "set_result": (None, [c_void_p, c_void_p, c_int, c_int64, c_int64]),
    "set_panels": (None, [c_void_p, c_int64, c_int64]),
    "prepare": (None, [c_void_p, c_void_p, c_void_p]),
    "prepared_bytes": (c_int64, [c_void_p]),
    "multiply_tiles": (None, [c_void_p]),
    "multiply_int8_without_tiles": (None, [c_void_p]),
    "check": (c_int, [c_int]),
    "tiles_in_use": (c_int, []),
    "product": (None, [c_int, c_void_p, c_void_p, c_void_p, c_void_p]),
}


def build(folder: pathlib.Path, form: str) -> pathlib.Path:
    """Compile the library.

    Args:
        folder: where to.
        form: ``emulated``, with the flags of the level in use, as far as the emulation needs them; or ``trapped``, with
            those of the level amx.
    """
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    vnni = [*avx512, "-mavx512vnni"]
    sources = [str(SOURCE)]
    if form == "emulated":
        flags = ["-O2", "-DGPT2RT_EMULATE_TILES"]
        flags += {"portable": [], "avx2": avx2, "avx512": avx512}.get(ops.cpu_isa(), vnni)
    else:
        sources.append(str(SOURCE.with_name("trapped_tiles.cpp")))
        flags = ["-O3", "-fno-math-errno", *vnni, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
    library = folder / f"{form}_tiles.so"
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-w", "-std=c++20", "-ffp-contract=off", *flags]
    command += ["-shared", "-fPIC", f"-I{ROOT / 'csrc' / 'cpu'}", *sources, "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def load(library: pathlib.Path) -> ctypes.CDLL:
    """The library with the types of its functions."""
    loaded = ctypes.CDLL(str(library))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


class Linear:
    """One packed weight [n, k] in the emulation; it owns all the memory that the kernels are given."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor | Case) -> None:
        self.library = library
        self.args = library.new_args()
        if isinstance(weight, Tensor):
            self.n, self.k = weight.shape
            self.format, group, zeros = BFLOAT16, 0, False
            self.panels = aligned_bytes(ops.packed_linear_bytes(self.n, self.k, torch.bfloat16))
            ops.pack_linear(weight.bfloat16(), self.panels)
        else:
            self.n, self.k = weight.codes.size(0), weight.in_features
            int8, zeros = weight.codes.dtype == torch.int8, weight.zeros is not None
            self.format, group = INT8 if int8 else INT4, weight.group_size
            size = ops.packed_quantized_bytes(
                self.n, self.k, bits=8 if int8 else 4, group_size=group, has_zeros=zeros, has_codebook=False
            )
            self.panels = aligned_bytes(size)
            ops.pack_quantized(*weight.tensors, self.panels, **weight.sizes)
        library.set_weight(self.args, self.panels.data_ptr(), self.format, self.n, self.k, group, zeros)

    def __del__(self) -> None:
        self.library.delete_args(self.args)

    def rows(self, x: Tensor) -> Tensor:
        """Rows [m, bytes] as the kernels read them, from float32 [m, k]; what lies between the rows is NaN."""
        used = self.library.prepared_bytes(self.args)
        rows = torch.full((x.size(0), used + 24), 0xFF, dtype=torch.uint8)
        for row, values in zip(rows, x.float().contiguous(), strict=True):
            self.library.prepare(self.args, values.data_ptr(), row.data_ptr())
        return rows

    def __call__(
        self,
        rows: Tensor,
        *,
        bias: Tensor | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
        in_place: bool = False,
        dtype: torch.dtype = torch.float32,
        panels: tuple[int, int] | None = None,
        tiles: bool = True,
    ) -> Tensor:
        """y [m, n]; what is not written stays NaN, and memory around y must be as it was.

        Args:
            rows: from :meth:`rows`.
            bias: [n] float32.
            activation: a key of ``ACTIVATIONS``.
            residual: [m, n] of ``dtype``, added last.
            in_place: y is the residual's memory.
            dtype: of y.
            panels: the range of panels to compute; None: all.
            tiles: False takes the int8 kernel without tiles.
        """
        m, n = rows.size(0), self.n
        around = torch.full((m + 2, n + 7), float("nan"), dtype=dtype)
        y = around[1:-1, 3 : 3 + n]
        if in_place:
            y.copy_(residual)
            residual = y
        add = residual.data_ptr() if residual is not None else None
        self.library.set_rows(self.args, rows.data_ptr(), m, rows.stride(0))
        bias_pointer = bias.data_ptr() if bias is not None else None
        stride = residual.stride(0) if residual is not None else 0
        self.library.set_epilogue(self.args, bias_pointer, ACTIVATIONS[activation], add, stride)
        self.library.set_result(self.args, y.data_ptr(), DTYPES[dtype], around.stride(0) * around.itemsize, 0)
        self.library.set_panels(self.args, *(panels or (0, -(-n // 64))))
        self._run(tiles)
        result = y.clone()
        y.fill_(float("nan"))
        assert around.isnan().all(), "memory around y was written"
        return result

    def grouped(self, rows: Tensor, bias: Tensor, activation: str | None, group: int, bytes_per_row: int) -> Tensor:
        """y as int8 rows in groups, [m, bytes_per_row] uint8, for the next weight."""
        m = rows.size(0)
        y = torch.full((m, bytes_per_row), 0xFF, dtype=torch.uint8)
        self.library.set_rows(self.args, rows.data_ptr(), m, rows.stride(0))
        self.library.set_epilogue(self.args, bias.data_ptr(), ACTIVATIONS[activation], None, 0)
        self.library.set_result(self.args, y.data_ptr(), 0, bytes_per_row, group)
        self.library.set_panels(self.args, 0, -(-self.n // 64))
        self._run(True)
        return y

    def _run(self, tiles: bool) -> None:
        if tiles:
            self.library.multiply_tiles(self.args)
        else:
            self.library.multiply_int8_without_tiles(self.args)


def bfloat16_ref(x: Tensor, weight: Tensor) -> Tensor:
    """x w^T as TDPBF16PS sums 32 elements of k at a time; exact, for a product of two bfloat16 has 16 bits.

    Args:
        x: [m, k] and weight: [n, k], bfloat16, such that no product or sum is subnormal.

    Returns:
        [m, n] float32.
    """
    x, weight = x.float(), weight.float()
    total = torch.zeros(x.size(0), weight.size(0))
    for begin in range(0, x.size(1), 32):
        chains = []
        for parity in (0, 1):
            chain = torch.zeros_like(total)
            for k in range(begin + parity, min(begin + 32, x.size(1)), 2):
                chain = chain + x[:, k, None] * weight[None, :, k]
            chains.append(chain)
        total = total + (chains[0] + chains[1])
    return total
