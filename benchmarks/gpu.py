"""Everything there is to measure on a GPU, in sections by priority.

Three commands of under ten minutes run all of it, the most wanted first:

    python benchmarks/gpu.py --part 1 --out gpu-1.json     # a, g, h: is it right, bit for bit where that is promised
    python benchmarks/gpu.py --part 2 --out gpu-2.json     # b, c: the device, and latency at batch 1
    python benchmarks/gpu.py --part 3 --out gpu-3.json     # d, e, f: throughput, prompts, kernels
    python benchmarks/report.py gpu-1.json gpu-2.json gpu-3.json              # tables, targets, plots

    python benchmarks/gpu.py --part all --out gpu.json     # the three one after another: gpu-1.json, gpu-2.json, ...
    python benchmarks/gpu.py --sections c,f --minutes 5    # any sections
    python benchmarks/gpu.py --dry                         # all sections on a CPU, toy sizes

Sections: a correctness, b ceilings, c decode, d throughput, e prefill, f kernels, g invariance, h sanitizer. The file
is written after every row, so a run may be stopped at any time; --minutes stops it by itself, and gives every section
its share. Sections run in processes that this one watches: a part that fails is a row that says so; one that hangs, or
breaks its process's context on the device, costs that part and a new start of the process. The exit status is 1 if
anything failed.

With --lanes (by default as many as the machine's cores allow) several processes share what is not timed: correctness,
whose rows lie in files beside OUT until all are done, and compiling what one process alone times afterwards.

Times are medians and 10th percentiles of rounds in which gpt2rt and its peers alternate, between CUDA events around
graphs, weights cold; what a user waits for (``generate``) is taken by the clock. Beside each stand the ratio to the
fastest peer and the share of the floor: the bytes or operations over the bandwidth or rate measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gpu_sections.session import Session

#: of a part, unless the command line says otherwise: a tenth minute is for the start and for writing
PART_MINUTES = 9.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--sections", default="", help="letters or names with commas between; default: all")
    what.add_argument("--part", choices=("1", "2", "3", "all"), help="one of the three commands, or all of them")
    parser.add_argument("--minutes", type=float, help="stop after so long; default: 60, of a part 9")
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/gpu-DEVICE-DATE.json")
    parser.add_argument("--commit", help="for the record, where the folder is a copy without git")
    parser.add_argument("--dry", action="store_true", help="toy sizes on a CPU, in Triton's interpreter; no times")
    parser.add_argument("--smallest", action="store_true", help="toy sizes on the device")
    parser.add_argument("--lanes", type=int, help="processes that share what is not timed")
    # what the watching process tells the others
    parser.add_argument("--worker", type=int, metavar="PID", help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lane", default="0/1", help=argparse.SUPPRESS)
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
    from gpu_sections import PARTS, chosen

    try:
        names = chosen(PARTS.get(options.part, options.sections))
    except ValueError as error:
        print(f"--sections: {error}", file=sys.stderr)
        return 2
    if not options.dry and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --dry runs everything on a CPU at toy sizes", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry else "cuda")
    if options.out is None and not options.dry:
        word = "-".join(torch.cuda.get_device_name(device).lower().split())
        part = f"-{options.part}" if options.part in PARTS else ""
        date = time.strftime("%Y%m%d-%H%M")
        options.out = root / "benchmarks" / "results" / f"gpu-{word}-{date}{part}.json"
    if options.minutes is None:
        options.minutes = PART_MINUTES if options.part else 60.0
    if options.part == "all":
        return run_parts(options, list(PARTS))
    if options.dry or options.worker is not None:
        return work(options, names, device)
    return watch_workers(options, names)


def run_parts(options: argparse.Namespace, parts: list[str]) -> int:
    """The three commands, each with its own time and its own file."""
    statuses = []
    with tempfile.TemporaryDirectory() as folder:
        stem = options.out or pathlib.Path(folder) / "dry.json"
        for part in parts:
            out = stem.with_name(f"{stem.stem}-{part}{stem.suffix}")
            command = [*_command(options), "--part", part, "--out", str(out), "--minutes", str(options.minutes)]
            statuses.append(subprocess.run(command).returncode)
    return max(statuses)


def _command(options: argparse.Namespace) -> list[str]:
    """This program with the options that hold for every process of a run."""
    command = [sys.executable, __file__]
    command += ["--dry"] if options.dry else []
    command += ["--smallest"] if options.smallest else []
    command += [] if options.lanes is None else ["--lanes", str(options.lanes)]
    return command + ([] if options.commit is None else ["--commit", options.commit])


def record(options: argparse.Namespace) -> dict[str, Any]:
    """The command line, for the record."""
    return {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(options).items()}


def default_lanes() -> int:
    """As many as half of the cores keep busy; a prime, so that large and small parts take turns in every lane."""
    cores = len(os.sched_getaffinity(0))
    return 1 if _exclusive() else next((number for number in (7, 5, 3) if 2 * number <= cores), 1)


def _exclusive() -> bool:
    """Whether the device takes one process at a time."""
    query = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    try:
        modes = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "Exclusive_Process" in modes or "Prohibited" in modes


def watch_workers(options: argparse.Namespace, names: list[str]) -> int:
    """Run sections by processes that may be lost, and say what came of them."""
    from gpu_sections import WEIGHTS
    from gpu_sections.session import write_whole
    from gpu_sections.supervisor import read, supervise

    lanes = default_lanes() if options.lanes is None else options.lanes
    # its kernels compile in a moment
    lanes = 1 if options.smallest else lanes
    supervise(_command(options), {name: WEIGHTS[name] for name in names}, options.out, options.minutes, lanes)
    result = read(options.out)
    # workers have recorded their own
    result["arguments"] = record(options)
    write_whole(options.out, result)
    status = summarise(result)
    print(options.out)
    return status


def work(options: argparse.Namespace, names: list[str], device: torch.device) -> int:
    """Run sections in this process."""
    from gpu_sections.session import Session

    earlier = None
    if options.worker is not None:
        from gpu_sections.supervisor import read

        _leave_with(options.worker)
        found = read(options.out)
        # the file of a worker that was lost, or of lanes before it
        earlier = found if "machine" in found else None
    number, lanes = (int(word) for word in options.lane.split("/"))
    session = Session(
        device,
        options.out,
        minutes=options.minutes,
        dry=options.dry,
        smallest=options.smallest,
        compiles=options.compile,
        lane=(number, lanes),
        arguments=record(options),
        earlier=earlier,
    )
    if options.commit:
        session.result["machine"]["commit"] = options.commit
    # every capture of a graph collects garbage: let it pass over what was imported
    gc.freeze()
    try:
        lost = run(session, names)
    finally:
        gc.unfreeze()
    if options.worker is not None:
        return lost or int(not session.ok)
    status = summarise(session.result)
    if options.out is not None:
        print(options.out)
    return lost or status


def _leave_with(watcher: int) -> threading.Thread:
    """End this process when the one that watches it is gone: nobody else could, were a kernel to hang."""

    def look() -> None:
        while pathlib.Path(f"/proc/{watcher}").exists():
            time.sleep(2.0)
        os._exit(1)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread


def run(session: Session, names: list[str]) -> int:
    """Run the sections; 0, or the exit status of a process that has lost its device."""
    from gpu_sections import WEIGHTS, runner
    from gpu_sections.session import DeviceLostError
    from gpu_sections.supervisor import LOST

    for number, name in enumerate(names):
        if not session.compiles:
            print(f"== {name}", flush=True)
        try:
            with session.section(name, WEIGHTS[name] / sum(WEIGHTS[other] for other in names[number:])):
                session.need(5)
                runner(name)(session)
        except DeviceLostError:
            return LOST
    return 0


def summarise(result: dict[str, Any]) -> int:
    """Say what came of each section; 1 if anything failed."""
    from gpu_sections.session import failures

    for name, section in result["sections"].items():
        print(f"{name:12s} {section['state']} in {section['seconds']} s {section['error'] or ''}")
    bad = failures(result)
    for failure in bad:
        print(f"FAILED {failure}")
    return int(bool(bad) or any(section["state"] == "failed" for section in result["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
