"""The command line: ``gpt2rt generate``, ``gpt2rt env``, ``gpt2rt doctor``.

Exit codes: 0 ok, 1 failed, 2 wrong usage, 130 interrupted. Every error is one sentence on stderr;
``GPT2RT_LOG=debug`` adds the traceback. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

DEFAULT_MODEL = "gpt2rt/tiny-gpt2"

app = typer.Typer(
    name="gpt2rt",
    help="A small, exact, measured runtime for GPT-2 models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class UsageFault(Exception):
    """The command line asks for something that cannot be meant; exit code 2."""


_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from gpt2rt.env import version

        print(f"gpt2rt {version()}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


# ---- generate ------------------------------------------------------------------------------------------------------


@app.command(
    epilog='Examples:\n\ngpt2rt generate "ROMEO:"\n\ngpt2rt generate "ROMEO:" --seed 7 --stats\n\n'
    "echo -n ROMEO: | gpt2rt generate - --greedy --stop JULIET --json"
)
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="A folder, a hub id, or an embedded model.")] = (
        DEFAULT_MODEL
    ),
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
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16 or auto.", show_default="as stored; float16 as float32 on a CPU"),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...")] = "cpu",
    executor: Annotated[str | None, typer.Option(help="cpu or eager.", show_default="the fastest")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads on the CPU.", show_default="torch's choice")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of a hub model.")] = "main",
    subfolder: Annotated[str, typer.Option(help="Folder inside the checkpoint.")] = "",
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Never download.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print timings to stderr at the end.")] = False,
    as_json: _Json = False,
) -> None:
    """Continue a text, shown as it comes."""
    from gpt2rt.errors import RequestError
    from gpt2rt.generation import GenerationConfig

    text = _read_prompt(prompt)
    fields: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
    if stop:
        fields["stop_strings"] = list(stop)
    sample = sample and temperature != 0
    try:
        if sample:
            if seed is None:
                seed = int.from_bytes(os.urandom(4), "little")
            fields |= {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
            fields |= {} if min_p is None else {"min_p": min_p}
        GenerationConfig(**fields)
    except RequestError as error:
        # the fields are named like the flags
        raise UsageFault(str(error)) from error
    loaded = _load(model, dtype, device, executor, threads, revision, subfolder, local_files_only)
    sink = _ignore if as_json else _write
    result = _run_generation(loaded, text, fields, list(stop or ()), sink)
    result |= {"model": model, "prompt": text, "seed": seed if sample else None}
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        sink("\n")
    if stats:
        _print_stats(result)


def _read_prompt(prompt: str) -> str:
    if prompt == "-":
        data = sys.stdin.buffer.read()
        try:
            prompt = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageFault(f"stdin is not UTF-8 text (byte {error.start} of {len(data)})") from None
    if not prompt:
        raise UsageFault("the prompt is empty; give a text to continue")
    return prompt


@dataclasses.dataclass
class _Loaded:
    model: Any
    tokenizer: Any
    executor: Any
    load_seconds: float


def _load(
    name: str,
    dtype: str | None,
    device: str,
    executor: str | None,
    threads: int | None,
    revision: str,
    subfolder: str,
    local_files_only: bool,
) -> _Loaded:
    import torch

    from gpt2rt import GPT2LMHeadModel, GPT2Tokenizer
    from gpt2rt.graph import executor_names

    dtypes = ("float32", "bfloat16", "float16", "auto")
    if dtype not in (None, *dtypes):
        raise UsageFault(f"--dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    if executor not in (None, *executor_names()):
        raise UsageFault(f"--executor must be one of {', '.join(executor_names())}, got {executor!r}")
    if threads is not None:
        if threads < 1:
            raise UsageFault(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UsageFault(f"--device must be cpu, cuda or cuda:N, got {device!r}") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device {device}: this torch sees no CUDA device; use --device cpu")
    start = time.perf_counter()
    hub: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "local_files_only": local_files_only}
    tokenizer = GPT2Tokenizer.from_pretrained(name, **hub)
    model = GPT2LMHeadModel.from_pretrained(name, dtype=dtype, device=place, **hub)
    runner = model.generation_executor(executor)
    if threads is not None and hasattr(runner, "num_threads"):
        # the flag goes before GPT2RT_NUM_THREADS
        runner.num_threads = threads
    return _Loaded(model, tokenizer, runner, time.perf_counter() - start)


def _run_generation(
    loaded: _Loaded, prompt: str, fields: dict[str, Any], stop: list[str], sink: Callable[[str], None]
) -> dict[str, Any]:
    """Generate and show each piece of text; what happened, in JSON's types."""
    import torch

    from gpt2rt.generation.detokenize import text_decoder
    from gpt2rt.generation.prepare import prepare
    from gpt2rt.generation.stopping import StopTextFilter

    prompt_ids = loaded.tokenizer.encode(prompt, verbose=False)
    start = time.perf_counter()
    arguments = {**fields, "tokenizer": loaded.tokenizer if stop else None}
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
    with torch.no_grad(), contextlib.closing(decoder.steps()) as steps:
        for step in steps:
            times.append(time.perf_counter())
            show(stop_filter.put(text.put(step)))
    show(stop_filter.put(text.end()))
    show(stop_filter.end())
    row = decoder.rows[0]
    return {
        "text": "".join(pieces),
        "finish_reason": row.finish_reason,
        "prompt_tokens": row.prompt_length,
        "new_tokens": len(times),
        "load_s": round(loaded.load_seconds, 4),
        "ttft_ms": round(1e3 * (times[0] - start), 3),
        # the first token is the prompt's; the rest come at this rate
        "tokens_per_s": round((len(times) - 1) / (times[-1] - times[0]), 2) if len(times) > 1 else None,
        **_where(loaded),
    }


