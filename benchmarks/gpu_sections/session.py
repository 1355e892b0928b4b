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


def write_whole(out: pathlib.Path, result: dict[str, Any]) -> None:
    """Replace a file of results; never by half of them."""
    unfinished = out.with_name(out.name + ".part")
    write_json(unfinished, result)
    os.replace(unfinished, out)


def failures(result: Mapping[str, Any]) -> list[str]:
    """Rows of a result that say no, as "section: name"."""
    sections = result["sections"].items()
    return [f"{name}: {row['name']}" for name, section in sections for row in section["rows"] if row.get("ok") is False]


def is_ours(name: str) -> bool:
    """Whether a time is gpt2rt's; the others are peers."""
    return name.partition(",")[0].split(" ")[0] == "gpt2rt"


class OutOfTime(Exception):
    """The budget of the run is spent; what was measured is on disk."""


class DeviceLostError(Exception):
    """The process's context on the device is broken, as an illegal address leaves it; only a new process can go on."""


#: how long a part may be silent before its process is taken for hung, unless it says otherwise
PATIENCE_S = 120.0


class Session:
    """Rows of results, written to ``out`` one by one.

    Args:
        device: where everything runs.
        out: the JSON file; None writes none.
        minutes: the budget of the run.
        dry: a CPU in Triton's interpreter, toy sizes: results are checked, times are not kept.
        smallest: toy sizes on a device.
        compiles: every timed call runs once and no time is kept, so that a later process finds its kernels compiled.
        lane: (number, lanes): of all parts only every one whose turn it is, for processes that share the work.
        arguments: of the command line, for the record.
        earlier: what a process that is gone has left of this run; parts that it has begun are not begun again.

    Attributes:
        dtype: of weights and activations unless a section says otherwise.
        timed: times are kept.
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
        compiles: bool = False,
        lane: tuple[int, int] = (0, 1),
        arguments: Mapping[str, Any] | None = None,
        earlier: dict[str, Any] | None = None,
    ) -> None:
        self.device, self.out, self.dry, self.compiles = device, out, dry, compiles
        self.toy = dry or smallest
        self.timed = not (dry or compiles)
        self.dtype = torch.float16
        self._lane, self._turn = lane, 0
        self._started = time.monotonic()
        self._end = self._deadline = self._started + 60.0 * minutes
        self._entry: dict[str, Any] = {"parts": [], "rows": []}
        self._limits: dict[str, float] | None = None
        self.result: dict[str, Any] = earlier or {
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
        return failures(self.result)

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def seconds_left(self) -> float:
        """Of the section's share of the budget."""
        return max(0.0, self._deadline - time.monotonic())

    def need(self, seconds: float) -> None:
        """Raise :class:`OutOfTime` unless so much is left."""
        if not self.dry and seconds > self.seconds_left():
            raise OutOfTime

    @contextlib.contextmanager
    def section(self, name: str, share: float = 1.0) -> Iterator[None]:
        """Rows made inside belong to this section; an exception ends the section, not the run.

        Args:
            name: of :data:`gpu_sections.SECTIONS`.
            share: of the time that is left, for this section.

        Raises:
            DeviceLostError: the section is not over: another process may go on with its other parts.
        """
        new: dict[str, Any] = {"state": "running", "seconds": 0.0, "error": None, "parts": [], "rows": []}
        entry = self._entry = self.result["sections"].setdefault(name, new)
        entry.update(state="running", error=None)
        self._turn = 0
        start, before = time.monotonic(), entry["seconds"]
        self._deadline = start + share * (self._end - start)
        try:
            yield
            entry["state"] = "done"
        except OutOfTime:
            entry["state"] = "stopped"
            entry["error"] = "the time of --minutes was spent"
        except DeviceLostError as error:
            print(f"section {name}: {error}", file=sys.stderr, flush=True)
            raise
        except Exception as error:
            entry["state"], entry["error"] = "failed", describe(error)
            print(f"section {name} failed: {entry['error']}", file=sys.stderr, flush=True)
        finally:
            entry["seconds"] = round(before + time.monotonic() - start, 1)
            self.write()

    def over(self, name: str) -> bool:
        """Whether a part is not for this process: begun by one that is gone, or in another lane. Ask once for each."""
        number, lanes = self._lane
        turn, self._turn = self._turn, self._turn + 1
        return turn % lanes != number or name in self._entry["parts"]

    @contextlib.contextmanager
    def attempt(self, name: str, patience: float | None = None) -> Iterator[None]:
        """One part of a section: an exception becomes a failed row, and the section goes on.

        Args:
            name: of the part.
            patience: seconds without a row after which whoever watches this process takes it for hung; None:
                :data:`PATIENCE_S`.

        Raises:
            DeviceLostError: the process's context on the device is broken.
        """
        self._entry["parts"].append(name)
        self.result["patience_s"] = PATIENCE_S if patience is None else patience
        self.write()
        try:
            yield
        except OutOfTime:
            raise
        except Exception as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) and self._lane[1] > 1:
                # others have what it lacks: it is left to the process behind the lanes, which is alone
                self._entry["parts"].remove(name)
            else:
                self._add({"kind": "failed", "name": name, "ok": False, "error": describe(error)})
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                why = f"the device was lost: {describe(error)}"
                self._add({"kind": "failed", "name": f"{name}: device", "ok": False, "error": why})
                raise DeviceLostError(f"after {name}: {describe(error)}") from error

    # ---- rows ------------------------------------------------------------------------------------------------------

    def check(self, name: str, ok: bool, **facts: Any) -> None:
        """A statement that holds or not, and the numbers behind it."""
        self._add({"kind": "check", "name": name, "ok": bool(ok), **facts})

    def value(self, name: str, value: float | None, unit: str, **facts: Any) -> None:
        """One measured number; a dry run keeps none."""
        self._add({"kind": "value", "name": name, "value": value if self.timed else None, "unit": unit, **facts})

    def note(self, name: str, text: str) -> None:
        """Something that was not measured, and why; said once."""
        if any(row["name"] == name for row in self._entry["rows"]):
            return
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
        replace: bool = False,
        **facts: Any,
    ) -> None:
        """Times of gpt2rt and its peers for the same work.

        Args:
            name: of the row; targets are found by it.
            times: by form; those of gpt2rt are called "gpt2rt" or "gpt2rt, ...".
            failed: forms that could not run, and why. One of gpt2rt's makes the row say no.
            floor_us: what the bytes or operations take at the measured limits.
            replace: an earlier row of this name, which knew less.
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
            row["us"][form] = entry if self.timed else None
        row["fastest_peer"] = fastest if self.timed else None
        row["floor_us"] = floor_us if self.timed else None
        row["ok"] = not any(is_ours(form) for form in failed)
        if replace:
            self._entry["rows"][:] = [other for other in self._entry["rows"] if other["name"] != name]
        self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        self._entry["rows"].append(row)
        if not self.compiles:
            print(f"{self.seconds():5.0f}s  {_line(row)}", flush=True)
        self.write()

    def write(self) -> None:
        """Put the rows so far on disk; never half of them."""
        if self.out is not None:
            write_whole(self.out, self.result)

    # ---- the machine -----------------------------------------------------------------------------------------------

    def timer(self, rounds: int = 15, **options: Any) -> Timer:
        """A timer of this device; where times are not kept it calls once."""
        return Timer(self.device, rounds=rounds, **options) if self.timed else Timer(self.device, rounds=1, warm=False)

    @property
    def limits(self) -> dict[str, float]:
        """``bytes_per_s`` and ``operations_per_s`` of this device, measured once in each run."""
        if self._limits is None:
            # without times no limits are worth the time: any number serves
            any_limits = {"bytes_per_s": 1e9, "operations_per_s": 1e9}
            self._limits = measure_limits(self.device, self.dtype) if self.timed else any_limits
            self.result["limits"] = self._limits if self.timed else None
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
