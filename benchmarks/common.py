"""What every benchmark needs: a description of the machine, statistics, results on disk."""

from __future__ import annotations

import datetime
import json
import pathlib
import statistics
import subprocess

from gpt2rt import env

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def _git(*arguments: str) -> str:
    root = pathlib.Path(__file__).resolve().parent
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        # a machine without git
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def describe() -> dict:
    """Versions, hardware and commit; a result without them says nothing."""
    from gpt2rt import ops

    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    dirty = "+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
    isa = ops.cpu_isa() if ops.extension_status().loaded else "torch"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit + dirty,
        "isa": isa,
        **env.collect(),
    }


def percentile(values: list[float], percent: float) -> float:
    """The value below which this share of the samples lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def summary(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile and number of samples."""
    return {
        "median": statistics.median(values),
        "p10": percentile(values, 10),
        "p90": percentile(values, 90),
        "samples": len(values),
    }


def write_json(path: pathlib.Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
