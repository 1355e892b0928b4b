"""The report on results of benchmarks/gpu.py: tables, targets, checks, plots, out of results made by hand."""

import json
import tomllib

import pytest
import report
import torch
from gpu_sections import PARTS, SECTIONS, chosen
from gpu_sections.kernels import label
from gpu_sections.models import make_model, plan_of, title_of
from gpu_sections.peers import COMPILED
from gpu_sections.persistent import LABEL as PERSISTENT
from gpu_sections.persistent import ROWS
from gpu_sections.prefill import LENGTHS
from gpu_sections.session import Session
from gpu_sections.throughput import CASES

from gpt2rt.lab.measure import size_text
from gpt2rt.lab.registry import OPERATIONS
from gpt2rt.lab.timing import Times

CPU = torch.device("cpu")


def times(median):
    return Times(median, median - 1.0, 9, True)


def result_of(device="NVIDIA H100", **sections):
    """A result file made by hand; the device reads at half the bandwidth of the targets."""
    machine = {"device": device, "driver": "580.1", "commit": "abc", "date": "2026-01-01", "packages": {"torch": "2"}}
    limits = {"bytes_per_s": 1.5e12, "operations_per_s": 6e14}
    session = Session(CPU, None)
    for name, fill in sections.items():
        with session.section(name):
            fill(session)
    return {"machine": machine, "dry": False, "limits": limits, "sections": session.result["sections"]}


def decode(session):
    facts = {"model": "124M", "format": "float16", "batch": 1, "context": 256}
    forms = {"gpt2rt": times(200.0), "torch in a graph": times(400.0)}
    session.times("decode 124M float16 context 256", forms, floor_us=150.0, **facts)
    forms = {"gpt2rt": times(300.0), COMPILED: times(900.0)}
    session.times("generate 124M float16", forms, model="124M", format="float16")
    int4 = {"model": "124M", "format": "int4", "layers": "int4", "head": "int8"}
    session.times("generate 124M int4, head int8", {"gpt2rt": times(1800.0)}, **int4)


def kernels(session):
    forms = {"gpt2rt": times(10.0), "gpt2rt, n8 w8": times(12.0), "torch": times(8.0)}
    session.times("layer_norm rows=8192 n=768", forms, floor_us=8.5, op="layer_norm", bytes=100, operations=0)
    forms = {"gpt2rt": times(10.0)}
    session.times("linear_rows x", forms, floor_us=8.5, op="linear_rows", bytes=1000, operations=2000)


def test_targets_scale_with_the_bandwidth_and_say_what_they_reached():
    text = report.Report([result_of(decode=decode, kernels=kernels)]).text()
    # at half the bandwidth the floor of 86 us takes 172: every goal is 86 us later
    assert "| 124M float16, batch 1, context 256 | 172 | 276 | 221 | 191 | 200 | goal 2 |  |  |" in text
    assert "| layer norm 8192 x 768, share of bandwidth |  | 80 | 90 |  | 85 | goal 1 |  |  |" in text
    assert "| 355M float16, batch 1, context 256 | 488 | 694 | 589 | 524 | not measured |  |  |  |" in text
    assert "NVIDIA H100, driver 580.1; torch 2, triton None" in text
    assert "1.50 TB/s, 600 TFLOP/s" in text


def persistent(session):
    forms = {"gpt2rt": times(205.0), PERSISTENT: times(180.0), f"{PERSISTENT}, 66 blocks": times(170.0)}
    session.times("persistent decode 124M float16 context 256", forms, {"peer": "RuntimeError: no"}, floor_us=150.0)


