"""(d) Decode steps of many sequences, and many requests through ``LLM``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import serving
from .models import (
    ReplayedStep,
    decode_batch,
    drop,
    make_model,
    random_cache,
    step_bytes,
    title_of,
    weights_of,
)
from .peers import TorchStep
from .session import Session

#: (model, format, sequences, context), most wanted first
CASES = (
    *(("124M", "float16", batch, 512) for batch in (64, 8, 256, 16, 32, 128)),
    *(("124M", "float16", batch, context) for context in (128, 1024) for batch in (64, 8, 256)),
    *(("124M", "int4", batch, 512) for batch in (64, 8)),
    *(("355M", "float16", batch, 512) for batch in (64, 8)),
    *(("1.5B", "float16", batch, 512) for batch in (64, 8)),
    *(("1.5B", "int4", batch, 512) for batch in (64, 8)),
)


def run(session: Session) -> None:
    cases = (("toy", "float16", 9, 40),) if session.toy else CASES
    loaded: tuple[str, str] | None = None
    model: Any = None
    for name, format, batch, context in cases:
        title = f"decode {name} {format} batch {batch} context {context}"
        if session.over(title):
            continue
        session.need(8)
        with session.attempt(title):
            if loaded != (name, format):
                model = None
                drop()
                model, loaded = make_model(name, format, session.device), (name, format)
            _one(session, name, format, batch, context, model)
        drop()
    model = None
    serving.run(session)


def _one(session: Session, name: str, format: str, batch: int, context: int, model: Any) -> None:
    executor = model.generation_executor("cuda")
    chain = executor.chain
    inputs = decode_batch(chain.plan, batch, context, session.device)
    calls: dict[str, Callable[[int], Any]] = {}
    floor = 0.0
    kinds = {
        "gpt2rt": chain.plan.dtype,
        "gpt2rt, int8 KV cache": torch.int8,
        "gpt2rt, float8 KV cache": torch.float8_e4m3fn,
    }
    for label, dtype in kinds.items():
        cache = random_cache(chain.plan, batch, context, dtype)
        calls[label] = ReplayedStep(chain, inputs, cache, decode=True, greedy=True)
        if not floor:
            floor = session.floor_us(step_bytes(chain, batch, context, cache), _operations(chain.plan, batch, context))
    # it has nothing to compile, and as much to keep as all others
    if format == "float16" and not session.compiles:
        calls["torch in a graph"] = TorchStep(model, batch, 1, context)
    times, failed = session.timer(11, target_us=3000.0, max_calls=8).compare(calls)
    title = f"{title_of(name, chain.plan)} batch {batch} context {context}"
    facts = {"model": name, "format": format, **weights_of(chain.plan), "batch": batch, "context": context}
    session.times(f"decode {title}", times, failed, floor_us=floor, **facts)
    if "gpt2rt" in times:
        session.value(f"tokens {title}", batch / times["gpt2rt"].median * 1e6, "tokens/s", **facts)


def _operations(plan: Any, batch: int, context: int) -> float:
    weights = 12 * plan.n_layer * plan.n_embd**2 + plan.vocab_size * plan.n_embd
    return 2.0 * batch * (weights + 2 * plan.n_layer * plan.n_embd * context)
