"""What setup.py builds: the symbols of the extension, the contents of wheel and sdist, and its refusals."""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import gpt2rt.ops as ops

ROOT = pathlib.Path(__file__).resolve().parents[1]

# what a checkout holds; build products and caches are left behind
IGNORED = shutil.ignore_patterns("build", "dist", "*.egg-info", "*.so", "__pycache__", ".*cache", ".git", ".hypothesis")


@pytest.fixture(scope="module")
def extension():
    status = ops.extension_status()
    if not status.loaded:
        pytest.skip(f"there is no extension to look at: {status.reason}")
    return status.path


def tool(name, *arguments):
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout


def test_extension_has_no_python_symbol(extension):
    undefined = tool("nm", "-D", "--undefined-only", extension).split()
    assert [name for name in undefined if re.match(r"_?Py[A-Z_]", name)] == []


def test_extension_uses_only_the_stable_interface_of_torch(extension):
    undefined = tool("nm", "-D", "--undefined-only", extension).split()
    # mangled C++ names of torch's own classes; the stable interface is C
    assert [name for name in undefined if name.startswith("_Z") and re.search(r"3c10|2at|5torch", name)] == []
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)


@pytest.fixture(scope="module")
def instructions(extension):
    """(function, instruction) of everything that the extension executes."""
    function, found = "", []
    for line in tool("objdump", "-d", "--no-show-raw-insn", extension).splitlines():
        if line.endswith(">:"):
            function = line
        else:
            found.append((function, line))
    return found


# parts of mangled names: the namespaces of the levels from AVX-512 up
WIDE = ("6avx512", "11avx512_vnni", "11avx512_bf16", "3amx")


def test_wide_registers_stay_in_their_instruction_set(instructions):
    """No function outside the AVX-512 levels uses its registers, and so on: such a one would crash older processors."""
    tiles = WIDE[3:]
    allowed = {"%zmm": WIDE, "%ymm": (*WIDE, "4avx2"), "%tmm": tiles, "ldtilecfg": tiles, "tilerelease": tiles}
    allowed |= {"vpdpbusd": WIDE[1:], "vdpbf16ps": WIDE[2:]}
    strays, seen = [], set()
    for function, line in instructions:
        for word, namespaces in allowed.items():
            if word in line:
                seen.add(word)
                if not any(namespace in function for namespace in namespaces):
                    strays.append((function, line))
    assert strays[:5] == []
    # the control: on x86-64 there are such functions
    registers = {"%zmm", "%ymm"} if platform.machine() == "x86_64" else set()
    assert seen & {"%zmm", "%ymm"} == registers


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX belongs to x86-64")
def test_tile_kernels_are_what_they_should_be(instructions):
    """Both kernels configure the tiles, multiply on them and release them, whatever processor this is."""
    done = run_python("import gpt2rt.ops as ops; ops.cpu_isa()", GPT2RT_CPU_ISA="amx")
    if "this build leaves out" in done.stderr:
        pytest.skip("the compiler of this build did not know AMX")
    steps = {"ldtilecfg", "tilezero", "tileloadd", "tilestored", "tilerelease"}
    for kernel, dot in (("gemm_int8_tiles", "tdpbsud"), ("gemm_bfloat16_tiles", "tdpbf16ps")):
        words = {line.split()[1] for function, line in instructions if kernel in function and len(line.split()) > 1}
        assert steps | {dot} <= words
        # signed times unsigned only, and pairs of bfloat16 only
        assert {word for word in words if word.startswith("tdp")} == {dot}


def run_python(program, **variables):
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=100
    )


def run_setup(folder, *arguments, **variables):
    environment = {**os.environ, "GPT2RT_CPP": "0", "GPT2RT_CUDA": "auto", **variables}
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout") / "gpt2rt"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=IGNORED)
    return folder


def test_wheel_without_the_extension(checkout):
    done = run_setup(checkout, "bdist_wheel", "-d", "wheels")
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "wheels").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"gpt2rt"}
    assert len(names) == len(set(names))
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {name.removeprefix("gpt2rt/kernels/") for name in names if name.startswith("gpt2rt/kernels/")} == kernels
    assert "gpt2rt/py.typed" in names
    assets = (path for path in (ROOT / "gpt2rt" / "assets").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert {str(path.relative_to(ROOT)) for path in assets} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".so"))]


def test_sdist_holds_what_a_build_needs(checkout):
    done = run_setup(checkout, "sdist", "-d", "sdists")
    assert done.returncode == 0, done.stderr
    (sdist,) = (checkout / "sdists").iterdir()
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert any(path.suffix == ".cu" for path in sources)
    for path in [*sources, *(ROOT / "kernels").glob("*.py")]:
        assert str(path.relative_to(ROOT)) in names
    assert {"setup.py", "pyproject.toml", "gpt2rt/py.typed"} <= names
    assert not [name for name in names if name.startswith("gpt2rt/kernels/")]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"GPT2RT_CUDA": "1", "CUDA_HOME": "/nowhere"}, "GPT2RT_CUDA=1, but there is no nvcc in CUDA_HOME/bin"),
        ({"GPT2RT_CUDA": "yes"}, "GPT2RT_CUDA is 'yes', expected one of auto, 0, 1"),
        ({"GPT2RT_CPP": "off"}, "GPT2RT_CPP is 'off', expected one of 0, 1"),
    ],
)
def test_wrong_settings_are_refused(checkout, variables, message):
    done = run_setup(checkout, "--version", **variables)
    assert done.returncode != 0
    assert message in done.stderr


def test_without_torch_the_build_says_what_to_do(checkout, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    done = run_setup(checkout, "--version", GPT2RT_CPP="1", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "needs torch at build time" in done.stderr
    assert "--no-build-isolation" in done.stderr
    assert "GPT2RT_CPP=0" in done.stderr


# writes nothing but the command line into a log; an old one refuses AMX
COMPILER = """#!/bin/sh
echo "$@" >> "$COMPILER_LOG"
case "$OLD $*" in "1 "*-mamx*) echo "unknown option -mamx-tile" >&2; exit 1;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX belongs to x86-64")
@pytest.mark.parametrize("old", ["0", "1"])
def test_a_compiler_without_amx_leaves_it_out(checkout, tmp_path, old):
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    done = run_setup(
        checkout,
        "build_ext",
        *("--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")),
        GPT2RT_CPP="1",
        CXX=str(compiler),
        COMPILER_LOG=str(log),
        OLD=old,
    )
    assert done.returncode == 0, done.stderr
    (command,) = [line for line in log.read_text().splitlines() if "isa_amx.cpp" in line]
    assert ("-mamx-int8" in command) == (old == "0")
    assert ("without the kernels for AMX" in done.stdout) == (old == "1")
    # the levels below are as they were
    assert any("isa_avx512_bf16.cpp" in line and "-mavx512bf16" in line for line in log.read_text().splitlines())
