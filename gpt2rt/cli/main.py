"""The way in: the commands, and how every one of them ends.

Exit codes: 0 ok, 1 failed, 2 wrong usage, 130 interrupted. Every error is one sentence on stderr;
``GPT2RT_LOG=debug`` adds the traceback. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer

from . import bench, doctor, env, generate, quantize, run, score, serve, warmup
from .common import UsageFault

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="gpt2rt",
    help="A small, exact, measured runtime for GPT-2 and OpenAI GPT models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for module in (generate, run, score, serve, quantize, warmup, env, doctor):
    app.command(name=module.__name__.rpartition(".")[2], epilog=module.EXAMPLES)(module.command)
app.add_typer(bench.app, name="bench")


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
    if arguments is None:
        # a process of its own: all that is imported stays to the end, and walking through torch's objects again and
        # again would take a quarter of a short command's time
        gc.freeze()
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