def test_the_stretch_is_compared_with_the_persistent_kernel():
    """It was set for that kernel, and read from the chain alone: it could not be met."""
    text = report.Report([result_of(decode=decode), result_of(kernels=persistent)]).text()
    row = "| 172 | 276 | 221 | 191 | 200 | goal 2 | 180 (gpt2rt, CUDA C++ persistent) | stretch |"
    assert f"| 124M float16, batch 1, context 256 {row}" in text

    def asked_for(session):
        """What a run with GPT2RT_CUDA_PERSISTENT=1 has in the row of the same name."""
        forms = {PERSISTENT: times(185.0), "torch in a graph": times(390.0)}
        session.times("decode 124M float16 context 256", forms, floor_us=151.0)

    both = report.Report([result_of(decode=decode), result_of(decode=asked_for)])
    row = "| 172 | 276 | 221 | 191 | 200 | goal 2 | 185 (gpt2rt, CUDA C++ persistent) | stretch |"
    assert f"| 124M float16, batch 1, context 256 {row}" in both.text()
    only = report.Report([result_of(decode=asked_for)]).text()
    row = "| 172 | 276 | 221 | 191 | not measured |  | 185 (gpt2rt, CUDA C++ persistent) | stretch |"
    assert f"| 124M float16, batch 1, context 256 {row}" in only
    found = both.find("decode 124M float16 context 256")
    assert {form: entry["median"] for form, entry in found["us"].items()} == {
        "gpt2rt": 200.0,
        "torch in a graph": 390.0,
        PERSISTENT: 185.0,
    }
    assert (found["fastest_peer"], found["floor_us"], found["model"]) == ("torch in a graph", 151.0, "124M")


def test_every_target_names_rows_as_the_sections_do():
    """A target whose row nobody writes would be "not measured" for ever."""
    table = tomllib.loads((report.HERE / "gpu_targets.toml").read_text(encoding="utf-8"))
    decoding = {f"decode {size} float16 context 256" for size in ("124M", "355M", "774M", "1.5B")}
    models = {size: plan_of(make_model("toy", size, CPU)) for size in ("float16", "int4")}
    known = decoding | {f"decode {title_of('1.5B', models['int4'])} context 256"}
    for op in OPERATIONS.values():
        known |= {f"{op.name} {size_text(size)}" for size in op.sizes}
    plain = title_of("124M", models["float16"])
    known |= {f"decode {plain} batch {batch} context {context}" for _, _, batch, context in CASES}
    known |= {f"prefill {plain} {length} tokens" for length in LENGTHS} | {f"invariance cost {plain} batch 1"}
    assert {target["row"] for target in table["target"]} <= known
    forms = {form for target in table["target"] for form in target.get("forms", ())}
    assert forms == {PERSISTENT, ROWS, label("CUDA C++")}
    for target in table["target"]:
        assert target.get("also", []) in (
            [],
            [f"persistent {target['row']}", f"persistent grids {target['row'].split()[1]}"],
        )


def test_every_format_stands_beside_the_fastest_transformers():
    def first(session):
        facts = {"model": "124M", "format": "float16", "layers": "float16", "head": "float16"}
        peers = {"transformers sdpa": times(5000.0), COMPILED: times(6000.0)}
        session.times("first token 124M float16 128 tokens", {"gpt2rt": times(2500.0), **peers}, **facts)

    text = report.Report([result_of(decode=decode, prefill=first)]).text()
    assert "fastest of transformers, float16" in text
    assert f"| generate 124M float16 | 300 (gpt2rt) | 900 ({COMPILED}) | 3.00 | ahead |" in text
    # what it is compared with is the float16 model, whatever ours is
    assert f"| generate 124M int4, head int8 | 1800 (gpt2rt) | 900 ({COMPILED}) | 0.50 | **behind** |" in text
    row = "| first token 124M float16 128 tokens | 2500 (gpt2rt) | 5000 (transformers sdpa) | 2.00 | ahead |"
    assert row in text


def test_every_section_has_its_place():
    """Result files of the three commands, a row of each kind in each section."""

    def kinds(session):
        name = f"row of {next(reversed(session.result['sections']))}"
        session.check(f"{name}: holds", True, error=0.1)
        session.times(name, {"gpt2rt": times(10.0), "peer": times(20.0)}, floor_us=5.0)
        session.value(f"{name}: bandwidth", 3.0, "TB/s")
        session.note(f"{name}: tool", "not run: there is none")

    files = [result_of(**dict.fromkeys(chosen(part), kinds)) for part in PARTS.values()]
    text = report.Report(files).text()
    for name, _ in SECTIONS.values():
        assert f"### {name}\n" in text
        assert f"| row of {name} | 10 (9) | 20 (peer) | 2.00 | 5 | 50 % |  |" in text
        assert f"| row of {name}: bandwidth | 3 TB/s |" in text
        assert f"- row of {name}: tool: not run: there is none" in text
    assert "Checks: 8 of 8 hold." in text
    assert "Not complete" not in text


