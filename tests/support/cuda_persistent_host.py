"""``csrc/cuda/persistent.cuh`` compiled for the host: as the op of CPU tensors that the launcher calls."""

import contextlib
import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator

import torch
from cuda_rows_host import ROOT, include_folder
from torch import Tensor

#: shared memory that a block may ask for: sm_80, sm_86, sm_90
SHARED_BYTES = {80: 166912, 86: 101376, 90: 232448}


class Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("n", "k", "padded", "chunk", "chunks", "tiles")),
        ("tile_bytes", ctypes.c_int64),
    )


class PersistentParams(ctypes.Structure):
    """The fields of csrc/cuda/persistent.h."""

    _fields_ = (
        ("stream", ctypes.c_void_p),
        # qkv, proj, fc, down, head
        ("weights", 5 * Matrix),
        ("norms", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("wte", ctypes.c_void_p),
        ("wpe", ctypes.c_void_p),
        ("wte_stride", ctypes.c_int64),
        ("wpe_stride", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("n_positions", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("input_id", "position_id", "slot", "seq_len", "block_table")),
        ("max_blocks", ctypes.c_int32),
        ("cache", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "query", "inner", "values", "lse")),
        ("num_splits", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("best", "best_at", "barrier", "logits", "hidden", "chosen")),
        *((name, ctypes.c_int32) for name in ("n_layer", "n_head", "head_dim", "n_embd", "stages")),
    )


class Faults(ctypes.Structure):
    """The fields of on_host::Faults: what the emulated device leaves out."""

    _fields_ = (
        ("grid_wait", ctypes.c_int),
        ("full_wait", ctypes.c_bool),
        ("empty_wait", ctypes.c_bool),
        ("consumers_meet", ctypes.c_bool),
        ("warp_meet", ctypes.c_bool),
        ("stage_shift", ctypes.c_int),
    )


class Device:
    """What the emulated device is like.

    Attributes:
        blocks: of the grid, where the launcher does not ask for fewer.
        groups: of consumer warps; 2 on a device.
        stages: of each group's ring; 0: as many as shared memory of ``architecture`` holds.
        bulk: stages arrive as bulk copies (sm_90), else piece by piece from each lane (sm_80).
        seed: of the order in which blocks and threads go on, and of the time that copies take.
        faults: what is left out.
    """

    def __init__(self) -> None:
        self.blocks, self.groups, self.stages, self.architecture = 3, 2, 0, 90
        self.bulk, self.seed, self.faults = True, 0, Faults(grid_wait=-1)


device = Device()


@contextlib.contextmanager
def emulating(**changes) -> Iterator[Device]:
    """Another device for a while; names of faults are taken, too."""
    before = dict(device.__dict__)
    faults = {name: changes.pop(name) for name, _ in Faults._fields_ if name in changes}
    device.__dict__.update(changes, faults=Faults(**{"grid_wait": -1, **faults}))
    try:
        yield device
    finally:
        device.__dict__.update(before)


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/cuda_persistent_on_host.so"
        source = ROOT / "tests/support/cuda_persistent_on_host.cpp"
        # no contraction beyond the fused operations that the source names; checks of longjmp know no fibers
        flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-Wall", "-Werror"]
        ignored = ["-Wno-unknown-pragmas", f"-isystem{include_folder()}", f"-I{ROOT / 'csrc/cuda'}"]
        subprocess.run(["g++", *flags, *ignored, str(source), "-o", target], check=True)
        loaded = ctypes.CDLL(target)
    assert loaded.size_of_params() == ctypes.sizeof(PersistentParams)
    assert loaded.size_of_faults() == ctypes.sizeof(Faults)
    for name in ("model_stream_bytes", "model_workspace_floats"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.run_persistent.restype = ctypes.c_char_p
    return loaded


def sized(
    n_layer: int, n_head: int, head_dim: int, n_embd: int, inner: int, vocab: int, splits: int
) -> PersistentParams:
    """Parameters with the sizes of a model."""
    params = PersistentParams()
    library().set_model(ctypes.byref(params), n_layer, n_head, head_dim, n_embd, inner, vocab, splits)
    return params


def stages_for(params: PersistentParams, groups: int, architecture: int) -> int:
    """Stages of each ring that a device of an architecture has room for."""
    return library().model_stages(ctypes.byref(params), SHARED_BYTES[architecture], groups)


@functools.cache
def register() -> torch.library.Library:
    """Make ``persistent_decode_cuda`` run on CPU tensors; the ops live as long as what is returned."""
    library = torch.library.Library("gpt2rt", "FRAGMENT")
    source = (ROOT / "csrc/cuda/persistent_ops.cpp").read_text()
    for call in re.findall(r"m\.def\((.*?)\);", source, re.DOTALL):
        schema = "".join(re.findall(r'"(.*?)"', call))
        # defined already where the CUDA library is loaded
        if not hasattr(torch.ops.gpt2rt, schema.partition("(")[0]):
            library.define(schema)
    library.impl("persistent_decode_cuda", _run_on_host, "CPU")
    library.impl("persistent_blocks_cuda", lambda *_: device.blocks, "CPU")
    return library


def _run_on_host(
    stream,
    norms,
    scales,
    eps,
    activation,
    wte,
    wpe,
    input_ids,
    position_ids,
    slot_mapping,
    seq_lens,
    block_table,
    cache,
    workspace,
    barrier,
    logits,
    hidden,
    chosen,
    inner,
    num_splits,
    blocks,
) -> None:
    """What persistent_ops.cpp does with its arguments."""
    n_layer, _, num_blocks, n_head, block_size, head_dim = cache.shape
    params = sized(n_layer, n_head, head_dim, wte.size(1), inner, logits.numel(), num_splits)
    assert stream.numel() == library().model_stream_bytes(ctypes.byref(params))
    assert workspace.numel() == library().model_workspace_floats(ctypes.byref(params))
    assert norms.shape == (2 * n_layer + 1, 2, wte.size(1))
    params.stream, params.norms, params.scales = stream.data_ptr(), norms.data_ptr(), scales.data_ptr()
    params.eps, params.activation = eps, activation
    params.wte, params.wte_stride = wte.data_ptr(), wte.stride(0)
    params.wpe, params.wpe_stride, params.n_positions = wpe.data_ptr(), wpe.stride(0), wpe.size(0)
    params.input_id, params.position_id = input_ids.data_ptr(), position_ids.data_ptr()
    params.slot, params.seq_len = slot_mapping.data_ptr(), seq_lens.data_ptr()
    params.block_table, params.max_blocks = block_table.data_ptr(), block_table.size(1)
    params.cache, params.num_blocks, params.block_size = cache.data_ptr(), num_blocks, block_size
    params.barrier, params.logits = barrier.data_ptr(), logits.data_ptr()
    params.hidden = None if hidden is None else hidden.data_ptr()
    params.chosen = None if chosen is None else chosen.data_ptr()
    stages = device.stages or stages_for(params, device.groups, device.architecture)
    error = library().run_persistent(
        ctypes.byref(params),
        ctypes.c_void_p(workspace.data_ptr()),
        cache.dtype == torch.bfloat16,
        device.groups,
        min(blocks, device.blocks) or device.blocks,
        stages,
        device.bulk,
        device.seed,
        ctypes.byref(device.faults),
    )
    if error is not None:
        raise RuntimeError(f"persistent_decode_cuda on the host: {error.decode()}")


def new_state(n_embd: int, wide: int, inner: int, n_head: int, num_splits: int) -> tuple[Tensor, Tensor]:
    """A workspace of NaN and a barrier that was never used."""
    from gpt2rt.kernels.persistent_decode import workspace_floats

    return (
        torch.full((workspace_floats(n_embd, wide, inner, n_head, num_splits),), torch.nan),
        torch.zeros(1, dtype=torch.int32),
    )
