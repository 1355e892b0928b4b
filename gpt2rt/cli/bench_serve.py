"""``gpt2rt bench serve``: an OpenAI-compatible server under load."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench_tables import (
    DatasetName,
    DatasetPath,
    InputLen,
    NumPrompts,
    OutputJson,
    OutputLen,
    PrefixLen,
    RangeRatio,
    Seed,
    make_workload,
    print_metrics,
    print_rows,
    save,
)
from .common import JsonFlag, UsageFault

EXAMPLES = (
    "Examples:\n\ngpt2rt bench serve --num-prompts 100 --input-len 64 --output-len 64 --max-concurrency 16\n\n"
    "gpt2rt bench serve --base-url http://127.0.0.1:8000 --request-rate 20 --goodput ttft:200 tpot:50 --save-result"
)

BACKENDS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}


def command(
    more_goodput: Annotated[
        list[str] | None, typer.Argument(metavar="METRIC:MS", help="Further limits of --goodput.", show_default=False)
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Of the server.", show_default="http://HOST:PORT")] = None,
    host: Annotated[str, typer.Option(help="Of the server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the server.")] = 8000,
    backend: Annotated[str, typer.Option(help=f"What it speaks: {', '.join(BACKENDS)}.")] = "openai",
    endpoint: Annotated[str | None, typer.Option(help="Where to send requests.", show_default="the backend's")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Its name on the server.", show_default="the first listed")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, hub id or embedded model to make prompts with.", show_default="--model")
    ] = None,
    dataset_name: DatasetName = "random",
    dataset_path: DatasetPath = None,
    input_len: InputLen = 64,
    output_len: OutputLen = None,
    random_range_ratio: RangeRatio = 0.0,
    random_prefix_len: PrefixLen = 0,
    num_prompts: NumPrompts = 64,
    num_warmups: Annotated[
        int, typer.Option(help="Requests before those that count, beside the one that shows the server ready.")
    ] = 0,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Most requests under way at a time.", show_default="any number")
    ] = None,
    request_rate: Annotated[float, typer.Option(help="Requests a second; inf sends all at once.")] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="Shape of the gamma distribution of their gaps: 1 Poisson, less comes in bursts.")
    ] = 1.0,
    goodput: Annotated[
        list[str] | None, typer.Option(help="METRIC:MS, of ttft, tpot and e2el, which a good request keeps.")
    ] = None,
    percentile_metrics: Annotated[str, typer.Option(help="Of ttft, tpot, itl, e2el.")] = "ttft,tpot,itl",
    metric_percentiles: Annotated[str, typer.Option(help="Numbers with commas, such as 50,90,99.9.")] = "99",
    ignore_eos: Annotated[
        bool | None, typer.Option("--ignore-eos/--keep-eos", help="Always make all tokens.", show_default="if random")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    logprobs: Annotated[int | None, typer.Option(help="Ask for so many with each token.")] = None,
    extra_body: Annotated[str | None, typer.Option(help="JSON object: further fields of every request.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, sent with every request; repeatable.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = None,
    ready_check_timeout_sec: Annotated[int, typer.Option(help="Wait so long for the server; 0: do not check.")] = 600,
    request_timeout_sec: Annotated[float, typer.Option(help="Give up when nothing comes for so long.")] = 600.0,
    seed: Seed = 0,
    label: Annotated[str | None, typer.Option(help="A name for the run, in the result and its file.")] = None,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write the result to a file named by it.")] = False,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="With the times of every request.")] = False,
    result_dir: Annotated[Path, typer.Option(help="Where --save-result writes.")] = Path("."),
    result_filename: Annotated[str | None, typer.Option(help="What it writes.", show_default="by the run")] = None,
    output_json: OutputJson = None,
    as_json: JsonFlag = False,
) -> None:
    """Send requests to a running server and report how it answers.

    TTFT: from sending a request to its first chunk. E2EL: to its last. ITL: between chunks. TPOT: (E2EL - TTFT) /
    (output tokens - 1). Goodput: requests a second that keep all limits. Keys of the result are those of vLLM's serving
    benchmark.
    """
    import asyncio

    from gpt2rt.bench import serve
    from gpt2rt.bench.http import HttpClient
    from gpt2rt.bench.metrics import parse_goodput, parse_metrics, parse_percentiles
    from gpt2rt.bench.workload import arrival_times

    if backend not in BACKENDS:
        raise UsageFault(f"--backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if num_warmups < 0 or (max_concurrency is not None and max_concurrency < 1):
        given = f"got {num_warmups} and {max_concurrency}"
        raise UsageFault(f"--num-warmups must be at least 0 and --max-concurrency at least 1, {given}")
    if more_goodput and not goodput:
        raise UsageFault(f"unexpected argument {more_goodput[0]!r}")
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
    metrics = _read("--percentile-metrics", parse_metrics, percentile_metrics)
    percentiles = _read("--metric-percentiles", parse_percentiles, metric_percentiles)
    settings = " ".join([*(goodput or ()), *(more_goodput or ())]).split()
    limits = _read("--goodput", parse_goodput, settings)
    _read("--request-rate, --burstiness", lambda _: arrival_times(1, request_rate, burstiness), None)
    headers = _headers(header, api_key)
    body: dict[str, Any] = {"temperature": temperature}
    if logprobs is not None:
        body["logprobs"] = logprobs
    if extra_body is not None:
        body |= _object(extra_body)
    url = (base_url or f"http://{host}:{port}").rstrip("/")
    _read("--base-url", HttpClient, url)
    waiting: dict[str, Any] = {"notice": lambda text: print(f"gpt2rt: {text}", file=sys.stderr)}
    name = model or asyncio.run(
        serve.first_model(url, headers, request_timeout_sec, patience=ready_check_timeout_sec, **waiting)
    )
    target = serve.Target(
        base_url=url,
        model=name,
        endpoint=endpoint or BACKENDS[backend],
        headers=headers,
        body=body,
        ignore_eos=dataset_name == "random" if ignore_eos is None else ignore_eos,
        timeout=request_timeout_sec,
    )
    # one more: the request that shows the server ready
    samples = workload.samples(_tokenizer(tokenizer or name), extra=num_warmups + 1)
    if target.is_chat:
        samples = _as_text(samples, tokenizer or name)
    answers, duration = asyncio.run(
        serve.run(
            target,
            samples[:num_prompts],
            warmups=samples[num_prompts:],
            request_rate=request_rate,
            burstiness=burstiness,
            max_concurrency=max_concurrency,
            ready_timeout=ready_check_timeout_sec,
            seed=seed,
            **waiting,
        )
    )
    result = serve.report(
        target,
        answers,
        duration,
        backend=backend,
        label=label,
        tokenizer=tokenizer or name,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        num_warmups=num_warmups,
        seed=seed,
        metrics=metrics,
        percentiles=percentiles,
        goodput=limits,
        detailed=save_detailed,
    )
    if save_result:
        save(result_dir / (result_filename or _file_name(result)), result)
    save(output_json, result)
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        print(f"gpt2rt: {len(errors)} of {len(answers)} requests failed; the first: {errors[0]}", file=sys.stderr)
    if as_json:
        print(json.dumps(result))
    else:
        _print(result, metrics, percentiles, limits)
    if not result["completed"]:
        raise typer.Exit(1)


def _read(option: str, parse: Any, text: Any) -> Any:
    """What a parser makes of an option's text; its ValueError names the option."""
    try:
        return parse(text)
    except ValueError as error:
        raise UsageFault(f"{option}: {error}") from None


