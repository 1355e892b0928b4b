"""(g) Bits: batch invariance over rows, company and chunks; determinism over replays; and what invariance costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.graph.device_loop import DeviceLoop, SamplingRows
from gpt2rt.lab.problem import Place
from gpt2rt.lab.weights import make_weight

from .models import ReplayedStep, altered, decode_batch, drop, make_model, prefill_batch, random_cache, title_of
from .persistent import steps_of
from .session import Session


def run(session: Session) -> None:
    with torch.no_grad():
        name = "toy" if session.toy else "124M"
        # what is promised first, of whole models, then its parts
        for format in ("float16",) if session.toy else ("float16", "int4"):
            for part in (_model, _replays, _cost):
                word = part.__name__.strip("_")
                if session.over(f"{word} {name} {format}"):
                    continue
                session.need(20)
                with session.attempt(f"{word} {name} {format}"):
                    executor = make_model(name, format, session.device, scale=3.0).generation_executor("cuda")
                    # the other parts leave the persistent kernel out themselves
                    which = steps_of(executor) if part is _replays else ""
                    part(session, title_of(name, executor.plan) + which, executor)
                drop()
        for format in ("dense", "int4") if session.toy else ("dense", "int8", "int4", "nf4"):
            if session.over(f"product {format}"):
                continue
            session.need(10)
            with session.attempt(f"product {format}"):
                _products(session, format)


def _products(session: Session, format: str) -> None:
    """Row 0 of a product of M rows, for every M, against M = 1; and the same call again."""
    from gpt2rt.kernels.linear_rows import fused_linear_rows_triton
    from gpt2rt.kernels.linear_tiles import fused_linear_tiles_triton, workspace_bytes

    place = Place(session.device, session.dtype)
    k, n = (128, 32) if session.toy else (768, 2304)
    counts = (1, 5, 33) if session.toy else (1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 200, 256)
    weight = make_weight(place, format, n, k)
    x = place.normal(max(counts), k)

    def tiles(rows: int) -> Tensor:
        out = torch.full((rows, n), torch.nan, device=session.device)
        size = workspace_bytes(weight, rows, batch_invariant=True)
        work = torch.zeros(size, dtype=torch.uint8, device=session.device)
        fused_linear_tiles_triton(x[:rows], weight, None, out, workspace=work, batch_invariant=True)
        return out[0]

    def few(rows: int) -> Tensor:
        out = torch.full((rows, n), torch.nan, device=session.device)
        fused_linear_rows_triton(x[:rows], weight, None, out)
        return out[0]

    for name, product, limit in (("linear_tiles", tiles, counts[-1]), ("linear_rows", few, 8)):
        alone = product(1)
        differing = [m for m in counts if m <= limit and not torch.equal(product(m), alone)]
        session.check(f"{name} {format}: row 0 for every M", not differing, differing=differing)
        repeats = 2 if session.toy else 50
        session.check(
            f"{name} {format}: {repeats} repeats", all(torch.equal(product(1), alone) for _ in range(repeats))
        )
    if format == "dense":
        alone = x[:1] @ weight.data.t()
        differing = [m for m in counts if not torch.equal((x[:m] @ weight.data.t())[:1], alone)]
        session.note("torch's product: row 0 for every M", f"differs from M = 1 for M = {differing}")


def _invariant(executor: Any) -> Any:
    from gpt2rt.graph.cuda import CudaExecutor

    return CudaExecutor(executor.plan, batch_invariant=True, pdl=executor.pdl)


def _model(session: Session, name: str, executor: Any) -> None:
    """A sequence's logits, whole or in chunks or token by token, alone or among others."""
    strict = _invariant(executor)
    plan, device = strict.plan, session.device
    length = 20 if session.toy else 200
    chunks = (20, 7) if session.toy else (200, 64, 17, 130)
    ids = torch.randint(0, plan.vocab_size, (length,), device=device)

    def logits(chunk: int, step_by_step: int) -> Tensor:
        """The last row, when the last ``step_by_step`` tokens are steps of their own."""
        cache = random_cache(plan, 1, length, plan.dtype)
        table = torch.randperm(cache.pool.num_blocks, device=device).to(torch.int32)[None]
        past, rows = 0, None
        while past < length:
            count = min(chunk, length - step_by_step - past) if past < length - step_by_step else 1
            rows = strict.step(prefill_batch(ids[past : past + count], past, table), cache).logits
            past += count
        assert rows is not None
        return rows[-1]

    whole = logits(length, 0)
    for chunk in chunks:
        session.check(f"{name}: prompt in chunks of {chunk}", torch.equal(logits(chunk, 0), whole))
    tail = 2 if session.toy else 16
    session.check(f"{name}: the last {tail} tokens one by one", torch.equal(logits(length, tail), whole))

    context = 40 if session.toy else 300
    alone, differing = None, []
    for batch in (1, 3) if session.toy else (1, 2, 8, 9, 33, 64, 256):
        torch.manual_seed(1)
        cache = random_cache(plan, 1, context, plan.dtype)
        inputs = decode_batch(plan, 1, context, device)
        # the same sequence, stored once, as every row of the batch
        inputs.input_ids[:] = 7
        inputs = _repeated(inputs, batch)
        row = strict.step(inputs, cache).logits
        alone = row[0] if alone is None else alone
        if not all(torch.equal(each, alone) for each in row):
            differing.append(batch)
    session.check(f"{name}: a step in company", not differing, differing=differing)


