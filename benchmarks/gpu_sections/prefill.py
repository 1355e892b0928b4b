"""(e) Prompts: one step of 32 to 1024 tokens, and the time to the first token as a user sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from shapes import prefill_operations

from gpt2rt.lab.timing import Times, describe

from .models import DTYPES, MODELS, ReplayedStep, drop, make_model, prefill_batch, random_cache
from .peers import TRANSFORMERS_MODES, TorchStep, generate_us, transformers_model
from .session import Session, as_times

LENGTHS = (128, 1024, 32, 512, 256, 64)


def run(session: Session) -> None:
    names = ["toy"] if session.toy else ["124M", "355M", "774M", "1.5B"]
    for format in ("float16",) if session.toy else ("float16", "int4"):
        for name in names:
            session.need(25)
            with session.attempt(f"prefill {name} {format}"):
                _one(session, name, format)
            drop()


def _one(session: Session, name: str, format: str) -> None:
    model = make_model(name, format, session.device)
    executor = model.generation_executor("cuda")
    chain, device = executor.chain, session.device
    for length in (70,) if session.toy else LENGTHS:
        session.need(8)
        cache = random_cache(chain.plan, 1, length, chain.plan.dtype)
        table = torch.randperm(cache.pool.num_blocks, device=device).to(torch.int32)[None]
        ids = torch.randint(0, chain.plan.vocab_size, (length,), device=device)
        calls: dict[str, Callable[[int], Any]] = {
            "gpt2rt": ReplayedStep(chain, prefill_batch(ids, 0, table), cache, decode=False, greedy=True)
        }
        if format in DTYPES:
            calls["torch in a graph"] = TorchStep(model, 1, length, length)
        times, failed = session.timer(11, target_us=2000.0, max_calls=8).compare(calls)
        operations = prefill_operations(MODELS[name], length)
        session.times(
            f"prefill {name} {format} {length} tokens",
            times,
            failed,
            floor_us=session.floor_us(chain.weight_bytes, operations),
            model=name,
            format=format,
            tokens=length,
            operations=operations,
        )
    if format == "float16":
        session.need(20)
        _first_token(session, name, model)


def _first_token(session: Session, name: str, model: Any) -> None:
    device = session.device
    lengths, rounds = ((8,), 0) if session.toy else ((128, 512), 5)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    peers = {"gpt2rt": (model, {})}
    for label in ("transformers eager", "transformers sdpa"):
        peers[label] = (transformers_model(name, torch.float16, device, TRANSFORMERS_MODES[label][0]), {})
    for length in lengths:
        ids = torch.randint(0, model.config.vocab_size, (1, length), device=device)
        times: dict[str, Times] = {}
        failed: dict[str, str] = {}
        for label, (peer, options) in peers.items():
            try:
                times[label] = as_times(generate_us(peer, ids, 2, rounds, wait, **options)[0])
            except Exception as error:
                failed[label] = describe(error)
        session.times(f"first token {name} float16 {length} tokens", times, failed, model=name, tokens=length)
