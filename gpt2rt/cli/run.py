"""``gpt2rt run``: a pipeline over a file or over stdin, as ``transformers run`` was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Dtype,
    LocalOnly,
    Quantization,
    Revision,
    Threads,
    UsageFault,
    check_dtype,
    check_quantization,
    parse_device,
    parse_settings,
    set_threads,
)
from .formats import FORMATS, Columns, infer_format, read_records, write_results

EXAMPLES = (
    "Examples:\n\ngpt2rt run --task sentiment-analysis --model ./my-gpt2 --input reviews.csv --column review "
    "--output labels.csv\n\n"
    'echo "ROMEO:" | gpt2rt run --task text-generation --set max_new_tokens=20\n\n'
    "gpt2rt run --task question-answering --model ./my-gpt2 --input squad.jsonl --output answers.jsonl"
)

# gpt2rt.pipelines.supported_tasks(), here so that --help needs no torch
TASKS = (
    "feature-extraction",
    "ner",
    "question-answering",
    "sentiment-analysis",
    "text-classification",
    "text-generation",
    "token-classification",
    "zero-shot-classification",
)

# tasks whose inputs may be dictionaries of texts, so that records with several columns can share a batch
_TAKES_RECORDS = ("question-answering", "text-classification")


def command(
    task: Annotated[str, typer.Option(help=f"What to do: {', '.join(TASKS)}.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A folder, a hub id, or an embedded model.", show_default="the task's"),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Where to read the config.", show_default="the model's own")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Where to read the tokenizer.", show_default="the model's own")
    ] = None,
    input: Annotated[
        str | None, typer.Option(help="The file to read: *.json, *.jsonl or *.csv.", show_default="stdin")
    ] = None,
    output: Annotated[str | None, typer.Option(help="The file to write.", show_default="stdout")] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Which column to read; for several arguments ARGUMENT=COLUMN,ARGUMENT=COLUMN."),
    ] = None,
    format: Annotated[
        str, typer.Option(help="infer (from the names of the files), json, csv, or pipe (a text on each line).")
    ] = "infer",
    device: Annotated[str, typer.Option(help="-1 for the CPU, n for cuda:n, or a name like cuda:0.")] = "-1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if there is one.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A keyword of the task, as NAME=VALUE; repeatable.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts that are computed together.")] = 1,
    dtype: Dtype = None,
    quantization: Quantization = None,
    threads: Threads = None,
    revision: Revision = "main",
    local_files_only: LocalOnly = False,
) -> None:
    """Run a task over every text of a file or of stdin."""
    # all that can be wrong with the command line is found before a model is loaded
    if task not in TASKS:
        raise UsageFault(f"--task must be one of {', '.join(TASKS)}, got {task!r}")
    if format not in FORMATS:
        raise UsageFault(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    if batch_size < 1:
        raise UsageFault(f"--batch-size must be at least 1, got {batch_size}")
    check_dtype(dtype)
    keywords = parse_settings(settings)
    source = None if input is None else Path(input)
    target = None if output is None else Path(output)
    form = infer_format(source) if format == "infer" else format
    if source is not None and not source.is_file():
        raise UsageFault(f"--input {source} is no file")
    if target is not None and target.is_dir():
        raise UsageFault(f"--output {target} is a folder; name the file in it")
    if target is not None and target.exists() and not overwrite:
        raise UsageFault(f"--output {target} exists already; pass --overwrite to replace it")
    if target is not None and not target.absolute().parent.is_dir():
        raise UsageFault(f"--output {target}: the folder {target.absolute().parent} does not exist")
    # a pipe's results may be wanted in a file, and a file's results in another format
    out_form = infer_format(target) if target is not None and format == "infer" else form
    check_quantization(quantization)
    set_threads(threads)
    place = parse_device(device)

    from gpt2rt.pipelines import pipeline
    from gpt2rt.pipelines.factory import find_task

    task, chosen = find_task(task)
    if model is None and chosen.default is None:
        raise UsageFault(f"--task {task} has no default model; pass --model")
    names = column or chosen.pipeline.default_input_names
    columns = Columns(names, many=chosen.pipeline.default_input_names is not None)
    try:
        pipe = pipeline(
            task,
            model=model,
            config=config,
            tokenizer=tokenizer,
            device=place,
            dtype=dtype,
            quantization=quantization,
            revision=revision,
            local_files_only=local_files_only,
            batch_size=batch_size,
            **keywords,
        )
    except TypeError as error:
        # an unknown keyword in --set
        raise UsageFault(str(error)) from error
    name = "stdin" if source is None else str(source)
    with contextlib.ExitStack() as stack:
        stream = sys.stdin.buffer if source is None else stack.enter_context(open(source, "rb"))
        lines = source is not None and source.suffix.lower() == ".jsonl"
        results = _results(pipe, task, read_records(stream, form, lines, columns, name), columns.named)
        _save(results, target, out_form, lines)


def _results(pipe: Any, task: str, records: Iterator[Any], named: bool) -> Iterator[Any]:
    """The results, one after another; a record is read when its batch is due."""
    if not named or task in _TAKES_RECORDS:
        yield from pipe(records)
    else:
        for record in records:
            yield pipe(**record)


def _save(results: Iterator[Any], target: Path | None, form: str, lines: bool) -> None:
    if target is None:
        write_results(results, sys.stdout, form, lines, sys.stdout.flush)
        return
    from gpt2rt.checkpoint.atomic import AtomicFiles

    def write(path: Path) -> None:
        with open(path, "w", encoding="utf-8", newline="") as stream:
            write_results(results, stream, form, target.suffix.lower() == ".jsonl", lambda: None)

    with AtomicFiles() as files:
        files.add(target, write)
