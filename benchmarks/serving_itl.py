"""How long do running streams wait for their next token while a long prompt is computed beside them?

Streams decode on the asynchronous engine, all at once: first alone, then while some prompts come one after another,
each when the one before it has its first token. Counted are the times between the tokens of the streams: alone, all
after every stream has begun; loaded, those that overlap a time in which a prompt was being computed. Both take turns
for several rounds, and every prompt is new.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import time
from typing import Any

from common import percentile
from cpu_decode import say
from cpu_peers import PEERS
from cpu_peers.gpt2rt_peer import load_model
from shapes import SHAPES

STREAM_PROMPT = 16
# beginnings and ends, in seconds
Spans = list[tuple[float, float]]


class Load:
    """One engine, and the requests that are made of it.

    Args:
        engine: the engine.
        vocab_size: of its model.
        context: the most tokens of a request.
        long_prompt: tokens of the prompts beside the streams.
        seed: of all prompts.
    """

    def __init__(self, engine: Any, vocab_size: int, context: int, long_prompt: int, seed: str) -> None:
        self.engine, self.vocab_size, self.long_prompt = engine, vocab_size, long_prompt
        self.most_tokens = context - STREAM_PROMPT
        self._numbers = random.Random(seed)

    def prompt(self, length: int) -> list[int]:
        return [self._numbers.randrange(self.vocab_size) for _ in range(length)]

    async def stream(self, num_tokens: int, begun: asyncio.Event, enough: asyncio.Event) -> list[float]:
        """The moments at which its tokens come, in seconds, until ``enough`` is set; the first sets ``begun``."""
        from gpt2rt.engine import RequestOutputKind, SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        parameters.output_kind = RequestOutputKind.DELTA
        moments = []
        async with contextlib.aclosing(self.engine.generate(self.prompt(STREAM_PROMPT), parameters)) as outputs:
            async for output in outputs:
                if output.outputs[0].token_ids:
                    moments.append(time.perf_counter())
                    begun.set()
                if enough.is_set():
                    break
        return moments

    async def one_prompt(self) -> tuple[float, float]:
        """When a long prompt is sent, and when its first token comes."""
        from gpt2rt.engine import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
        prompt = self.prompt(self.long_prompt)
        start = time.perf_counter()
        async for _ in self.engine.generate(prompt, parameters):
            pass
        return start, time.perf_counter()

    async def alone(self, num_streams: int, num_tokens: int) -> list[float]:
        """Times between the tokens of streams, in ms, after all have begun."""
        gaps, _ = await self._run(num_streams, num_tokens, 0)
        return [1e3 * (later - earlier) for earlier, later in gaps]

    async def beside(self, num_streams: int, num_prompts: int) -> tuple[list[float], list[float]]:
        """Times between the tokens of streams while so many prompts are computed, and these prompts' times to their
        first tokens, in ms."""
        gaps, prompts = await self._run(num_streams, self.most_tokens, num_prompts)
        loaded = [gap for gap in gaps if any(gap[0] < end and gap[1] > start for start, end in prompts)]
        return [1e3 * (later - earlier) for earlier, later in loaded], [1e3 * (end - start) for start, end in prompts]

    async def _run(self, num_streams: int, num_tokens: int, num_prompts: int) -> tuple[Spans, Spans]:
        begun = [asyncio.Event() for _ in range(num_streams)]
        enough = asyncio.Event()
        streams = [asyncio.create_task(self.stream(num_tokens, event, enough)) for event in begun]
        prompts: Spans = []
        if num_prompts:
            for event in begun:
                await event.wait()
            while len(prompts) < num_prompts and not any(stream.done() for stream in streams):
                prompts.append(await self.one_prompt())
            enough.set()
        moments = await asyncio.gather(*streams)
        all_begun = max(row[0] for row in moments)
        gaps = [
            (earlier, later) for row in moments for earlier, later in itertools.pairwise(row) if earlier >= all_begun
        ]
        return gaps, prompts


def measure_itl(arguments: argparse.Namespace, checkpoint: str) -> list[dict[str, Any]]:
    """A row for each format, setting of the engine and number of streams."""
    import torch

    from gpt2rt.engine import AsyncLLM

    torch.set_num_threads(arguments.threads)
    rows = []
    for form in arguments.formats.split(","):
        model = load_model(checkpoint, PEERS[f"gpt2rt-{form}"].options)
        for slowdown in arguments.prefill_slowdown:
            engine = AsyncLLM(model, max_num_queued_reqs=None, prefill_slowdown=slowdown)
            try:
                for count in arguments.streams:
                    say(f"itl: {form}, prefill_slowdown {slowdown}, {count} streams")
                    row = asyncio.run(_rounds(engine, arguments, count))
                    rows.append({"format": form, "prefill_slowdown": slowdown, "streams": count, **row})
            finally:
                engine.shutdown()
    return rows


async def _rounds(engine: Any, arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    shape = SHAPES[arguments.shape]
    seed = f"{arguments.seed} {count}"
    load = Load(engine, shape["vocab_size"], shape["n_positions"], arguments.long_prompt, seed)
    # not counted: what the engine measures to choose its chunks begins here too
    await load.alone(count, 16)
    await load.beside(count, 1)
    alone: list[float] = []
    beside: list[float] = []
    first: list[float] = []
    quiet_first: list[float] = []
    for _ in range(arguments.rounds):
        alone += await load.alone(count, arguments.stream_tokens)
        gaps, prompts = await load.beside(count, arguments.long_prompts)
        beside += gaps
        first += prompts
        start, end = await load.one_prompt()
        quiet_first.append(1e3 * (end - start))
    if not (alone and beside):
        raise SystemExit("the streams ended before a prompt was computed beside them")
    return {
        "unloaded_ms": _spread(alone),
        "loaded_ms": _spread(beside),
        "p99_ratio": percentile(beside, 99) / percentile(alone, 99),
        "prompt_ttft_ms": {"alone": percentile(quiet_first, 50), "beside_streams": percentile(first, 50)},
    }


def _spread(values: list[float]) -> dict[str, float]:
    found = {f"p{percent}": percentile(values, percent) for percent in (50, 90, 99)}
    return {**found, "max": max(values), "samples": len(values)}
