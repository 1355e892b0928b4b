"""The house rules: who may import whom, what ``import gpt2rt`` costs, what the wheel holds."""

import ast
import json
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gpt2rt"

#: a file imports from its own layer and those after it
LAYERS = [
    {"cli", "doctor", "lab", "bench"},
    {"server", "integrations"},
    {"pipelines"},
    {"engine"},
    {"models"},
    {"generation"},
    {"graph"},
    {"cache", "quantization"},
    {"ops"},
    {"kernels"},
]
SIDE = {"config", "errors", "env", "checkpoint", "tokenizers"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if "assets" not in parts:
            yield path, parts[0]


def imported_parts(path):
    """First name below ``gpt2rt`` of every import in a file, wherever it stands in the file."""
    package = ("gpt2rt", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            modules = [f"{module}.{alias.name}" for alias in node.names] if module == "gpt2rt" else [module]
        for module in modules:
            head, *rest = module.split(".")
            if head == "gpt2rt" and rest:
                yield rest[0]


@pytest.mark.parametrize(("path", "part"), [pytest.param(*s, id=str(s[0].relative_to(ROOT))) for s in sources()])
def test_a_file_imports_only_from_its_own_layer_and_those_below(path, part):
    if part == "__init__":
        return
    for other in imported_parts(path):
        if other == part or (other not in LEVEL and other not in SIDE):
            continue
        if part in SIDE:
            assert other in SIDE, f"{path.name} stands at the side and may not import gpt2rt.{other}"
        elif other not in SIDE:
            assert LEVEL[other] >= LEVEL[part], f"gpt2rt.{part} may not import gpt2rt.{other}, which stands above it"


def test_kernels_know_nothing_of_gpt2rt():
    allowed = {"torch", "triton", "gpt2rt.kernels", *sys.stdlib_module_names}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                assert any(name == a or name.startswith(a + ".") for a in allowed), f"{path.name} imports {name}"


def test_kernels_is_no_package_of_its_own():
    # a top-level package named kernels breaks `import transformers` from the repository root
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (PACKAGE / "kernels").is_symlink()


COST = """
import json, resource, sys, time
import torch
def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6
before, modules, start = rss(), set(sys.modules), time.process_time()
import gpt2rt
print(json.dumps({"seconds": time.process_time() - start, "megabytes": rss() - before,
                  "modules": sorted(set(sys.modules) - modules)}))
"""


def import_cost():
    result = subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.mark.proves("D11")
def test_import_gpt2rt_needs_torch_only():
    cost = import_cost()
    heavy = ("triton", "transformers", "fastapi", "tokenizers", "safetensors", "huggingface_hub", "typer", "rich")
    assert [name for name in cost["modules"] if name.split(".")[0] in heavy] == []
    assert cost["megabytes"] < 30
    # processor time of the import alone, so that a busy machine does not change it; the best of three
    assert min(cost["seconds"], import_cost()["seconds"], import_cost()["seconds"]) < 0.3


def test_every_export_resolves():
    import gpt2rt

    for name in gpt2rt.__all__:
        assert getattr(gpt2rt, name) is not None
    assert set(gpt2rt.__all__) <= set(dir(gpt2rt))
    with pytest.raises(AttributeError, match="no attribute 'GPT3'"):
        gpt2rt.GPT3  # noqa: B018


def test_the_wheel_holds_gpt2rt_and_nothing_else(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "GPT2RT_CPP": "0", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools >= 77")
    # a copy of what git would hold, so that no build folder appears in the tree
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.splitlines():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    result = subprocess.run([*command, str(source)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gpt2rt"}
    assert len(names) == len(set(names))
    assert "gpt2rt/kernels/refs.py" in names
    assert "gpt2rt/py.typed" in names
    assert "gpt2rt/assets/tiny-gpt2/model.safetensors" in names
    assert not [name for name in names if name.endswith("kernels/__init__.py")]
