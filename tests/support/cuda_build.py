"""``gpt2rt._C_cuda`` built once for all tests that look at it, and its machine code.

PYTHONPATH=tests/support python tests/support/cuda_build.py    # write tests/cuda_resources.json anew
"""

import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
#: what each instance of the persistent kernel takes, by architecture: a change for the worse must be seen
RESOURCES = ROOT / "tests/cuda_resources.json"
#: architecture -> name in the table -> numbers
Resources = dict[str, dict[str, dict[str, int]]]


def build(folder, **variables):
    """setup.py's CUDA half alone, into ``folder``; for sm_90, as compiling for all takes a minute."""
    environment = {**os.environ, "GPT2RT_CPP": "0", "GPT2RT_CUDA": "1", "GPT2RT_CUDA_ARCHITECTURES": "90", **variables}
    places = ("--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp"))
    command = [sys.executable, "setup.py", "build_ext", *places]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)


@functools.cache
def built() -> tuple[pathlib.Path, str]:
    """The library for sm_90, and what the compiler said."""
    # lives as long as the process
    built.folder = tempfile.TemporaryDirectory()
    folder = pathlib.Path(built.folder.name)
    done = build(folder, NVCC_FLAGS="-Xptxas -v")
    assert done.returncode == 0, done.stderr
    (library,) = (folder / "lib").rglob("*.so")
    assert library.relative_to(folder / "lib") == pathlib.Path("gpt2rt/_C_cuda.so")
    return library, done.stdout + done.stderr


def disassembled(binary: pathlib.Path, cuobjdump: pathlib.Path) -> dict[str, dict[int, str]]:
    """Mangled name (with its architecture where there are several) -> address -> instruction with its predicate."""
    listed = subprocess.run([cuobjdump, "-sass", binary], capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[int, str]] = {}
    architecture, current = "", {}
    for line in listed.splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            architecture = match.group(1)
        elif "Function :" in line:
            current = found.setdefault(f"{architecture} {line.split('Function :')[1].strip()}", {})
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            current[int(match.group(1), 16)] = match.group(2)
    return found


def reachable(code: dict[int, str], start: int) -> set[int]:
    """Addresses of the instructions that may run after the one at ``start``."""
    addresses = sorted(code)
    following = dict(itertools.pairwise(addresses))
    seen: set[int] = set()
    left = [start]
    while left:
        at = left.pop()
        if at in seen:
            continue
        seen.add(at)
        predicate, operation = re.match(r"(@!?U?P\w+\s+)?(.*)", code[at]).groups()
        name = operation.split()[0].split(".")[0]
        # BSSY names where its threads meet again, which BSYNC then jumps to
        target = re.search(r"0x([0-9a-f]+)$", operation)
        if name in ("BRA", "BSSY", "CALL", "JMP") and target:
            left.append(int(target.group(1), 16))
        # a second predicate among the operands makes a jump conditional, too
        always = predicate is None and not re.search(r"\bU?P\d|UR\d", operation) and "DIV" not in operation
        if not (name in ("EXIT", "RET", "BRA", "JMP") and always) and at in following:
            left.append(following[at])
    return seen


def resources(log: str) -> Resources:
    """What ptxas -v says of the kernels of one source."""
    table: Resources = {}
    pattern = (
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for name, architecture, stack, stores, loads, registers, rest in re.findall(pattern, log, re.DOTALL):
        static = re.search(r"(\d+) bytes smem", rest)
        table.setdefault(architecture, {})["bfloat16" if "BFloat" in name else "float16"] = {
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
            "static_shared": int(static.group(1)) if static else 0,
        }
    return table


def persistent_everywhere(folder: pathlib.Path) -> tuple[pathlib.Path, Resources]:
    """The persistent kernel compiled for all architectures of setup.py: an object and its resources."""
    source = (ROOT / "setup.py").read_text()
    numbers = re.search(r"CUDA_ARCHITECTURES = \((.*?)\)", source).group(1).split(", ")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    target = folder / "persistent.o"
    command = ["nvcc", "-O3", "-std=c++17", "-Xptxas", "-v", *flags, "-c", "csrc/cuda/persistent.cu", "-o", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=110)
    return target, resources(done.stdout + done.stderr)


def main() -> None:
    if shutil.which("nvcc") is None:
        raise SystemExit("the CUDA toolkit (nvcc) is not installed")
    with tempfile.TemporaryDirectory() as folder:
        _, table = persistent_everywhere(pathlib.Path(folder))
    RESOURCES.write_text(json.dumps(table, indent=2) + "\n")
    print(RESOURCES)


if __name__ == "__main__":
    main()