def _where(loaded: _Loaded) -> dict[str, Any]:
    import torch

    return {
        "executor": loaded.executor.name,
        "isa": _isa() if loaded.model.device.type == "cpu" else None,
        "threads": getattr(loaded.executor, "num_threads", 0)
        or int(os.environ.get("GPT2RT_NUM_THREADS") or torch.get_num_threads()),
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }


def _isa() -> str | None:
    from gpt2rt import ops

    return ops.cpu_isa() if ops.extension_status().loaded else None


def _print_stats(result: dict[str, Any]) -> None:
    rate = "-" if result["tokens_per_s"] is None else f"{result['tokens_per_s']:.1f}"
    parts = [
        f"{result['prompt_tokens']} + {result['new_tokens']} tokens ({result['finish_reason']})",
        f"load {result['load_s']:.2f} s",
        f"TTFT {result['ttft_ms']:.1f} ms",
        f"{rate} tokens/s",
        f"executor {result['executor']} ({result['isa'] or result['device']}, {result['threads']} threads, "
        f"{result['dtype']})",
    ]
    if result["seed"] is not None:
        parts.append(f"seed {result['seed']}")
    print(" · ".join(parts), file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    pass


# ---- env -----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example:\n\ngpt2rt env --json")
def env(as_json: _Json = False) -> None:
    """Show versions, hardware, and which form of each op is active and why."""
    from gpt2rt import ops
    from gpt2rt.env import collect

    status = ops.extension_status()
    facts: dict[str, Any] = dict(collect())
    facts["extension"] = {"loaded": status.loaded, "path": status.path, "reason": status.reason}
    facts["isa"] = _isa()
    facts["ops"] = ops.op_forms()
    facts["notes"] = _why_not(facts)
    if as_json:
        print(json.dumps(facts))
        return
    console = _console()
    table = Table(show_header=False, box=None)
    for name, value in _flat(facts, ("ops", "extension", "notes")):
        table.add_row(name, escape(value))
    table.add_row("extension", escape(status.path or f"not loaded: {status.reason}"))
    console.print(table)
    forms = Table("op", "on cpu", "on cuda", box=None)
    for name, places in ops.op_forms().items():
        forms.add_row(name, places["cpu"], places["cuda"])
    console.print()
    console.print(forms)
    console.print()
    for note in facts["notes"]:
        console.print(f"- {escape(note)}")


def _console() -> Console:
    # in a file or pipe lines are not broken
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _flat(facts: dict[str, Any], skip: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if name in skip:
            continue
        if isinstance(value, dict):
            for key, item in value.items():
                yield key, "not installed" if item is None and name == "packages" else str(item)
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value)) or "none"
        else:
            yield name, "none" if value is None else str(value)


