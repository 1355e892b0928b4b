"""(e) Prompts: one step of 32 to 1024 tokens, and the time to the first token as a user sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from shapes import prefill_operations

from gpt2rt.lab.timing import Times, describe

from .models import (
    DTYPES,
    MODELS,
    ReplayedStep,
    drop,
    make_model,
    prefill_batch,
    random_cache,
    title_of,
    weights_of,
)
from .peers import COMPILED, TRANSFORMERS_MODES, TorchStep, generate_us, note_quantised_peers, transformers_model
from .session import Session, as_times

LENGTHS = (128, 1024, 32, 512, 256, 64)
#: the prompt's pass compiled as well, which transformers does for prompts in chunks: one chunk
COMPILED_PROMPT = f"{COMPILED}, prompt too"
#: calls before those that are measured: compiled peers record their graphs in the second and third
WARM = 3
#: seconds that torch.compile may take over a model of 1.5B without a row
PATIENCE_S = 240.0


def run(session: Session) -> None:
    names = ["toy"] if session.toy else ["124M", "355M", "774M", "1.5B"]
    note_quantised_peers(session)
    # a first token takes its peers long to compile: all steps come before
    for part in (_steps, _first_token):
        for format in ("float16",) if session.toy else ("float16", "int4"):
            for name in names:
                title = f"{'prefill' if part is _steps else 'first token'} {name} {format}"
                if session.over(title):
                    continue
                session.need(15)
                with session.attempt(title, PATIENCE_S):
                    part(session, name, format, make_model(name, format, session.device))
                drop()


def _steps(session: Session, name: str, format: str, model: Any) -> None:
    executor = model.generation_executor("cuda")
    chain, device = executor.chain, session.device
    plain = model if format in DTYPES else make_model(name, "float16", device)
    for length in (70,) if session.toy else LENGTHS:
        session.need(4)
        cache = random_cache(chain.plan, 1, length, chain.plan.dtype)
        table = torch.randperm(cache.pool.num_blocks, device=device).to(torch.int32)[None]
        ids = torch.randint(0, chain.plan.vocab_size, (length,), device=device)
        calls: dict[str, Callable[[int], Any]] = {
            "gpt2rt": ReplayedStep(chain, prefill_batch(ids, 0, table), cache, decode=False, greedy=True)
        }
        torchs = "torch in a graph" if format in DTYPES else "torch in a graph, float16"
        # it has nothing to compile
        if not session.compiles:
            calls[torchs] = TorchStep(plain, 1, length, length)
        times, failed = session.timer(11, target_us=2000.0, max_calls=8).compare(calls)
        operations = prefill_operations(MODELS[name], length)
        session.times(
            f"prefill {title_of(name, chain.plan)} {length} tokens",
            times,
            failed,
            floor_us=session.floor_us(chain.weight_bytes, operations),
            model=name,
            format=format,
            **weights_of(chain.plan),
            tokens=length,
            operations=operations,
        )


def _first_token(session: Session, name: str, format: str, model: Any) -> None:
    """``generate`` of one token as a user calls it."""
    device, cuda = session.device, session.device.type == "cuda"
    lengths, rounds = ((8,), 0) if session.toy else ((128, 512), 5 if session.timed else 0)
    plan = model.generation_executor("cuda").plan
    title, weights = f"first token {title_of(name, plan)}", weights_of(plan)

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    peers = {"gpt2rt": (model, {})}
    if format == "float16":
        for label, (attention, options) in TRANSFORMERS_MODES.items():
            peers[label] = (transformers_model(name, torch.float16, device, attention), dict(options))
    for length in lengths:
        session.need(5)
        ids = torch.randint(0, model.config.vocab_size, (1, length), device=device)
        asked = dict(peers)
        if cuda and COMPILED in peers and (name, length) in (("124M", 128), ("toy", 8)):
            compiled, options = peers[COMPILED]
            asked[COMPILED_PROMPT] = (compiled, {**options, "prefill_chunk_size": length})
        times: dict[str, Times] = {}
        failed: dict[str, str] = {}
        for label, (peer, options) in asked.items():
            try:
                times[label] = as_times(generate_us(peer, ids, 1, rounds, wait, WARM, **options)[0])
            except Exception as error:
                failed[label] = describe(error)
            # what is known is on disk before a peer is compiled
            facts = {"model": name, "format": format, **weights, "tokens": length}
            session.times(f"{title} {length} tokens", times, failed, replace=True, **facts)
    if cuda and format == "float16":
        torch.compiler.reset()
