"""Kernels that promise the bits of their definition must not contract a product and a sum into one rounding."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

HERE = Path(__file__).parent

PROGRAM = """
import re, sys
sys.path.insert(0, sys.argv[1])
import check
import triton
from triton.backends.compiler import GPUTarget

def words(launch, **changed):
    source, options = check.specialise(launch)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options | changed).asm["ptx"]
    return len(re.findall(r"\\bfma\\.", text)), text.count(".ftz"), len(re.findall(r"\\bdiv\\.rn\\.f32", text))

specs = {spec.name: spec for spec in check.load_specs(sys.argv[1] + "/specs_sampling.py")}
for name in ("sample all filters", "penalties"):
    for launch in check.record(specs[name].call):
        print(launch.kernel.fn.__name__, *words(launch))
weights = check.record(specs["sampling_weights"].call)[1]
print("exact", *words(weights))
print("fused", *words(weights, enable_fp_fusion=True))
"""


def test_multiplications_and_additions_round_separately(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(HERE)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert done.returncode == 0, done.stderr
    found = {name: tuple(map(int, numbers)) for name, *numbers in map(str.split, done.stdout.splitlines())}
    assert {"_weigh_kernel", "_gather_kernel", "_draw_kernel", "_penalties_kernel", "exact"} < set(found)
    fused = found.pop("fused")
    # small numbers must not be flushed to zero either
    assert {name: numbers[:2] for name, numbers in found.items()} == dict.fromkeys(found, (0, 0))
    # a quotient that is not the nearest float32 would move scores
    assert all(found[name][2] > 0 for name in ("_weigh_kernel", "_gather_kernel", "_draw_kernel", "_penalties_kernel"))
    # the negative control
    assert fused[0] > 0
