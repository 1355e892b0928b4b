"""The benchmark of GPUs, as far as it needs none: sections, budget, records, the sanitizer's call, the report."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import gpu
import pytest
import torch
from gpu_sections import PARTS, SECTIONS, WEIGHTS, chosen, sanitizer, supervisor
from gpu_sections.kernels import label
from gpu_sections.session import OutOfTime, Session, is_ours

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


def test_a_lost_device_ends_its_process_and_the_section_goes_on_in_another(tmp_path, capsys, monkeypatch):
    """The rest of its section was lost with it once, whole models behind a toy kernel."""

    def synchronize(device):
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def section(session):
        for part in ("good kernel", "bad kernel", "model"):
            if session.over(part):
                continue
            with session.attempt(part):
                if part == "bad kernel":
                    broken.append(part)
                    raise RuntimeError("launch failed")
                session.check(part, True)

    broken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("gpu_sections.session.describe_device", lambda device: {"device": "Some GPU"})
    monkeypatch.setattr("gpu_sections.runner", lambda name: section)
    out = tmp_path / "out.json"
    command = ["--worker", str(os.getpid()), "--sections", "a", "--smallest", "--minutes", "7", "--out", str(out)]
    assert gpu.main(command) == supervisor.LOST
    found = json.loads(out.read_text())["sections"]["correctness"]
    assert found["state"] == "running"
    assert [row["name"] for row in found["rows"]] == ["good kernel", "bad kernel", "bad kernel: device"]
    assert "illegal memory access" in found["rows"][-1]["error"]
    broken.clear()
    # a row failed, so the status says no
    assert gpu.main(command) == 1
    found = json.loads(out.read_text())["sections"]["correctness"]
    assert found["state"] == "done"
    assert [row["name"] for row in found["rows"]] == ["good kernel", "bad kernel", "bad kernel: device", "model"]


def test_the_file_holds_every_row_as_soon_as_it_is_known(tmp_path):
    out = tmp_path / "out.json"
    session = Session(CPU, out)
    with session.section("a"):
        session.check("one", True)
        held = json.loads(out.read_text(encoding="utf-8"))["sections"]["a"]
        assert (held["state"], [row["name"] for row in held["rows"]]) == ("running", ["one"])


def test_three_commands_run_every_section_once():
    sections = [name for part in PARTS.values() for name in chosen(part)]
    assert sorted(sections) == sorted(chosen(""))
    assert sorted(WEIGHTS) == sorted(sections)
    assert len(PARTS) == 3
    assert gpu.PART_MINUTES < 10
    assert all(f"--part {part}" in gpu.__doc__ for part in PARTS)


def test_all_parts_run_one_after_another_with_files_of_their_own(tmp_path, monkeypatch):
    asked = []

    def call(command):
        asked.append(command)
        return type("Done", (), {"returncode": len(asked) % 2})

    monkeypatch.setattr(gpu.subprocess, "run", call)
    # --dry sets it, and no other test may find it
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert gpu.main(["--dry", "--part", "all", "--out", str(tmp_path / "gpu.json"), "--commit", "abc"]) == 1
    assert [command[command.index("--part") + 1] for command in asked] == ["1", "2", "3"]
    files = [pathlib.Path(command[command.index("--out") + 1]).name for command in asked]
    assert files == ["gpu-1.json", "gpu-2.json", "gpu-3.json"]
    assert all("--dry" in command and command[command.index("--minutes") + 1] == "9.0" for command in asked)
    assert all(command[command.index("--commit") + 1] == "abc" for command in asked)


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


def test_a_section_has_its_share_of_the_time_and_what_others_leave():
    session = Session(CPU, None, minutes=10.0)
    with session.section("a", 0.25):
        assert 149 < session.seconds_left() <= 150
        with pytest.raises(OutOfTime):
            session.need(200)
    with session.section("b"):
        assert 590 < session.seconds_left() <= 600


def test_lanes_share_the_parts_of_a_section():
    names = [f"part {number}" for number in range(7)]
    done = []
    for lane in range(3):
        session = Session(CPU, None, lane=(lane, 3))
        with session.section("a"):
            for name in names:
                if not session.over(name):
                    with session.attempt(name):
                        done.append((lane, name))
    assert sorted(name for _, name in done) == names
    assert [name for lane, name in done if lane == 1] == ["part 1", "part 4"]


def test_a_part_without_memory_is_left_to_a_process_that_is_alone():
    for lanes, parts, rows in ((3, [], []), (1, ["1.5B"], ["1.5B"])):
        session = Session(CPU, None, lane=(0, lanes))
        with session.section("a"):
            assert not session.over("1.5B")
            with session.attempt("1.5B"):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        section = session.result["sections"]["a"]
        assert (section["state"], section["parts"]) == ("done", parts)
        assert [row["name"] for row in section["rows"]] == rows


def test_a_row_that_grows_replaces_itself():
    session = Session(CPU, None)
    with session.section("a"):
        session.note("tool", "none")
        session.times("generate", {"gpt2rt": times(10.0)}, replace=True)
        session.times("generate", {"gpt2rt": times(10.0), "peer": times(20.0)}, replace=True)
        session.note("tool", "none")
    rows = session.result["sections"]["a"]["rows"]
    assert [row["name"] for row in rows] == ["tool", "generate"]
    assert set(rows[1]["us"]) == {"gpt2rt", "peer"}


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


# ---- processes that may be lost --------------------------------------------------------------------------------------

#: a worker that knows only files: each word is what happens in a part, in the order of the parts
WORKER = """
import json, os, pathlib, sys, time

