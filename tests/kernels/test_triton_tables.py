"""The static tables of the kernels: what they hold for each architecture, and the program that tunes them."""

import importlib
import json
import os
import pathlib

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import gpu_tune
import tune_entries

import gpt2rt
from gpt2rt.kernels import launch, paged_decode_attention, paged_prefill_attention, tile_config
from gpt2rt.kernels.batch_invariant_attention import TILES as INVARIANT_TILES
from gpt2rt.kernels.config_table import ALL, LEAST_SHARED_BYTES, SHARED_BYTES, ConfigTable
from gpt2rt.kernels.merge_splits import SPLIT
from gpt2rt.kernels.paged_prefill_attention import FEW_QUERIES, PrefillTile
from gpt2rt.lab.timing import Times

# the maximum of a padding row is -inf - -inf
pytestmark = [pytest.mark.kernel, pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")]

KERNELS = pathlib.Path(gpt2rt.__file__).parent / "kernels"
MODULES = [importlib.import_module(f"gpt2rt.kernels.{path.stem}") for path in sorted(KERNELS.glob("*.py"))]
TABLES = {id(value): value for module in MODULES for value in vars(module).values() if isinstance(value, ConfigTable)}
ARCHITECTURES = [0, *SHARED_BYTES]


def lines_of(table):
    """(architecture, kind, limits, configuration) of all lines."""
    return [
        (a, kind, line[:-1], line[-1]) for a in ARCHITECTURES for kind in table.kinds for line in table.lines(a, kind)
    ]


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_every_line_can_be_launched_and_is_reached(table):
    assert set(table.architectures) <= set(SHARED_BYTES)
    for architecture, kind, limits, config in lines_of(table):
        assert len(limits) == len(table.limits)
        numbers = config._asdict() if isinstance(config, tuple) else {"num_warps": config}
        stages = numbers.pop("num_stages", 1)
        assert 1 <= stages <= 6
        assert all(n > 0 and n & (n - 1) == 0 for n in numbers.values()), config
        assert numbers["num_warps"] <= 32
        # the largest sizes of a line are served by it, not by one before
        sizes = [10**9 if limit is None else limit for limit in limits]
        assert table.find(architecture, kind, *sizes) == config


def test_sizes_beyond_a_table():
    with pytest.raises(AssertionError, match="layer_norm: no line of all for "):
        importlib.import_module("gpt2rt.kernels.layer_norm").WARPS.find(90, ALL, 32769)


def test_attention_fits_the_shared_memory_of_every_architecture():
    # what the compiler took in the ahead-of-time check: the queries, one tile of keys and values, and block ids
    for architecture, kind, (_, head_dim), tile in lines_of(paged_prefill_attention.TILES):
        room = SHARED_BYTES.get(architecture, LEAST_SHARED_BYTES)
        operand = max(kind, 2)
        assert head_dim * operand * (tile.block_m + 2 * tile.block_n) + 8 * tile.num_stages * tile.block_n <= room
    for table in (paged_decode_attention.TILES, INVARIANT_TILES):
        for architecture, kind, (head_dim,), tile in lines_of(table):
            room = SHARED_BYTES.get(architecture, LEAST_SHARED_BYTES)
            assert 2 * tile.num_stages * tile.block_n * head_dim * kind <= room
            # a split is read in whole tiles
            assert SPLIT % tile.block_n == 0


def test_only_stages_and_tiles_of_many_rows_depend_on_the_architecture():
    for table in TABLES.values():
        for architecture in table.architectures:
            for kind in table.kinds:
                changed = set(table.lines(architecture, kind)) - set(table.lines(0, kind))
                assert all(table is tile_config.TILES and line[0] is None for line in changed)


def test_prompts_with_queries_for_many_programs_take_larger_tiles():
    find = paged_prefill_attention.TILES.find
    for architecture in ARCHITECTURES:
        assert find(architecture, 2, FEW_QUERIES, 64).block_m == 64
        assert find(architecture, 2, FEW_QUERIES + 1, 64).block_m == 128
        # the keys of a tile decide the order of a row's sums
        assert find(architecture, 2, FEW_QUERIES, 64).block_n == find(architecture, 2, FEW_QUERIES + 1, 64).block_n
        assert find(architecture, 2, FEW_QUERIES + 1, 65) == find(architecture, 2, 1, 65)


def test_an_architecture_has_lines_of_its_own():
    lines = {"a": ((16, 1), (None, 2)), "b": ((None, 3),)}
    table = ConfigTable("t", ("rows",), lines, others={80: {"a": ((None, 4),)}})
    assert [table.find(a, "a", size) for a in (0, 80, 90) for size in (16, 17)] == [1, 2, 1, 4, 1, 2]
    assert table.find(80, "b", 5) == 3
    assert table.architectures == (80,)
    for dead in ((None, 2), (8, 4)):
        with pytest.raises(ValueError, match="do not each replace another line with the same limits"):
            ConfigTable("t", ("rows",), lines, others={80: {"a": (dead,)}})


def test_what_is_tried_is_forgotten():
    table = ConfigTable("t", (), {ALL: ((1,),)})

    def fail():
        with table.trying(2):
            with table.trying(3):
                assert table.find(90, ALL) == 3
            assert table.find(90, ALL) == 2
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert table.find(90, ALL) == 1


def test_the_architecture_of_tensors_to_come():
    assert launch.architecture_of_device("cpu") == launch.architecture_of(torch.empty(0)) == 0


# ---- the tuner ------------------------------------------------------------------------------------------------------


def test_every_table_can_be_tuned():
    entries = [entry for _, make in tune_entries.SECTIONS.values() for entry in make()]
    assert {id(entry.table) for entry in entries} == set(TABLES)
    for entry in entries:
        present = entry.present(90)
        assert {type(config) for config in entry.candidates} == {type(present)}
        assert len(set(entry.candidates)) == len(entry.candidates) > 1
        assert entry.problems
        # a line to paste is a line of the table
        assert entry.line(90, "config").startswith("(")


def test_all_sections_run_dry(tmp_path, capsys):
    out = tmp_path / "tune.json"
    assert gpu_tune.main(["--dry", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {name: section["state"] for name, section in result["sections"].items()} == dict.fromkeys(
        tune_entries.SECTIONS, "done"
    )
    rows = [row for section in result["sections"].values() for row in section["rows"]]
    raced = [row for row in rows if row["kind"] == "candidates"]
    assert len(raced) == len(tune_entries.SECTIONS)
    # a candidate beside the present one, right, and no times of the interpreter
    assert all(len(row["errors"]) == 2 and not row["failed"] and not row["us"] for row in raced)
    assert all(row["text"].startswith("keep ") for row in rows if row["kind"] == "line")
    assert gpu_tune.main(["--sections", "q"]) == 2
    assert "no section 'q'; choose from rows, head" in capsys.readouterr().err
    assert gpu_tune.main(["--list", "--sections", "head"]) == 0
    assert "head 16: row of the weight 2048" in capsys.readouterr().out


def made_up(monkeypatch, tmp_path, speeds, broken=()):
    """The tuner on one line of prefill, with times of its candidates that are given, and some that do not launch."""
    from gpu_sections.session import Session

    import gpt2rt.lab.problem

    tried = gpt2rt.lab.problem.tried

    def fragile(table, config, run):
        def call(copy):
            raise RuntimeError("out of resource: shared memory")

        return call if config in broken else tried(table, config, run)

    def compare(timer, calls, copies):
        return {name: Times(speeds[name], speeds[name], 9, True) for name in calls}, {}

    monkeypatch.setattr(gpt2rt.lab.problem, "tried", fragile)
    monkeypatch.setattr(gpt2rt.lab.timing.Timer, "compare", compare)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    size = {"seqs": 1, "queries": 3, "context": 20, "heads": 1, "head_dim": 16, "cache": "float"}
    entry = tune_entries.Entry(
        paged_prefill_attention.TILES,
        2,
        (FEW_QUERIES + 1, 64),
        (("paged_prefill_attention", size), ("paged_prefill_attention", {**size, "queries": 5})),
        (PrefillTile(16, 64, 4, 2), PrefillTile(16, 16, 4, 2), PrefillTile(128, 64, 8, 2)),
    )
    session = Session(torch.device("cpu"), tmp_path / "out.json")
    with session.section("prefill"):
        gpu_tune.tune(session, entry)
    return session, session.result["sections"]["prefill"]["rows"]


def test_the_fastest_line_that_works_is_proposed(monkeypatch, tmp_path):
    speeds = {"present": 10.0, "PrefillTile(16, 64, 4, 2)": 8.0, "PrefillTile(16, 16, 4, 2)": 5.0}
    session, rows = made_up(monkeypatch, tmp_path, speeds, broken=[PrefillTile(16, 16, 4, 2)])
    assert session.ok
    first, second, line = rows
    assert first["kind"] == second["kind"] == "candidates"
    assert first["failed"] == {"PrefillTile(16, 16, 4, 2)": "RuntimeError: out of resource: shared memory"}
    assert line["text"].startswith("(None, 64, PrefillTile(16, 64, 4, 2))  # 1.25 times the speed of PrefillTile(128,")
    assert line["gain"] == pytest.approx(1.25)
    assert (line["architecture"], line["problems"], line["of"]) == (90, 2, 2)


def test_small_gains_and_a_broken_table_change_nothing(monkeypatch, tmp_path):
    speeds = {"present": 10.0, "PrefillTile(16, 64, 4, 2)": 9.9, "PrefillTile(16, 16, 4, 2)": 12.0}
    session, rows = made_up(monkeypatch, tmp_path, speeds)
    assert rows[-1]["text"] == "keep (None, 64, PrefillTile(128, 64, 8, 2))"
    assert rows[-1]["bits"]["PrefillTile(16, 64, 4, 2)"]
    session, rows = made_up(monkeypatch, tmp_path, speeds, broken=[PrefillTile(128, 64, 8, 2)])
    assert not session.ok
    assert rows[-1]["text"].startswith("keep ")
