"""Compiles every kernel for every target with no GPU and reads the machine code.

    python tests/kernels/aot/check.py --targets 80 86 90 100 120 [--update]

Exit code 1 when a kernel spills registers to the stack, needs more shared memory than a block may have, loads memory in
narrow pieces, misses the tensor cores, waits for the kernel before it ahead of its own loads, or needs over 10 % more
registers than resources.json says for this triton version and target. ``--update`` rewrites the entries of this version
and these targets.

The kernels come from launcher calls (specs.py): the program steps in where triton would launch, takes the kernel and
its arguments, and compiles them for the target with the specialisation rules of triton's launcher.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
# the kernels of this checkout, whatever is installed
sys.path.insert(0, str(HERE.parents[2]))
# spec files import each other
sys.path.insert(0, str(HERE))
# in the interpreter's process @jit gives functions that cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from gpt2rt.kernels import launch as launching  # noqa: E402  (found by the path that is set above)

# bytes of shared memory that a block may opt in to (CUDA C++ programming guide, technical specifications)
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
REGISTERS_SLACK = 1.10
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}
# targets below this compute capability have no programmatic dependent launch
PDL_CAPABILITY = 90


class Launch(NamedTuple):
    """One kernel launch as the launcher asked for it."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Usage(NamedTuple):
    """What a compiled kernel needs and does."""

    registers: int  # per thread
    stack: int  # bytes per thread; not 0 means spills
    shared: int  # bytes per block
    wide_loads: int  # 128-bit loads from global memory
    loads: int  # all loads from global memory
    loads_before_wait: int  # wide loads and prefetches before the first wait for the kernel before this one
    instructions: int  # in the machine code, whether they run once, often or never; 0 where it was not read
    mma: dict[str, int]  # tensor core instructions by kind: HMMA (mma.sync), HGMMA (wgmma), UTCHMMA (tcgen05)


