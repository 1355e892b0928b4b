"""Readers of an AsyncLLM, and how tests wait for what its thread does."""

import asyncio
import time

from engine_cases import prompt_ids, said

from gpt2rt.engine import LLM, RequestOutputKind, SamplingParams

PROMPT = prompt_ids(40, seed=3)
# seconds within which anything must have happened that takes a few hundredths
PATIENCE = 20.0


def params(max_tokens=200, **fields):
    """Greedy, to the last token."""
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **fields)


def deltas(max_tokens=200, **fields):
    """The same, in pieces."""
    return params(max_tokens, output_kind=RequestOutputKind.DELTA, **fields)


def expected_whole():
    """What :func:`whole` says, by the engine without a thread."""
    with LLM(num_blocks=128, num_threads=1, enable_prefix_caching=False) as llm:
        return said(llm.generate([PROMPT], params(20))[0])


async def whole(engine, prompt=PROMPT, sampling=None, **options):
    """The last output of a request; deltas are joined."""
    sampling = sampling or params(20)
    joined = None
    async for output in engine.generate(prompt, sampling, **options):
        if joined is None or sampling.output_kind is not RequestOutputKind.DELTA:
            joined = output
        else:
            joined.add(output, aggregate=True)
    return joined


async def until(condition):
    """Wait for something that another thread does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        await asyncio.sleep(0.001)


def run(main):
    """Run a coroutine on a loop of its own; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(main, PATIENCE))
