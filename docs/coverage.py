"""Writes docs/coverage.md and the generated tables of docs/loading.md: ``python docs/coverage.py``.

The rows and their promises stand in docs/coverage_rows.toml. Which tests prove a row is read from the tests' source: a
function, a class or a whole file (``pytestmark``) carries ``@pytest.mark.proves("F1", "fault:F12")``. What fields of
GenerationConfig and the keywords of from_pretrained do comes from the code.
"""

import ast
import inspect
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator
from typing import Any, NamedTuple

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
STATUSES = ("proven", "refused", "later")


class Row(NamedTuple):
    """One row: what is promised, and how far it is kept."""

    id: str
    promise: str
    status: str = "proven"
    reason: str = ""


class Proof(NamedTuple):
    """One test that claims to prove a row."""

    row: str
    path: str  # below tests/
    test: str


def read_rows() -> dict[str, list[Row]]:
    """Title of a group -> its rows."""
    data = tomllib.loads((DOCS / "coverage_rows.toml").read_text(encoding="utf-8"))
    return {group["title"]: [Row(name, **fields) for name, fields in group["rows"].items()] for group in data["group"]}


# ---- the tests -------------------------------------------------------------------------------------------------------


def _marked(node: ast.AST) -> Iterator[str]:
    """Arguments of every ``pytest.mark.proves(...)`` inside an expression."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.proves":
            for argument in call.args:
                if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
                    raise ValueError(f"line {call.lineno}: proves({ast.unparse(argument)}): write the row as a string")
                yield argument.value


def proofs_in(source: str, path: str) -> list[Proof]:
    """The proofs that the source of one test file claims."""
    found: list[Proof] = []

    def visit(body: list[ast.stmt], inherited: list[str], prefix: str) -> None:
        marks = list(inherited)
        for node in body:
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == "pytestmark" for target in node.targets):
                marks += _marked(node.value)
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                own = [row for decorator in node.decorator_list for row in _marked(decorator)]
                visit(node.body, marks + own, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
                own = [row for decorator in node.decorator_list for row in _marked(decorator)]
                found.extend(Proof(row, path, prefix + node.name) for row in dict.fromkeys(marks + own))

    visit(ast.parse(source).body, [], "")
    return found


def read_proofs(tests: pathlib.Path = ROOT / "tests") -> list[Proof]:
    """The proofs that all test files claim, in the order of the files."""
    found = []
    for path in sorted(tests.rglob("test_*.py")):
        name = path.relative_to(tests).as_posix()
        try:
            found += proofs_in(path.read_text(encoding="utf-8"), name)
        except ValueError as error:
            raise ValueError(f"tests/{name}: {error}") from None
    return found


def problems(rows: list[Row], proofs: list[Proof]) -> list[str]:
    """What is wrong: rows without proof, proofs without a row, repeated rows, unknown states."""
    known = [row.id for row in rows]
    proven = {proof.row for proof in proofs}
    found = [f"row {name} stands twice" for name in dict.fromkeys(known) if known.count(name) > 1]
    for row in rows:
        if row.status not in STATUSES:
            found.append(f"row {row.id} has the status {row.status!r}, expected one of {', '.join(STATUSES)}")
        elif row.status != "later" and row.id not in proven:
            found.append(f"row {row.id} is called {row.status}, and no test proves it: {row.promise}")
        if (row.status == "proven") == bool(row.reason):
            found.append(f"row {row.id} is {row.status} with the reason {row.reason!r}")
    found += [
        f"tests/{proof.path}: {proof.test} proves {proof.row!r}, which is no row"
        for proof in proofs
        if proof.row not in known
    ]
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rows = [head, tuple("---" for _ in head), *lines]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)


def _tests_of(row: Row, proofs: list[Proof]) -> str:
    files: dict[str, list[str]] = {}
    for proof in proofs:
        if proof.row == row.id:
            files.setdefault(proof.path, []).append(proof.test)
    texts = []
    for path, tests in files.items():
        what = tests[0].removeprefix("test_").replace("_", " ") if len(tests) == 1 else f"{len(tests)} tests"
        texts.append(f"[{path.removesuffix('.py')}](../tests/{path}): {what}")
    return "; ".join(texts)


def _group(rows: list[Row], proofs: list[Proof]) -> str:
    lines = []
    for row in rows:
        status = row.status if not row.reason else f"{row.status}: {row.reason}"
        lines.append((row.id.removeprefix("fault:"), row.promise, status, _tests_of(row, proofs)))
    return _table(("row", "promise", "status", "proof"), lines)


def generation_fields() -> str:
    """The table of GenerationConfig's fields."""
    from gpt2rt.generation.config import FIELD_STATUS

    lines = [(f"`{name}`", status, text) for name, (status, text) in FIELD_STATUS.items()]
    return _table(("field", "status", "what it does, or why not"), lines)


