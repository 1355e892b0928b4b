"""``gpt2rt warmup``: compile a model's GPU kernels before the first request needs them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DEFAULT_MODEL,
    Device,
    Dtype,
    JsonFlag,
    LocalOnly,
    Place,
    Quantization,
    Revision,
    Subfolder,
    UsageFault,
    check_dtype,
    load,
)

EXAMPLES = (
    "Examples:\n\ngpt2rt warmup openai-community/gpt2 --dtype float16\n\n"
    "gpt2rt warmup ./my-model --quantization int4 --batch-sizes 1,8,64 --prompt-lengths 128,1024"
)

_PROMPT_LENGTHS = "16,32,64,128,256,512,1024"


def command(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or an embedded model.")] = DEFAULT_MODEL,
    dtype: Dtype = None,
    quantization: Quantization = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="What keys and values are stored in, as for generate.")] = "auto",
    batch_sizes: Annotated[str, typer.Option(help="Rows of decode steps, rounded up to powers of two.")] = "1,2,4,8",
    prompt_lengths: Annotated[
        str, typer.Option(help="Tokens of prompts, rounded up to powers of two from 16 to 1024.")
    ] = _PROMPT_LENGTHS,
    device: Device = "cuda",
    revision: Revision = "main",
    subfolder: Subfolder = "",
    local_files_only: LocalOnly = False,
    as_json: JsonFlag = False,
) -> None:
    """Compile the kernels of a model for this GPU, so that no request waits for a compiler.

    Those of generate, LLM and serve, for batches and prompts up to the largest that are given. They are kept on disk
    (TRITON_CACHE_DIR, or ~/.triton/cache), and other processes load them from there.
    """
    check_dtype(dtype)
    rows, lengths = _numbers("--batch-sizes", batch_sizes, 256), _numbers("--prompt-lengths", prompt_lengths, 2**20)
    hub = {"revision": revision, "subfolder": subfolder, "local_files_only": local_files_only}
    loaded = load(model, None, None, Place(device, "cuda", None, dtype, quantization), hub)
    from gpt2rt.cache import PagedKVCache
    from gpt2rt.engine import EngineConfig
    from gpt2rt.engine.served import ServedModel
    from gpt2rt.engine.warmup import try_out
    from gpt2rt.generation.cache_names import kv_cache_dtype as resolve
    from gpt2rt.generation.config import GenerationConfig
    from gpt2rt.generation.warmup import run_each_way

    executor = loaded.executor
    plan = executor.plan
    chosen = resolve(GenerationConfig(kv_cache_dtype=kv_cache_dtype), plan.device) or plan.dtype
    # no step is longer than this: a step of several prompts may have more tokens than the context
    longest = max(plan.n_positions, int(_PROMPT_LENGTHS.rpartition(",")[2]))
    lengths = sorted({min(length, longest) for length in lengths})
    start = time.perf_counter()
    cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, max(rows), dtype=chosen, device=plan.device)
    sizes = executor.warm_up(cache, batch_sizes=rows, prompt_lengths=lengths)
    graphs = len(executor.graphs)
    run_each_way(loaded.model, kv_cache_dtype)
    engine = EngineConfig(
        max_num_seqs=rows[-1],
        max_num_batched_tokens=max(rows[-1], lengths[-1]),
        kv_cache_dtype=kv_cache_dtype,
        executor="cuda",
    )
    try_out(ServedModel(loaded.model, lambda: None, engine, model))
    seconds = time.perf_counter() - start
    folder = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    facts = {"model": model, "sizes": sizes, "graphs": graphs, "seconds": seconds, "folder": folder}
    if as_json:
        print(json.dumps(facts))
    else:
        print(f"{sizes} sizes of step and {graphs} graphs in {seconds:.1f} s; kernels are in {folder}")


def _numbers(option: str, text: str, most: int) -> list[int]:
    """The integers of an option, none twice."""
    try:
        numbers = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise UsageFault(f"{option} takes numbers between commas, got {text!r}") from None
    if not numbers or numbers[0] < 1 or numbers[-1] > most:
        raise UsageFault(f"{option} takes numbers from 1 to {most}, got {text!r}")
    return numbers
