"""What the commands that measure engines and servers share: their options, tables, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import UsageFault, check_dtype, check_quantization, console, parse_device, set_threads

OutputJson = Annotated[Path | None, typer.Option(help="Write the result to this file.")]
Seed = Annotated[int, typer.Option(help="Of the prompts, and of when they are sent.")]
DatasetName = Annotated[str, typer.Option(help="random, custom (JSON Lines with a prompt in each) or sharegpt.")]
DatasetPath = Annotated[Path | None, typer.Option(help="The file of custom and sharegpt.")]
InputLen = Annotated[int, typer.Option("--input-len", "--random-input-len", help="Tokens of a random prompt.")]
OutputLen = Annotated[
    int | None,
    typer.Option(
        "--output-len", "--random-output-len", help="Tokens to generate.", show_default="128; of a file, as it says"
    ),
]
RangeRatio = Annotated[
    float, typer.Option("--random-range-ratio", help="Random lengths vary by this share, 0 to below 1.")
]
PrefixLen = Annotated[int, typer.Option("--random-prefix-len", help="Tokens that all random prompts begin with.")]
NumPrompts = Annotated[int, typer.Option(help="Requests to make.")]
NumSeqs = Annotated[int, typer.Option(help="Sequences that the engine computes side by side.")]
BatchedTokens = Annotated[int | None, typer.Option(help="Most tokens of a step.", show_default="the engine's choice")]
ModelLen = Annotated[int | None, typer.Option(help="Most tokens of a request.", show_default="the model's")]
NumBlocks = Annotated[int | None, typer.Option(help="Blocks of the KV cache.", show_default="by memory")]
CacheDtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, int8 or float8.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
NoText = Annotated[bool, typer.Option("--disable-detokenize", help="Make token ids only, no text.")]


def make_workload(**values: Any) -> Any:
    """A Workload of the options.

    Raises:
        UsageFault: one is out of its range.
    """
    from gpt2rt.bench.workload import Workload

    try:
        return Workload(**values)
    except ValueError as error:
        raise UsageFault(str(error)) from None


def engine_options(
    *, device: str, dtype: str | None, quantization: str | None, threads: int | None, **settings: Any
) -> dict[str, Any]:
    """Keywords for an engine out of a command's options; those that are None are left to the engine.

    Raises:
        UsageFault: one has an invalid value.
    """
    check_dtype(dtype)
    check_quantization(quantization)
    set_threads(threads)
    options = {"device": parse_device(device), "dtype": dtype, "quantization": quantization, **settings}
    return {name: value for name, value in options.items() if value is not None}


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, if there is a place for it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def print_rows(title: str, rows: list[tuple[str, Any, str]]) -> None:
    """A table of (what, value, unit)."""
    table = Table(title=title, box=None, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for what, value, unit in rows:
        table.add_row(what, shown(value), unit)
    console().print(table)


def print_metrics(result: dict[str, Any], metrics: list[str], percentiles: list[float]) -> None:
    """A line for each metric: mean, median, standard deviation and percentiles, in milliseconds."""
    from gpt2rt.bench.metrics import METRICS, percentile_name

    names = ["mean", "median", "std", *map(percentile_name, percentiles)]
    table = Table("ms", *names, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for metric in metrics:
        table.add_row(METRICS[metric], *(shown(result[f"{name}_{metric}_ms"]) for name in names))
    console().print(table)


def shown(value: Any) -> str:
    """A number as a table shows it; ``-`` for None."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