def _headers(settings: list[str] | None, api_key: str | None) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals or not name.strip() or any(mark in setting for mark in "\r\n"):
            raise UsageFault(f"--header takes KEY=VALUE, got {setting!r}")
        headers[name.strip()] = value.strip()
    return headers


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageFault(f"--extra-body must be a JSON object, got {text!r}")
    return found


def _tokenizer(name: str) -> Any:
    from gpt2rt.tokenizers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise UsageFault(f"--tokenizer is needed: {name!r} was tried, and {error}") from None


def _as_text(samples: list[Any], name: str) -> list[Any]:
    """Prompts as text: a chat has no token ids."""
    import dataclasses

    tokenizer = _tokenizer(name)
    texts = [s.prompt if isinstance(s.prompt, str) else tokenizer.decode(s.prompt) for s in samples]
    return [dataclasses.replace(sample, prompt=text) for sample, text in zip(samples, texts, strict=True)]


def _file_name(result: dict[str, Any]) -> str:
    """As vLLM names it: label, rate, concurrency, model, date."""
    concurrency = result["max_concurrency"]
    middle = "" if concurrency is None else f"-concurrency{concurrency}"
    model = result["model_id"].rstrip("/").rpartition("/")[2]
    return f"{result['label'] or result['backend']}-{result['request_rate']}qps{middle}-{model}-{result['date']}.json"


def _print(result: dict[str, Any], metrics: list[str], percentiles: list[float], limits: dict[str, float]) -> None:
    rows = [
        ("completed requests", result["completed"], f"after {result['num_warmups']} to warm up"),
        ("failed requests", result["failed"], ""),
        ("duration", result["duration"], "s"),
        ("prompt tokens", result["total_input_tokens"], ""),
        ("generated tokens", result["total_output_tokens"], ""),
        ("requests", result["request_throughput"], "/ s"),
    ]
    if limits:
        kept = ", ".join(f"{metric} <= {limit:g} ms" for metric, limit in limits.items())
        rows.append(("good requests", result["request_goodput"], f"/ s ({kept})"))
    rows += [
        ("generated tokens", result["output_throughput"], "/ s"),
        ("generated tokens, at most", result["max_output_tokens_per_s"], "/ s"),
        ("prompt and generated tokens", result["total_token_throughput"], "/ s"),
        ("requests under way, at most", result["max_concurrent_requests"], ""),
    ]
    print_rows(f"{result['model_id']}, {result['num_prompts']} requests", rows)
    print_metrics(result, metrics, percentiles)
