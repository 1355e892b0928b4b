"""``gpt2rt generate``: continue a text, shown as it comes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .common import (
    DEFAULT_MODEL,
    Device,
    Dtype,
    ExecutorName,
    JsonFlag,
    Loaded,
    LocalOnly,
    ModelName,
    Place,
    Quantization,
    Revision,
    Subfolder,
    Threads,
    UsageFault,
    check_dtype,
    isa,
    load,
    parse_settings,
    read_stdin,
)

EXAMPLES = (
    'Examples:\n\ngpt2rt generate "ROMEO:"\n\ngpt2rt generate "ROMEO:" --seed 7 --stats\n\n'
    "echo -n ROMEO: | gpt2rt generate - --greedy --stop JULIET --json\n\n"
    'gpt2rt generate "ROMEO:" --greedy --num-beams 4 --set no_repeat_ngram_size=3'
)


def command(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.", show_default=False)],
    model: ModelName = DEFAULT_MODEL,
    tokenizer: Annotated[
        str | None, typer.Option(help="Where to read the tokenizer.", show_default="the model's own")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="The most tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="Above 0: sharper below 1, flatter above; 0 is --greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 0.95,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this fraction of the likeliest.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: avoid tokens that are already there.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same text.", show_default="a new one")
    ] = None,
    sample: Annotated[bool, typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest.")] = True,
    num_beams: Annotated[
        int, typer.Option(help="Above 1: beam search with this many beams; the text comes at the end.")
    ] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    context_policy: Annotated[
        str | None,
        typer.Option(
            help="What happens at the end of the model's positions: stop, error, truncate_left or sliding.",
            show_default="the model's, else stop",
        ),
    ] = None,
    assistant_model: Annotated[
        str | None, typer.Option(help="A smaller model that proposes tokens; the text stays the same.")
    ] = None,
    prompt_lookup: Annotated[
        int | None, typer.Option(help="Propose up to this many tokens from the text so far; the text stays the same.")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="What keys and values are stored in: float32, bfloat16, float16, int8 or float8.",
            show_default="auto",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of GenerationConfig, as NAME=VALUE; repeatable.")
    ] = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: Device = "cpu",
    executor: ExecutorName = None,
    threads: Threads = None,
    revision: Revision = "main",
    subfolder: Subfolder = "",
    local_files_only: LocalOnly = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print timings to stderr at the end.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Continue a text, shown as it comes."""
    from gpt2rt.errors import RequestError
    from gpt2rt.generation import GenerationConfig

    text = _read_prompt(prompt)
    fields: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
    named = {
        "context_policy": context_policy,
        "prompt_lookup_num_tokens": prompt_lookup,
        "kv_cache_dtype": kv_cache_dtype,
    }
    fields |= {name: value for name, value in named.items() if value is not None}
    if num_beams != 1:
        fields["num_beams"] = num_beams
    if stop:
        fields["stop_strings"] = list(stop)
    sample = sample and temperature != 0
    if sample:
        if seed is None:
            seed = int.from_bytes(os.urandom(4), "little")
        fields |= {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        fields |= {} if min_p is None else {"min_p": min_p}
    fields |= parse_settings(settings)
    try:
        # the fields are named like the flags
        GenerationConfig(**fields).refuse_unsupported()
    except RequestError as error:
        raise UsageFault(str(error)) from error
    stops = fields.get("stop_strings") or []
    check_dtype(dtype)
    place = Place(device, executor, threads, dtype, quantization)
    hub = {"revision": revision, "subfolder": subfolder, "local_files_only": local_files_only}
    loaded = load(model, tokenizer, assistant_model, place, hub)
    sink = _ignore if as_json else _write
    result = _run_generation(loaded, text, fields, [stops] if isinstance(stops, str) else list(stops), sink)
    result |= {"model": model, "prompt": text, "seed": seed if sample else None}
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        sink("\n")
    if stats:
        _print_stats(result)


def _read_prompt(prompt: str) -> str:
    if prompt == "-":
        prompt = read_stdin()
    if not prompt:
        raise UsageFault("the prompt is empty; give a text to continue")
    return prompt


def _run_generation(
    loaded: Loaded, prompt: str, fields: dict[str, Any], stop: list[str], sink: Callable[[str], None]
) -> dict[str, Any]:
    """Generate and show each piece of text; what happened, in JSON's types."""
    import torch

    from gpt2rt.generation.detokenize import text_decoder
    from gpt2rt.generation.prepare import prepare
    from gpt2rt.generation.stopping import StopTextFilter

    prompt_ids = loaded.tokenizer.encode(prompt, verbose=False)
    start = time.perf_counter()
    arguments = {**fields, "tokenizer": loaded.tokenizer, "assistant_model": loaded.assistant}
    decoder, _, _ = prepare(loaded.model, [prompt_ids], None, None, None, arguments)
    # only now: a prompt that is refused is not shown
    sink(prompt)
    pieces: list[str] = []
    times: list[float] = []

    def show(piece: str) -> None:
        if piece:
            pieces.append(piece)
            sink(piece)

    text, stop_filter = text_decoder(loaded.tokenizer, prompt_ids, True), StopTextFilter(stop)
    # beams are only known at the end
    streams = fields.get("num_beams", 1) == 1
    try:
        with torch.no_grad(), contextlib.closing(decoder.steps()) as steps:
            for step in steps:
                times.append(time.perf_counter())
                if streams:
                    show(stop_filter.put(text.put(step)))
    finally:
        decoder.plan.processors.close()
    row = decoder.rows[0]
    if not streams:
        show(stop_filter.put(text.put(row.new_ids)))
    show(stop_filter.put(text.end()))
    show(stop_filter.end())
    return {
        "text": "".join(pieces),
        "finish_reason": row.finish_reason,
        "prompt_tokens": row.prompt_length,
        "new_tokens": len(row.new_ids),
        "load_s": round(loaded.load_seconds, 4),
        "ttft_ms": round(1e3 * (times[0] - start), 3),
        # the first token is the prompt's; the rest come at this rate
        "tokens_per_s": round((len(times) - 1) / (times[-1] - times[0]), 2) if len(times) > 1 else None,
        **_where(loaded),
    }


def _where(loaded: Loaded) -> dict[str, Any]:
    import torch

    return {
        "executor": loaded.executor.name,
        "isa": isa() if loaded.model.device.type == "cpu" else None,
        "threads": getattr(loaded.executor, "num_threads", 0)
        or int(os.environ.get("GPT2RT_NUM_THREADS") or torch.get_num_threads()),
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "quantization": loaded.model.quantization_scheme,
    }


def _print_stats(result: dict[str, Any]) -> None:
    rate = "-" if result["tokens_per_s"] is None else f"{result['tokens_per_s']:.1f}"
    parts = [
        f"{result['prompt_tokens']} + {result['new_tokens']} tokens ({result['finish_reason']})",
        f"load {result['load_s']:.2f} s",
        f"TTFT {result['ttft_ms']:.1f} ms",
        f"{rate} tokens/s",
        f"executor {result['executor']} ({result['isa'] or result['device']}, {result['threads']} threads, "
        f"{result['quantization'] or result['dtype']})",
    ]
    if result["seed"] is not None:
        parts.append(f"seed {result['seed']}")
    print(" · ".join(parts), file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    pass
