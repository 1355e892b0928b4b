"""The op of the persistent kernel in the library as it is built: its schema, and what it refuses before it launches."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from cuda_build import ROOT, built

if torch.version.cuda is not None:
    pytest.skip("a stand-in for torch's CUDA library is for a torch without it", allow_module_level=True)

# what the message of each refusal must say
REFUSED = {
    "stream too short": "stream must be uint8, contiguous, of ",
    "stream not aligned": "stream must start at a multiple of 16 bytes",
    "norms of half": "norms must be float32, contiguous, of 288 elements, got 288",
    "scales of two layers": "scales must be float32 [1]",
    "activation 7": "there is no activation 7",
    "wte of another dtype": "wte must be [rows, 48] of the dtype of the cache",
    "wte of more rows": "34 rows of wte and 33 logits",
    "wpe too narrow": "wpe must be [rows, 48]",
    "wpe by columns": "wpe must be [rows, 48] of the dtype of the cache, rows contiguous",
    "ids of int32": "input_ids must be int64 with an element",
    "no positions": "position_ids must be int64 with an element",
    "lengths of int64": "seq_lens must be int32 with an element",
    "table of one dimension": "block_table must be a matrix",
    "cache of float32": "cache must be float16 or bfloat16",
    "cache of five dimensions": "cache must be [n_layer, 2, num_blocks, n_head, block_size, head_dim]",
    "cache not contiguous": "cache must be [n_layer, 2, num_blocks, n_head, block_size, head_dim], contiguous",
    "head_dim 20": "head_dim is 20, expected a multiple of 8 up to 128",
    "workspace too small": "workspace must be float32, contiguous, of ",
    "workspace for other splits": "workspace must be float32, contiguous, of ",
    "barrier of two words": "barrier must be int32, contiguous, of 1 elements, got 2",
    "logits of half": "logits must be float32",
    "hidden too long": "hidden must be float32 of 48 elements",
    "chosen of two rows": "chosen must be int64 of one element",
    "another inner size": "stream must be uint8, contiguous, of ",
    "no splits": "0 splits",
    "blocks, head_dim 136": "head_dim is 136, expected a multiple of 8 up to 128",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each call of tests/support/call_persistent_op.py came to."""
    for tool in ("nvcc", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    library, _ = built()
    shims = tmp_path_factory.mktemp("shims") / "cuda_shims.so"
    subprocess.run(["g++", "-shared", "-fPIC", ROOT / "tests/support/cuda_shims.cpp", "-o", shims], check=True)
    program = ROOT / "tests/support/call_persistent_op.py"
    environment = {**os.environ, "LD_PRELOAD": str(shims), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, program, library], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("call", ["right", "without hidden and chosen"])
def test_right_arguments_get_as_far_as_the_device(outcomes, call):
    """Which is not there: the driver says so, or says that it is not there itself."""
    assert outcomes[call].startswith("RuntimeError: persistent_decode_cuda: the launch failed: ")
    assert "CUDA" in outcomes[call]
    assert outcomes["blocks"].startswith("ValueError: persistent_decode_cuda: ")


def test_each_call_is_looked_at(outcomes):
    assert outcomes.keys() == REFUSED.keys() | {"right", "without hidden and chosen", "blocks"}


@pytest.mark.parametrize("call", REFUSED)
def test_wrong_arguments_are_refused_before_the_launch(outcomes, call):
    assert outcomes[call].startswith("ValueError: persistent_decode_cuda: "), outcomes[call]
    assert REFUSED[call] in outcomes[call]
