"""Build of gpt2rt: the pure-Python package, the extension ``gpt2rt._C`` (csrc/) and ``gpt2rt._C_cuda`` (csrc/cuda/).

Metadata stands in pyproject.toml. Environment variables:
    GPT2RT_CPP: ``0`` leaves ``_C`` out; gpt2rt then runs on its reference path. Default ``1``.
    GPT2RT_CUDA: ``auto`` (default) builds ``_C_cuda`` if torch has CUDA and nvcc is found (CUDA_HOME, or PATH); ``1``
        demands it, and builds it against a torch without CUDA too, which will not load it; ``0`` leaves it out, and so
        does ``auto`` with GPT2RT_CPP=0.
    CXX, CXXFLAGS, LDFLAGS: as usual; CXXFLAGS comes last, so it can add sanitizers or turn optimisation off.
    GPT2RT_CUDA_ARCHITECTURES: for which ``_C_cuda`` gets machine code, such as ``90`` or ``80,90``; one that nvcc does
        not know is an error. Default: all that are supported and that nvcc knows; those that it does not are named.
    NVCC_FLAGS: added to nvcc's, such as ``-ccbin g++-13`` for a host compiler that nvcc accepts.

Each extension uses torch's stable ABI only and no Python symbol, so one ``_C.abi3.so`` serves many versions of both.
Kernels are compiled once per instruction set, each with its own flags, and chosen at run time (csrc/cpu/isa.cpp);
the build never asks which processor it runs on.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CUDA = "gpt2rt._C_cuda"

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

# machine code for these, as far as nvcc knows them; the kernels use nothing that is special to one model of an
# architecture, so that of 8.0 serves 8.6 and 8.9, and so on. Whatever comes after the last one gets its PTX
CUDA_ARCHITECTURES = (80, 90, 100, 120)
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# from 2.11 on the C interface of the CUDA streams is stable
CUDA_API = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


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
    cuda = env_choice("GPT2RT_CUDA", "auto", ("auto", "0", "1"))
    nvcc = None if cuda == "0" else find_nvcc()
    if cuda == "1" and nvcc is None:
        raise SystemExit(
            "setup.py: GPT2RT_CUDA=1, but there is no nvcc in CUDA_HOME/bin or on PATH; install the CUDA toolkit, or "
            "leave GPT2RT_CUDA unset: without gpt2rt._C_cuda the Triton kernels, which need no build, do its work"
        )
    cpp = env_choice("GPT2RT_CPP", "1", ("0", "1")) == "1"
    if not cpp and cuda != "1":
        return {}
    try:
        import torch
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

        def get_ext_filename(self, ext_name: str) -> str:
            """``_C_cuda.so``: no Python ever imports it."""
            # asked for with its package and without
            if ext_name.endswith(CUDA.rpartition(".")[2]):
                return ext_name.replace(".", os.sep) + ".so"
            return super().get_ext_filename(ext_name)

        def build_extension(self, ext: Any) -> None:
            """Add the objects of all instruction sets to ``ext`` and build it."""
            if ext.name == CUDA:
                assert nvcc is not None
                build_cuda(
                    nvcc, Path(self.get_ext_fullpath(CUDA)), Path(self.build_temp).resolve() / "cuda", user_flags
                )
                return
            # editable installs have a new temporary folder each time; these objects, which take most of the time and
            # nothing of torch, are kept in the checkout
            folder = ROOT / "build" if self.editable_mode else Path(self.build_temp).resolve()
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
            jobs = []
            for name in isa_names():
                source = f"csrc/cpu/isa_{name}.cpp"
                command = [*compiler, *CXX_FLAGS, *isa_flags(name, compiler), *user_flags, "-c", source]
                # a name of its own for each command: one that runs at the same time does not replace it
                digest = hashlib.sha256((shlex.join(command) + version).encode()).hexdigest()[:16]
                target = folder / "isa" / f"{name}-{digest}.o"
                target.parent.mkdir(parents=True, exist_ok=True)
                jobs.append((target, [*command, "-o", str(target)], SOURCES_AND_HEADERS))
            compile_objects(jobs)
            ext.extra_objects = [*(ext.extra_objects or []), *(str(target) for target, *_ in jobs)]
            # setuptools links again only if something in this list is newer than the library
            ext.depends = [*(ext.depends or []), *map(str, SOURCES_AND_HEADERS), *ext.extra_objects]
            super().build_extension(ext)

    sources = [
        str(path.relative_to(ROOT))
        for path in SOURCES_AND_HEADERS
        if path.suffix == ".cpp" and not path.name.startswith("isa_")
    ]
    extension = CppExtension(
        "gpt2rt._C",
        sources,
        depends=[str(path) for path in SOURCES_AND_HEADERS],
        extra_compile_args={"cxx": [*CXX_FLAGS, *user_flags]},
        extra_link_args=["-pthread"],
        py_limited_api=True,
    )
    extensions = [extension] if cpp else []
    if cuda == "1" or (nvcc is not None and torch.version.cuda):
        # build_cuda knows its sources: torch refuses .cu files here where it is built without CUDA
        extensions.append(Extension(CUDA, []))
    return {
        "ext_modules": extensions,
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


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME (or CUDA_PATH), else that on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def cuda_architectures(nvcc: str, listed: list[str]) -> list[str]:
    """Those that are asked for, of the ``listed`` that nvcc knows; one that it does not is named, or an error."""
    chosen = os.environ.get("GPT2RT_CUDA_ARCHITECTURES", "")
    asked = [number.strip() for number in (chosen or ",".join(map(str, CUDA_ARCHITECTURES))).split(",")]
    known = [number for number in asked if f"sm_{number}" in listed]
    unknown = ", ".join(number or "''" for number in asked if number not in known)
    if chosen and unknown:
        raise SystemExit(
            f"setup.py: GPT2RT_CUDA_ARCHITECTURES is {chosen!r}, but {nvcc} does not know {unknown}, only "
            f"{', '.join(listed)}; leave that out (90 is compute capability 9.0), or install a newer CUDA toolkit"
        )
    if not known:
        raise SystemExit(f"setup.py: {nvcc} has none of the architectures {unknown}, only {', '.join(listed)}")
    if unknown:
        print(f"setup.py: {CUDA} without machine code for {unknown}, which {nvcc} does not know", flush=True)
    return known


def build_cuda(nvcc: str, target: Path, folder: Path, user_flags: list[str]) -> None:
    """Compile csrc/cuda and link ``target``; torch's own CUDAExtension refuses to work with a torch without CUDA."""
    from torch.utils.cpp_extension import include_paths, library_paths

    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    known = cuda_architectures(nvcc, listed)
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    targets.append(f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}")
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    nvcc_flags = shlex.split(os.environ.get("NVCC_FLAGS", ""))
    # messages name files as in the repository, wherever it was built
    compile_cuda = [nvcc, *NVCC_FLAGS, "-Xcompiler", f"-ffile-prefix-map={ROOT}/=", "-t", str(os.cpu_count() or 1)]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    cxx_flags = [flag for flag in CXX_FLAGS if "TORCH_TARGET_VERSION" not in flag]
    includes = [f"-isystem{path}" for path in include_paths()]
    jobs, objects = [], []
    for source in CUDA_SOURCES:
        if source.suffix == ".cu":
            command = [*compile_cuda, *targets, *nvcc_flags]
        elif source.suffix == ".cpp":
            command = [*compiler, *cxx_flags, *CUDA_API, *includes, *user_flags]
        else:
            continue
        objects.append(folder / f"{source.name}.o")
        jobs.append(
            (objects[-1], [*command, "-c", str(source.relative_to(ROOT)), "-o", str(objects[-1])], CUDA_SOURCES)
        )
    names = [str(each) for each in objects]
    places = [f"-L{path}" for path in library_paths()]
    link = [nvcc, *nvcc_flags, "-shared", "-cudart", "static", *names, *places, "-ltorch_cpu", "-o", str(target)]
    try:
        compile_objects(jobs)
        subprocess.run(link, cwd=ROOT, check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"setup.py: building {CUDA} failed, see above ({shlex.join(error.cmd)[:80]}...); GPT2RT_CUDA=0 leaves it "
            "out, NVCC_FLAGS='-ccbin ...' names another host compiler"
        ) from error


def compile_objects(jobs: list[tuple[Path, list[str], list[Path]]]) -> None:
    """Run all jobs of :func:`compile_object`, several at a time."""
    with ThreadPoolExecutor() as pool:
        # list() waits for all and raises what failed
        list(pool.map(lambda job: compile_object(*job), jobs))


def compile_object(target: Path, command: list[str], inputs: list[Path]) -> None:
    """Run a compiler command unless ``target`` is newer than every input and was made by the same command."""
    stamp = target.with_suffix(".command")
    text = shlex.join(command)
    newest = max(path.stat().st_mtime for path in inputs)
    if target.exists() and stamp.exists() and stamp.read_text() == text and target.stat().st_mtime > newest:
        return
    print(text, flush=True)
    stamp.unlink(missing_ok=True)
    subprocess.run(command, cwd=ROOT, check=True)
    stamp.write_text(text)


SOURCES_AND_HEADERS = sorted(
    path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h") and CSRC / "cuda" not in path.parents
)
CUDA_SOURCES = sorted(path for path in (CSRC / "cuda").iterdir() if path.is_file())

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
