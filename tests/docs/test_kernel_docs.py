"""docs/kernels.md lists every kernel as the registry has it."""

import importlib.util
import json
import pathlib

import pytest

from gpt2rt.lab.registry import OPERATIONS

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("docs_kernels", ROOT / "docs" / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(docs):
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(), "docs/kernels.md is stale: run python docs/kernels.py"


def test_files_that_are_named_exist():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    for operation in OPERATIONS.values():
        assert f"### {operation.name}\n" in text
        for target in (operation.reference, *operation.triton):
            assert (ROOT / "kernels" / f"{target.partition(':')[0]}.py").is_file()


def test_results_become_rows(docs, tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    forms = {"C++": {"us": 12.345, "share": 0.5}, "torch": {"us": None, "share": None}}
    row = {"op": "layer_norm", "dtype": "float32", "size": {"rows": 1, "n": 768}, "forms": forms}
    cpu = {"machine": {"cpu": "a processor", "torch_threads": 2}, "device": "cpu", "kernels": [row]}
    (folder / "kernels-cpu.json").write_text(json.dumps(cpu), encoding="utf-8")
    times = {"gpt2rt": {"median": 2.0, "share_of_floor": None}, "torch": None}
    rows = [
        {"op": "layer_norm", "dtype": "float16", "size": {"rows": 1, "n": 768}, "us": times},
        {"name": "failed", "kind": "failed"},
    ]
    gpu = {"machine": {"device": "a GPU"}, "sections": {"kernels": {"rows": rows}}}
    (folder / "gpu-1.json").write_text(json.dumps(gpu), encoding="utf-8")
    (folder / "gpu-2.json").write_text(json.dumps({"machine": {}, "sections": {}}), encoding="utf-8")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    text = docs.section(OPERATIONS["layer_norm"], docs.read_results())
    assert "Measured on a processor, 2 threads:" in text
    assert "| rows=1 n=768 | float32 | C++ | 12.3 | 50 % |" in text
    assert "Measured on a GPU:" in text
    assert "| rows=1 n=768 | float16 | gpt2rt | 2 |  |" in text
    assert "torch |" not in text
    assert "Measured" not in docs.section(OPERATIONS["sample"], docs.read_results())
