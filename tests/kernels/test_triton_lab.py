"""Every kernel of the lab in triton's interpreter, and all sections of benchmarks/gpu.py at toy sizes."""

import json
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import gpu
import report

from gpt2rt.lab.measure import is_ours, measure
from gpt2rt.lab.problem import Place
from gpt2rt.lab.registry import OPERATIONS

# the maximum of a padding row is -inf - -inf
pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))
def test_kernel_agrees_with_its_definition(operation, dtype):
    result = measure(operation, operation.toy, Place("cpu", dtype))
    ours = {name: form["ok"] for name, form in result["forms"].items() if is_ours(name)}
    assert ours["Triton"]
    assert all(ours.values()), result


FUSED = [
    (kernel, rows, role, format)
    for kernel, rows in (("linear_rows", 2), ("linear_tiles", 9))
    for role, format in (("qkv", "dense"), ("proj", "int8"), ("down", "nf4"), ("head", "int4-zeros"))
]


@pytest.mark.parametrize(("kernel", "rows", "role", "format"), FUSED)
def test_roles_of_the_fused_layer(kernel, rows, role, format):
    size = {"rows": rows, "k": 64, "n": 192 if role == "qkv" else 32, "role": role, "format": format, "head_dim": 32}
    result = measure(OPERATIONS[kernel], size, Place("cpu", torch.float16))
    assert result["ok"], result


@pytest.mark.timeout(600)
def test_all_sections_run_dry(tmp_path, capsys):
    out = tmp_path / "dry.json"
    assert gpu.main(["--dry", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["dry"]
    sections = result["sections"]
    assert {name: section["state"] for name, section in sections.items()} == dict.fromkeys(sections, "done")
    assert len(sections) == 8
    rows = [row for section in sections.values() for row in section["rows"]]
    # times of the interpreter are nobody's results
    assert not any(entry for row in rows if row["kind"] == "times" for entry in row["us"].values())
    assert not any(row["value"] for row in rows if row["kind"] == "value")
    timed = [row for row in sections["kernels"]["rows"] if row["kind"] != "note"]
    assert {row["op"] for row in timed} == set(OPERATIONS)
    # without its library the persistent kernel has no times
    notes = [row["text"] for row in sections["kernels"]["rows"] if row["kind"] == "note"]
    assert all(text.startswith("not run: ") for text in notes)
    checks = [row["name"] for row in rows if row["kind"] == "check"]
    assert "model toy float16: logits" in checks
    # the formats are those that the model has, not those that were asked for
    assert "model toy int4, head int8: greedy tokens" in checks
    assert "toy float16 batch 1, drawn: 2 replays of the decode loop" in checks
    assert "toy float16: a step in company" in checks

    capsys.readouterr()
    assert report.main([str(out)]) == 0
    text = capsys.readouterr().out
    assert f"Checks: {len(checks)} of {len(checks)} hold." in text
    assert "| 124M float16, batch 1, context 256 | 86 | 190 | 135 | 105 | not measured |" in text
