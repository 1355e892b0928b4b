"""Tables and plot of a result of cpu_serving.py.

python benchmarks/serving_report.py benchmarks/results/cpu-serving-124M.json            # markdown
python benchmarks/serving_report.py benchmarks/results/cpu-serving-124M.json --png serving.png
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

from cpu_report import WIDTHS, heading, is_ours

BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "nf4": 4}


def speed(result: dict[str, Any], name: str, count: str) -> float:
    """Median output tokens a second."""
    return result["throughput"]["programs"][name]["requests"][count]["output_tokens_per_s"]["median"]


def fastest(result: dict[str, Any], count: str, width: str, among: Callable[[str], bool]) -> str | None:
    """The fastest other program whose weights are at least this wide, or None."""
    programs = result["throughput"]["programs"]
    others = [
        name
        for name, row in programs.items()
        if not is_ours(name) and among(name) and BITS[row["width"]] >= BITS[width]
    ]
    return max(others, key=lambda name: speed(result, name, count), default=None)


RIVALS: dict[str, Callable[[str], bool]] = {
    "fastest other": lambda name: True,
    "transformers, continuous": lambda name: name.startswith("hf-continuous"),
    "CTranslate2": lambda name: name.startswith("ct2"),
}


def counts(result: dict[str, Any]) -> list[str]:
    return list(next(iter(result["throughput"]["programs"].values()))["requests"])


def overview(result: dict[str, Any]) -> str:
    """gpt2rt's formats beside the fastest of the others, as markdown."""
    lines = [
        f"{heading(result)}; median output tokens/s, × = gpt2rt over the fastest of them whose weights are as wide or "
        "wider",
        "",
        "| | requests | gpt2rt | " + " | ".join(f"{rival} | ×" for rival in RIVALS) + " |",
        "| --- | --- | --- |" + " --- | --- |" * len(RIVALS),
    ]
    for name, row in result["throughput"]["programs"].items():
        if not is_ours(name):
            continue
        for count in counts(result):
            mine = speed(result, name, count)
            cells = [name, count, f"{mine:.0f}"]
            for among in RIVALS.values():
                rival = fastest(result, count, row["width"], among)
                if rival is None:
                    cells += ["", ""]
                else:
                    theirs = speed(result, rival, count)
                    cells += [f"{theirs:.0f} ({rival})", f"{mine / theirs:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def details(result: dict[str, Any]) -> str:
    """Everybody, as markdown, in groups of equal width; then who is missing and why."""
    lines = [
        "| width | | requests | tokens/s (p10) | TTFT ms p50 / p99 | ITL ms p50 / p99 | same tokens | peak MB |",
        "|" + " --- |" * 8,
    ]
    programs = result["throughput"]["programs"]
    for width in WIDTHS:
        group = [(name, row) for name, row in programs.items() if row["width"] == width]
        for name, row in sorted(group, key=lambda item: not is_ours(item[0])):
            for count, measured in row["requests"].items():
                rate = measured["output_tokens_per_s"]
                cells = [width, f"**{name}**" if is_ours(name) else name, count]
                cells.append(f"{rate['median']:.0f} ({rate['p10']:.0f})")
                for times in (measured["ttft_ms"], measured["itl_ms"]):
                    cells.append("" if times is None else f"{times['p50']:.1f} / {times['p99']:.1f}")
                same = measured["same_tokens"]
                cells += ["" if same is None else f"{100 * same:.0f} %", f"{row['peak_megabytes']:.0f}"]
                lines.append("| " + " | ".join(cells) + " |")
    absent = result["throughput"]["left_out"] | {
        name: f"failed: {reason}" for name, reason in result["throughput"]["failed"].items()
    }
    for reason in dict.fromkeys(absent.values()):
        who = ", ".join(name for name, why in absent.items() if why == reason)
        lines.append(f"\n{who}: {reason}")
    return "\n".join(lines)


def itl_table(result: dict[str, Any]) -> str:
    """The times between tokens, alone and beside long prompts."""
    length = result["arguments"]["long_prompt"]
    lines = [
        f"Time between tokens in ms, alone and while prompts of {length} tokens are computed; TTFT of such a prompt",
        "",
        "| | prefill_slowdown | streams | alone p50 / p99 | beside p50 / p99 / max | p99 ratio | TTFT alone | beside |",
        "|" + " --- |" * 8,
    ]
    for row in result["itl"]:
        alone, beside, first = row["unloaded_ms"], row["loaded_ms"], row["prompt_ttft_ms"]
        cells = [row["format"], str(row["prefill_slowdown"]), str(row["streams"])]
        cells += [f"{alone['p50']:.1f} / {alone['p99']:.1f}"]
        cells += [f"{beside['p50']:.1f} / {beside['p99']:.1f} / {beside['max']:.1f}", f"{row['p99_ratio']:.2f}"]
        cells += [f"{first['alone']:.0f}", f"{first['beside_streams']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def loop_table(result: dict[str, Any]) -> str:
    """Where a step's time goes."""
    names = ("engine", "executor", "loop", "choosing", "python", "seen")
    lines = [
        "Median µs of a step, batch 1: the engine's, the executor's, their difference, of it the operations that "
        "choose a token, the rest; and between two outputs of LLM.stream beyond the executor",
        "",
        "| | choice | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for row in result["loop"]:
        cells = [row["model"], row["choice"], *(f"{row['us'][name]['median']:.1f}" for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(result: dict[str, Any]) -> str:
    """All that there is of a result."""
    parts = []
    if "throughput" in result:
        parts += [overview(result), details(result)]
    if "itl" in result:
        parts.append(itl_table(result))
    if "loop" in result:
        parts.append(loop_table(result))
    return "\n\n".join(parts)


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Bars of output tokens a second: a panel for each number of requests, programs in groups of equal width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    programs = result["throughput"]["programs"]
    order = [name for width in reversed(WIDTHS) for name in reversed(programs) if programs[name]["width"] == width]
    columns = counts(result)
    size = (6 * len(columns), 1.5 + 0.3 * len(order))
    figure, panels = pyplot.subplots(1, len(columns), figsize=size, squeeze=False, sharey=True)
    for panel, count in zip(panels[0], columns, strict=True):
        values = [speed(result, name, count) for name in order]
        bars = panel.barh(order, values, color=["#c2410c" if is_ours(name) else "#94a3b8" for name in order])
        panel.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        panel.set_title(f"{count} requests at once")
        panel.set_xlabel("output tokens / s")
        panel.margins(x=0.12)
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
    print(tables(result))
    if arguments.png:
        plot(result, arguments.png)


if __name__ == "__main__":
    main()
