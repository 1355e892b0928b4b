"""(c) Latency of a token at batch 1: four models, three formats, two contexts; with and without PDL and graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from gpt2rt.lab.problem import variant
from gpt2rt.lab.timing import Times, describe
from gpt2rt.ops.cuda_extension import cuda_extension_status

from .models import (
    DTYPES,
    ReplayedStep,
    altered,
    decode_batch,
    drop,
    make_model,
    random_cache,
    step_bytes,
    title_of,
    weights_of,
)
from .peers import COMPILED, TRANSFORMERS_MODES, TorchStep, generate_us, note_quantised_peers, transformers_model
from .persistent import BARRIER_PATIENCE_S, ROWS, chain_label, time_beside_chain
from .persistent import LABEL as PERSISTENT
from .session import Session, as_times

#: new tokens of a measured generation
NEW_TOKENS = 64
#: seconds that torch.compile may take over a model of 1.5B without a row
PATIENCE_S = 240.0


def run(session: Session) -> None:
    names = ["toy"] if session.toy else ["124M", "355M", "774M", "1.5B"]
    formats = ["float16", "int4"] if session.toy else ["float16", "int4", "int8"]
    note_quantised_peers(session)
    # first what the device does, for all; then the kernel that no device has proven, which a whole grid waits in; then
    # what a user waits for, whose peers take long to compile
    parts = (_steps, formats, None), (_persistent, formats[:1], BARRIER_PATIENCE_S), (_generate, formats, PATIENCE_S)
    for part, wanted, patience in parts:
        for format in wanted:
            for name in names:
                title = f"{part.__name__.strip('_')} {name} {format}"
                if session.over(title):
                    continue
                session.need(20)
                with session.attempt(title, patience):
                    part(session, name, format, make_model(name, format, session.device))
                drop()


def _contexts(session: Session) -> tuple[int, ...]:
    return (40,) if session.toy else (256, 1024)


def _steps(session: Session, name: str, format: str, model: Any) -> None:
    executor = model.generation_executor("cuda")
    # the same weights before they were rounded: there is no quantised chain of torch's
    plain = model if format in DTYPES else make_model(name, "float16", session.device)
    for context in _contexts(session):
        session.need(8)
        _context(session, name, format, context, plain, executor)


def _persistent(session: Session, name: str, format: str, model: Any) -> None:
    chain = model.generation_executor("cuda").chain
    for context in _contexts(session):
        title = f"persistent decode {title_of(name, chain.plan)} context {context}"
        time_beside_chain(session, title, name, chain, context)


def _context(session: Session, name: str, format: str, context: int, plain: Any, executor: Any) -> None:
    """The launches of a step, without the host: graphs, with their peers, and the same launched one by one."""
    chain, device = executor.chain, session.device
    cache = random_cache(chain.plan, 1, context, chain.plan.dtype)
    batch = decode_batch(chain.plan, 1, context, device)
    ours = chain_label(chain)
    calls: dict[str, Callable[[int], Any]] = {ours: ReplayedStep(chain, batch, cache, decode=True, greedy=True)}
    if chain.pdl and context == 256 and format == "float16" and ours != PERSISTENT:
        calls["gpt2rt, no PDL"] = ReplayedStep(altered(chain, pdl=False), batch, cache, decode=True, greedy=True)
    torchs = "torch in a graph" if format in DTYPES else "torch in a graph, float16"
    # it has nothing to compile
    if not session.compiles:
        calls[torchs] = TorchStep(plain, 1, 1, context)
    if format == "int4" and cuda_extension_status().loaded:
        # chosen while the launches are recorded
        step, ours = calls.pop(ours), "gpt2rt"
        for label, enabled in ((ours, False), (ROWS, True)):
            calls[label] = variant("linear_rows_cuda", "_enabled", enabled, step)
    timer = session.timer(15, target_us=2000.0, max_calls=16)
    times, failed = timer.compare(calls)
    if device.type == "cuda" and session.timed and ours in times:
        times[f"{ours}, no graph"] = _launched(session, calls[ours])
    bytes_moved = step_bytes(chain, 1, context, cache)
    session.times(
        f"decode {title_of(name, chain.plan)} context {context}",
        times,
        failed,
        floor_us=session.floor_us(bytes_moved),
        model=name,
        format=format,
        **weights_of(chain.plan),
        batch=1,
        context=context,
        bytes=bytes_moved,
    )


def _launched(session: Session, step: Callable[[int], Any]) -> Times:
    """A step launched from Python, kernel by kernel, until the device is done."""
    values = []
    for _ in range(10):
        torch.cuda.synchronize(session.device)
        start = time.perf_counter()
        step(0)
        torch.cuda.synchronize(session.device)
        values.append((time.perf_counter() - start) * 1e6)
    return as_times(values)


def _generate(session: Session, name: str, format: str, model: Any) -> None:
    """``generate`` as a user calls it, host and all."""
    device, cuda = session.device, session.device.type == "cuda"
    new_tokens, prompt, rounds = (2, 8, 0) if session.toy else (NEW_TOKENS, 224, 3 if session.timed else 0)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=device)
    plan = model.generation_executor("cuda").plan
    weights, title = weights_of(plan), f"generate {title_of(name, plan)}"
    ours = chain_label(model.generation_executor("cuda").chain)
    times: dict[str, Times] = {}
    first: dict[str, Times] = {}
    failed: dict[str, str] = {}

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    def rows() -> None:
        facts = {"model": name, "format": format, **weights, "batch": 1, "prompt": prompt, "new_tokens": new_tokens}
        # what is known is on disk before a peer is compiled, which may take the rest of the time
        session.times(title, times, failed, replace=True, **facts)
        session.times(f"{title}, first token", first, failed, replace=True, **facts)

    def one(label: str, peer: Any, **options: Any) -> None:
        try:
            ttft, each = generate_us(peer, ids, new_tokens, rounds, wait, **options)
        except Exception as error:
            failed[label] = describe(error)
        else:
            times[label], first[label] = as_times(each), as_times(ttft)
        rows()

    one(ours, model)
    if format != "float16":
        return
    del model, plan
    drop()
    for label, (attention, options) in TRANSFORMERS_MODES.items():
        # compiling for a CPU takes longer than a dry run may
        if label == COMPILED and not cuda:
            continue
        session.need(20)
        one(label, transformers_model(name, DTYPES[format], device, attention), **options)
        if label == COMPILED:
            # its compiled code and graphs would stay as long as the process
            torch.compiler.reset()
        drop()
