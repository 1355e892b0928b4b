"""``gpt2rt bench latency``: how long one batch takes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .bench_tables import (
    BatchedTokens,
    CacheDtype,
    ModelLen,
    NoText,
    NumBlocks,
    OutputJson,
    Seed,
    Temperature,
    engine_options,
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
    "Examples:\n\ngpt2rt bench latency --input-len 64 --output-len 32 --batch-size 1\n\n"
    "gpt2rt bench latency --model ./my-gpt2 --quantization int8 --output-json latency.json"
)


def command(
    model: ModelName = DEFAULT_MODEL,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt, random ids.")] = 32,
    output_len: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Prompts of the batch.")] = 8,
    n: Annotated[int, typer.Option("--n", help="Answers to each prompt.")] = 1,
    num_iters_warmup: Annotated[int, typer.Option(help="Iterations before those that count.")] = 10,
    num_iters: Annotated[int, typer.Option(help="Iterations that count.")] = 30,
    temperature: Temperature = 1.0,
    disable_detokenize: NoText = False,
    seed: Seed = 0,
    max_model_len: ModelLen = None,
    max_num_batched_tokens: BatchedTokens = None,
    num_blocks: NumBlocks = None,
    kv_cache_dtype: CacheDtype = "auto",
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Keep prompts between iterations: all but the first then skip them.")
    ] = False,
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
    """Time a batch of equal requests from end to end, again and again.

    Keys of the result are those of vLLM's latency benchmark, in seconds: avg_latency, std_latency, latencies,
    percentiles.
    """
    for name, value, least in (
        ("--input-len", input_len, 1),
        ("--output-len", output_len, 1),
        ("--batch-size", batch_size, 1),
        ("--n", n, 1),
        ("--num-iters", num_iters, 1),
        ("--num-iters-warmup", num_iters_warmup, 0),
    ):
        if value < least:
            raise UsageFault(f"{name} must be at least {least}, got {value}")
    options = engine_options(
        device=device,
        dtype=dtype,
        quantization=quantization,
        threads=threads,
        executor=executor,
        max_num_seqs=batch_size * n,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        num_blocks=num_blocks,
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=enable_prefix_caching,
        revision=revision,
        local_files_only=local_files_only,
    )
    from gpt2rt.bench.offline import latency
    from gpt2rt.engine import LLM

    with LLM(model, **options) as llm:
        if input_len + output_len > llm.max_model_len:
            raise UsageFault(
                f"--input-len {input_len} and --output-len {output_len} are {input_len + output_len} tokens, "
                f"but {model} takes {llm.max_model_len}"
            )
        result = latency(
            llm,
            input_len=input_len,
            output_len=output_len,
            batch_size=batch_size,
            n=n,
            num_iters=num_iters,
            num_iters_warmup=num_iters_warmup,
            temperature=temperature,
            detokenize=not disable_detokenize,
            seed=seed,
        )
    save(output_json, result)
    if as_json:
        print(json.dumps(result))
        return
    rows = [("average", 1e3 * result["avg_latency"], "ms"), ("standard deviation", 1e3 * result["std_latency"], "ms")]
    rows += [(f"{percent} %", 1e3 * seconds, "ms") for percent, seconds in result["percentiles"].items()]
    title = f"{batch_size} x ({input_len} tokens in, {output_len} out), {num_iters} times after {num_iters_warmup}"
    print_rows(title, rows)
