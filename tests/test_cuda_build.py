"""The library of CUDA C++ kernels: what setup.py makes of csrc/cuda, the machine code, and when it is loaded."""

import collections
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from cuda_build import build, disassembled
from cuda_build import built as built_library

from gpt2rt.ops.cuda_extension import cuda_extension_status, use_cuda_rows, use_persistent_decode

ROOT = pathlib.Path(__file__).resolve().parents[1]

# instances of the kernel for few rows: two dtypes, three formats, two or four parts
INSTANCES = 12
# and of the persistent one: test_cuda_persistent_build.py
PERSISTENT = 2
# more of them a weight, and unpacking 4-bit codes takes longer than reading them does on an H100
MOST_INSTRUCTIONS = {"int4": 2.75, "int4_zeros": 2.75, "code4": 3.0}


@pytest.fixture(scope="module")
def built():
    """The library and what the compiler said."""
    if shutil.which("nvcc") is None:
        pytest.skip("the CUDA toolkit (nvcc) is not installed")
    return built_library()


def test_library_needs_only_the_c_interface_of_torch(built):
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listed = subprocess.run(["nm", "-D", "--undefined-only", built[0]], capture_output=True, text=True, check=True)
    names = {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}
    # the CUDA runtime is inside; Python is not needed; torch's own classes have mangled names
    assert [name for name in names if re.match(r"_?Py[A-Z_]|cuda[A-Z]|__cuda", name)] == []
    assert [name for name in names if name.startswith("_Z") and re.search(r"3c10|2at|5torch", name)] == []
    assert "aoti_torch_get_current_cuda_stream" in names


def test_no_instance_spills(built):
    _, log = built
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    # the PTX for later devices is not compiled here
    assert len(spills) == INSTANCES + PERSISTENT, log
    assert set(spills) == {("0", "0", "0")}
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    # 13 warps, four of them on one quarter of a multiprocessor with its 16384 registers
    assert len(registers) == INSTANCES + PERSISTENT
    assert max(registers) <= 128


@pytest.fixture(scope="module")
def instructions(built):
    """(format, parts, dtype) -> instructions of that instance, in the order of the machine code."""
    triton = pytest.importorskip("triton")
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = {}
    for name, code in disassembled(built[0], tool).items():
        if "persistent" in name:
            continue
        format, parts = re.search(r"FormatE(\d)ELi(\d)E", name).groups()
        key = ("int4", "int4_zeros", "code4")[int(format)], int(parts), "bfloat16" if "BFloat" in name else "float16"
        found[key] = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in code.values()]
    assert len(found) == INSTANCES
    return found


def test_instructions_per_weight(instructions):
    """From the first to the last product: four steps, in each of which a thread unpacks 64 weights and multiplies."""
    for (format, parts, dtype), code in instructions.items():
        products = [i for i, name in enumerate(code) if name.startswith("HMMA.16816")]
        # 8 weights of a thread each
        assert len(products) == 4 * 64 / 8
        each = (products[-1] - products[0]) / (4 * 64)
        assert each <= MOST_INSTRUCTIONS[format], f"{format}, {parts} parts, {dtype}: {each:.2f}"
        # no conversion instruction, of which a multiprocessor does 16 a cycle
        between = collections.Counter(name.split(".")[0] for name in code[products[0] : products[-1]])
        assert not between.keys() & {"I2F", "I2FP", "F2F", "F2FP", "I2I"}


def test_weights_are_under_way_before_the_wait(instructions):
    """All 16-byte loads of codes, two rows in each of four steps, come before the wait for the kernel before."""
    for code in instructions.values():
        (wait,) = [i for i, name in enumerate(code) if name == "ACQBULK"]
        loads = [i for i, name in enumerate(code) if name.startswith("LDG") and ".128.CONSTANT" in name]
        assert len(loads) == 8
        assert max(loads) < wait
        # what other kernels write is read after it, and not through the cache of constants
        stores = [i for i, name in enumerate(code) if name.startswith("STG")]
        assert stores
        assert min(stores) > wait
        assert not [name for name in code[wait:] if "CONSTANT" in name and name.startswith("LDG")]


