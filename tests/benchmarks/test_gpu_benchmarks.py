"""The benchmark of GPUs, as far as it needs none: sections, budget, records, the sanitizer's call, the report."""

import json
import os
import pathlib
import time

import gpu
import pytest
import report
import torch
from gpu_sections import SECTIONS, chosen, sanitizer
from gpu_sections.kernels import label
from gpu_sections.session import Session, is_ours

from gpt2rt.lab.timing import Times

CPU = torch.device("cpu")


def times(median):
    return Times(median, median - 1.0, 9, True)


# ---- the program -----------------------------------------------------------------------------------------------------


def test_sections_by_letter_and_name():
    assert chosen("") == [name for name, _ in SECTIONS.values()]
    assert chosen("b, decode,h") == ["ceilings", "decode", "sanitizer"]
    with pytest.raises(ValueError, match="no section 'x'; choose from a = correctness, "):
        chosen("a,x")


def test_it_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry" in capsys.readouterr().err
    assert gpu.main(["--sections", "q"]) == 2
    assert "no section 'q'" in capsys.readouterr().err


def test_a_failing_section_leaves_the_others(tmp_path, capsys):
    session = Session(CPU, tmp_path / "out.json", smallest=True)
    with session.section("first"):
        session.check("right", True, error=0.5)
        raise RuntimeError("the device\nis gone")
    with session.section("second"):
        with session.attempt("part"):
            raise ValueError("no")
        session.check("also right", True)
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(session.result))
    first, second = written["sections"]["first"], written["sections"]["second"]
    assert (first["state"], first["error"]) == ("failed", "RuntimeError: the device is gone")
    assert [row["name"] for row in first["rows"]] == ["right"]
    assert second["state"] == "done"
    assert [(row["name"], row["ok"]) for row in second["rows"]] == [("part", False), ("also right", True)]
    assert session.failures() == ["second: part"]
    assert not session.ok
    assert not list(tmp_path.glob("*.part"))
    assert {"commit", "packages", "device", "date"} <= written["machine"].keys()


