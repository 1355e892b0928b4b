"""Everything there is to measure on a GPU, in sections by priority.

    python benchmarks/gpu.py --sections a,g --minutes 9 --out gpu-1.json      # is it right, bit for bit where promised
    python benchmarks/gpu.py --sections b,c --minutes 9 --out gpu-2.json      # the device, and latency at batch 1
    python benchmarks/gpu.py --sections d,e,f --minutes 9 --out gpu-3.json    # throughput, prompts, kernels
    python benchmarks/gpu.py --sections h --minutes 9 --out gpu-4.json        # sanitizer, where there is time for it
    python benchmarks/report.py gpu-1.json gpu-2.json gpu-3.json gpu-4.json   # tables, targets, plots

    python benchmarks/gpu.py --dry                                            # all sections on a CPU, toy sizes

Sections: a correctness, b ceilings, c decode, d throughput, e prefill, f kernels, g invariance, h sanitizer. The file
is written after every row, so a run may be stopped at any time; --minutes stops it by itself. A part that fails is a
row that says so, and the rest goes on; a part that breaks the process's context on the device ends its section, and the
sections after it run in a new process. The exit status is 1 if anything failed.

Times are medians and 10th percentiles of rounds in which gpt2rt and its peers alternate, between CUDA events around
graphs, weights cold; what a user waits for (``generate``) is taken by the clock. Beside each stand the ratio to the
fastest peer and the share of the floor: the bytes or operations over the bandwidth or rate measured in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_sections.session import Session


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="", help="letters or names with commas between; default: all")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long")
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/gpu-DEVICE-DATE.json")
    parser.add_argument("--commit", help="for the record, where the folder is a copy without git")
    parser.add_argument("--dry", action="store_true", help="toy sizes on a CPU, in Triton's interpreter; no times")
    parser.add_argument("--smallest", action="store_true", help="toy sizes on the device")
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
    from gpu_sections import chosen
    from gpu_sections.session import Session

    try:
        names = chosen(options.sections)
    except ValueError as error:
        print(f"--sections: {error}", file=sys.stderr)
        return 2
    if not options.dry and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --dry runs everything on a CPU at toy sizes", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry else "cuda")
    out = options.out
    if out is None and not options.dry:
        word = "-".join(torch.cuda.get_device_name(device).lower().split())
        out = root / "benchmarks" / "results" / f"gpu-{word}-{time.strftime('%Y%m%d-%H%M')}.json"
    record = {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(options).items()}
    session = Session(
        device, out, minutes=options.minutes, dry=options.dry, smallest=options.smallest, arguments=record
    )
    if options.commit:
        session.result["machine"]["commit"] = options.commit
    # every capture of a graph collects garbage: let it pass over what was imported
    gc.freeze()
    try:
        unrun = run(session, names)
    finally:
        gc.unfreeze()
    if unrun:
        run_anew(session, unrun, options)
    summarise(session)
    if out is not None:
        print(out)
    return 0 if session.ok else 1


def run(session: Session, names: list[str]) -> list[str]:
    """Run the sections; those that are left when the context on the device is lost are returned."""
    from gpu_sections import runner
    from gpu_sections.session import DeviceLostError

    for number, name in enumerate(names, start=1):
        print(f"== {name}", flush=True)
        try:
            with session.section(name):
                session.need(5)
                runner(name)(session)
        except DeviceLostError:
            return names[number:]
    return []


def run_anew(session: Session, names: list[str], options: argparse.Namespace) -> None:
    """Run sections in a new process, and take its results over."""
    print(f"== a new process for {', '.join(names)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "rest.json"
        command = [sys.executable, __file__, "--sections", ",".join(names), "--out", str(out)]
        command += ["--minutes", str(session.minutes_left())] + (["--smallest"] if options.smallest else [])
        subprocess.run(command, check=False)
        found = json.loads(out.read_text())["sections"] if out.exists() else {}
    lost = {"state": "failed", "seconds": 0.0, "error": "its process left no results", "rows": []}
    session.result["sections"].update({name: found.get(name, dict(lost)) for name in names})
    session.write()


def summarise(session: Session) -> None:
    """Say what came of each section."""
    for name, section in session.result["sections"].items():
        print(f"{name:12s} {section['state']} in {section['seconds']} s {section['error'] or ''}")
    for failure in session.failures():
        print(f"FAILED {failure}")


if __name__ == "__main__":
    sys.exit(main())
