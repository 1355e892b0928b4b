"""Many requests through ``LLM``: whether they get the tokens of ``generate``, how often a step waits, how fast it is.

A dry run takes the CPU's own executor: the engine's steps through the kernels are a test of the project already.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from gpt2rt.engine import LLM, SamplingParams

from .models import drop, make_model
from .session import Session

#: what is served, and how many requests at once, most wanted first; one engine for all, for its warm-up takes longest
MODEL, FORMAT, REQUESTS = "124M", "float16", (1, 64, 8)
#: tokens of a prompt, and new ones
PROMPT, NEW = 128, 128
#: runs of each kind, in turn
ROUNDS = 3


def check(session: Session) -> None:
    """Tokens beside ``generate``'s, and the waits of a step: at most one."""
    # float32: prompts that are computed together differ in the last bits from one alone, which must not decide a token
    model = make_model("toy", "float32", session.device, scale=8.0)
    prompts = _prompts(6, 5, model.config.vocab_size)
    new = 12 if session.dry else 40
    greedy = {"temperature": 0.0}
    kinds: list[dict[str, Any]] = [greedy, greedy, {"seed": 5, "top_p": 0.9}, {"seed": 6, "top_k": 7}]
    edited = [{**greedy, "logprobs": 2}, {"seed": 7, "presence_penalty": 0.5}]
    llm = LLM(model, executor=_executor(session), num_blocks=64, max_num_seqs=8)
    for name, ways in (("alike", kinds), ("of every kind", [*kinds, *edited])):
        params = [_params(new, **way) for way in ways]
        if not session.dry:
            # captures wait as often as they like
            llm.generate(prompts[: len(ways)], params)
        with _waits(session) as waits:
            llm.core.observer = lambda step, waits=waits: waits.append(0)
            outputs = llm.generate(prompts[: len(ways)], params)
        found = [output.outputs[0].token_ids for output in outputs]
        expected = [_generated(model, p, way, new) for p, way in zip(prompts, kinds, strict=False)]
        # the rest are not generate's settings by one name
        session.check(
            f"LLM, requests {name}: the tokens of generate", found[: len(kinds)] == expected, requests=len(ways)
        )
        session.check(f"LLM, requests {name}: waits of a step", max(waits) <= 1, most=max(waits), steps=len(waits))
    llm.shutdown()


def run(session: Session) -> None:
    """Tokens a second, with and without decoding ahead."""
    name, format, requests = ("toy", "float16", (2,)) if session.toy else (MODEL, FORMAT, REQUESTS)
    title = f"LLM {name} {format}"
    if session.over(title):
        return
    session.need(90)
    with session.attempt(title, patience=300.0):
        model = make_model(name, format, session.device)
        prompt, new = (5, 6) if session.toy else (PROMPT, NEW)
        blocks = max(requests) * -(-(prompt + new) // 16)
        llm = LLM(
            model,
            executor=_executor(session),
            num_blocks=blocks,
            max_num_seqs=max(requests),
            enable_prefix_caching=False,
        )
        for count in requests:
            _one(session, llm, count, prompt, new, {"model": name, "format": format})
        llm.shutdown()
    drop()


def _one(session: Session, llm: LLM, count: int, prompt: int, new: int, facts: dict[str, Any]) -> None:
    kinds = {"LLM": True, "LLM, no step ahead": False}
    prompts = _prompts(count, prompt, llm.core.served.vocab_size)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    ahead = llm.core._ahead
    rounds = 0 if session.compiles else 1 if session.toy else ROUNDS
    for turn in range(1 + rounds):
        for kind, wanted in kinds.items():
            ahead.enabled = wanted and llm.executor_name == "cuda"
            began = time.perf_counter()
            llm.generate(prompts, [_params(new, temperature=0.0)] * count)
            # the first round captures graphs
            if turn:
                seconds[kind].append(time.perf_counter() - began)
    for kind, taken in seconds.items() if rounds else ():
        middle = sorted(taken)[len(taken) // 2]
        what = f"{facts['model']} {facts['format']} requests {count}"
        facts = {**facts, "requests": count, "prompt": prompt, "new": new}
        session.value(f"{kind} {what}", count * new / middle, "tokens/s", **facts)
        session.value(f"{kind} {what}, a step", 1e6 * middle / new, "us", **facts)


def _executor(session: Session) -> str | None:
    return None if session.dry else "cuda"


def _prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(0)
    return torch.randint(1, vocab_size, (count, length), generator=numbers).tolist()


def _params(new: int, **settings: Any) -> SamplingParams:
    return SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False, **settings)


def _generated(model: Any, prompt: list[int], way: dict[str, Any], new: int) -> list[int]:
    draws = {"do_sample": False} if "seed" not in way else {"do_sample": True, "top_k": 0, **way}
    draws.pop("temperature", None)
    ids = torch.tensor([prompt], device=model.device)
    return model.generate(ids, max_new_tokens=new, **draws)[0, len(prompt) :].tolist()


@contextlib.contextmanager
def _waits(session: Session) -> Iterator[list[int]]:
    """Counts torch's waits for the device; whoever appends to the list begins the next step."""
    counts = [0]
    if session.device.type != "cuda":
        yield counts
        return
    before = torch.cuda.get_sync_debug_mode()
    show = warnings.showwarning

    def count(message: Any, *rest: Any, **more: Any) -> None:
        if "synchronizing" in str(message):
            counts[-1] += 1
        else:
            show(message, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode(before)
