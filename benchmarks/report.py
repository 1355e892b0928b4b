"""Tables and plots out of the results of gpu.py.

    python benchmarks/report.py benchmarks/results/gpu-*.json                # markdown, targets first
    python benchmarks/report.py results.json --plots folder                  # roofline.png and decode.png as well

Several files are read as one run; they must be of one device. Of equal rows the forms come together, and of equal forms
the last counts: a run with ``GPT2RT_CUDA_PERSISTENT=1`` adds its forms to those of a run without. Targets
(gpu_targets.toml) stand beside what gpt2rt does by default and beside the best of its forms, with its name; those in
microseconds are scaled to the bandwidth of the device.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tomllib
from collections.abc import Iterable, Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
#: what gpt2rt does unless it is asked for another form
DEFAULT = "gpt2rt"


class Report:
    """The rows of one or more result files.

    Args:
        results: what gpu.py wrote, oldest first.

    Raises:
        ValueError: none, one of a run that did not begin, or results of different devices.
    """

    def __init__(self, results: list[dict[str, Any]]) -> None:
        if not results:
            raise ValueError("no result was given; gpu.py writes them")
        if not all("machine" in result for result in results):
            raise ValueError("a result says nothing of its machine: its run ended before anything was measured")
        devices = {str(result["machine"].get("device")) for result in results}
        if len(devices) > 1:
            raise ValueError(f"the results are of different devices, {', '.join(sorted(devices))}; report each alone")
        self.results = results
        self.sections: dict[str, dict[str, dict[str, Any]]] = {}
        self.unfinished: list[str] = []
        for result in results:
            for name, section in result["sections"].items():
                rows = self.sections.setdefault(name, {})
                for row in section["rows"]:
                    rows[row["name"]] = together(rows.get(row["name"]), row)
                if section["state"] != "done":
                    self.unfinished.append(f"{name} {section['state']}: {section['error']}")
        found = [result["limits"] for result in results if result.get("limits")]
        self.limits: dict[str, float] | None = found[-1] if found else None

    def rows(self, kind: str, sections: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """Rows of a kind, in the order of their sections."""
        for name, rows in self.sections.items():
            if sections is None or name in sections:
                yield from (row for row in rows.values() if row["kind"] == kind)

    def find(self, name: str) -> dict[str, Any] | None:
        """The row of that name."""
        return next((rows[name] for rows in self.sections.values() if name in rows), None)

    # ---- tables ----------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """Everything, as markdown."""
        parts = [self.heading(), self.targets(), self.ahead(), self.checks()]
        for name, rows in self.sections.items():
            if any(row["kind"] == "times" for row in rows.values()):
                parts.append(f"### {name}\n\n{times_table([r for r in rows.values() if r['kind'] == 'times'])}")
        parts.append(self.values())
        return "\n\n".join(part for part in parts if part)

    def heading(self) -> str:
        """Device, software and commit, and what is missing."""
        machine = self.results[-1]["machine"]
        packages = machine.get("packages", {})
        versions = ", ".join(f"{name} {packages.get(name)}" for name in ("torch", "triton", "transformers"))
        device = machine.get("device") or "no GPU (dry run: no times)"
        commits = ", ".join(dict.fromkeys(result["machine"]["commit"] for result in self.results))
        driver = f", driver {machine['driver']}" if machine.get("driver") else ""
        lines = [f"{device}{driver}; {versions}; commit {commits}; {machine['date']}"]
        if self.limits:
            terabytes, teraflops = self.limits["bytes_per_s"] * 1e-12, self.limits["operations_per_s"] * 1e-12
            lines.append(f"Measured limits: {terabytes:.2f} TB/s, {teraflops:.0f} TFLOP/s (float16).")
        lines += [f"Not complete: {text}." for text in self.unfinished]
        return "\n\n".join(lines)

    def targets(self) -> str:
        """Targets beside what was measured; those without a result are listed as not measured."""
        table = tomllib.loads((HERE / "gpu_targets.toml").read_text(encoding="utf-8"))
        lines = [
            "| target | floor | goal 1 | goal 2 | stretch | gpt2rt | reached | best form of gpt2rt | reached by it |",
            "| --- |" + " --- |" * 8,
        ]
        for target in table["target"]:
            quantity = target["quantity"]
            scale = table["bandwidth"] / self.limits["bytes_per_s"] if self.limits else 1.0
            floor = target.get("floor")
            shift = 0.0 if floor is None or quantity != "us" else floor * (scale - 1.0)
            goals = [goal + shift for goal in target["goals"]]
            rows = [self.find(name) for name in (target["row"], *target.get("also", ()))]
            found = measured(rows, (DEFAULT, *target.get("forms", ())), quantity)
            value = found.get(DEFAULT)
            cells = [target["measure"], "" if floor is None else number(floor + shift)]
            cells += [number(goal) for goal in goals] + [""] * (3 - len(goals))
            cells += ["not measured" if value is None else number(value), reached(value, goals, quantity)]
            best = (max if quantity == "share" else min)(found, key=lambda form: found[form], default=None)
            if best is None or best == DEFAULT:
                cells += ["", ""]
            else:
                cells += [f"{number(found[best])} ({best})", reached(found[best], goals, quantity)]
            lines.append("| " + " | ".join(cells) + " |")
        return "### Targets\n\n" + "\n".join(lines)

    def ahead(self) -> str:
        """What a user waits for beside the fastest of transformers, whose model is in float16 whatever ours is in."""
        lines = []
        for row in self.rows("times", ["decode", "prefill"]):
            kind, _, model = row["name"].partition(f" {row.get('model')} ")
            if kind not in ("generate", "first token"):
                continue
            plain = self.find(f"{kind} {row['model']} float16{model.removeprefix(title_of(row))}") or {"us": {}}
            peers = {form: e["median"] for form, e in plain["us"].items() if e and form.startswith("transformers")}
            fastest = min(peers, key=lambda form: peers[form], default=None)
            for form, entry in row["us"].items():
                if fastest is None or not entry or not is_ours(form):
                    continue
                ratio = peers[fastest] / entry["median"]
                lines.append(
                    f"| {row['name']} | {number(entry['median'])} ({form}) | {number(peers[fastest])} ({fastest}) | "
                    f"{ratio:.2f} | {'ahead' if ratio > 1.0 else '**behind**'} |"
                )
        if not lines:
            return ""
        head = "| what a user waits for, us | gpt2rt | fastest of transformers, float16 | speed ratio | |\n"
        return "\n".join([head + "| --- | --- | --- | --- | --- |", *lines])

    def checks(self) -> str:
        """How many statements hold, and every one that does not."""
        rows = [*self.rows("check"), *self.rows("failed")]
        rows += [row for row in self.rows("times") if not row["ok"]]
        bad = [row for row in rows if not row["ok"]]
        lines = [f"Checks: {len(rows) - len(bad)} of {len(rows)} hold."]
        for row in bad:
            why = row.get("error") or row.get("failed") or row.get("errors") or row.get("differing") or ""
            lines.append(f"- **{row['name']}**: {why}")
        lines += [f"- {row['name']}: {row['text']}" for row in self.rows("note")]
        return "\n".join(lines)

    def values(self) -> str:
        """Single numbers."""
        rows = [row for row in self.rows("value") if row["value"] is not None]
        if not rows:
            return ""
        lines = [f"| {row['name']} | {number(row['value'])} {row['unit']} |" for row in rows]
        return "\n".join(["| measured | |", "| --- | --- |", *lines])

    # ---- plots -----------------------------------------------------------------------------------------------------

    def plots(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Draw what there is to draw; needs matplotlib.

        Returns:
            The files that were written.
        """
        import matplotlib

        matplotlib.use("Agg")
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [self._roofline(folder / "roofline.png"), self._decode(folder / "decode.png")]
        return [path for path in drawn if path is not None]

    def roofline_points(self) -> list[tuple[str, float, float]]:
        """(kernel, operations a byte, TFLOP/s) of every kernel that multiplies."""
        return [
            (row["op"], row["operations"] / row["bytes"], row["operations"] / row["us"]["gpt2rt"]["median"] * 1e-6)
            for row in self.rows("times", ["kernels"])
            if row["us"].get("gpt2rt") and row["operations"]
        ]

    def decode_lines(
        self, model: str = "124M", format: str = "float16"
    ) -> dict[tuple[int, str], list[tuple[int, float]]]:
        """(sequences, form) -> [(context, us a step), ...] in order of the context."""
        lines: dict[tuple[int, str], list[tuple[int, float]]] = {}
        rows = [row for row in self.rows("times", ["decode", "throughput"]) if "context" in row]
        for row in sorted(rows, key=lambda row: (row["batch"], row["context"])):
            for form in ("gpt2rt", "torch in a graph"):
                entry = row["us"].get(form)
                if entry and (row["model"], row["format"]) == (model, format):
                    lines.setdefault((row["batch"], form), []).append((row["context"], entry["median"]))
        return lines

    def _roofline(self, path: pathlib.Path) -> pathlib.Path | None:
        points = self.roofline_points()
        if not points or not self.limits:
            return None
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 5.5))
        ridge = self.limits["operations_per_s"] / self.limits["bytes_per_s"]
        low, high = min(p[1] for p in points) / 2, max(*(p[1] for p in points), ridge) * 2
        peak = self.limits["operations_per_s"] * 1e-12
        axes.plot([low, ridge, high], [low * self.limits["bytes_per_s"] * 1e-12, peak, peak], color="black")
        for number, op in enumerate(dict.fromkeys(p[0] for p in points)):
            mine = [p for p in points if p[0] == op]
            axes.scatter([p[1] for p in mine], [p[2] for p in mine], s=18, color=f"C{number}", label=op)
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
        axes.legend(fontsize=8)
        axes.set_title(f"{self.results[-1]['machine'].get('device')}: kernels below the measured roofline")
        return _saved(figure, path)

    def _decode(self, path: pathlib.Path) -> pathlib.Path | None:
        lines = self.decode_lines()
        if not lines:
            return None
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 5.5))
        batches = list(dict.fromkeys(batch for batch, _ in lines))
        for (batch, form), line in lines.items():
            style = "o-" if form == "gpt2rt" else "x--"
            colour = f"C{batches.index(batch)}"
            axes.plot(*zip(*line, strict=True), style, color=colour, label=f"batch {batch}, {form}", linewidth=1)
        axes.set(xlabel="context, tokens", ylabel="us a step", yscale="log")
        axes.legend(fontsize=7)
        axes.set_title(f"GPT-2 124M float16, {self.results[-1]['machine'].get('device')}: a decode step")
        return _saved(figure, path)


