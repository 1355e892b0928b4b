"""``gpt2rt bench kernels``: tables, JSON, and what it refuses."""

import json

import pytest

from gpt2rt import ops
from gpt2rt.lab.registry import OPERATIONS


@pytest.fixture
def extension():
    if not ops.extension_status().loaded:
        pytest.skip(ops.extension_status().reason)


def test_a_table_for_a_kernel(run, extension):
    code, out, err = run("bench", "kernels", "--op", "layer_norm", "--toy")
    assert (code, err) == (0, "")
    assert "layer_norm" in out
    lines = {line.split()[-5]: line for line in out.splitlines() if line.rstrip().endswith("-")}
    assert "rows=3 n=100" in out
    assert "C++" in out
    assert "torch" in out
    assert lines


def test_json_has_every_form_of_every_kernel(run, extension):
    code, out, err = run("bench", "kernels", "--toy", "--json", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["limits"] is None
    assert {row["op"] for row in result["kernels"]} == {o.name for o in OPERATIONS.values() if o.cpp}
    for row in result["kernels"]:
        assert row["dtype"] == "bfloat16"
        assert row["ok"]
        assert any(form["us"] is None for form in row["forms"].values())


def test_times_and_shares_of_one_kernel(run, extension, monkeypatch):
    from gpt2rt.lab import registry, timing

    # no minutes for a bandwidth, no megabytes for a test
    monkeypatch.setattr(timing, "measure_limits", lambda *_: {"bytes_per_s": 1e9, "operations_per_s": 1e12})
    small = registry.OPERATIONS["bias_gelu_new"]
    monkeypatch.setitem(registry.OPERATIONS, "bias_gelu_new", type(small)(**{**vars(small), "sizes": (small.toy,)}))
    code, out, _ = run("bench", "kernels", "--op", "bias_gelu_new", "--rounds", "2", "--json")
    assert code == 0
    (row,) = json.loads(out)["kernels"]
    assert row["limit_us"] == pytest.approx(row["bytes"] / 1e3)
    assert row["forms"]["C++"]["us"] > 0
    assert row["forms"]["C++"]["share"] == pytest.approx(row["limit_us"] / row["forms"]["C++"]["us"])


def test_a_wrong_kernel_ends_with_1(run, extension, monkeypatch):
    from gpt2rt.lab import registry

    monkeypatch.setitem(registry.TOLERANCE, __import__("torch").float32, 0.0)
    code, out, _ = run("bench", "kernels", "--op", "linear", "--toy")
    assert code == 1
    assert "linear" in out


def test_the_list(run):
    code, out, _ = run("bench", "kernels", "--list")
    assert code == 0
    assert all(name in out for name in OPERATIONS)
    code, out, _ = run("bench", "kernels", "--list", "--op", "sample", "--json")
    (entry,) = json.loads(out)
    assert entry["reference"] == "sampling_refs:sample_ref"
    assert [form for form in entry["forms"] if form != "C++"] == ["definition", "torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "norm"), "--op: there is no operation 'norm'"),
        (("--dtype", "int8", "--op", "linear"), "--dtype must be one of float32, float16, bfloat16, got 'int8'"),
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--device", "tpu!"), "--device must be cpu, cuda"),
    ],
)
def test_wrong_usage(run, one_sentence, arguments, message):
    code, _, err = run("bench", "kernels", *arguments)
    assert code == 2
    assert message in one_sentence(err)
