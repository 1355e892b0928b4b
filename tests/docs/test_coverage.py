"""docs/coverage.md and the tables of docs/loading.md say what the tests prove and what the code does."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("docs_coverage", ROOT / "docs" / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(coverage):
    for path, text in coverage.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run python docs/coverage.py"


def test_every_row_has_its_proof_and_every_proof_its_row(coverage):
    rows = [row for group in coverage.read_rows().values() for row in group]
    assert coverage.problems(rows, coverage.read_proofs()) == []


def test_the_rows_are_all_there(coverage):
    ids = {row.id for group in coverage.read_rows().values() for row in group}
    expected = {"N9", *(f"fault:F{number:02d}" for number in range(1, 44))}
    for letter, count in (("F", 18), ("H", 7), ("O", 8), ("T", 14), ("G", 13), ("L", 12), ("D", 11)):
        expected |= {f"{letter}{number}" for number in range(1, count + 1)}
    assert expected - ids == set()


def test_what_the_checks_would_find(coverage):
    rows = [
        coverage.Row("A1", "proven"),
        coverage.Row("A2", "not proven"),
        coverage.Row("A3", "x", "later", "not built"),
        coverage.Row("A4", "x", "later"),
        coverage.Row("A5", "x", "maybe", "?"),
        coverage.Row("A1", "again"),
    ]
    proofs = [coverage.Proof("A1", "test_x.py", "test_a"), coverage.Proof("B1", "test_x.py", "test_b")]
    assert coverage.problems(rows, proofs) == [
        "row A1 stands twice",
        "row A2 is called proven, and no test proves it: not proven",
        "row A4 is later with the reason ''",
        "row A5 has the status 'maybe', expected one of proven, refused, later",
        "tests/test_x.py: test_b proves 'B1', which is no row",
    ]


def test_how_proofs_are_found(coverage):
    source = """
import pytest
pytestmark = [pytest.mark.slow, pytest.mark.proves("M")]

@pytest.mark.parametrize("x", [1])
@pytest.mark.proves("A", "fault:F01")
@pytest.mark.proves("B")
def test_one(x): ...

def test_two(): ...

def other(): ...

@pytest.mark.proves("C")
class TestIt:
    @pytest.mark.proves("D")
    async def test_three(self): ...
"""
    found = {(proof.row, proof.test) for proof in coverage.proofs_in(source, "test_x.py")}
    assert found == {
        *((row, "test_one") for row in ("M", "A", "fault:F01", "B")),
        ("M", "test_two"),
        *((row, "TestIt.test_three") for row in ("M", "C", "D")),
    }
    with pytest.raises(ValueError, match=r"line 3: proves\(ROW\): write the row as a string"):
        coverage.proofs_in('import pytest\nROW = "A"\n@pytest.mark.proves(ROW)\ndef test_x(): ...', "test_x.py")


def test_arguments_are_read_from_docstrings(coverage):
    def function():
        """Do.

        Args:
            a: one
                and more.
            b, *c: two.
        Returns:
            d: nothing
        """

    assert coverage.described_arguments(function) == {"a": "one and more.", "b": "two.", "c": "two."}


def test_a_page_without_its_mark_is_an_error(coverage):
    page = "x\n<!-- generated: a -->\nold\n<!-- end -->\ny"
    assert coverage.with_sections(page, {"a": "new"}) == "x\n<!-- generated: a -->\n\nnew\n\n<!-- end -->\ny"
    with pytest.raises(ValueError, match=r"has 0 parts <!-- generated: b -->"):
        coverage.with_sections(page, {"b": "new"})


def test_every_page_is_listed_and_every_link_leads_somewhere():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, f"docs/README.md does not list {page.name}"
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
