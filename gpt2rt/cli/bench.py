"""``gpt2rt bench``: the kernel lab on the command line, and the benchmarks of engines and servers."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from . import bench_latency, bench_serve, bench_throughput
from .common import Device, JsonFlag, Threads, UsageFault, console, parse_device, set_threads

EXAMPLES = (
    "Examples:\n\ngpt2rt bench kernels --op layer_norm\n\ngpt2rt bench kernels --device cuda --dtype float16 --json"
)

app = typer.Typer(help="Measure kernels, an engine or a server.", add_completion=False)
for module in (bench_latency, bench_throughput, bench_serve):
    app.command(name=module.__name__.rpartition("bench_")[2], epilog=module.EXAMPLES)(module.command)


@app.callback()
def _root() -> None:
    pass


@app.command(epilog=EXAMPLES)
def kernels(
    op: Annotated[list[str] | None, typer.Option(help="Only this one; may be given again.", show_default="all")] = None,
    device: Device = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16.", show_default="float32 on a CPU, float16 on a GPU"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds in which all forms are timed in turn.")] = 15,
    toy: Annotated[bool, typer.Option("--toy", help="Tiny sizes: checks only, no times.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Only say what there is.")] = False,
    threads: Threads = None,
    as_json: JsonFlag = False,
) -> None:
    """Every kernel's forms beside each other: error, time, and share of what the machine allows.

    The error is the largest difference from the definition in float64, over the largest magnitude. Times are of cold
    data: calls take turns through copies of it. The share is the time that the bytes or the operations take at the
    bandwidth and the rate measured in the same run, over the time taken.
    """
    if rounds < 1:
        raise UsageFault(f"--rounds must be at least 1, got {rounds}")
    from gpt2rt.lab.measure import choose, measure, runs_on
    from gpt2rt.lab.registry import TOLERANCE

    try:
        operations = choose(op)
    except ValueError as error:
        raise UsageFault(f"--op: {error}") from None
    import torch

    set_threads(threads)
    place_device = parse_device(device)
    dtypes = {str(known).removeprefix("torch."): known for known in TOLERANCE}
    name = dtype or ("float16" if place_device.type == "cuda" else "float32")
    if name not in dtypes:
        raise UsageFault(f"--dtype must be one of {', '.join(dtypes)}, got {name!r}")
    from gpt2rt.lab.problem import Place

    if listing:
        _list(operations, Place(place_device, dtypes[name]), as_json)
        return
    from gpt2rt.lab.timing import Timer, measure_limits

    on_cuda = place_device.type == "cuda"
    timed = not toy and not Place(place_device).interpreted
    limits = measure_limits(place_device, dtypes[name]) if timed else None
    timer = Timer(place_device, rounds=rounds, target_us=1000.0 if on_cuda else 5000.0) if timed else None
    cold = (1 << 28) if timed else 0
    results = []
    for operation in operations:
        if not runs_on(operation, Place(place_device)):
            continue
        rows = []
        for size in (operation.toy,) if toy else operation.sizes:
            place = Place(place_device, dtypes[name], cold_bytes=cold)
            rows.append(measure(operation, size, place, timer, limits))
            if on_cuda:
                torch.cuda.empty_cache()
        results += rows
        if not as_json:
            _print(operation, rows)
    if as_json:
        from gpt2rt.env import collect

        print(json.dumps({"machine": collect(), "device": str(place_device), "limits": limits, "kernels": results}))
    if not all(row["ok"] for row in results):
        raise typer.Exit(1)


def _list(operations: list[Any], place: Any, as_json: bool) -> None:
    from gpt2rt.lab.measure import form_names, runs_on, size_text

    def forms(operation: Any) -> list[str]:
        """Those that run on the device that was asked for, at any of its sizes."""
        if not runs_on(operation, place):
            return []
        names = (name for size in operation.sizes for name in form_names(operation, size, place))
        return list(dict.fromkeys(names))

    if as_json:
        names = ("name", "maths", "reference", "triton", "cpp", "limit", "exact", "sizes")
        entries = [{name: getattr(operation, name) for name in names} for operation in operations]
        print(json.dumps([e | {"forms": forms(o)} for e, o in zip(entries, operations, strict=True)]))
        return
    table = Table("kernel", "computes", "definition", "Triton", "C++", "sizes", f"forms on {place.device}", box=None)
    for operation in operations:
        sizes = "\n".join(size_text(size) for size in operation.sizes)
        cells = (operation.name, operation.maths, operation.reference, "\n".join(operation.triton), operation.cpp)
        table.add_row(*(escape(cell) for cell in (*cells, sizes, "\n".join(forms(operation)))))
    console().print(table)


def _print(operation: Any, rows: list[dict[str, Any]]) -> None:
    from gpt2rt.lab.measure import size_text

    out = console()
    out.print(f"\n[bold]{operation.name}[/]  {escape(operation.maths)}  [dim]{escape(operation.reference)}[/]")
    table = Table("size", "form", "error", "allowed", "us", "p10", "share of limit", box=None)
    for row in rows:
        first = size_text(row["size"])
        for name, form in row["forms"].items():
            error = "-" if form["error"] is None else f"{form['error']:.1e}"
            verdict = "" if form["ok"] is None else f"{row['tolerance']:.1e}"
            if form["ok"] is False:
                error = f"[red]{error}[/]"
            times = ("-", "-") if form["us"] is None else (f"{form['us']:.2f}", f"{form['p10_us']:.2f}")
            share = "-" if form["share"] is None else f"{100 * form['share']:.0f} %"
            table.add_row(first, escape(name), error, verdict, *times, share)
            if form["failed"]:
                table.add_row("", "", f"[red]{escape(form['failed'])}[/]")
            first = ""
    out.print(table)
