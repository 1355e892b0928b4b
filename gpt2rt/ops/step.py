"""A whole forward step on the CPU in one call of C++ (csrc/step).

The plan is a table of nodes, the weights are one arena of packed panels: see ``gpt2rt.graph.cpu``, which builds both.
"""

from __future__ import annotations

from torch import Tensor

from ._library import define, extension_status


def _cpu_step_fake(
    plan: Tensor,
    arena: Tensor,
    wte: Tensor,
    wpe: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    logits_indices: Tensor,
    kv_cache: Tensor,
    workspace: Tensor,
    logits: Tensor,
    hidden: Tensor,
    num_threads: int,
    times: Tensor | None = None,
    kv_scales: Tensor | None = None,
    top_ids: Tensor | None = None,
    top_logits: Tensor | None = None,
) -> None:
    return None


def _no_trace(*args):
    raise NotImplementedError("this op's result is a host value and cannot be traced; call it outside torch.compile")


#: the most columns of ``top_ids``
MAX_TOP = 512

#: the raw op; arguments as in its schema. With ``top_ids`` and ``top_logits`` [num_logits, k] it writes the k best of
#: each row, the largest logit first and of equal ones the lowest id, in place of ``logits``, which must be [0, V] then;
#: a row whose logits are not all finite has ids -1. It checks every index and offset before any work.
cpu_step = define(
    "cpu_step",
    "(Tensor plan, Tensor arena, Tensor wte, Tensor wpe, Tensor input_ids, Tensor position_ids, "
    "Tensor query_start_loc, Tensor seq_lens, Tensor block_table, Tensor slot_mapping, Tensor logits_indices, "
    "Tensor(a!) kv_cache, Tensor(b!) workspace, Tensor(c!) logits, Tensor(d!) hidden, int num_threads, "
    "Tensor(e!)? times=None, Tensor(f!)? kv_scales=None, Tensor(g!)? top_ids=None, Tensor(h!)? top_logits=None) -> ()",
    reference=None,
    fake=_cpu_step_fake,
)

_workspace_bytes = define(
    "cpu_step_workspace_bytes",
    "(Tensor plan, int num_tokens, int num_logits) -> int",
    reference=None,
    fake=_no_trace,
)
#: instruction sets that the C++ kernels are built for, from the plainest up; each level includes the ones before it
CPU_ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
_cpu_isa = define("cpu_isa", "() -> str", reference=None, fake=_no_trace)
_cpu_isa_limit = define("cpu_isa_limit", "() -> str", reference=None, fake=_no_trace)


def cpu_step_workspace_bytes(plan: Tensor, num_tokens: int, num_logits: int) -> int:
    """Bytes of scratch memory that :data:`cpu_step` needs for this many tokens and rows of logits."""
    return _workspace_bytes(plan, num_tokens, num_logits)


def cpu_isa() -> str:
    """The instruction set that the C++ kernels use: one of :data:`CPU_ISAS`.

    ``GPT2RT_CPU_ISA`` forces a lower one.

    Raises:
        RuntimeError: ``GPT2RT_CPU_ISA`` names none of them or one that this CPU lacks, or the extension is missing.
    """
    _need_extension()
    return _cpu_isa()


def has_bfloat16_products() -> bool:
    """Whether the C++ kernels multiply pairs of bfloat16 in one instruction.

    Raises:
        RuntimeError: as :func:`cpu_isa`.
    """
    return CPU_ISAS.index(cpu_isa()) >= CPU_ISAS.index("avx512_bf16")


def cpu_isa_limit() -> str:
    """Why :func:`cpu_isa` is not a higher level, a sentence; empty for the highest one.

    Raises:
        RuntimeError: as :func:`cpu_isa`.
    """
    _need_extension()
    return _cpu_isa_limit()


def _need_extension() -> None:
    status = extension_status()
    if not status.loaded:
        raise RuntimeError(f"the C++ extension is missing: {status.reason}")