def test_a_lost_device_ends_its_section_and_the_others_run_in_a_new_process(tmp_path, capsys, monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def broken(session):
        session.check("fine", True)
        with session.attempt("bad kernel"):
            raise RuntimeError("launch failed")
        raise AssertionError("not reached")

    def anew(command, **options):
        if command[0] == "git":
            return plain(command, **options)
        asked.append(command)
        part = pathlib.Path(command[command.index("--out") + 1])
        part.write_text(
            json.dumps({"sections": {"decode": {"state": "done", "seconds": 1.0, "error": None, "rows": []}}})
        )

    asked, plain = [], gpu.subprocess.run
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr("gpu_sections.session.describe_device", lambda device: {"device": "Some GPU"})
    monkeypatch.setattr("gpu_sections.runner", lambda name: broken)
    monkeypatch.setattr(gpu.subprocess, "run", anew)
    out = tmp_path / "out.json"
    assert gpu.main(["--sections", "a,c,h", "--smallest", "--minutes", "7", "--out", str(out)]) == 1
    (command,) = asked
    assert command[command.index("--sections") + 1] == "decode,sanitizer"
    assert "--smallest" in command
    assert 6 < float(command[command.index("--minutes") + 1]) <= 7
    sections = json.loads(out.read_text())["sections"]
    assert sections["correctness"]["error"].startswith("DeviceLostError: after bad kernel: RuntimeError: CUDA error")
    assert [row["name"] for row in sections["correctness"]["rows"]] == ["fine", "bad kernel"]
    assert sections["decode"]["state"] == "done"
    assert sections["sanitizer"]["error"] == "its process left no results"
    assert "FAILED correctness: bad kernel" in capsys.readouterr().out


def test_the_file_holds_every_row_as_soon_as_it_is_known(tmp_path):
    out = tmp_path / "out.json"
    session = Session(CPU, out)
    with session.section("a"):
        session.check("one", True)
        held = json.loads(out.read_text(encoding="utf-8"))["sections"]["a"]
        assert (held["state"], [row["name"] for row in held["rows"]]) == ("running", ["one"])


def test_the_budget_ends_a_section_not_the_record(tmp_path):
    session = Session(CPU, tmp_path / "out.json", minutes=1.0)
    with session.section("a"):
        session.need(30)
        with session.attempt("part"):
            session.need(90)
        raise AssertionError("not reached")
    assert session.result["sections"]["a"]["state"] == "stopped"
    assert session.ok
    dry = Session(CPU, None, minutes=0.0, dry=True)
    dry.need(1e9)


def test_times_stand_beside_the_fastest_peer_and_the_floor():
    session = Session(CPU, None)
    with session.section("a"):
        forms = {"gpt2rt": times(10.0), "gpt2rt, no PDL": times(20.0), "torch": times(30.0), "slow": times(40.0)}
        session.times("row", forms, {"compiled": "RuntimeError: no"}, floor_us=5.0, batch=1)
        session.times("alone", {"gpt2rt": times(10.0)}, {"gpt2rt, variant": "wrong"})
    row, alone = session.result["sections"]["a"]["rows"]
    assert row["fastest_peer"] == "torch"
    assert row["us"]["gpt2rt"]["speed_over_fastest_peer"] == pytest.approx(3.0)
    assert row["us"]["gpt2rt, no PDL"]["share_of_floor"] == pytest.approx(0.25)
    assert "speed_over_fastest_peer" not in row["us"]["torch"]
    # a peer may fail, gpt2rt may not
    assert row["ok"]
    assert not alone["ok"]
    assert alone["us"]["gpt2rt"]["speed_over_fastest_peer"] is None
    assert session.failures() == ["a: alone"]


def test_dry_runs_keep_no_times():
    session = Session(CPU, None, dry=True)
    with session.section("a"):
        session.times("row", {"gpt2rt": times(10.0), "torch": times(30.0)}, floor_us=5.0)
        session.value("bandwidth", 3.0, "TB/s")
    row, value = session.result["sections"]["a"]["rows"]
    assert row["us"] == {"gpt2rt": None, "torch": None}
    assert row["floor_us"] is None
    assert value["value"] is None
    assert session.result["limits"] is None


def test_forms_of_the_lab_among_times():
    forms = ("Triton", "Triton: n8 w8", "CUDA C++", "CUDA C++: wide", "torch, dense")
    labels = ("gpt2rt", "gpt2rt, n8 w8", "gpt2rt, CUDA C++", "gpt2rt, CUDA C++, wide", "torch, dense")
    assert tuple(label(form) for form in forms) == labels
    assert [is_ours(name) for name in labels] == [True] * 4 + [False]


def test_whose_a_form_is():
    assert is_ours("gpt2rt")
    assert is_ours("gpt2rt, no PDL")
    assert is_ours("gpt2rt Triton")
    assert not is_ours("torch in a graph")
    assert not is_ours("transformers eager")


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


@pytest.fixture
def fake_tool(tmp_path, monkeypatch):
    """A compute-sanitizer that reports ``status`` and shows how it was called."""

    def make(status, seconds=0):
        tool = tmp_path / "compute-sanitizer"
        summary = "========= ERROR SUMMARY: 3 errors" if status else "========= ERROR SUMMARY: 0 errors"
        tool.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING" >> {tmp_path}/calls\n'
            f'echo "{summary}"\nexec sh -c "sleep {seconds}; exit {status}"\n',
            encoding="utf-8",
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return tmp_path / "calls"

    return make


def sanitized():
    session = Session(CPU, None)
    with session.section("sanitizer"):
        sanitizer.run(session)
    return session, session.result["sections"]["sanitizer"]["rows"]


def test_the_sanitizer_checks_the_smallest_shapes(fake_tool):
    calls = fake_tool(0)
    session, rows = sanitized()
    assert [(row["name"], row["ok"]) for row in rows] == [("memcheck", True), ("racecheck", True)]
    assert rows[0]["summary"] == "ERROR SUMMARY: 0 errors"
    first, caching, *_ = calls.read_text(encoding="utf-8").splitlines()
    assert first.startswith("--tool memcheck --error-exitcode 86 --target-processes all ")
    assert "gpu.py --sections a --smallest --out " in first
    assert caching == "1"
    assert session.ok


def test_what_the_sanitizer_finds_is_a_failure(fake_tool):
    fake_tool(86)
    session, rows = sanitized()
    assert [row["ok"] for row in rows] == [False, False]
    assert rows[0]["status"] == 86
    assert "3 errors" in rows[0]["summary"]
    assert not session.ok


def test_a_sanitizer_that_takes_too_long_is_stopped(fake_tool, monkeypatch):
    fake_tool(0, seconds=60)
    monkeypatch.setattr(sanitizer, "TIMEOUT_S", 0.5)
    start = time.monotonic()
    _, rows = sanitized()
    assert time.monotonic() - start < 30
    assert rows[0]["status"] == -1
    assert "took too long" in rows[0]["tail"]


def test_without_the_tool_it_says_so(monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    session, rows = sanitized()
    assert rows == [{"kind": "note", "name": "compute-sanitizer", "text": "not run: compute-sanitizer is not on PATH"}]
    assert session.ok


# ---- the report ------------------------------------------------------------------------------------------------------


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
    forms = {"gpt2rt": times(300.0), report.COMPILED: times(900.0)}
    session.times("generate 124M float16", forms, model="124M", format="float16")
    session.times("generate 124M int4", {"gpt2rt": times(1800.0)}, model="124M", format="int4")


def kernels(session):
    forms = {"gpt2rt": times(10.0), "gpt2rt, n8 w8": times(12.0), "torch": times(8.0)}
    session.times("layer_norm rows=8192 n=768", forms, floor_us=8.5, op="layer_norm", bytes=100, operations=0)
    forms = {"gpt2rt": times(10.0)}
    session.times("linear_rows x", forms, floor_us=8.5, op="linear_rows", bytes=1000, operations=2000)


def test_targets_scale_with_the_bandwidth_and_say_what_they_reached():
    text = report.Report([result_of(decode=decode, kernels=kernels)]).text()
    # at half the bandwidth the floor of 86 us takes 172: every goal is 86 us later
    assert "| 124M float16, batch 1, context 256 | 172 | 276 | 221 | 191 | 200 | goal 2 |" in text
    assert "| layer norm 8192 x 768, share of bandwidth |  | 80 | 90 |  | 85 | goal 1 |" in text
    assert "| 355M float16, batch 1, context 256 | 488 | 694 | 589 | 524 | not measured |  |" in text
    assert "NVIDIA H100, driver 580.1; torch 2, triton None" in text
    assert "1.50 TB/s, 600 TFLOP/s" in text


def test_every_format_stands_beside_the_compiled_transformers():
    text = report.Report([result_of(decode=decode)]).text()
    assert "| 124M float16 | 300 | 900 | 3.00 | ahead |" in text
    assert "| 124M int4 | 1800 | 900 | 0.50 | **behind** |" in text


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
    assert found.find("generate 124M int4") is not None


def test_results_of_different_devices_are_not_mixed():
    with pytest.raises(ValueError, match=r"different devices, NVIDIA H100, NVIDIA H200"):
        report.Report([result_of(), result_of(device="NVIDIA H200")])
    with pytest.raises(ValueError, match="no result was given"):
        report.Report([])


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
