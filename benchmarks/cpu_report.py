"""Tables and plot of a result of cpu_decode.py.

python benchmarks/cpu_report.py benchmarks/results/cpu-decode-124M-formats.json            # markdown
python benchmarks/cpu_report.py benchmarks/results/cpu-decode-124M-formats.json --png 124M.png
"""

from __future__ import annotations

import argparse
import json
import pathlib

WIDTHS = ("fp32", "bf16", "int8", "int4", "nf4")


def is_ours(name: str) -> bool:
    return name.startswith("gpt2rt")


def scenario_names(result: dict) -> list[str]:
    return list(next(iter(result["peers"].values()))["scenarios"])


def heading(result: dict) -> str:
    machine, arguments = result["machine"], result["arguments"]
    where = f"{machine['cpu']}, {machine['isa']}, commit {machine['commit']}"
    return f"{arguments['shape']}, {arguments['threads']} threads, {where}"


def fastest_other(result: dict, width: str, scenario: str) -> tuple[str, float] | None:
    """(name, median ms) of the fastest other program with weights of this width, or None if there is none."""
    others = [
        (name, row["scenarios"][scenario]["ms"]["median"])
        for name, row in result["peers"].items()
        if row["width"] == width and not is_ours(name)
    ]
    return min(others, key=lambda other: other[1], default=None)


def speed_ratio(result: dict, name: str, scenario: str) -> float | None:
    """Speed of a peer over that of the fastest other program of the same width, both at the median."""
    row = result["peers"][name]
    best = fastest_other(result, row["width"], scenario)
    return None if best is None else best[1] / row["scenarios"][scenario]["ms"]["median"]


def overview(result: dict) -> str:
    """What it comes to, as markdown: gpt2rt's formats, each beside the fastest other program of its width."""
    names = scenario_names(result)
    lines = [
        f"{heading(result)}; median ms of gpt2rt, of the fastest other program of the same width, and × = the ratio of "
        "speeds",
        "",
        "| | " + " | ".join(f"{name} | fastest other | ×" for name in names) + " |",
        "| --- |" + " --- | --- | --- |" * len(names),
    ]
    for name, row in result["peers"].items():
        if not is_ours(name):
            continue
        cells = [name]
        for scenario in names:
            cells.append(f"{row['scenarios'][scenario]['ms']['median']:.2f}")
            other, ratio = fastest_other(result, row["width"], scenario), speed_ratio(result, name, scenario)
            cells += ["", ""] if other is None else [f"{other[1]:.2f} ({other[0]})", f"{ratio:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def details(result: dict) -> str:
    """Everybody, as markdown: a row a peer, in groups of equal width, gpt2rt first; then who is missing and why."""
    names = scenario_names(result)
    lines = [
        f"{heading(result)}; ms p10 / median; × = speed over the fastest other program of the same width; "
        "floor = bytes of weights / measured read bandwidth",
        "",
        "| width | | " + " | ".join(f"{name} ms | ×" for name in names) + " | MB a step | × floor | peak MB |",
        "| --- | --- |" + " --- | --- |" * len(names) + " --- | --- | --- |",
    ]
    for width in WIDTHS:
        group = [(name, row) for name, row in result["peers"].items() if row["width"] == width]
        for name, row in sorted(group, key=lambda item: not is_ours(item[0])):
            cells = [width, f"**{name}**" if is_ours(name) else name]
            for scenario in names:
                times, ratio = row["scenarios"][scenario]["ms"], speed_ratio(result, name, scenario)
                cells += [f"{times['p10']:.2f} / {times['median']:.2f}", "" if ratio is None else f"{ratio:.2f}"]
            decode = row["scenarios"].get("decode-1")
            share = f"{decode['ms']['median'] / row['floor_ms']:.2f}" if decode else ""
            cells += [f"{row['step_megabytes']:.1f}", share, f"{row['peak_megabytes']:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    absent = result["left_out"] | {name: f"failed: {reason}" for name, reason in result["failed"].items()}
    for reason in dict.fromkeys(absent.values()):
        who = ", ".join(name for name, why in absent.items() if why == reason)
        lines.append(f"\n{who}: {reason}")
    return "\n".join(lines)


def plot(result: dict, path: pathlib.Path) -> None:
    """Bars of speed over the fastest other program of the same width: a panel a scenario, a group a width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = scenario_names(result)
    figure, panels = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), 6), squeeze=False, sharey=True)
    order = [name for width in reversed(WIDTHS) for name, row in result["peers"].items() if row["width"] == width]
    for panel, scenario in zip(panels[0], names, strict=True):
        # without another program of its width a peer has no bar
        ratios = [speed_ratio(result, name, scenario) or 0.0 for name in order]
        panel.barh(order, ratios, color=["#c2410c" if is_ours(name) else "#94a3b8" for name in order])
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_title(scenario)
        panel.set_xlabel("speed / fastest other of the width")
    figure.suptitle(f"GPT-2 {result['arguments']['shape']}, {result['arguments']['threads']} threads")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=pathlib.Path)
    parser.add_argument("--png", type=pathlib.Path)
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    print(overview(result), details(result), sep="\n\n")
    if arguments.png:
        plot(result, arguments.png)


if __name__ == "__main__":
    main()
