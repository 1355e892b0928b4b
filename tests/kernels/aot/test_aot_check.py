"""The ahead-of-time check must pass good kernels and fail bad ones: it is run on both, as CI runs it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

CHECK = Path(__file__).with_name("check.py")

BAD_SPECS = """
from spec import Spec

import torch
import triton
import triton.language as tl


@triton.jit
def narrow_loads(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride))


@triton.jit
def large_tiles(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i[:, None] * BLOCK + i[None, :])
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], tl.dot(x, x))


x = torch.empty(1, device="meta")
SPECS = [
    Spec(name="narrow", call=lambda: narrow_loads[(1,)](x, x, 3, BLOCK=1024), wide_loads=(2,), mma=True),
    Spec(name="large", call=lambda: large_tiles[(1,)](x, x, BLOCK=128, num_warps=2), wide_loads=(0,), mma=False),
]
"""


def run(*arguments, cache):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(CHECK), "--jobs", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110)


def test_a_good_kernel_passes_until_its_registers_rise(tmp_path):
    resources = tmp_path / "resources.json"
    arguments = ("--targets", 90, "--only", "layer_norm n=768 f32", "--resources", resources)
    first = run(*arguments, cache=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "registers not compared on sm_90" in first.stdout
    line = next(line for line in first.stdout.splitlines() if "_add_layer_norm_kernel" in line)
    registers = int(line.split("_add_layer_norm_kernel")[1].split()[0])
    version = first.stdout.splitlines()[0].split()[1]
    key = "add_layer_norm n=768 f32 / _add_layer_norm_kernel"
    resources.write_text(json.dumps({version: {key: {"90": int(registers / 1.2)}}}))
    second = run(*arguments, cache=tmp_path)
    assert second.returncode == 1, second.stdout + second.stderr
    assert f"registers rose from {int(registers / 1.2)} to {registers}" in second.stdout
    assert "not in resources.json: run with --update" in second.stdout  # plain layer_norm
    assert "2 failed" in second.stdout


def test_bad_kernels_fail_and_say_why(tmp_path):
    specs = tmp_path / "bad_specs.py"
    specs.write_text(BAD_SPECS)
    done = run("--targets", 86, "--specs", specs, "--resources", tmp_path / "none.json", cache=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    narrow, large = (next(line for line in done.stdout.splitlines() if name in line) for name in ("narrow", "large"))
    assert "0 wide loads, expected 2" in narrow
    assert "no tensor core instructions" in narrow
    assert "spills" in large
    assert "shared memory" in large


WAIT_SPECS = """
from spec import Spec

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def weights_first(x_ptr, w_ptr, y_ptr):
    i = tl.arange(0, 1024)
    w = tl.load(w_ptr + i)
    gdc_wait()
    tl.store(y_ptr + i, w * tl.load(x_ptr + i))


@triton.jit
def wait_first(x_ptr, w_ptr, y_ptr):
    i = tl.arange(0, 1024)
    gdc_wait()
    tl.store(y_ptr + i, tl.load(w_ptr + i) * tl.load(x_ptr + i))


x = torch.empty(1024, device="meta")
SPECS = [
    Spec(name=kernel.__name__, call=lambda kernel=kernel: kernel[(1,)](x, x, x, launch_pdl=True), wide_loads=(4,),
         mma=False, wait_after_loads=2)
    for kernel in (weights_first, wait_first)
]
"""


def test_weights_must_be_on_their_way_before_the_wait(tmp_path):
    specs = tmp_path / "wait_specs.py"
    specs.write_text(WAIT_SPECS)
    arguments = ("--specs", specs, "--resources", tmp_path / "none.json")
    done = run("--targets", 80, 90, *arguments, cache=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    good, bad = (next(line for line in done.stdout.splitlines() if name in line) for name in ("weights_f", "wait_f"))
    assert good.endswith("ok")
    assert "0 wide loads before the wait, expected 2" in bad
    # before sm_90 there is nothing to wait for
    assert "2 kernels compiled, 1 failed" in done.stdout
