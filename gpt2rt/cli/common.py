"""What several commands share."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

DEFAULT_MODEL = "gpt2rt/tiny-gpt2"
DTYPES = ("float32", "bfloat16", "float16", "auto")


class UsageFault(Exception):
    """The command line asks for something that cannot be meant; exit code 2."""


# options that several commands have, with the same words
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ModelName = Annotated[str, typer.Option("--model", "-m", help="A folder, a hub id, or an embedded model.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16 or auto.", show_default="as stored; float16 as float32 on a CPU"),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="Quantise float weights as they are read: int8, int4, nf4 or fp4; int4-g32 and so on for other groups.",
        show_default="as stored",
    ),
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...; also -1 (CPU) or n (cuda:n).")]
ExecutorName = Annotated[str | None, typer.Option(help="cpu, cuda or eager.", show_default="the fastest")]
Threads = Annotated[int | None, typer.Option(help="Threads on the CPU.", show_default="torch's choice")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of a hub model.")]
Subfolder = Annotated[str, typer.Option(help="Folder inside the checkpoint.")]
LocalOnly = Annotated[bool, typer.Option("--local-files-only", help="Never download.")]


def read_stdin() -> str:
    """All of stdin.

    Raises:
        UsageFault: it is not UTF-8.
    """
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageFault(f"stdin is not UTF-8 text (byte {error.start} of {len(data)})") from None


def check_dtype(dtype: str | None) -> None:
    """Raise UsageFault for an unknown ``--dtype``."""
    if dtype not in (None, *DTYPES):
        raise UsageFault(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def check_quantization(quantization: str | None) -> None:
    """Raise UsageFault for an unknown ``--quantization``."""
    if quantization is None:
        return
    from gpt2rt.quantization import resolve_quantization

    try:
        resolve_quantization(quantization)
    except ValueError as error:
        raise UsageFault(f"--quantization: {error}") from None


def set_threads(threads: int | None) -> None:
    """Let torch use this many threads; None leaves it as it is."""
    import torch

    if threads is not None:
        if threads < 1:
            raise UsageFault(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)


def parse_device(device: str) -> Any:
    """The torch device of ``--device``: -1, a number, or a name.

    Raises:
        UsageFault: it is none of these.
        RuntimeError: it is a CUDA device and torch sees none.
    """
    import torch

    name = device
    if device.lstrip("-").isdecimal():
        number = int(device)
        name = "cpu" if number == -1 else f"cuda:{number}"
    try:
        place = torch.device(name)
    except RuntimeError:
        raise UsageFault(f"--device must be cpu, cuda, cuda:N, or a number (-1 for cpu), got {device!r}") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device {device}: this torch sees no CUDA device; use --device cpu")
    return place


def parse_settings(settings: Sequence[str] | None) -> dict[str, Any]:
    """The values of ``--set NAME=VALUE``: JSON if it is JSON, else the text itself.

    Raises:
        UsageFault: one has no ``=`` or no name.
    """
    values: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageFault(f"--set takes NAME=VALUE, got {setting!r}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            # words need no quotation marks; Python's spelling is understood too
            values[name] = {"True": True, "False": False, "None": None}.get(text, text)
    return values


@dataclasses.dataclass
class Place:
    """Where and how a model runs, as the options say it."""

    device: str
    executor: str | None
    threads: int | None
    dtype: str | None
    quantization: str | None = None


@dataclasses.dataclass
class Loaded:
    """A model that is ready, and what it took."""

    model: Any
    tokenizer: Any
    assistant: Any
    executor: Any
    load_seconds: float


def load(
    name: str, tokenizer_name: str | None, assistant_name: str | None, place: Place, hub: dict[str, Any]
) -> Loaded:
    """Model and tokenizer of a checkpoint, by its ``model_type``.

    Raises:
        UsageFault: an option has an invalid value.
    """
    from gpt2rt.graph import executor_names

    if place.executor not in (None, *executor_names()):
        raise UsageFault(f"--executor must be one of {', '.join(executor_names())}, got {place.executor!r}")
    check_quantization(place.quantization)
    set_threads(place.threads)
    device = parse_device(place.device)
    # only now: a wrong option is found without waiting for them
    from gpt2rt.models.auto import AutoModelForCausalLM
    from gpt2rt.tokenizers import AutoTokenizer

    start = time.perf_counter()
    # another checkpoint than the model's has its own branches and folders
    local = {"local_files_only": hub["local_files_only"]}
    tokenizer = AutoTokenizer.from_pretrained(
        name if tokenizer_name is None else tokenizer_name, **(hub if tokenizer_name is None else local)
    )
    kind = {"dtype": place.dtype, "quantization": place.quantization, "device": device}
    model = AutoModelForCausalLM.from_pretrained(name, **kind, **hub)
    assistant = None
    if assistant_name is not None:
        assistant = AutoModelForCausalLM.from_pretrained(assistant_name, **kind, **local)
    runner = model.generation_executor(place.executor)
    if place.threads is not None and hasattr(runner, "num_threads"):
        # the flag goes before GPT2RT_NUM_THREADS
        runner.num_threads = place.threads
    return Loaded(model, tokenizer, assistant, runner, time.perf_counter() - start)


def console() -> Console:
    """Where tables are printed; in a file or pipe lines are not broken."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def isa() -> str | None:
    """The instruction set of the extension, or None without it."""
    from gpt2rt import ops

    return ops.cpu_isa() if ops.extension_status().loaded else None
