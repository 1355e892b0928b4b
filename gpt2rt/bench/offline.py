"""Measure an engine in this process: ``gpt2rt bench latency`` and ``gpt2rt bench throughput``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .metrics import Answer
from .workload import Sample, ordinary_ids, random_samples

if TYPE_CHECKING:
    from gpt2rt.engine import LLM, AsyncLLM, SamplingParams

LATENCY_PERCENTILES = (10, 25, 50, 75, 90, 99)


def sampling(output_len: int, *, temperature: float, n: int = 1, detokenize: bool = True) -> SamplingParams:
    """Parameters with which a request makes exactly ``output_len`` tokens."""
    from gpt2rt.engine import SamplingParams

    length: dict[str, Any] = dict(max_tokens=output_len, ignore_eos=True)
    return SamplingParams(temperature=temperature, n=n, detokenize=detokenize, **length)


def latency(
    llm: LLM,
    *,
    input_len: int = 32,
    output_len: int = 128,
    batch_size: int = 8,
    n: int = 1,
    num_iters: int = 30,
    num_iters_warmup: int = 10,
    temperature: float = 1.0,
    detokenize: bool = True,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """How long one batch of equal requests takes from end to end.

    Args:
        llm: the engine; without prefix caching, or every iteration after the first skips the prompts.
        input_len, output_len: tokens of each prompt (random ids) and of each answer.
        num_iters, num_iters_warmup: iterations that count, and those before them that do not.
        progress: called after every iteration.

    Returns:
        vLLM's keys: ``avg_latency``, ``std_latency``, ``latencies``, ``percentiles``; seconds.
    """
    import numpy as np

    ids = ordinary_ids(llm.tokenizer) if llm.tokenizer is not None else list(range(llm.model.config.vocab_size))
    samples = random_samples(ids, batch_size, input_len=input_len, output_len=output_len, seed=seed)
    prompts = [{"prompt_token_ids": sample.prompt} for sample in samples]
    parameters = sampling(output_len, temperature=temperature, n=n, detokenize=detokenize)
    latencies = []
    for number in range(num_iters_warmup + num_iters):
        start = time.perf_counter()
        llm.generate(prompts, parameters)
        seconds = time.perf_counter() - start
        if number >= num_iters_warmup:
            latencies.append(seconds)
        progress()
    percentiles = np.percentile(latencies, LATENCY_PERCENTILES).tolist()
    return {
        "avg_latency": float(np.mean(latencies)),
        "std_latency": float(np.std(latencies)),
        "latencies": latencies,
        "percentiles": dict(zip(map(str, LATENCY_PERCENTILES), percentiles, strict=True)),
    }


def throughput(
    llm: LLM,
    samples: Sequence[Sample],
    *,
    warmups: Sequence[Sample] = (),
    n: int = 1,
    temperature: float = 1.0,
    detokenize: bool = True,
) -> dict[str, Any]:
    """How much the engine does when all requests are there from the start.

    Args:
        warmups: generated before the clock starts.

    Returns:
        As :func:`throughput_result` says.
    """

    def generate(some: Sequence[Sample]) -> list[Any]:
        parameters = [
            sampling(sample.output_len, temperature=temperature, n=n, detokenize=detokenize) for sample in some
        ]
        return llm.generate([_prompt(sample) for sample in some], parameters)

    if warmups:
        generate(warmups)
    start = time.perf_counter()
    outputs = generate(samples)
    elapsed = time.perf_counter() - start
    input_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    output_tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    return throughput_result(elapsed, len(samples), input_tokens, output_tokens)


def throughput_result(elapsed: float, num_requests: int, input_tokens: int, output_tokens: int) -> dict[str, Any]:
    """vLLM's keys ``elapsed_time`` (s), ``num_requests``, ``total_num_tokens`` (prompts and answers),
    ``requests_per_second`` and ``tokens_per_second``, with ``total_output_tokens`` and ``output_tokens_per_second``."""
    total = input_tokens + output_tokens
    return {
        "elapsed_time": elapsed,
        "num_requests": num_requests,
        "total_num_tokens": total,
        "requests_per_second": num_requests / elapsed,
        "tokens_per_second": total / elapsed,
        "total_output_tokens": output_tokens,
        "output_tokens_per_second": output_tokens / elapsed,
    }


async def stream_all(
    engine: AsyncLLM,
    samples: Sequence[Sample],
    *,
    n: int = 1,
    temperature: float = 1.0,
    detokenize: bool = True,
) -> tuple[list[Answer], float]:
    """Run all requests at once on the asynchronous engine and note when each output arrives.

    Returns:
        The answers, with times as ``metrics`` defines them (an output stands for a chunk), and the duration in seconds.
    """
    start = time.perf_counter()
    tasks = [
        stream(engine, sample, sampling(sample.output_len, temperature=temperature, n=n, detokenize=detokenize))
        for sample in samples
    ]
    answers = await asyncio.gather(*tasks)
    return answers, time.perf_counter() - start


async def stream(engine: AsyncLLM, sample: Sample, parameters: SamplingParams) -> Answer:
    """Run one request; its tokens come as they are made."""
    from gpt2rt.engine import RequestOutputKind

    parameters.output_kind = RequestOutputKind.DELTA
    answer = Answer(prompt_len=sample.prompt_len, start=time.perf_counter())
    last = answer.start
    texts = []
    async for output in engine.generate(_prompt(sample), parameters):
        count = sum(len(choice.token_ids) for choice in output.outputs)
        if not count:
            # only says that it has finished
            continue
        now = time.perf_counter()
        if answer.output_len:
            answer.itl.append(now - last)
        else:
            answer.ttft = now - answer.start
        answer.output_len += count
        last = now
        texts += [choice.text for choice in output.outputs]
    answer.latency = last - answer.start
    answer.text = "".join(texts)
    return answer


def _prompt(sample: Sample) -> dict[str, Any]:
    return {"prompt": sample.prompt} if isinstance(sample.prompt, str) else {"prompt_token_ids": sample.prompt}
