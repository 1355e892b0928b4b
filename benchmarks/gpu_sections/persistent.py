"""The persistent decode kernel (csrc/cuda/persistent.cuh) in sections a, c and f.

gpt2rt uses it on request; here it is checked and timed wherever its library is loaded and the model is one that it has.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from gpt2rt.graph.persistent import PersistentStep, unsupported
from gpt2rt.ops.cuda_extension import cuda_extension_status

from .models import ReplayedStep, altered, decode_batch, drop, make_model, random_cache, step_bytes, weights_of
from .session import Session

#: what it is called among times
LABEL = "gpt2rt, CUDA C++ persistent"
#: what a step is called whose products of 4-bit weights are those of csrc/cuda/, as with ``GPT2RT_CUDA_INT4=1``
ROWS = "gpt2rt, CUDA C++ rows"
#: seconds without a row after which its grid is taken to wait for ever
BARRIER_PATIENCE_S = 90.0
#: launches whose bits must be equal
REPEATS = 200


def why_not(plan: Any) -> str:
    """Why it cannot run a plan here; empty if it can."""
    status = cuda_extension_status()
    return unsupported(plan) if status.loaded else status.reason


def persistent_chain(chain: Any) -> Any | None:
    """The same chain with single steps as one launch, its weights packed anew; None where that cannot be."""
    if why_not(chain.plan):
        return None
    from gpt2rt.graph.chain import KERNEL_ACTIVATIONS

    return altered(chain, persistent=PersistentStep(chain.plan, KERNEL_ACTIVATIONS))


def chain_label(chain: Any) -> str:
    """What a chain's steps of one sequence are called: two variables give them, or their products, to other kernels."""
    from gpt2rt.kernels import linear_rows_cuda

    if chain.persistent is not None:
        return LABEL
    four_bits = weights_of(chain.plan)["layers"] in ("int4", "nf4")
    return ROWS if four_bits and linear_rows_cuda._enabled else "gpt2rt"


def steps_of(executor: Any) -> str:
    """What is added to the names of rows where the variable gave the steps of one sequence to this kernel."""
    return "" if executor.chain.persistent is None else ", persistent steps"


def persistent_executor(executor: Any) -> Any | None:
    """The same executor with such a chain, and graphs of its own; None where that cannot be."""
    chain = persistent_chain(executor.chain)
    if chain is None:
        return None
    other = executor.with_positions(executor.plan.nodes[0].wpe)
    other.chain = chain
    return other


def with_blocks(chain: Any, blocks: int) -> Any:
    """The same chain on a grid of so many blocks."""
    step = copy.copy(chain.persistent)
    step.blocks = blocks
    return altered(chain, persistent=step)


# ---- section a -----------------------------------------------------------------------------------------------------


def check_bits(session: Session, name: str, executor: Any, repeats: int = REPEATS) -> None:
    """Launches one after another, and grids of other sizes: equal to the bit."""
    chain = executor.chain
    context = min(200, chain.plan.n_positions)
    cache = random_cache(chain.plan, 1, context, chain.plan.dtype)
    batch = decode_batch(chain.plan, 1, context, session.device)
    step = ReplayedStep(chain, batch, cache, decode=True)
    first = step().clone()
    equal = sum(bool(torch.equal(step(), first)) for _ in range(repeats))
    session.check(
        f"{name}: bits of {repeats} launches", equal == repeats, equal=equal, finite=bool(first.isfinite().all())
    )
    blocks = chain.persistent.blocks
    for count in sorted({1, 3, max(1, blocks // 2), max(1, blocks - 1)}):
        other = ReplayedStep(with_blocks(chain, count), batch, cache, decode=True)()
        session.check(f"{name}: bits on {count} of {blocks} blocks", bool(torch.equal(other, first)))


# ---- section f -----------------------------------------------------------------------------------------------------


def time_grids(session: Session) -> None:
    """Whole steps against the chain on grids of several sizes, and what a phase costs that has next to no bytes."""
    names = ["toy"] if session.toy else ["124M", "355M", "774M", "1.5B"]
    for name in names:
        part = f"persistent grids {name}"
        if session.over(part):
            continue
        session.need(10)
        with session.attempt(part, BARRIER_PATIENCE_S):
            chain = make_model(name, "float16", session.device).generation_executor("cuda").chain
            time_beside_chain(session, part, name, chain, 40 if session.toy else 256, (2, 4))
        drop()
    part = "persistent decode, barriers"
    if session.over(part):
        return
    session.need(10)
    with session.attempt(part, BARRIER_PATIENCE_S):
        # 61 phases whose weights a single block would read in a moment
        sizes = dict(n_layer=12, n_embd=64, n_head=1, vocab_size=64, n_positions=64)
        model = make_model(
            "toy" if session.toy else "barriers", "float16", session.device, sizes=None if session.toy else sizes
        )
        time_beside_chain(session, part, "barriers", model.generation_executor("cuda").chain, 16, (2, 4))


def time_beside_chain(
    session: Session, title: str, name: str, chain: Any, context: int, shares: tuple[int, ...] = ()
) -> None:
    """A step of one sequence by the persistent kernel beside the chain; a note where there is none.

    Args:
        session: of the row.
        title: its name.
        name: of the model.
        chain: of an executor.
        context: tokens after the step.
        shares: the same on grids of this part of the blocks, in the row too.
    """
    reason = why_not(chain.plan) or ("the kernel has nothing to compile" if session.compiles else "")
    if reason:
        session.note(title, f"not run: {reason}")
        return
    cache = random_cache(chain.plan, 1, context, chain.plan.dtype)
    batch = decode_batch(chain.plan, 1, context, session.device)
    one = persistent_chain(chain)
    assert one is not None
    blocks = one.persistent.blocks
    # the chain of Triton kernels, also where the variable has given its steps to this kernel
    calls = {"gpt2rt": ReplayedStep(altered(chain, persistent=None), batch, cache, decode=True, greedy=True)}
    calls[LABEL] = ReplayedStep(one, batch, cache, decode=True, greedy=True)
    for share in shares:
        count = max(1, blocks // share)
        calls[f"{LABEL}, {count} blocks"] = ReplayedStep(
            with_blocks(one, count), batch, cache, decode=True, greedy=True
        )
    times, failed = session.timer(15, target_us=2000.0, max_calls=16).compare(calls)
    num_bytes = step_bytes(chain, 1, context, cache)
    session.times(
        title,
        times,
        failed,
        floor_us=session.floor_us(num_bytes),
        op="persistent_decode",
        size={"model": name, "context": context},
        dtype=str(chain.plan.dtype).removeprefix("torch."),
        blocks=blocks,
        phases=5 * chain.plan.n_layer + 1,
        bytes=num_bytes,
        # a multiplication and an addition for each weight of 16 bits
        operations=chain.weight_bytes,
    )