def _repeated(batch: Any, count: int) -> Any:
    import dataclasses

    def rows(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(count, dim=0)

    device = batch.input_ids.device
    slots = rows(batch.slot_mapping)
    # all rows would write the same numbers; one does
    slots[1:] = -1
    return dataclasses.replace(
        batch,
        input_ids=rows(batch.input_ids),
        position_ids=rows(batch.position_ids),
        query_start_loc=torch.arange(count + 1, dtype=torch.int32, device=device),
        seq_lens=rows(batch.seq_lens),
        block_table=rows(batch.block_table),
        slot_mapping=slots,
        logits_indices=torch.arange(count, device=device),
    )


def _replays(session: Session, name: str, executor: Any) -> None:
    """The graphs that ``generate`` replays, from the same start again and again, greedy and drawing."""
    # the context passes from one block to the next on the way, and from one number of splits
    context, steps, starts = (40, 1, 2) if session.toy else (246, 20, 50)
    for batch in (1,) if session.toy else (1, 8, 64):
        ones = [1.0] * batch
        numbers = list(range(batch)), [0] * batch, [1] * batch, [context + 1] * batch
        drawn = SamplingRows(*numbers, temperature=[0.8] * batch, top_k=[50] * batch, top_p=ones)
        for way, sampling in (("greedy", None), ("drawn", drawn)):
            session.need(5)
            cache = random_cache(executor.plan, batch, context, executor.plan.dtype, room=steps)
            sequences = [Sequence(cache) for _ in range(batch)]
            for sequence in sequences:
                sequence.append(context)
            found = [_from_start(executor, cache, sequences, context, steps, sampling) for _ in range(starts)]
            (tokens, states), rest = found[0], found[1:]
            session.check(
                f"{name} batch {batch}, {way}: {starts * steps} replays of the decode loop",
                all(other == tokens for other, _ in rest)
                and all(torch.equal(other, states) for _, other in rest)
                # -1 stands for logits that are not finite
                and min(map(min, tokens)) >= 0,
                starts=starts,
                steps=steps,
                different_tokens=sum(other != tokens for other, _ in rest),
                different_states=sum(not torch.equal(other, states) for _, other in rest),
                graphs=len(executor.graphs),
                no_graphs=executor.graphs.disabled,
                pdl=executor.pdl,
            )


def _from_start(
    executor: Any,
    cache: PagedKVCache,
    sequences: list[Sequence],
    context: int,
    steps: int,
    sampling: SamplingRows | None,
) -> tuple[list[list[int]], Tensor]:
    """The tokens of a few steps of a loop that starts anew, and the bits of the keys and values that they left."""
    loop = DeviceLoop(executor, cache, len(sequences))
    loop.start([7] * len(sequences), sequences, [context + steps] * len(sequences), sampling)
    tokens = []
    while len(tokens) < steps:
        while loop.can_launch():
            loop.launch()
        tokens.append(loop.read())
    first = context // cache.block_size
    table = torch.tensor([sequence.blocks[first:] for sequence in sequences], device=executor.plan.device)
    length = context + steps - first * cache.block_size
    states = cache.read(table, length, executor.plan.dtype)[..., context % cache.block_size :, :].clone()
    loop.close()
    for sequence in sequences:
        sequence.truncate(context)
    return tokens, states


def _cost(session: Session, name: str, executor: Any) -> None:
    """Batch invariance beside the default."""
    plan, device = executor.plan, session.device
    context = 40 if session.toy else 256
    chain = altered(executor.chain, persistent=None)
    chains = {"gpt2rt": chain, "gpt2rt, batch invariant": altered(chain, batch_invariant=True)}
    for batch in (1,) if session.toy else (1, 8, 64):
        session.need(8)
        cache = random_cache(plan, batch, context, plan.dtype)
        inputs = decode_batch(plan, batch, context, device)
        calls = {label: ReplayedStep(chain, inputs, cache, decode=True) for label, chain in chains.items()}
        times, failed = session.timer(11, target_us=2000.0, max_calls=8).compare(calls)
        session.times(f"invariance {name} batch {batch} context {context}", times, failed, batch=batch, context=context)
        _extra(session, f"invariance cost {name} batch {batch}", times)
    length = 40 if session.toy else 1024
    cache = random_cache(plan, 1, length, plan.dtype)
    table = torch.randperm(cache.pool.num_blocks, device=device).to(torch.int32)[None]
    inputs = prefill_batch(torch.randint(0, plan.vocab_size, (length,), device=device), 0, table)
    calls = {label: ReplayedStep(chain, inputs, cache, decode=False) for label, chain in chains.items()}
    times, failed = session.timer(9, target_us=2000.0, max_calls=4).compare(calls)
    session.times(f"invariance {name} prompt of {length}", times, failed, tokens=length)
    _extra(session, f"invariance cost {name} prompt of {length}", times)


def _extra(session: Session, name: str, times: Any) -> None:
    if len(times) == 2:
        usual, strict = (t.median for t in times.values())
        session.value(name, 100.0 * (strict / usual - 1.0), "% extra time")
