"""``gpt2rt score``: how likely texts are, and their perplexity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    DEFAULT_MODEL,
    Device,
    Dtype,
    ExecutorName,
    JsonFlag,
    LocalOnly,
    ModelName,
    Place,
    Quantization,
    Revision,
    Subfolder,
    Threads,
    UsageFault,
    check_dtype,
    load,
    read_stdin,
)

EXAMPLES = (
    "Examples:\n\ngpt2rt score hamlet.txt\n\ngpt2rt score hamlet.txt --stride 1 --json\n\n"
    "printf 'To be\\nor not to be\\n' | gpt2rt score - --lines --add-bos"
)


def command(
    files: Annotated[list[str], typer.Argument(help="Files of UTF-8 text; - is stdin.", show_default=False)],
    model: ModelName = DEFAULT_MODEL,
    tokenizer: Annotated[
        str | None, typer.Option(help="Where to read the tokenizer.", show_default="the model's own")
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line is a text of its own, not each file.")] = False,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens between the windows of a long text: 1 is exact and slow, --max-length fast.",
            show_default="half of --max-length",
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a window.", show_default="the model's positions")
    ] = None,
    add_bos: Annotated[
        bool, typer.Option("--add-bos", help="Put the bos token before each text, to score its first token too.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Windows that are computed together.")] = 8,
    tokens: Annotated[bool, typer.Option("--tokens", help="With --json: the log-probability of each token.")] = False,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: Device = "cpu",
    executor: ExecutorName = None,
    threads: Threads = None,
    revision: Revision = "main",
    subfolder: Subfolder = "",
    local_files_only: LocalOnly = False,
    as_json: JsonFlag = False,
) -> None:
    """Print the perplexity of texts, and how likely they are."""
    if tokens and not as_json:
        raise UsageFault("--tokens goes with --json")
    for flag, value in (("--stride", stride), ("--max-length", max_length), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UsageFault(f"{flag} must be at least 1, got {value}")
    check_dtype(dtype)
    texts = [item for name in files for item in _read(name, lines)]
    if not texts:
        raise UsageFault("there is no text to score; all lines are empty")
    hub = {"revision": revision, "subfolder": subfolder, "local_files_only": local_files_only}
    loaded = load(model, tokenizer, None, Place(device, executor, threads, dtype, quantization), hub)
    scores = loaded.model.score(
        [text for _, text in texts],
        loaded.tokenizer,
        stride=stride,
        max_length=max_length,
        batch_size=batch_size,
        add_bos=add_bos,
    )
    rows: list[dict[str, Any]] = []
    for index, (name, _) in enumerate(texts):
        rows.append(
            {
                "name": name,
                "num_tokens": len(scores.token_ids[index]),
                "num_scored": scores.num_scored[index],
                "logprob": scores.logprobs[index],
                "perplexity": scores.perplexities[index],
            }
        )
        if tokens:
            names = loaded.tokenizer.convert_ids_to_tokens(scores.token_ids[index])
            rows[-1]["tokens"] = [list(pair) for pair in zip(names, scores.token_logprobs[index], strict=True)]
    total = {"model": model, "perplexity": scores.perplexity, "num_scored": sum(scores.num_scored), "texts": rows}
    if as_json:
        print(json.dumps(total, ensure_ascii=False))
        return
    for row in rows:
        print(_line(row["name"], row["perplexity"], row["num_scored"], row["logprob"]))
    if len(rows) > 1:
        print(_line("all", scores.perplexity, total["num_scored"], sum(scores.logprobs)))


def _line(name: str, perplexity: float, scored: int, logprob: float) -> str:
    return f"{name}: perplexity {perplexity:.4f}, {scored} tokens scored, log-probability {logprob:.3f} nats"


def _read(name: str, lines: bool) -> list[tuple[str, str]]:
    """(name, text) of each text in a file.

    Raises:
        UsageFault: there is no such file, or it holds no UTF-8 text.
    """
    if name == "-":
        name, text = "stdin", read_stdin()
    else:
        path = Path(name)
        if not path.is_file():
            raise UsageFault(f"{name} is no file")
        data = path.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageFault(f"{name} is not UTF-8 text (byte {error.start} of {len(data)})") from None
    if lines:
        return [(f"{name}:{number}", line) for number, line in enumerate(text.splitlines(), 1) if line]
    if not text:
        raise UsageFault(f"{name} is empty; give a text to score")
    return [(name, text)]
