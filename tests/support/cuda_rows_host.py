"""``csrc/cuda/rows.cuh`` compiled for the host: as the op of CPU tensors that the launcher calls."""

import ctypes
import functools
import math
import pathlib
import re
import shutil
import subprocess
import tempfile

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parents[2]
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Any(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("type", ctypes.c_int32))

    @classmethod
    def of(cls, x: Tensor | None) -> "Any":
        return cls() if x is None else cls(x.data_ptr(), x.stride(0), TYPES[x.dtype])


class RowsParams(ctypes.Structure):
    """The fields of csrc/cuda/params.h."""

    _fields_ = (
        ("x", Any),
        ("x_aligned", ctypes.c_bool),
        ("values", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("num_splits", ctypes.c_int32),
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("num_groups", ctypes.c_int32),
        ("group_shift", ctypes.c_int32),
        ("norm_weight", Any),
        ("norm_bias", Any),
        ("norm_aligned", ctypes.c_bool),
        ("eps", ctypes.c_float),
        ("bias", Any),
        ("residual", Any),
        ("out", Any),
        ("activation", ctypes.c_int32),
        ("key_cache", Any),
        ("value_cache", Any),
        ("slots", ctypes.c_void_p),
        ("num_slots", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
    )


def why_not() -> str | None:
    """Why the host cannot compile it, or None."""
    if shutil.which("g++") is None:
        return "there is no g++"
    return None if include_folder() is not None else "the CUDA toolkit's headers (cuda_fp16.h) are not installed"


def include_folder() -> pathlib.Path | None:
    nvcc = shutil.which("nvcc")
    near = [] if nvcc is None else [pathlib.Path(nvcc).resolve().parents[1] / "include"]
    candidates = (*near, pathlib.Path("/usr/local/cuda/include"))
    return next((folder for folder in candidates if (folder / "cuda_fp16.h").exists()), None)


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/cuda_rows_on_host.so"
        source = ROOT / "tests/support/cuda_rows_on_host.cpp"
        # no contraction: the device's compiler decides for itself, and the test allows for either
        flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror"]
        ignored = ["-Wno-unknown-pragmas", f"-isystem{include_folder()}", f"-I{ROOT / 'csrc/cuda'}"]
        subprocess.run(["g++", *flags, *ignored, str(source), "-o", target], check=True)
        loaded = ctypes.CDLL(target)
    assert loaded.size_of_params() == ctypes.sizeof(RowsParams)
    return loaded


def op_schema() -> str:
    """The op's schema, read from csrc/cuda/ops.cpp."""
    source = (ROOT / "csrc/cuda/ops.cpp").read_text()
    (call,) = re.findall(r"m\.def\((.*?)\);", source, re.DOTALL)
    return "".join(re.findall(r'"(.*?)"', call))


@functools.cache
def register() -> torch.library.Library:
    """Make ``fused_linear_rows_cuda`` run on CPU tensors; the op lives as long as what is returned."""
    library = torch.library.Library("gpt2rt", "FRAGMENT")
    # defined already where the CUDA library is loaded
    if not hasattr(torch.ops.gpt2rt, "fused_linear_rows_cuda"):
        library.define(op_schema())
    library.impl("fused_linear_rows_cuda", _run_on_host, "CPU")
    return library


def _run_on_host(
    x,
    values,
    lse,
    seq_lens,
    words,
    scales,
    zeros,
    codebook,
    k,
    group_size,
    bfloat16,
    bias,
    norm_weight,
    norm_bias,
    eps,
    activation,
    residual,
    out,
    key_cache,
    value_cache,
    slots,
    pdl,
) -> None:
    """What ops.cpp does with its arguments."""
    params = RowsParams(
        x=Any.of(x),
        words=words.data_ptr(),
        scales=scales.data_ptr(),
        num_groups=scales.size(1),
        group_shift=int(math.log2(group_size)),
        norm_weight=Any.of(norm_weight),
        norm_bias=Any.of(norm_bias),
        eps=eps,
        bias=Any.of(bias),
        residual=Any.of(residual),
        out=Any.of(out),
        activation=activation,
        num_rows=out.size(0),
        n=words.size(0),
        k=k,
    )
    if norm_weight is not None:
        params.norm_aligned = all(each.data_ptr() % (4 * each.element_size()) == 0 for each in (norm_weight, norm_bias))
    if x is not None:
        params.x_aligned = x.data_ptr() % (4 * x.element_size()) == 0 and x.stride(0) % 4 == 0
    if zeros is not None:
        params.zeros = zeros.data_ptr()
    if codebook is not None:
        params.codebook = codebook.data_ptr()
    if slots is not None:
        num_blocks, _, params.block_size, params.head_dim = key_cache.shape
        params.key_cache, params.value_cache = Any.of(key_cache), Any.of(value_cache)
        params.slots, params.num_slots = slots.data_ptr(), num_blocks * params.block_size
    if values is not None:
        params.values, params.lse, params.seq_lens = values.data_ptr(), lse.data_ptr(), seq_lens.data_ptr()
        params.num_splits, params.head_dim = values.shape[2:]
    format = 2 if codebook is not None else 0 if zeros is None else 1
    library().run_rows(ctypes.byref(params), format, TYPES[torch.bfloat16 if bfloat16 else torch.float16])