def test_the_table_of_times():
    text = report.Report([result_of(kernels=kernels)]).text()
    assert "| layer_norm rows=8192 n=768 | 10 (9) | 8 (torch) | 0.80 | 8.5 | 85 % | gpt2rt, n8 w8 12 |" in text


def test_failures_and_what_is_missing_are_said():
    def bad(session):
        session.check("right", True)
        session.check("wrong", False, error=0.7)
        session.note("tool", "not run")
        with session.attempt("part"):
            raise RuntimeError("broken")
        session.need(1e9)

    text = report.Report([result_of(correctness=bad)]).text()
    assert "Checks: 1 of 3 hold." in text
    assert "- **wrong**: 0.7" in text
    assert "- **part**: RuntimeError: broken" in text
    assert "- tool: not run" in text
    assert "Not complete: correctness stopped: the time of --minutes was spent." in text


def test_of_equal_rows_the_last_counts():
    def again(session):
        session.times("decode 124M float16 context 256", {"gpt2rt": times(120.0)}, floor_us=100.0)

    found = report.Report([result_of(decode=decode), result_of(decode=again)])
    assert found.find("decode 124M float16 context 256")["us"]["gpt2rt"]["median"] == 120.0
    assert found.find("generate 124M int4, head int8") is not None


def test_results_of_different_devices_are_not_mixed():
    with pytest.raises(ValueError, match=r"different devices, NVIDIA H100, NVIDIA H200"):
        report.Report([result_of(), result_of(device="NVIDIA H200")])
    with pytest.raises(ValueError, match="no result was given"):
        report.Report([])
    with pytest.raises(ValueError, match="ended before anything was measured"):
        report.Report([{"sections": {"decode": {"state": "failed", "error": "no", "rows": []}}}])


def test_the_program_reads_files(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(result_of(decode=decode)), encoding="utf-8")
    assert report.main([str(path)]) == 0
    assert "### Targets" in capsys.readouterr().out
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "goals", "quantity", "expected"),
    [
        (100.0, [190, 135, 105], "us", "stretch"),
        (136.0, [190, 135, 105], "us", "goal 1"),
        (191.0, [190, 135, 105], "us", "missed"),
        (66.0, [50, 65, 85], "share", "goal 2"),
        (14.0, [30, 15], "value", "goal 2"),
        (None, [30, 15], "value", ""),
    ],
)
def test_the_furthest_goal_that_is_reached(value, goals, quantity, expected):
    assert report.reached(value, goals, quantity) == expected


def test_what_is_drawn():
    def more(session):
        for context, us in ((1024, 900.0), (128, 300.0)):
            facts = {"model": "124M", "format": "float16", "batch": 64, "context": context}
            session.times(f"decode 124M float16 batch 64 context {context}", {"gpt2rt": times(us)}, **facts)

    found = report.Report([result_of(decode=decode, kernels=kernels, throughput=more)])
    # 2000 operations in 10 us are 0.2 GFLOP/s
    assert found.roofline_points() == [("linear_rows", 2.0, pytest.approx(2e-4))]
    assert found.decode_lines() == {
        (1, "gpt2rt"): [(256, 200.0)],
        (1, "torch in a graph"): [(256, 400.0)],
        (64, "gpt2rt"): [(128, 300.0), (1024, 900.0)],
    }
    assert found.decode_lines("355M") == {}


def test_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'gpt2rt[bench]'")
    drawn = report.Report([result_of(decode=decode, kernels=kernels)]).plots(tmp_path / "pictures")
    assert [path.name for path in drawn] == ["roofline.png", "decode.png"]
    assert all(path.stat().st_size > 1000 for path in drawn)
    assert report.Report([result_of()]).plots(tmp_path) == []
