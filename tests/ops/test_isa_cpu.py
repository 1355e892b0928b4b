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
    "test_packed_linear_cpu.py",
    "test_attention_cpu.py",
    "test_attention_int8_cpu.py",
    "test_step_attention_cpu.py",
    "test_cpu_step.py",
]
# from the best down
ISAS = list(reversed(ops.CPU_ISAS)) if platform.machine() == "x86_64" else ["portable"]
# a level that replaces a few kernels of the one below is tested where they run
FILES = {
    "amx": [
        "test_linear_cpu.py",
        "test_quantized_linear_cpu.py",
        "test_packed_linear_cpu.py",
        "test_step_attention_cpu.py",
        "test_cpu_step.py",
    ],
    "avx512_bf16": [
        "test_linear_cpu.py",
        "test_packed_linear_cpu.py",
        "test_step_attention_cpu.py",
        "test_cpu_step.py",
    ],
    "avx512_vnni": ["test_quantized_linear_cpu.py", "test_packed_linear_cpu.py"],
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


@pytest.mark.proves("fault:F61")
@pytest.mark.parametrize("isa", OTHERS)
def test_ops_are_right_on(isa, best):
    """The other tests of this folder once more, with the instruction set forced."""
    if ISAS.index(isa) < ISAS.index(best):
        pytest.skip(f"{isa} cannot be had here")
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


GENERATE = """
import gpt2rt.ops as ops
from gpt2rt import GPT2LMHeadModel

model = GPT2LMHeadModel.from_pretrained("gpt2rt/tiny-gpt2")
tokens = [model.generate([[5, 9, 12]], max_new_tokens=24, do_sample=False, kv_cache_dtype=d)[0].tolist()
          for d in ("float32", "int8")]
print(ops.cpu_isa(), model.generation_executor().name, tokens)
"""


@pytest.mark.proves("fault:F61")
def test_the_same_tokens_on_every_instruction_set(best, run_python):
    lines = {isa: run_python(GENERATE, GPT2RT_CPU_ISA=isa).stdout.split(" ", 2) for isa in ISAS[ISAS.index(best) :]}
    for isa, (used, executor, tokens) in lines.items():
        assert (used, executor) == (isa, "cpu")
        assert tokens == lines["portable"][2]


@pytest.mark.parametrize("isa", ISAS)
def test_isa_can_be_forced(isa, best, run_python):
    done = run_python(NAME, GPT2RT_CPU_ISA=isa)
    if ISAS.index(isa) < ISAS.index(best):
        assert done.returncode != 0
        # amx can also be missing in the system or in the build
        assert f"GPT2RT_CPU_ISA is {isa}, which " in done.stderr
        if isa != "amx":
            assert "which this processor does not support; use one of: " in done.stderr
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


LIMIT = "import gpt2rt.ops as ops; print(ops.cpu_isa_limit())"


def test_why_there_is_no_higher_level(best, run_python):
    limit = run_python(LIMIT, GPT2RT_CPU_ISA="").stdout.strip()
    if best == ISAS[0]:
        assert limit == ""
    else:
        above = ISAS[ISAS.index(best) - 1]
        assert limit.startswith(f"{above}, the level above, is one that ")
    lowest = ISAS[-1]
    forced = run_python(LIMIT, GPT2RT_CPU_ISA=lowest).stdout.strip()
    assert forced == ("" if len(ISAS) == 1 else f"GPT2RT_CPU_ISA={lowest} forces it")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX belongs to x86-64")
def test_why_there_is_no_amx(best, run_python):
    """The same words in the error for who asks for it and in the limit for who does not."""
    if best == "amx":
        pytest.skip("there is")
    error = run_python(NAME, GPT2RT_CPU_ISA="amx").stderr
    if best == "avx512_bf16":
        reason = run_python(LIMIT, GPT2RT_CPU_ISA="").stdout.strip().split("is one that ")[1]
        assert f"GPT2RT_CPU_ISA is amx, which {reason}; use one of: avx512_bf16, " in error
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = set(file.read().partition("\nflags")[2].partition("\n")[0].split())
    if not {"amx_tile", "amx_int8", "amx_bf16"} <= flags and "this build leaves out" not in error:
        assert "this processor does not support" in error
    # it is no fault of the kernels, so nothing is said unasked
    assert "self-check" not in run_python(NAME, GPT2RT_CPU_ISA="").stderr
