"""Writes the list of kernels into docs/kernels.md.

    python docs/kernels.py

What stands after the mark in docs/kernels.md is made here, out of ``gpt2rt.lab.registry`` and of the results that are
kept: benchmarks/results/kernels-*.json of ``gpt2rt bench kernels --json`` and benchmarks/results/gpu-*.json of gpu.py.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
MARK = "<!-- made by docs/kernels.py -->"


class Measured(NamedTuple):
    """One form at one size: median microseconds, and the share of what the device allows (None: no limit)."""

    op: str
    device: str
    dtype: str
    size: str
    form: str
    us: float
    share: float | None


def read_results() -> list[Measured]:
    """All times that are kept."""
    found = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("kernels-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        machine = result["machine"]
        threads = f"{machine['torch_threads']} thread" + ("s" if machine["torch_threads"] > 1 else "")
        device = f"{machine['cpu']}, {threads}" if result["device"] == "cpu" else machine["accelerators"][0]
        for row in result["kernels"]:
            for form, entry in row["forms"].items():
                if entry["us"] is not None:
                    size = _words(row["size"])
                    found.append(Measured(row["op"], device, row["dtype"], size, form, entry["us"], entry["share"]))
    for path in sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["sections"].get("kernels", {"rows": []})["rows"]:
            for form, entry in row.get("us", {}).items():
                if entry is not None:
                    place = result["machine"]["device"], row["dtype"], _words(row["size"])
                    found.append(Measured(row["op"], *place, form, entry["median"], entry["share_of_floor"]))
    return found


def _words(size: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in size.items())


def _place(target: str) -> str:
    module, _, function = target.partition(":")
    return f"kernels/{module}.py `{function}`"


def section(operation: Any, measured: list[Measured]) -> str:
    """One kernel."""
    from gpt2rt.lab.registry import TOLERANCE

    allowed = "none: equal to the bit"
    if not operation.exact:
        kinds = [operation.dtype] if operation.dtype else list(TOLERANCE)
        allowed = ", ".join(f"{str(kind).removeprefix('torch.')} {TOLERANCE[kind]:.1e}" for kind in kinds)
    rows = [
        ("definition", _place(operation.reference)),
        ("Triton", "; ".join(_place(target) for target in operation.triton)),
        ("C++", f"csrc/cpu/{operation.cpp}" if operation.cpp else "none"),
        ("error allowed", allowed),
        ("bounded by", operation.limit),
        ("sizes", "; ".join(_words(size) for size in operation.sizes)),
    ]
    lines = [f"### {operation.name}", "", f"`{operation.maths}`", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {text} |" for name, text in rows]
    own = [m for m in measured if m.op == operation.name]
    for device in dict.fromkeys(m.device for m in own):
        lines += [
            "",
            f"Measured on {device}:",
            "",
            "| size | dtype | form | us | share of limit |",
            "| --- |" + " --- |" * 4,
        ]
        for m in (m for m in own if m.device == device):
            share = "" if m.share is None else f"{100 * m.share:.0f} %"
            us = f"{m.us:.0f}" if m.us >= 100 else f"{m.us:.3g}"
            lines.append(f"| {m.size} | {m.dtype} | {m.form} | {us} | {share} |")
    return "\n".join(lines)


def page() -> str:
    """The page as it should be."""
    from gpt2rt.lab.registry import OPERATIONS

    text = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    measured = read_results()
    return text + MARK + "\n\n" + "\n\n".join(section(o, measured) for o in OPERATIONS.values()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
