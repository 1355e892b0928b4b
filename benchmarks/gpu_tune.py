"""Finds lines for the kernels' static tables on the device at hand. Offline: nothing in gpt2rt runs it.

    python benchmarks/gpu_tune.py --sections rows,head,decode --minutes 9 --out tune-1.json
    python benchmarks/gpu_tune.py --list          # sections, their lines, how many kernels are compiled for them
    python benchmarks/gpu_tune.py --dry           # all sections on a CPU, toy sizes, no times

For each line of a table (kernels/config_table.py) the candidates and the present configuration are checked against the
definition, then timed as in the kernel lab: medians of rounds in which they alternate, CUDA graphs between events,
weights cold, at the shapes of the four GPT-2s (tune_entries.py). A candidate that does not compile, wants too much
shared memory or is wrong is a row that says so, and is out of the race. The file is written after every row, so a run
may be stopped at any time; --minutes stops it by itself.

The best of a line has the smallest geometric mean, over the line's problems, of its time over that of the present one;
less than 3 % is nobody's gain. "bits" says whether its results equal the present one's, bit for bit: one that keeps
them may be given to this architecture alone (``others``), any other is for all architectures or for none, where the
table serves up to 64 rows. At the end stands what to paste.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_sections.session import Session
    from tune_entries import Entry

#: copies of the data together, beyond every L2 cache
COLD_BYTES = 300_000_000
#: smaller gains are noise
LEAST_GAIN = 1.03
PRESENT = "present"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="", help="names with commas between; default: all")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long")
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/tune-DEVICE-DATE.json")
    parser.add_argument("--commit", help="for the record, where the folder is a copy without git")
    parser.add_argument("--list", action="store_true", help="say what there is, and measure nothing")
    parser.add_argument("--dry", action="store_true", help="toy sizes on a CPU, in Triton's interpreter; no times")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.dry:
        # before triton is imported: it decides then
        os.environ["TRITON_INTERPRET"] = "1"
    root = pathlib.Path(__file__).resolve().parent.parent
    # behind all else: a clone that was not installed
    sys.path.append(str(root))
    import torch
    from gpu_sections.session import DeviceLostError, Session
    from tune_entries import SECTIONS, chosen

    try:
        names = chosen(options.sections)
    except ValueError as error:
        print(f"--sections: {error}", file=sys.stderr)
        return 2
    if options.list:
        for name in names:
            what, entries = SECTIONS[name]
            print(f"{name}: {what}")
            for entry in entries():
                compiled = len({tuple(without_rows(size).items()) for _, size in entry.problems})
                print(f"    {entry.name:60s} {len(entry.candidates)} candidates, {compiled} shapes")
        return 0
    if not options.dry and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --dry runs everything on a CPU at toy sizes", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry else "cuda")
    out = options.out
    if out is None and not options.dry:
        word = "-".join(torch.cuda.get_device_name(device).lower().split())
        out = root / "benchmarks" / "results" / f"tune-{word}-{time.strftime('%Y%m%d-%H%M')}.json"
    record = {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(options).items()}
    session = Session(device, out, minutes=options.minutes, dry=options.dry, arguments=record)
    if options.commit:
        session.result["machine"]["commit"] = options.commit
    # every capture of a graph collects garbage: let it pass over what was imported
    gc.freeze()
    try:
        for name in names:
            print(f"== {name}", flush=True)
            with session.section(name), torch.no_grad():
                entries = list(SECTIONS[name][1]())
                # one line of a section shows that it runs
                for entry in entries[:1] if options.dry else entries:
                    tune(session, entry)
    except DeviceLostError:
        print("the device is lost to this process; what was measured is on disk", file=sys.stderr)
    finally:
        gc.unfreeze()
    summarise(session)
    if out is not None:
        print(out)
    return 0 if session.ok else 1


def without_rows(size: dict[str, Any]) -> dict[str, Any]:
    """What of a size is compiled into kernels."""
    return {name: value for name, value in size.items() if name not in ("rows", "seqs", "queries", "context")}


def words(config: Any) -> str:
    """A configuration as a table has it."""
    if not isinstance(config, tuple):
        return str(config)
    return f"{type(config).__name__}({', '.join(map(str, config))})"


def tune(session: Session, entry: Entry) -> None:
    """One line: a row for each problem, then one with the best."""
    import torch

    from gpt2rt.lab.measure import size_text
    from gpt2rt.lab.registry import OPERATIONS

    architecture = 0
    if not session.dry:
        major, minor = torch.cuda.get_device_capability(session.device)
        architecture = 10 * major + minor
    present = entry.present(architecture)
    candidates = [config for config in entry.candidates if config != present]
    problems = entry.problems
    if session.dry:
        name, size = problems[0]
        kept = {key: size[key] for key in ("format", "cache") if key in size}
        candidates, problems = candidates[:1], ((name, {**OPERATIONS[name].toy, **kept}),)
    rows: list[dict[str, Any]] = []
    try:
        for operation, size in problems:
            session.need(5)
            with session.attempt(f"{entry.name} {operation} {size_text(size)}"):
                rows.append(race(session, entry, operation, size, present, candidates))
    finally:
        # also when the time is up
        if rows:
            decide(session, entry, architecture, present, candidates, rows)


def race(
    session: Session, entry: Entry, operation: str, size: dict[str, Any], present: Any, candidates: list[Any]
) -> dict[str, Any]:
    """Errors and times of all candidates for one problem, as a row of the file."""
    from gpt2rt.lab.measure import size_text
    from gpt2rt.lab.problem import Place, largest_error, tried
    from gpt2rt.lab.registry import OPERATIONS
    from gpt2rt.lab.timing import describe

    place = Place(session.device, entry.dtype, cold_bytes=0 if session.dry else COLD_BYTES)
    problem = OPERATIONS[operation].problem(place, size)
    run, expected = problem.forms[entry.form], problem.expected()
    tolerance = OPERATIONS[operation].tolerance(entry.dtype)
    names = {PRESENT: present} | {words(config): config for config in candidates}
    usual: tuple[Any, ...] | None = None
    right: dict[str, Any] = {}
    row: dict[str, Any] = {"operation": operation, "size": size, "bytes": problem.moved, "tolerance": tolerance}
    row |= {"errors": {}, "same_bits": {}, "failed": {}, "us": {}, "p10_us": {}}
    for name, config in names.items():
        problem.forms[name] = tried(entry.table, config, run)
        try:
            found = problem.results(name)
            error = largest_error(found, expected)
        except Exception as reason:
            # too much shared memory, or more registers than there are
            row["failed"][name] = describe(reason)
            continue
        # JSON has no infinity; "not <=" would let NaN pass
        row["errors"][name] = error if math.isfinite(error) else None
        if not error <= tolerance:
            row["failed"][name] = f"wrong: error {error:.2g}, allowed {tolerance:.2g}"
            continue
        right[name] = problem.forms[name]
        if name == PRESENT:
            # what it gave is written over by the next one
            usual = tuple(tensor.clone() for tensor in found)
        elif usual is not None:
            row["same_bits"][name] = all(a.equal(b) for a, b in zip(found, usual, strict=True))
    if session.dry:
        # nobody wants the interpreter's times
        times, failed = {}, {}
    else:
        times, failed = session.timer(9).compare(right, problem.copies)
    row["failed"] |= failed
    row["ok"] = PRESENT in right and PRESENT not in failed
    row["us"] = {name: t.median for name, t in times.items()}
    row["p10_us"] = {name: t.p10 for name, t in times.items()}
    timed = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
    text = f"us: {timed}" if timed else f"{len(right)} right"
    text += "".join(f"; {name} FAILED: {why}" for name, why in row["failed"].items())
    title = f"{entry.name} {operation} {size_text(size)}"
    session.record("candidates", title, text, table=entry.table.name, **row)
    return row


def decide(
    session: Session, entry: Entry, architecture: int, present: Any, candidates: list[Any], rows: list[dict[str, Any]]
) -> None:
    """The row that says which configuration a line should have."""
    # over the present one's time, where every problem has both
    ratios = {
        name: math.exp(sum(math.log(row["us"][name] / row["us"][PRESENT]) for row in rows) / len(rows))
        for name in map(words, candidates)
        if all(name in row["us"] and PRESENT in row["us"] for row in rows)
    }
    bits = {name: all(row["same_bits"].get(name, False) for row in rows) for name in ratios}
    best = min(ratios, key=lambda name: ratios[name], default=None)
    if best is None or 1 / ratios[best] < LEAST_GAIN:
        chosen, gain, same_bits = words(present), 1.0, True
        line = entry.line(architecture, chosen)
        text = f"keep {line}"
    else:
        chosen, gain, same_bits = best, 1 / ratios[best], bits[best]
        line = entry.line(architecture, chosen)
        text = f"{line}  # {gain:.2f} times the speed of {words(present)}, bits {'the same' if same_bits else 'others'}"
    if len(rows) < len(entry.problems):
        text += f" ({len(rows)} of {len(entry.problems)} problems)"
    session.record(
        "line",
        entry.name,
        text,
        table=entry.table.name,
        key=str(entry.key),
        sizes=list(entry.sizes),
        line=line,
        architecture=architecture,
        present=words(present),
        best=chosen,
        gain=gain,
        same_bits=same_bits,
        time_ratios=ratios,
        bits=bits,
        problems=len(rows),
        of=len(entry.problems),
    )


def summarise(session: Session) -> None:
    """What to paste, line by line."""
    for name, section in session.result["sections"].items():
        print(f"{name:12s} {section['state']} in {section['seconds']} s {section['error'] or ''}")
        for row in section["rows"]:
            if row["kind"] == "line":
                print(f"    {row['name']:60s} {row['text']}")
    for failure in session.failures():
        print(f"FAILED {failure}")


if __name__ == "__main__":
    sys.exit(main())
