"""Fixtures of the op tests."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import gpt2rt.ops as ops

ROOT = pathlib.Path(__file__).resolve().parents[2]

# rtol, atol of STYLE.md
ELEMENTWISE = {torch.float32: (1.3e-6, 1e-5), torch.float16: (1e-3, 1e-5), torch.bfloat16: (1.6e-2, 1e-5)}
ROW_REDUCTION = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 1e-3), torch.bfloat16: (2e-2, 2e-2)}


@pytest.fixture(autouse=True, scope="session")
def _needs_extension():
    if not ops.extension_status().loaded:
        pytest.skip(f"these tests are about the C++ forms: {ops.extension_status().reason}")


@pytest.fixture(autouse=True, scope="session")
def _threads():
    # the small references below run a hundred times slower on torch's threads when other programs share the cores
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed_and_pool(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("GPT2RT_NUM_THREADS", "2")


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def dtype(request):
    return request.param


@pytest.fixture
def assert_elementwise():
    """Compares with the tolerance of one rounding."""

    def compare(actual, expected):
        rtol, atol = ELEMENTWISE[actual.dtype]
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

    return compare


@pytest.fixture
def assert_row_reduction():
    """Compares with the tolerance of a sum over a row."""

    def compare(actual, expected):
        rtol, atol = ROW_REDUCTION[actual.dtype]
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

    return compare


@pytest.fixture
def assert_matmul():
    """Compares errors against float64: at most twice plain torch's in the same dtype, plus 1e-5."""

    def compare(actual, plain, exact):
        error, allowed = (actual.double() - exact).abs().max(), (plain.double() - exact).abs().max()
        assert error <= 2 * allowed + 1e-5, f"error {error:.3g}, plain torch's {allowed:.3g}"

    return compare


@pytest.fixture
def run_python():
    """Runs a program in a fresh interpreter and returns the finished process; extra variables as keywords."""

    def run(program: str, *arguments: str, timeout: float = 100, **variables: str) -> subprocess.CompletedProcess:
        paths = [str(ROOT), str(ROOT / "tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
