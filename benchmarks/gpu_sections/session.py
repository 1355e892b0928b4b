"""A run of gpu.py: what it measures on, its rows, the file they go to, and the time that is left."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from common import describe as describe_machine
from common import write_json

from gpt2rt.lab.timing import Timer, Times, describe, measure_limits


def is_ours(name: str) -> bool:
    """Whether a time is gpt2rt's; the others are peers."""
    return name.partition(",")[0].split(" ")[0] == "gpt2rt"


class OutOfTime(Exception):
    """The budget of the run is spent; what was measured is on disk."""


class DeviceLostError(Exception):
    """The process's context on the device is broken, as an illegal address leaves it; only a new process can go on."""


class Session:
    """Rows of results, written to ``out`` one by one.

    Args:
        device: where everything runs.
        out: the JSON file; None writes none.
        minutes: the budget of the run.
        dry: a CPU in Triton's interpreter, toy sizes: results are checked, times are not kept.
        smallest: toy sizes on a device.
        arguments: of the command line, for the record.

    Attributes:
        dtype: of weights and activations unless a section says otherwise.
        result: what is written.
        ok: no check failed, nothing raised.
    """

    def __init__(
        self,
        device: torch.device,
        out: pathlib.Path | None,
        *,
        minutes: float = 60.0,
        dry: bool = False,
        smallest: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.device, self.out, self.dry = device, out, dry
        self.toy = dry or smallest
        self.dtype = torch.float16
        self._started = time.monotonic()
        self._deadline = self._started + 60.0 * minutes
        self._rows: list[dict[str, Any]] = []
        self._limits: dict[str, float] | None = None
        self.result: dict[str, Any] = {
            "machine": {**describe_machine(), **describe_device(device)},
            "arguments": dict(arguments or {}),
            "dry": dry,
            "limits": None,
            "sections": {},
        }

    @property
    def ok(self) -> bool:
        sections = self.result["sections"].values()
        return all(s["state"] != "failed" for s in sections) and not self.failures()

    def failures(self) -> list[str]:
        """Rows that say no, as "section: name"."""
        sections = self.result["sections"].items()
        return [
            f"{name}: {row['name']}" for name, section in sections for row in section["rows"] if row.get("ok") is False
        ]

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def minutes_left(self) -> float:
        """Of the budget."""
        return max(0.0, self._deadline - time.monotonic()) / 60.0

    def need(self, seconds: float) -> None:
        """Raise :class:`OutOfTime` unless so much is left."""
        if not self.dry and time.monotonic() + seconds > self._deadline:
            raise OutOfTime

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Rows made inside belong to this section; an exception ends the section, not the run."""
        entry: dict[str, Any] = {"state": "running", "seconds": 0.0, "error": None, "rows": []}
        self.result["sections"][name] = entry
        self._rows = entry["rows"]
        start = time.monotonic()
        try:
            yield
            entry["state"] = "done"
        except OutOfTime:
            entry["state"] = "stopped"
            entry["error"] = "the time of --minutes was spent"
        except Exception as error:
            entry["state"], entry["error"] = "failed", describe(error)
            print(f"section {name} failed: {entry['error']}", file=sys.stderr, flush=True)
            if isinstance(error, DeviceLostError):
                raise
        finally:
            entry["seconds"] = round(time.monotonic() - start, 1)
            self.write()

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """One part of a section: an exception becomes a failed row, and the section goes on."""
        try:
            yield
        except OutOfTime:
            raise
        except Exception as error:
            self._add({"kind": "failed", "name": name, "ok": False, "error": describe(error)})
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise DeviceLostError(f"after {name}: {describe(error)}") from error

    # ---- rows ------------------------------------------------------------------------------------------------------

    def check(self, name: str, ok: bool, **facts: Any) -> None:
        """A statement that holds or not, and the numbers behind it."""
        self._add({"kind": "check", "name": name, "ok": bool(ok), **facts})

    def value(self, name: str, value: float | None, unit: str, **facts: Any) -> None:
        """One measured number; a dry run keeps none."""
        self._add({"kind": "value", "name": name, "value": None if self.dry else value, "unit": unit, **facts})

    def note(self, name: str, text: str) -> None:
        """Something that was not measured, and why."""
        self._add({"kind": "note", "name": name, "text": text})

    def record(self, kind: str, name: str, text: str, **facts: Any) -> None:
        """A row of a program's own kind; ``text`` is what it prints."""
        self._add({"kind": kind, "name": name, "text": text, **facts})

    def times(
        self,
        name: str,
        times: Mapping[str, Times],
        failed: Mapping[str, str] | None = None,
        *,
        floor_us: float | None = None,
        **facts: Any,
    ) -> None:
        """Times of gpt2rt and its peers for the same work.

        Args:
            name: of the row; targets are found by it.
            times: by form; those of gpt2rt are called "gpt2rt" or "gpt2rt, ...".
            failed: forms that could not run, and why. One of gpt2rt's makes the row say no.
            floor_us: what the bytes or operations take at the measured limits.
            facts: what the row is about.
        """
        failed = dict(failed or {})
        medians = {form: t.median for form, t in times.items()}
        peers = {form: us for form, us in medians.items() if not is_ours(form)}
        fastest = min(peers, key=lambda form: peers[form], default=None)
        row: dict[str, Any] = {"kind": "times", "name": name, **facts, "us": {}, "failed": failed}
        for form, t in times.items():
            entry: dict[str, Any] = {"median": t.median, "p10": t.p10, "samples": t.samples, "captured": t.captured}
            if is_ours(form):
                entry["speed_over_fastest_peer"] = peers[fastest] / t.median if fastest else None
            entry["share_of_floor"] = None if floor_us is None else floor_us / t.median
            row["us"][form] = None if self.dry else entry
        row["fastest_peer"] = None if self.dry else fastest
        row["floor_us"] = None if self.dry else floor_us
        row["ok"] = not any(is_ours(form) for form in failed)
        self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        print(f"{self.seconds():5.0f}s  {_line(row)}", flush=True)
        self.write()

    def write(self) -> None:
        """Put the rows so far on disk; never half of them."""
        if self.out is not None:
            unfinished = self.out.with_name(self.out.name + ".part")
            write_json(unfinished, self.result)
            os.replace(unfinished, self.out)

    # ---- the machine -----------------------------------------------------------------------------------------------

    def timer(self, rounds: int = 15, **options: Any) -> Timer:
        """A timer of this device; a dry run measures once."""
        return Timer(self.device, rounds=1, warm=False) if self.dry else Timer(self.device, rounds=rounds, **options)

    @property
    def limits(self) -> dict[str, float]:
        """``bytes_per_s`` and ``operations_per_s`` of this device, measured once in each run."""
        if self._limits is None:
            # a dry run has no limits worth the time: any number serves
            dry = {"bytes_per_s": 1e9, "operations_per_s": 1e9}
            self._limits = dry if self.dry else measure_limits(self.device, self.dtype)
            self.result["limits"] = None if self.dry else self._limits
        return self._limits

    def floor_us(self, num_bytes: float, operations: float = 0.0) -> float:
        """What so many bytes or operations take at this device's limits."""
        limits = self.limits
        return 1e6 * max(num_bytes / limits["bytes_per_s"], operations / limits["operations_per_s"])


def describe_device(device: torch.device) -> dict[str, Any]:
    """The accelerator and its software."""
    if device.type != "cuda":
        return {"device": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    import subprocess

    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = found.stdout.split()
    return lines[0] if found.returncode == 0 and lines else None


def _line(row: Mapping[str, Any]) -> str:
    name = f"{row['name']:56s}"
    match row["kind"]:
        case "times":
            times = ", ".join(f"{form} {e['median']:.1f}" for form, e in row["us"].items() if e) or "ran"
            floor = "" if row["floor_us"] is None else f" (floor {row['floor_us']:.1f})"
            failed = "".join(f"; {form} FAILED: {why}" for form, why in row["failed"].items())
            return f"{name} us: {times}{floor}{failed}"
        case "check":
            return f"{name} {'ok' if row['ok'] else 'FAILED'} {_facts(row)}"
        case "value":
            return f"{name} {'ran' if row['value'] is None else format(row['value'], '.4g')} {row['unit']}"
        case "failed":
            return f"{name} FAILED: {row['error']}"
        case _:
            return f"{name} {row['text']}"


def _facts(row: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in row.items() if k not in ("kind", "name", "ok") and isinstance(v, int | float | str)}
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())


def as_times(values: list[float]) -> Times:
    """Times that were taken by the clock."""
    return Times.of(values, False)
