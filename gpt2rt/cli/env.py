"""``gpt2rt env``: what is installed here and what of it is used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from .common import JsonFlag, console, isa

EXAMPLES = "Example:\n\ngpt2rt env --json"


def command(as_json: JsonFlag = False) -> None:
    """Show versions, hardware, and which form of each op is active and why."""
    from gpt2rt import ops
    from gpt2rt.env import collect
    from gpt2rt.ops.cuda_extension import cuda_extension_status

    status, in_cuda = ops.extension_status(), cuda_extension_status()
    facts: dict[str, Any] = dict(collect())
    facts["extension"] = {"loaded": status.loaded, "path": status.path, "reason": status.reason}
    facts["cuda_extension"] = {"loaded": in_cuda.loaded, "path": in_cuda.path, "reason": in_cuda.reason}
    facts["isa"] = isa()
    facts["ops"] = ops.op_forms()
    facts["notes"] = _why_not(facts)
    if as_json:
        print(json.dumps(facts))
        return
    out = console()
    table = Table(show_header=False, box=None)
    for name, value in _flat(facts, ("ops", "extension", "cuda_extension", "notes")):
        table.add_row(name, escape(value))
    table.add_row("extension", escape(status.path or f"not loaded: {status.reason}"))
    table.add_row("cuda extension", escape(in_cuda.path or f"not loaded: {in_cuda.reason}"))
    out.print(table)
    forms = Table("op", "on cpu", "on cuda", box=None)
    for name, places in ops.op_forms().items():
        forms.add_row(name, places["cpu"], places["cuda"])
    out.print()
    out.print(forms)
    out.print()
    for note in facts["notes"]:
        out.print(f"- {escape(note)}")


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
    from gpt2rt import ops

    notes = []
    if not facts["extension"]["loaded"]:
        notes.append(f"C++ is not active: {facts['extension']['reason']}")
    elif limit := ops.cpu_isa_limit():
        notes.append(f"C++ runs with {facts['isa']}: {limit}")
    if facts["packages"].get("triton") is None:
        notes.append("Triton is not active: it is not installed")
    elif not facts["accelerators"]:
        notes.append("Triton is not active: torch sees no CUDA device")
    return notes