def load_specs(path: str) -> list[Any]:
    """``SPECS`` of a specs file."""
    spec = importlib.util.spec_from_file_location("aot_specs", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"no Python file at {path}")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules["aot_specs"] = module
    spec.loader.exec_module(module)
    return module.SPECS


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches that ``call`` makes, none of which is run."""
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, args, kwargs))

    original, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def specialise(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The source that triton's launcher would compile for these arguments, and the compile options."""
    kernel = launch.kernel
    names = [p.name for p in kernel.params]
    values = dict(zip(names, launch.args, strict=False))
    values.update({k: v for k, v in launch.kwargs.items() if k in names})
    options = {k: v for k, v in launch.kwargs.items() if k not in names}
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value = values[p.name]
        # an argument that is None is a constant too
        if p.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not p.do_not_specialize):
            signature[p.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        else:
            signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not p.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def measure(launch: Launch, capability: int, *, read_code: bool) -> Usage:
    """Compile for a target and read registers and stack from the cubin, and what its instructions are if asked to."""
    source, options = specialise(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = triton.knobs.nvidia
    # the analysis of the data's flow, which nothing here asks for, is a third of the disassembler's time
    commands = [tools.cuobjdump.path, "-res-usage"], [tools.nvdisasm.path, "-c", "-ndf"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage, sass = (
            subprocess.run([*command, f.name], capture_output=True, text=True, check=True).stdout if wanted else ""
            for command, wanted in zip(commands, (True, read_code), strict=True)
        )

    def number(key: str) -> int:
        found = re.search(rf"{key}:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump -res-usage printed no {key}: {usage!r}")
        return int(found.group(1))

    def wide(code: str) -> int:
        return len(re.findall(r"\bLDG\S*\.128|LDGSTS\S*\.128|UTMALDG", code))

    # ACQBULK is griddepcontrol.wait
    before, waits, _ = sass.partition("ACQBULK")
    return Usage(
        registers=number("REG"),
        stack=number("STACK") + number("LOCAL"),
        shared=compiled.metadata.shared,
        wide_loads=wide(sass),
        loads=len(re.findall(r"\bLDG\b|LDGSTS|UTMALDG", sass)),
        # CCTL.PF2 asks for a line of 128 bytes to come to the L2 cache
        loads_before_wait=wide(before) + len(re.findall(r"CCTL\S*\.PF2", before)) if waits else 0,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/ +(?!NOP)[^;]+;", sass, re.MULTILINE)),
        mma=Counter(re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", sass)),
    )


def measure_spec(task: tuple[str, int, int]) -> list[tuple[str, Usage]]:
    """(kernel name, usage) for each launch of one spec: (specs file, index in it, compute capability)."""
    path, index, capability = task
    spec = load_specs(path)[index]
    launching.compiled_for = capability
    launches = record(spec.call)
    if len(launches) != len(spec.wide_loads):
        raise RuntimeError(f"{spec.name}: {len(launches)} launches, the spec lists {len(spec.wide_loads)}")
    return [
        # the disassembler takes nearly as long as the compiler
        (
            launch.kernel.fn.__name__,
            measure(launch, capability, read_code=bool(wide or spec.mma or spec.wait_after_loads)),
        )
        for launch, wide in zip(launches, spec.wide_loads, strict=True)
    ]


def faults(usage: Usage, spec: Any, wide_loads: int, capability: int, known_registers: int | None) -> list[str]:
    """What is wrong with a kernel, in words; empty when all is well. ``known_registers`` comes from resources.json."""
    found = []
    if usage.stack:
        found.append(f"spills {usage.stack} bytes")
    if usage.shared > SHARED_LIMIT[capability]:
        found.append(f"shared memory {usage.shared} over {SHARED_LIMIT[capability]}")
    if usage.wide_loads < wide_loads:
        found.append(f"{usage.wide_loads} wide loads, expected {wide_loads}")
    if spec.mma and not usage.mma:
        found.append("no tensor core instructions")
    elif capability == 90 and isinstance(spec.mma, str) and set(usage.mma) != {spec.mma}:
        found.append(f"tensor core instructions {' and '.join(usage.mma)}, expected {spec.mma}")
    if usage.loads_before_wait < spec.wait_after_loads:
        found.append(f"{usage.loads_before_wait} wide loads before the wait, expected {spec.wait_after_loads}")
    if known_registers is not None and usage.registers > known_registers * REGISTERS_SLACK:
        found.append(f"registers rose from {known_registers} to {usage.registers}")
    return found


def write_resources(path: Path, table: dict[str, dict[str, dict[str, int]]]) -> None:
    """Registers per thread by triton version, kernel and target, a line for each kernel."""
    versions = []
    for version, kernels in sorted(table.items()):
        lines = [f"  {json.dumps(key)}: {json.dumps(by_target)}" for key, by_target in sorted(kernels.items())]
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for every target with no GPU and check it.")
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--update", action="store_true", help="rewrite the register table for this version and targets")
    parser.add_argument("--only", default="", help="compile only specs whose name holds this text")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default %(default)s)")
    parser.add_argument("--specs", default=str(HERE / "specs.py"), help="file with the list SPECS")
    parser.add_argument("--resources", type=Path, default=HERE / "resources.json", help="file with the register table")
    options = parser.parse_args()
    if options.update and options.only:
        parser.error("--update rewrites whole tables, so it cannot be combined with --only")

    started = time.perf_counter()
    table = json.loads(options.resources.read_text()) if options.resources.exists() else {}
    known = table.get(triton.__version__, {})
    covered = {target for by_target in known.values() for target in by_target}
    specs = load_specs(options.specs)
    chosen = [i for i, spec in enumerate(specs) if options.only in spec.name]
    tasks = [
        (options.specs, i, capability)
        for capability in options.targets
        for i in chosen
        if capability >= PDL_CAPABILITY or not (specs[i].pdl or specs[i].wait_after_loads)
    ]
    if not tasks:
        parser.error(f"no spec with {options.only!r} in its name is for these targets")
    print(f"triton {triton.__version__}")
    print(
        f"{'target':7s} {'call':34s} {'kernel':34s} {'regs':>4s} {'stack':>5s} {'shared':>6s} {'wide':>9s} "
        f"{'code':>5s} {'mma':11s}"
    )
    compiled = failed = 0
    fresh: dict[str, dict[str, int]] = {}
    with contextlib.ExitStack() as stack:
        measured = map(measure_spec, tasks)
        if options.jobs > 1:
            # spawn: torch has threads, which do not survive a fork
            measured = stack.enter_context(multiprocessing.get_context("spawn").Pool(options.jobs)).imap(
                measure_spec, tasks
            )
        for (_, i, capability), usages in zip(tasks, measured, strict=True):
            spec, target = specs[i], str(capability)
            for (name, usage), wide_loads in zip(usages, spec.wide_loads, strict=True):
                key = f"{spec.name} / {name}"
                fresh.setdefault(key, {})[target] = usage.registers
                known_registers = None if options.update else known.get(key, {}).get(target)
                found = faults(usage, spec, wide_loads, capability, known_registers)
                if known_registers is None and target in covered and not options.update:
                    found.append(f"not in {options.resources.name}: run with --update")
                compiled += 1
                failed += bool(found)
                print(
                    f"sm_{capability:<4d} {spec.name:34s} {name:34s} {usage.registers:4d} {usage.stack:5d} "
                    f"{usage.shared:6d} {usage.wide_loads:4d}/{usage.loads:<4d} {usage.instructions:5d} "
                    f"{' '.join(f'{kind} {count}' for kind, count in usage.mma.items()):11s} "
                    f"{'FAIL: ' + ', '.join(found) if found else 'ok'}",
                    flush=True,
                )
    if options.update:
        # kernels that are gone leave the table, other targets stay
        table[triton.__version__] = {key: {**known.get(key, {}), **by_target} for key, by_target in fresh.items()}
        write_resources(options.resources, table)
    else:
        unknown = [f"sm_{c}" for c in options.targets if str(c) not in covered]
        if unknown:
            print(f"registers not compared on {', '.join(unknown)}: no entries for triton {triton.__version__}")
    print(f"{compiled} kernels compiled, {failed} failed, {time.perf_counter() - started:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
