"""``gpt2rt doctor``: is this installation good, and does it agree with transformers?"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .common import JsonFlag, LocalOnly, console

EXAMPLES = "Examples:\n\ngpt2rt doctor\n\ngpt2rt doctor ./my-gpt2 --json"


def command(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint to compare with transformers.", show_default="the embedded one")
    ] = None,
    local_files_only: LocalOnly = False,
    as_json: JsonFlag = False,
) -> None:
    """Check the installation; with MODEL, compare gpt2rt with transformers on it, side by side."""
    from gpt2rt import doctor as checks

    report = checks.check_install() if model is None else checks.compare(model, local_files_only=local_files_only)
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        _print_report(report)
    if not report.ok:
        # nothing went wrong but the answer is no
        raise typer.Exit(1)


def _print_report(report: Any) -> None:
    out = console()
    table = Table(box=None, show_header=False)
    colours = {"ok": "green", "note": "yellow", "mismatch": "red"}
    for check in report.checks:
        table.add_row(f"[{colours[check.status]}]{check.status}[/]", escape(check.name), escape(check.detail))
    out.print(table)
    out.print()
    out.print(escape(report.summary))
