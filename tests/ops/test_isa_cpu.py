"""Every instruction set that this processor has, each in its own process."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

import gpt2rt.ops as ops

HERE = pathlib.Path(__file__).resolve().parent
NUMERICAL = [
    "test_rows_cpu.py",
    "test_linear_cpu.py",
    "test_quantized_linear_cpu.py",
    "test_attention_cpu.py",
    "test_attention_int8_cpu.py",
    "test_cpu_step.py",
]
# from the best down
ISAS = list(reversed(ops.CPU_ISAS)) if platform.machine() == "x86_64" else ["portable"]
# a level that replaces a few kernels of the one below is tested where they run
FILES = {
    "avx512_bf16": ["test_linear_cpu.py", "test_cpu_step.py"],
    "avx512_vnni": ["test_quantized_linear_cpu.py"],
}

# the rest of this run tests the one in use
OTHERS = [isa for isa in ISAS if not ops.extension_status().loaded or isa != ops.cpu_isa()]

NAME = "import gpt2rt.ops as ops; print(ops.cpu_isa())"


@pytest.fixture(scope="module")
def best():
    # a process of its own: this one may have been started with GPT2RT_CPU_ISA
    env = {k: v for k, v in os.environ.items() if k != "GPT2RT_CPU_ISA"}
    return subprocess.run(
        [sys.executable, "-c", NAME], env=env, cwd=HERE.parents[1], capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize("isa", OTHERS)
def test_ops_are_right_on(isa, best):
    """The other tests of this folder once more, with the instruction set forced."""
    if ISAS.index(isa) < ISAS.index(best):
        pytest.skip(f"this processor has no {isa}")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *(str(HERE / name) for name in FILES.get(isa, NUMERICAL)),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "GPT2RT_CPU_ISA": isa},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("isa", ISAS)
def test_isa_can_be_forced(isa, best, run_python):
    done = run_python(NAME, GPT2RT_CPU_ISA=isa)
    if ISAS.index(isa) < ISAS.index(best):
        assert done.returncode != 0
        assert f"GPT2RT_CPU_ISA is {isa}, which this processor does not support" in done.stderr
    else:
        assert done.stdout.strip() == isa, done.stderr


REFUSED = """
import torch, gpt2rt.ops as ops
for call in (ops.cpu_isa, lambda: ops.layer_norm(torch.ones(1, 4), torch.ones(4), torch.ones(4), 1e-5)):
    for _ in range(2):
        try:
            call()
        except RuntimeError as error:
            print(str(error).splitlines()[0])
"""


def test_an_unknown_isa_is_refused_at_each_use(run_python):
    done = run_python(REFUSED, GPT2RT_CPU_ISA="sse9")
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stderr
    assert all(line.startswith("GPT2RT_CPU_ISA is 'sse9', expected one of: ") for line in lines)


def test_an_empty_value_means_the_best(best, run_python):
    assert run_python(NAME, GPT2RT_CPU_ISA="").stdout.strip() == best