words, arguments = sys.argv[1].split(), sys.argv[2:]
value = lambda name: arguments[arguments.index(name) + 1]
out = pathlib.Path(value("--out"))
result = json.loads(out.read_text()) if out.exists() else {"machine": {"device": None}, "sections": {}}
lane, lanes = map(int, value("--lane").split("/")) if "--lane" in arguments else (0, 1)
for name in value("--sections").split(","):
    new = {"state": "running", "seconds": 1.0, "error": None, "parts": [], "rows": []}
    section = result["sections"].setdefault(name, new)
    section.update(state="running", error=None)

    def write():
        out.with_suffix(".new").write_text(json.dumps(result))
        os.replace(out.with_suffix(".new"), out)

    for number, word in enumerate(words):
        part = f"{word} {number}"
        if part in section["parts"] or number % lanes != lane:
            continue
        section["parts"].append(part)
        result["patience_s"] = 1.0
        write()
        if word == "hangs":
            time.sleep(60)
        if word == "crashes":
            os.abort()
        if word == "loses":
            sys.exit(3)
        section["rows"].append({"kind": "check", "name": part, "ok": True, "lane": lane})
    section["state"] = "done"
    write()
"""


@pytest.fixture
def supervised(tmp_path):
    """Sections of such workers, as the file has them."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER, encoding="utf-8")

    def run(words, shares, minutes=1.0, lanes=1):
        out = tmp_path / "out.json"
        supervisor.supervise([sys.executable, "-S", str(path), words], shares, out, minutes, lanes)
        assert [file.name for file in tmp_path.glob("*.json")] == ["out.json"]
        return json.loads(out.read_text(encoding="utf-8"))["sections"]

    return run


def names_of(section):
    return [row["name"] for row in section["rows"]]


def test_a_part_that_hangs_or_breaks_its_process_costs_that_part(supervised, capsys):
    sections = supervised("fine hangs fine crashes loses fine", {"decode": 1})
    assert sections["decode"]["state"] == "done"
    rows = ["fine 0", "hangs 1: process", "fine 2", "crashes 3: process", "fine 5"]
    # what a worker writes itself, as of a lost device, is not said again
    assert [name for name in names_of(sections["decode"]) if "fine" in name or ":" in name] == rows
    errors = [row["error"] for row in sections["decode"]["rows"] if not row["ok"]]
    assert errors == ["no row for 1 s: it was taken for hung and ended", "its process ended with status -6"]
    assert "taken for hung" in capsys.readouterr().out


def test_a_worker_that_cannot_start_is_not_started_again(tmp_path):
    out = tmp_path / "out.json"
    supervisor.supervise([sys.executable, "-S", "-c", "raise SystemExit(1)"], {"decode": 1, "prefill": 1}, out, 1.0, 1)
    sections = json.loads(out.read_text(encoding="utf-8"))["sections"]
    assert {name: section["state"] for name, section in sections.items()} == {"decode": "failed", "prefill": "failed"}
    assert sections["decode"]["error"] == "its process ended with status 1 and left no results"


def test_several_processes_share_what_is_not_timed(supervised):
    sections = supervised("a b c d e", {"correctness": 1, "invariance": 1}, lanes=3)
    # in the order of the lanes, so that a report reads the same each time
    assert names_of(sections["correctness"]) == ["a 0", "d 3", "b 1", "e 4", "c 2"]
    assert sections["correctness"]["state"] == sections["invariance"]["state"] == "done"
    assert {row["lane"] for row in sections["invariance"]["rows"]} == {0}


def test_what_a_lane_has_left_undone_is_done_by_the_worker_behind_them(tmp_path, supervised):
    """As on a device that takes one process at a time."""
    flag = tmp_path / "taken"
    worker = (tmp_path / "worker.py").read_text(encoding="utf-8")
    busy = f"""
import sys
if "--lane" in sys.argv and not sys.argv[sys.argv.index("--lane") + 1].startswith("0/"):
    open({str(flag)!r}, "w").close()
    sys.exit(1)
"""
    (tmp_path / "worker.py").write_text(busy + worker, encoding="utf-8")
    section = supervised("a b c d e", {"correctness": 1}, lanes=3)["correctness"]
    assert flag.exists()
    assert (section["state"], section["error"]) == ("done", None)
    assert names_of(section) == ["a 0", "d 3", "b 1", "c 2", "e 4"]