def test_without_cuda_in_torch_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    cuda_extension_status.cache_clear()
    try:
        status = cuda_extension_status()
        assert (status.loaded, status.path) == (False, None)
        assert "is built without CUDA" in status.reason
        monkeypatch.setenv("GPT2RT_CUDA_INT4", "1")
        assert not use_cuda_rows(torch.device("cpu"))
        with pytest.raises(ImportError, match=r"GPT2RT_CUDA_INT4 is set, but torch .* is built without CUDA"):
            use_cuda_rows(torch.device("cuda"))
        monkeypatch.setenv("GPT2RT_CUDA_INT4", "0")
        assert not use_cuda_rows(torch.device("cuda"))
        assert not use_persistent_decode(torch.device("cuda"))
        monkeypatch.setenv("GPT2RT_CUDA_PERSISTENT", "1")
        assert not use_persistent_decode(torch.device("cpu"))
        with pytest.raises(ImportError, match=r"GPT2RT_CUDA_PERSISTENT is set, but torch .* is built without CUDA"):
            use_persistent_decode(torch.device("cuda"))
    finally:
        cuda_extension_status.cache_clear()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_env_says_why_it_is_not_loaded():
    program = "from gpt2rt.cli import main; main(['env', '--json'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert '"cuda_extension": {"loaded": false' in done.stdout, done.stderr
    assert "is built without CUDA" in done.stdout


# an nvcc that knows what it is told and cannot compile
NVCC = """#!/bin/sh
case "$*" in --list-gpu-code) echo "sm_90 sm_100";; *) exit 1;; esac
"""


@pytest.fixture
def broken_toolkit(tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return str(tmp_path)


def test_a_failed_build_says_how_to_go_on(tmp_path, broken_toolkit):
    done = build(tmp_path, CUDA_HOME=broken_toolkit)
    assert done.returncode != 0
    assert "building gpt2rt._C_cuda failed" in done.stderr
    assert "GPT2RT_CUDA=0" in done.stderr


def test_an_architecture_that_nvcc_does_not_know_is_refused(tmp_path, broken_toolkit):
    done = build(tmp_path, CUDA_HOME=broken_toolkit, GPT2RT_CUDA_ARCHITECTURES="90, 80,gpu")
    assert done.returncode != 0
    assert "GPT2RT_CUDA_ARCHITECTURES is '90, 80,gpu', but" in done.stderr
    assert "does not know 80, gpu, only sm_90, sm_100; leave that out" in done.stderr


def test_architectures_that_nvcc_has_not_yet_are_named(monkeypatch, capsys):
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    for name, value in {"GPT2RT_CPP": "0", "GPT2RT_CUDA": "0", "GPT2RT_CUDA_ARCHITECTURES": ""}.items():
        monkeypatch.setenv(name, value)
    script = runpy.run_path(str(ROOT / "setup.py"))
    assert script["cuda_architectures"]("nvcc", ["sm_90", "sm_100"]) == ["90", "100"]
    assert "gpt2rt._C_cuda without machine code for 80, 120, which nvcc does not know" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nvcc has none of the architectures 80, 90, 100, 120, only sm_75"):
        script["cuda_architectures"]("nvcc", ["sm_75"])


@pytest.mark.parametrize("variables", [{"GPT2RT_CUDA": "auto"}, {"GPT2RT_CUDA": "0"}], ids=str)
def test_it_is_left_out_unless_wanted(tmp_path, broken_toolkit, variables):
    """``auto`` without the CPU's extension, and ``0``: the broken toolkit is not even asked."""
    done = build(tmp_path, CUDA_HOME=broken_toolkit, **variables)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
