"""Every Python block of docs/*.md runs, page by page, with the embedded model; what it prints is there."""

import pathlib
import re
import warnings

import pytest

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted(path.name for path in DOCS.glob("*.md") if BLOCK.search(path.read_text(encoding="utf-8")))


def test_there_are_pages_to_run():
    assert {"loading.md", "generation.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = (DOCS / page).read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 2
        # so that a traceback shows the line of the page
        code = compile("\n" * (line - 1) + found.group(1), str(DOCS / page), "exec")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            exec(code, namespace)
        assert "print(" not in found.group(1) or capsys.readouterr().out.strip(), f"{page}:{line} prints nothing"


def test_blocks_of_code_have_a_language():
    for page in DOCS.glob("*.md"):
        fences = re.findall(r"^```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(language in ("python", "bash", "text") for language in fences[::2]), page.name