def _saved(figure: Any, path: pathlib.Path) -> pathlib.Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def is_ours(form: str) -> bool:
    """Whether a form is gpt2rt's."""
    return form == DEFAULT or form.startswith((f"{DEFAULT},", f"{DEFAULT} "))


def title_of(row: dict[str, Any]) -> str:
    """The formats in a row's name: those of the layers, and of the head if it has another."""
    layers, head = row.get("layers", row.get("format", "")), row.get("head")
    return layers if head in (None, layers) else f"{layers}, head {head}"


def together(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """One row out of two of one name: the forms of both, and of what both have that of the second."""
    if first is None or not first["kind"] == second["kind"] == "times":
        return second
    failed = {form: why for form, why in first["failed"].items() if form not in second["us"]} | second["failed"]
    us = {form: entry for form, entry in first["us"].items() if form not in failed} | second["us"]
    peers = {form: entry["median"] for form, entry in us.items() if entry and not is_ours(form)}
    floors = [row["floor_us"] for row in (second, first) if row["floor_us"] is not None]
    return {
        **first,
        **second,
        "us": us,
        "failed": failed,
        "floor_us": floors[0] if floors else None,
        "fastest_peer": min(peers, key=lambda form: peers[form], default=None),
        "ok": not any(is_ours(form) for form in failed),
    }


def measured(rows: Iterable[dict[str, Any] | None], forms: Iterable[str], quantity: str) -> dict[str, float]:
    """What a target asks for, by form of gpt2rt: microseconds, percent of the floor, or a value.

    Args:
        rows: in which it may stand, the target's own first; None: it was not measured.
        forms: that count.
        quantity: "us", "share" or "value".
    """
    found: dict[str, float] = {}
    for row in rows:
        if row is None:
            continue
        if quantity == "value" and row["kind"] == "value" and row["value"] is not None:
            found.setdefault(DEFAULT, row["value"])
        if quantity == "value" or row["kind"] != "times":
            continue
        for form in forms:
            entry = row["us"].get(form)
            value = entry and (entry["median"] if quantity == "us" else entry.get("share_of_floor"))
            if value is not None:
                found.setdefault(form, value if quantity == "us" else 100.0 * value)
    return found


def reached(value: float | None, goals: list[float], quantity: str) -> str:
    """The furthest goal that a value reaches; shares count upwards, all else downwards."""
    if value is None:
        return ""
    names = ("goal 1", "goal 2", "stretch")
    met = [
        name
        for name, goal in zip(names, goals, strict=False)
        if (value >= goal if quantity == "share" else value <= goal)
    ]
    return met[-1] if met else "missed"


def times_table(rows: list[dict[str, Any]]) -> str:
    """Times of gpt2rt beside the fastest peer and the floor, then all other forms."""
    lines = [
        "| | gpt2rt us (p10) | fastest peer us | speed over it | floor us | share of floor | others, us |",
        "| --- |" + " --- |" * 6,
    ]
    for row in rows:
        entry = row["us"].get("gpt2rt")
        cells = [row["name"]]
        cells.append(f"{number(entry['median'])} ({number(entry['p10'])})" if entry else "")
        fastest = row["fastest_peer"]
        cells.append(f"{number(row['us'][fastest]['median'])} ({fastest})" if fastest else "")
        ratio = entry and entry["speed_over_fastest_peer"]
        cells.append(f"{ratio:.2f}" if ratio else "")
        cells.append("" if row["floor_us"] is None else number(row["floor_us"]))
        share = entry and entry["share_of_floor"]
        cells.append(f"{100 * share:.0f} %" if share else "")
        others = [f"{f} {number(e['median'])}" for f, e in row["us"].items() if e and f not in ("gpt2rt", fastest)]
        others += [f"{form} failed" for form in row["failed"]]
        cells.append(", ".join(others))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=pathlib.Path)
    parser.add_argument("--plots", type=pathlib.Path, help="folder for pictures")
    options = parser.parse_args(arguments)
    try:
        report = Report([json.loads(path.read_text(encoding="utf-8")) for path in options.results])
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print(report.text())
    if options.plots is not None:
        for path in report.plots(options.plots):
            print(f"\n![{path.stem}]({path})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
