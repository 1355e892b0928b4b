"""Build of gpt2rt: the pure-Python package and the extension ``gpt2rt._C`` (csrc/). Metadata stands in pyproject.toml.

Environment variables:
    GPT2RT_CPP: ``0`` leaves the extension out; gpt2rt then runs on its reference path. Default ``1``.
    GPT2RT_CUDA: ``auto`` (default) or ``0`` builds for the CPU; ``1`` is refused as long as csrc/ has no CUDA sources.
    CXX, CXXFLAGS, LDFLAGS: as usual; CXXFLAGS comes last, so it can add sanitizers or turn optimisation off.

The extension uses torch's stable ABI only and no Python symbol, so one ``_C.abi3.so`` serves many versions of both.
Kernels are compiled once per instruction set, each with its own flags, and chosen at run time (csrc/cpu/isa.cpp);
the build never asks which processor it runs on.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# no -ffast-math and no contraction: sums keep the order, and fused operations are those that the source writes
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    # python adds -g, which would make the wheel six times as large; CXXFLAGS=-g brings it back
    "-g0",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    # messages and debug information name files as in the repository, wherever it was built
    f"-ffile-prefix-map={ROOT}/=",
    "-Wall",
    "-Wextra",
    # of torch's headers
    "-Wno-unused-parameter",
    # GCC 12 warns of the undefined operands inside its own AVX-512 intrinsics
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


def env_choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    """The value of an environment variable that takes one of a few values."""
    value = os.environ.get(name, "") or default
    if value not in allowed:
        raise SystemExit(f"setup.py: {name} is {value!r}, expected one of {', '.join(allowed)} (default {default})")
    return value


def isa_names() -> list[str]:
    """Instruction sets that the target architecture has; beyond x86-64 there is the portable one only."""
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["portable"]


def extension_options() -> dict[str, Any]:
    """``ext_modules`` and what goes with them; empty without the extension."""
    if env_choice("GPT2RT_CUDA", "auto", ("auto", "0", "1")) == "1":
        raise SystemExit(
            "setup.py: GPT2RT_CUDA=1, but csrc/ has no CUDA sources yet: on a GPU gpt2rt uses its Triton kernels, "
            "which need no build; unset GPT2RT_CUDA or set it to auto or 0"
        )
    if env_choice("GPT2RT_CPP", "1", ("0", "1")) == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"setup.py: building gpt2rt._C needs torch at build time, and importing it failed ({error}). Either "
            "install with build isolation (plain `pip install .`, which fetches torch for the build), or install "
            "torch first and use `pip install --no-build-isolation .`, or set GPT2RT_CPP=0 to leave the extension out"
        ) from error

    user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))

    class BuildWithIsas(BuildExtension):  # type: ignore[misc, valid-type]
        """Compiles csrc/cpu/isa_<name>.cpp with the flags of each instruction set, then the extension around them."""

        def build_extension(self, ext: Any) -> None:
            """Add the objects of all instruction sets to ``ext`` and build it."""
            folder = Path(self.build_temp).resolve() / "isa"
            folder.mkdir(parents=True, exist_ok=True)
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            jobs = []
            for name in isa_names():
                target = folder / f"isa_{name}.o"
                source = f"csrc/cpu/isa_{name}.cpp"
                flags = [*CXX_FLAGS, *isa_flags(name, compiler), *user_flags]
                jobs.append((target, [*compiler, *flags, "-c", source, "-o", str(target)]))
            with ThreadPoolExecutor() as pool:
                # list() waits for all and raises what failed
                list(pool.map(lambda job: compile_object(*job), jobs))
            ext.extra_objects = [*(ext.extra_objects or []), *(str(target) for target, _ in jobs)]
            # setuptools links again only if something in this list is newer than the library
            ext.depends = [*(ext.depends or []), *map(str, SOURCES_AND_HEADERS), *ext.extra_objects]
            super().build_extension(ext)

    sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.cpp") if not path.name.startswith("isa_"))
    extension = CppExtension(
        "gpt2rt._C",
        sources,
        depends=[str(path) for path in SOURCES_AND_HEADERS],
        extra_compile_args={"cxx": [*CXX_FLAGS, *user_flags]},
        extra_link_args=["-pthread"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildWithIsas},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def isa_flags(name: str, compiler: list[str]) -> list[str]:
    """Flags of an instruction set; none for AMX if compiler or assembler do not know it, then its file is empty."""
    flags = ISA_FLAGS[name]
    if name != "amx":
        return flags
    program = 'void f() { __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }'
    command = [*compiler, *flags, "-x", "c++", "-c", "-o", os.devnull, "-"]
    done = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return flags
    print(f"setup.py: without the kernels for AMX, {shlex.join(compiler)} does not know it:\n{done.stderr}", flush=True)
    return []


def compile_object(target: Path, command: list[str]) -> None:
    """Run a compiler command unless ``target`` is newer than every source and was made by the same command."""
    stamp = target.with_suffix(".command")
    text = shlex.join(command)
    newest = max(path.stat().st_mtime for path in SOURCES_AND_HEADERS)
    if target.exists() and stamp.exists() and stamp.read_text() == text and target.stat().st_mtime > newest:
        return
    print(text, flush=True)
    stamp.unlink(missing_ok=True)
    subprocess.run(command, cwd=ROOT, check=True)
    stamp.write_text(text)


SOURCES_AND_HEADERS = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h"))

setup(
    # kernels/ stands beside gpt2rt/ in the repository and inside it in the wheel; a top-level package of that name
    # would shadow another project's
    packages=[*find_packages(include=["gpt2rt", "gpt2rt.*"], exclude=["gpt2rt.kernels*"]), "gpt2rt.kernels"],
    package_dir={"gpt2rt.kernels": "kernels"},
    package_data={"gpt2rt": ["py.typed", "assets/**/*"]},
    # only what is named above: the symbolic link gpt2rt/kernels would bring the kernels in twice
    include_package_data=False,
    **extension_options(),
)
