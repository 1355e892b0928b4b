"""The process of one peer: ``worker.py PEER CHECKPOINT CONVERTED_FOLDER THREADS [--convert]``.

It may run in another environment than the benchmark's. Without ``--convert`` it loads, then answers each line of
standard input, ``{"prompts": [[id, ...], ...], "new_tokens": n}``, with a line of JSON: tokens of each row,
milliseconds from the start to each step's tokens, peak resident megabytes. The first line it writes is
``{"load_s": ..., "versions": {...}}``, or ``{"missing": [names to install]}``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import time

if __name__ == "__main__":
    # libraries print what they like; the answers have a channel of their own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cpu_peers import PEERS, Peer, family_module


def required(peer: Peer, *, converting: bool) -> dict[str, str]:
    """Modules that this peer imports, and the names to install them by."""
    family = family_module(peer)
    needed = dict(family.CONVERT_REQUIRES if converting else family.REQUIRES)
    for option, modules in getattr(family, "OPTION_REQUIRES", {}).items():
        if option in peer.options:
            needed |= modules
    return needed


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # the package around it
        return False


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # a working tree on the path
        return "not installed as a package"


def peak_megabytes(process: str = "self") -> float:
    """Peak resident memory of a process alone; getrusage's figure starts at that of the process which forked it."""
    status = pathlib.Path("/proc", process, "status")
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"{status} has no VmHWM")


def main() -> None:
    name, checkpoint, converted, threads, *rest = sys.argv[1:]
    peer, converting = PEERS[name], rest == ["--convert"]

    def answer(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    packages = required(peer, converting=converting)
    absent = [package for module, package in packages.items() if not installed(module)]
    if absent:
        answer({"missing": absent})
        return
    options = {**peer.options, "threads": int(threads)}
    family = family_module(peer)
    if converting:
        family.convert(checkpoint, pathlib.Path(converted), options)
        answer({"converted": True})
        return
    start = time.perf_counter()
    runner = family.Runner(checkpoint, pathlib.Path(converted), options)
    load_s = time.perf_counter() - start
    answer({"load_s": load_s, "versions": {package: version(package) for package in packages.values()}})
    for line in sys.stdin:
        request = json.loads(line)
        tokens, times = runner.generate(request["prompts"], request["new_tokens"])
        milliseconds = [1e3 * moment for moment in times]
        answer({"tokens": tokens, "times_ms": milliseconds, "peak_megabytes": peak_megabytes()})


if __name__ == "__main__":
    main()