def described_arguments(function: Any) -> dict[str, str]:
    """Argument -> sentence, from the ``Args`` of a docstring."""
    text = inspect.cleandoc(function.__doc__ or "")
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", text + "\n", re.MULTILINE)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.group(1).splitlines() if section else []:
        start = re.fullmatch(r"    ((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*): (.*)", line)
        if start:
            names = [name.lstrip("*") for name in start.group(1).split(", ")]
            found |= dict.fromkeys(names, start.group(2))
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _keywords(function: Any, refused: dict[str, Any], without_effect: dict[str, str]) -> str:
    described = described_arguments(function)
    lines = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in ("self", "cls"):
            continue
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        # the docstring's double backquotes are markdown's single ones, and its roles are nothing there
        text = re.sub(r":\w+:`", "`", described[name].replace("``", "`"))
        lines.append((f"`{name}{default}`", "honoured", text))
    for name, reason in sorted(without_effect.items()):
        lines.append((f"`{name}`", "accepted, without effect", reason))
    for name, (harmless, reason) in sorted(refused.items()):
        values = " or ".join(f"`{value!r}`" for value in harmless)
        lines.append((f"`{name}`", f"refused unless {values}", reason))
    return _table(("keyword", "status", "what it does, or why not"), lines)


def generated_sections() -> dict[str, str]:
    """Name of a generated part of docs/loading.md -> its text."""
    from gpt2rt.checkpoint import options
    from gpt2rt.models.pretrained import PreTrainedModel

    return {
        "from_pretrained": _keywords(PreTrainedModel.from_pretrained, options.REFUSED, options.WITHOUT_EFFECT),
        "save_pretrained": _keywords(
            PreTrainedModel.save_pretrained, options.SAVE_REFUSED, options.SAVE_WITHOUT_EFFECT
        ),
    }


def with_sections(text: str, sections: dict[str, str]) -> str:
    """A page with its generated parts, which stand between ``<!-- generated: name -->`` and ``<!-- end -->``."""
    for name, body in sections.items():
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", text)
        if count != 1:
            raise ValueError(f"the page has {count} parts <!-- generated: {name} -->, expected 1")
    return text


def pages() -> dict[pathlib.Path, str]:
    """Page -> what it should hold."""
    groups, proofs = read_rows(), read_proofs()
    rows = [row for group in groups.values() for row in group]
    counts = ", ".join(f"{sum(row.status == status for row in rows)} {status}" for status in STATUSES)
    parts = [
        "# What is promised, and what proves it",
        "Written by `python docs/coverage.py`; `tests/docs/test_coverage.py` fails when it is stale. The rows are in "
        '`docs/coverage_rows.toml`; a test proves a row with `@pytest.mark.proves("<row>")`, written `fault:F01` for '
        f"the faults. {len(rows)} rows: {counts}.",
    ]
    for title, group in groups.items():
        parts += [f"## {title}", _group(group, proofs)]
    parts += ["## Every field of GenerationConfig", generation_fields()]
    loading = DOCS / "loading.md"
    return {
        DOCS / "coverage.md": "\n\n".join(parts) + "\n",
        loading: with_sections(loading.read_text(encoding="utf-8"), generated_sections()),
    }


def main() -> None:
    """Write the pages; end with status 1 when a row lacks its proof or a proof its row."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    found = problems([row for group in read_rows().values() for row in group], read_proofs())
    for line in found:
        print(line, file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