def _why_not(facts: dict[str, Any]) -> list[str]:
    """Why the forms that are not active are not."""
    notes = []
    if not facts["extension"]["loaded"]:
        notes.append(f"C++ is not active: {facts['extension']['reason']}")
    elif facts["isa"] != "avx512":
        forced = os.environ.get("GPT2RT_CPU_ISA")
        why = f"GPT2RT_CPU_ISA={forced} forces it" if forced else "this processor has none above it"
        notes.append(f"C++ runs with {facts['isa']}: {why}")
    if facts["packages"].get("triton") is None:
        notes.append("Triton is not active: it is not installed")
    elif not facts["accelerators"]:
        notes.append("Triton is not active: torch sees no CUDA device")
    return notes


# ---- doctor --------------------------------------------------------------------------------------------------------


@app.command(epilog="Examples:\n\ngpt2rt doctor\n\ngpt2rt doctor ./my-gpt2 --json")
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint to compare with transformers.", show_default="the embedded one")
    ] = None,
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Never download.")] = False,
    as_json: _Json = False,
) -> None:
    """Check the installation; with MODEL, compare gpt2rt with transformers on it, side by side."""
    from gpt2rt import doctor as checks

    report = checks.check_install() if model is None else checks.compare(model, local_files_only=local_files_only)
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        _print_report(report)
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


def _print_report(report: Any) -> None:
    console = _console()
    table = Table(box=None, show_header=False)
    colours = {"ok": "green", "note": "yellow", "mismatch": "red"}
    for check in report.checks:
        table.add_row(f"[{colours[check.status]}]{check.status}[/]", escape(check.name), escape(check.detail))
    console.print(table)
    console.print()
    console.print(escape(report.summary))


# ---- the way in ----------------------------------------------------------------------------------------------------


def _debug() -> bool:
    return os.environ.get("GPT2RT_LOG", "").lower() == "debug"


def _complain(kind: str, message: object) -> None:
    print(f"gpt2rt: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if _debug() or not issubclass(category, DeprecationWarning | FutureWarning):
        _complain("warning", message)


def _drop_stdout() -> None:
    """The reader has gone: let nothing else, the interpreter's last flush included, write to it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code."""
    sys.exit(_main(arguments))


def _main(arguments: list[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # text that the terminal's encoding cannot show must not end the program
            stream.reconfigure(errors="replace")
    warnings.showwarning = _show_warning
    try:
        # not app(...): that has exit codes of its own for a broken pipe and for Ctrl-C
        command = typer.main.get_command(app)
        with command.make_context("gpt2rt", sys.argv[1:] if arguments is None else list(arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        _complain("error", "interrupted")
        return EXIT_INTERRUPTED
    except UsageFault as error:
        _complain("error", error)
        return EXIT_USAGE
    except BrokenPipeError:
        # whoever reads has enough
        _drop_stdout()
        return 0
    except Exception as error:
        # the parser's own errors: typer brings its own copy of click's classes in some versions, so go by their methods
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            where = getattr(getattr(error, "ctx", None), "command_path", "gpt2rt")
            _complain("error", f"{error.format_message().rstrip('.')}; see {where} --help")
            return EXIT_USAGE
        if _debug():
            traceback.print_exc()
        _complain("error", error if str(error) else type(error).__name__)
        return EXIT_FAILED


if __name__ == "__main__":
    main()
