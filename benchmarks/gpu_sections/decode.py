"""(c) Latency of a token at batch 1: four models, three formats, two contexts; with and without PDL and graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from gpt2rt.lab.problem import variant
from gpt2rt.lab.timing import Times, describe
from gpt2rt.ops.cuda_extension import cuda_extension_status

from .models import DTYPES, ReplayedStep, altered, decode_batch, drop, make_model, random_cache, step_bytes
from .peers import TRANSFORMERS_MODES, TorchStep, generate_us, transformers_model
from .persistent import LABEL as PERSISTENT
from .persistent import persistent_chain
from .session import Session, as_times

#: new tokens of a measured generation
NEW_TOKENS = 64


def run(session: Session) -> None:
    names = ["toy"] if session.toy else ["124M", "355M", "774M", "1.5B"]
    formats = ["float16", "int4"] if session.toy else ["float16", "int4", "int8"]
    # first what the device does, for all; then what a user waits for, whose peers take long to compile
    for part in (_steps, _generate):
        for format in formats:
            for name in names:
                session.need(30)
                with session.attempt(f"{part.__name__.strip('_')} {name} {format}"):
                    part(session, name, format, make_model(name, format, session.device))
                drop()


def _steps(session: Session, name: str, format: str, model: Any) -> None:
    executor = model.generation_executor("cuda")
    persistent = persistent_chain(executor.chain)
    for context in (40,) if session.toy else (256, 1024):
        session.need(15)
        _context(session, name, format, context, model, executor, persistent)


def _context(
    session: Session, name: str, format: str, context: int, model: Any, executor: Any, persistent: Any | None
) -> None:
    """The launches of a step, without the host: graphs, with their peers, and the same launched one by one."""
    chain, device = executor.chain, session.device
    cache = random_cache(chain.plan, 1, context, chain.plan.dtype)
    batch = decode_batch(chain.plan, 1, context, device)
    calls: dict[str, Callable[[int], Any]] = {"gpt2rt": ReplayedStep(chain, batch, cache, decode=True, greedy=True)}
    if persistent is not None:
        calls[PERSISTENT] = ReplayedStep(persistent, batch, cache, decode=True, greedy=True)
    if chain.pdl and context == 256:
        calls["gpt2rt, no PDL"] = ReplayedStep(altered(chain, pdl=False), batch, cache, decode=True, greedy=True)
    if format in DTYPES:
        calls["torch in a graph"] = TorchStep(model, 1, 1, context)
    elif format == "int4" and cuda_extension_status().loaded:
        # chosen while the launches are recorded
        calls["gpt2rt, CUDA C++ rows"] = variant("linear_rows_cuda", "_enabled", True, calls["gpt2rt"])
    timer = session.timer(15, target_us=2000.0, max_calls=16)
    times, failed = timer.compare(calls)
    if device.type == "cuda" and "gpt2rt" in times:
        times["gpt2rt, no graph"] = _launched(session, calls["gpt2rt"])
    bytes_moved = step_bytes(chain, 1, context, cache)
    session.times(
        f"decode {name} {format} context {context}",
        times,
        failed,
        floor_us=session.floor_us(bytes_moved),
        model=name,
        format=format,
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
    new_tokens, prompt, rounds = (3, 8, 0) if session.toy else (NEW_TOKENS, 224, 3)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=device)
    times: dict[str, Times] = {}
    first: dict[str, Times] = {}
    failed: dict[str, str] = {}

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    def one(label: str, peer: Any, **options: Any) -> None:
        try:
            ttft, each = generate_us(peer, ids, new_tokens, rounds, wait, **options)
        except Exception as error:
            failed[label] = describe(error)
        else:
            times[label], first[label] = as_times(each), as_times(ttft)

    one("gpt2rt", model)
    if format == "float16":
        for label, (attention, options) in TRANSFORMERS_MODES.items():
            # compiling for a CPU takes longer than a dry run may
            if options and not cuda:
                continue
            session.need(30)
            one(label, transformers_model(name, DTYPES[format], device, attention), **options)
            drop()
    facts = {"model": name, "format": format, "batch": 1, "prompt": prompt, "new_tokens": new_tokens}
    session.times(f"generate {name} {format}", times, failed, **facts)
    session.times(f"generate {name} {format}, first token", first, failed, **facts)
