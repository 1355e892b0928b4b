"""``gpt2rt bench throughput``: how much an engine does when everything is asked at once."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .bench_tables import (
    BatchedTokens,
    CacheDtype,
    DatasetName,
    DatasetPath,
    InputLen,
    ModelLen,
    NoText,
    NumBlocks,
    NumPrompts,
    NumSeqs,
    OutputJson,
    OutputLen,
    PrefixLen,
    RangeRatio,
    Seed,
    Temperature,
    engine_options,
    make_workload,
    print_metrics,
    print_rows,
    save,
)
from .common import (
    DEFAULT_MODEL,
    Device,
    Dtype,
    ExecutorName,
    JsonFlag,
    LocalOnly,
    ModelName,
    Quantization,
    Revision,
    Threads,
    UsageFault,
)

EXAMPLES = (
    "Examples:\n\ngpt2rt bench throughput --num-prompts 64 --input-len 64 --output-len 32\n\n"
    "gpt2rt bench throughput --model ./my-gpt2 --async-engine --max-num-seqs 16 --output-json throughput.json"
)


def command(
    model: ModelName = DEFAULT_MODEL,
    dataset_name: DatasetName = "random",
    dataset_path: DatasetPath = None,
    input_len: InputLen = 64,
    output_len: OutputLen = None,
    random_range_ratio: RangeRatio = 0.0,
    random_prefix_len: PrefixLen = 0,
    num_prompts: NumPrompts = 64,
    num_warmups: Annotated[int, typer.Option(help="Requests before those that count.")] = 1,
    n: Annotated[int, typer.Option("--n", help="Answers to each prompt.")] = 1,
    temperature: Temperature = 1.0,
    async_engine: Annotated[
        bool, typer.Option("--async-engine", help="Stream every request from the asynchronous engine.")
    ] = False,
    disable_detokenize: NoText = False,
    seed: Seed = 0,
    max_num_seqs: NumSeqs = 64,
    max_model_len: ModelLen = None,
    max_num_batched_tokens: BatchedTokens = None,
    num_blocks: NumBlocks = None,
    kv_cache_dtype: CacheDtype = "auto",
    enable_prefix_caching: Annotated[bool, typer.Option(help="Share the KV cache of equal beginnings.")] = True,
    device: Device = "cpu",
    dtype: Dtype = None,
    quantization: Quantization = None,
    executor: ExecutorName = None,
    threads: Threads = None,
    revision: Revision = "main",
    local_files_only: LocalOnly = False,
    output_json: OutputJson = None,
    as_json: JsonFlag = False,
) -> None:
    """Give an engine all requests at once and time until the last one is done.

    Keys of the result are those of vLLM's throughput benchmark: elapsed_time (s), num_requests, total_num_tokens,
    requests_per_second, tokens_per_second; and total_output_tokens, output_tokens_per_second. With --async-engine the
    metrics of gpt2rt bench serve come with them.
    """
    if n < 1 or num_warmups < 0:
        raise UsageFault(f"--n must be at least 1 and --num-warmups at least 0, got {n} and {num_warmups}")
    workload = make_workload(
        name=dataset_name,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        range_ratio=random_range_ratio,
        prefix_len=random_prefix_len,
        path=dataset_path,
        seed=seed,
    )
    options = engine_options(
        device=device,
        dtype=dtype,
        quantization=quantization,
        threads=threads,
        executor=executor,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        num_blocks=num_blocks,
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=enable_prefix_caching,
        revision=revision,
        local_files_only=local_files_only,
    )
    settings: dict[str, Any] = dict(n=n, temperature=temperature, detokenize=not disable_detokenize)
    run = _streamed if async_engine else _together
    result = run(model, options, workload, num_warmups, settings)
    save(output_json, result)
    if as_json:
        print(json.dumps(result))
        return
    rows = [
        ("requests", result["num_requests"], f"after {num_warmups} to warm up"),
        ("time", result["elapsed_time"], "s"),
        ("requests", result["requests_per_second"], "/ s"),
        ("tokens, prompts and answers", result["tokens_per_second"], "/ s"),
        ("tokens, answers", result["output_tokens_per_second"], "/ s"),
    ]
    print_rows("throughput", rows)
    if async_engine:
        print_metrics(result, ["ttft", "tpot", "itl", "e2el"], [99.0])


def _together(
    model: str, options: dict[str, Any], workload: Any, num_warmups: int, settings: dict[str, Any]
) -> dict[str, Any]:
    from gpt2rt.bench.offline import throughput
    from gpt2rt.engine import LLM

    with LLM(model, **options) as llm:
        samples = workload.samples(llm.tokenizer, extra=num_warmups)
        count = workload.num_prompts
        return throughput(llm, samples[:count], warmups=samples[count:], **settings)


def _streamed(
    model: str, options: dict[str, Any], workload: Any, num_warmups: int, settings: dict[str, Any]
) -> dict[str, Any]:
    import asyncio

    from gpt2rt.bench.metrics import summarize
    from gpt2rt.bench.offline import stream_all, throughput_result
    from gpt2rt.engine import AsyncLLM

    async def measure() -> tuple[list[Any], float]:
        samples = workload.samples(engine.tokenizer, extra=num_warmups)
        count = workload.num_prompts
        if num_warmups:
            await stream_all(engine, samples[count:], **settings)
        return await stream_all(engine, samples[:count], **settings)

    # a run with more requests than may wait would measure refusals
    engine = AsyncLLM(model, max_num_queued_reqs=None, **options)
    try:
        answers, elapsed = asyncio.run(measure())
    finally:
        engine.shutdown()
    tokens = sum(a.prompt_len for a in answers), sum(a.output_len for a in answers)
    return {
        **throughput_result(elapsed, len(answers), *tokens),
        **summarize(answers, elapsed, metrics=["ttft", "tpot", "itl", "e2el"]),
    }