def test_what_is_timed_is_compiled_by_several_and_timed_by_one(supervised):
    sections = supervised("a b c", {"decode": 1}, lanes=2)
    assert [(row["name"], row["lane"]) for row in sections["decode"]["rows"]] == [("a 0", 0), ("b 1", 0), ("c 2", 0)]


def test_time_that_is_spent_leaves_the_sections_stopped(supervised, monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE_S", 0.1)
    sections = supervised("fine hangs", {"decode": 1, "prefill": 1}, minutes=0.004)
    assert sections["decode"]["state"] == sections["prefill"]["state"] == "stopped"
    assert names_of(sections["decode"])[:1] in ([], ["fine 0"], ["hangs 1: process"])


def test_a_worker_leaves_with_the_process_that_watches_it(monkeypatch):
    left = []
    monkeypatch.setattr(gpu.os, "_exit", left.append)
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    # it must have left before the real way out is back
    gpu._leave_with(gone.pid).join()
    assert left == [1]


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------


@pytest.fixture
def fake_tool(tmp_path, monkeypatch):
    """A compute-sanitizer that reports ``status`` and shows how it was called."""

    def make(status, seconds=0):
        tool = tmp_path / "compute-sanitizer"
        summary = "========= ERROR SUMMARY: 3 errors" if status else "========= ERROR SUMMARY: 0 errors"
        lines = ["#!/bin/sh", f'echo "$@" >> {tmp_path}/calls']
        lines += [f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $GPT2RT_CUDA_GRAPHS" >> {tmp_path}/calls']
        lines += [f'echo "{summary}"', f"sleep {seconds} &", "wait $!", f"exit {status}"]
        tool.write_text("\n".join(lines), encoding="utf-8")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("PYTORCH_NO_CUDA_MEMORY_CACHING", raising=False)
        monkeypatch.delenv("GPT2RT_CUDA_GRAPHS", raising=False)
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
    names = ["memcheck", "racecheck", "memcheck, graphs", "synccheck", "initcheck"]
    assert [(row["name"], row["ok"]) for row in rows] == [(name, True) for name in names]
    assert rows[0]["summary"] == "ERROR SUMMARY: 0 errors"
    lines = calls.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("--tool memcheck --error-exitcode 86 --target-processes all ")
    assert f"gpu.py --smallest --worker {os.getpid()} --sections correctness --out " in lines[0]
    assert [line.split()[1] for line in lines[::2]] == ["memcheck", "racecheck", "memcheck", "synccheck", "initcheck"]
    # without torch's allocator nothing could be captured
    assert lines[1::2] == ["1 0", "1 0", " ", "1 0", "1 0"]
    assert session.ok


def test_what_the_sanitizer_finds_is_a_failure(fake_tool):
    fake_tool(86)
    session, rows = sanitized()
    assert [row["ok"] for row in rows] == [False] * 5
    assert rows[0]["status"] == 86
    assert "3 errors" in rows[0]["summary"]
    assert not session.ok


def test_a_sanitizer_that_takes_too_long_is_stopped_with_all_that_it_started(fake_tool, monkeypatch):
    """Its child went on, and kept the device."""
    fake_tool(0, seconds=61.7)
    monkeypatch.setattr(sanitizer, "CALLS", (sanitizer.Call("memcheck", "memcheck", False, 0.3),))
    start = time.monotonic()
    _, (row,) = sanitized()
    assert time.monotonic() - start < 30
    assert row["status"] == -1
    assert "stopped: it took longer than 0 s" in row["tail"]
    assert (row["state"], row["parts"]) == ("not begun", 0)
    running = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        # others end while this looks
        with contextlib.suppress(OSError):
            running.append(path.read_bytes())
    assert running
    assert b"sleep\x0061.7\x00" not in running


def test_calls_share_the_time_that_is_left(fake_tool, monkeypatch):
    fake_tool(0)
    session = Session(CPU, None, minutes=3.0)
    with session.section("sanitizer"):
        sanitizer.run(session)
    limits = [row["limit_s"] for row in session.result["sections"]["sanitizer"]["rows"]]
    # a fifth and a half of it for the first; the last may have more than it wants
    assert 50 < limits[0] <= 54
    assert limits[-1] == 90.0


def test_without_the_tool_it_says_so(monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    session, rows = sanitized()
    assert rows == [{"kind": "note", "name": "compute-sanitizer", "text": "not run: compute-sanitizer is not on PATH"}]
    assert session.ok
