"""Many requests through ``LLM``: whether they get the tokens of ``generate``, how often a step waits, how fast it is.

A dry run takes the CPU's own executor: the engine's steps through the kernels are a test of the project already.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from gpt2rt.engine import LLM, SamplingParams

from .models import drop, make_model
from .session import Session

#: (model, format, requests), most wanted first
CASES = (("124M", "float16", 1), ("124M", "float16", 64), ("124M", "float16", 8), ("124M", "int4", 1))
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
    for name, ways in (("alike", kinds), ("of every kind", [*kinds, *edited])):
        params = [_params(new, **way) for way in ways]
        llm = LLM(model, executor=_executor(session), num_blocks=64, max_num_seqs=8)
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
    for name, format, count in (("toy", "float16", 2),) if session.toy else CASES:
        session.need(25)
        with session.attempt(f"LLM {name} {format} requests {count}"):
            _one(session, name, format, count)
        drop()


def _one(session: Session, name: str, format: str, count: int) -> None:
    model = make_model(name, format, session.device)
    prompt, new = (5, 6) if session.toy else (PROMPT, NEW)
    prompts = _prompts(count, prompt, model.config.vocab_size)
    engines: dict[str, LLM] = {}
    for kind, ahead in (("LLM", "1"), ("LLM, no step ahead", "0")):
        os.environ["GPT2RT_CUDA_AHEAD"] = ahead
        blocks = count * -(-(prompt + new) // 16)
        engines[kind] = LLM(
            model, executor=_executor(session), num_blocks=blocks, max_num_seqs=count, enable_prefix_caching=False
        )
    del os.environ["GPT2RT_CUDA_AHEAD"]
    seconds: dict[str, list[float]] = {kind: [] for kind in engines}
    for turn in range(1 + (1 if session.toy else ROUNDS)):
        for kind, llm in engines.items():
            began = time.perf_counter()
            llm.generate(prompts, [_params(new, temperature=0.0)] * count)
            # the first round captures graphs
            if turn:
                seconds[kind].append(time.perf_counter() - began)
    for kind, taken in seconds.items():
        best = sorted(taken)[len(taken) // 2]
        facts = {"model": name, "format": format, "requests": count, "prompt": prompt, "new": new}
        what = f"{name} {format} requests {count}"
        session.value(f"{kind} {what}", count * new / best, "tokens/s", **facts)
        session.value(f"{kind} {what}, a step", 1e6 * best / new, "us", **facts)
    for llm in engines.values():
        llm.shutdown()


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
