"""What ``gpt2rt run`` reads and writes: JSON, JSON lines, CSV, and pipes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from .common import UsageFault

FORMATS = ("infer", "json", "csv", "pipe")
_EXTENSIONS = {".json": "json", ".jsonl": "json", ".csv": "csv"}
# columns that a file may have when --column does not name one
_USUAL_COLUMNS = ("text", "inputs", "sequence", "sequences", "sentence", "prompt")


def infer_format(path: Path | None) -> str:
    """The format of a file by its name; None, for stdin, is a pipe.

    Raises:
        UsageFault: the name does not tell.
    """
    if path is None:
        return "pipe"
    if path.suffix.lower() not in _EXTENSIONS:
        raise UsageFault(
            f"the format of {path} cannot be told from its name; pass --format json, csv or pipe, or name it "
            f"{', '.join('*' + end for end in _EXTENSIONS)}"
        )
    return _EXTENSIONS[path.suffix.lower()]


class Columns:
    """Which columns of a record go where, from ``--column``.

    Args:
        names: "column"; or "argument=column,argument=column", where "column" alone means the argument of that name;
            None: the first of a few usual names that a record has.
        many: the task takes several arguments, so that one name is an argument too.
    """

    def __init__(self, names: str | None, many: bool) -> None:
        self.pairs: list[tuple[str, str]] = []
        for name in names.split(",") if names else ():
            argument, _, column = name.partition("=")
            if not argument or ("=" in name and not column):
                raise UsageFault(f"--column takes NAME, or ARGUMENT=NAME with commas between, got {names!r}")
            self.pairs.append((argument, column or argument))
        #: a record becomes {argument: value}
        self.named = many or len(self.pairs) > 1 or bool(names and "=" in names)

    def of_record(self, record: Any, where: str) -> Any:
        """What the task gets of a JSON value or a CSV row.

        Raises:
            ValueError: a column is missing.
        """
        if not isinstance(record, dict):
            if self.named:
                raise ValueError(f"{where} is no object with {', '.join(column for _, column in self.pairs)}")
            return record
        pairs = self.pairs
        if not pairs:
            found = next((name for name in _USUAL_COLUMNS if name in record), None)
            if found is None:
                raise ValueError(
                    f"{where} has the columns {', '.join(map(repr, record))}, and which one holds the text is unknown; "
                    "pass --column"
                )
            pairs = [(found, found)]
        absent = [column for _, column in pairs if record.get(column) is None]
        if absent:
            raise ValueError(f"{where} has no column {absent[0]!r}; it has {', '.join(map(repr, record))}")
        return {name: record[column] for name, column in pairs} if self.named else record[pairs[0][1]]

    def of_line(self, line: str, where: str) -> Any:
        """What the task gets of a line of a pipe; tabs stand between several arguments.

        Raises:
            ValueError: there are not as many parts as arguments.
        """
        if not self.named:
            return line
        parts = line.split("\t")
        if len(parts) != len(self.pairs):
            names = ", ".join(argument for argument, _ in self.pairs)
            raise ValueError(f"{where} has {len(parts)} parts between tabs, expected {len(self.pairs)}: {names}")
        return {argument: part for (argument, _), part in zip(self.pairs, parts, strict=True)}


# ---- reading -------------------------------------------------------------------------------------------------------


def read_records(stream: Any, form: str, lines: bool, columns: Columns, name: str) -> Iterator[Any]:
    """What the task gets, one after another; only a JSON file that is one list is read whole.

    Args:
        stream: bytes.
        form: "json", "csv" or "pipe".
        lines: the JSON file has one value on each line.
        columns: what of each record.
        name: of the input, for messages.
    Raises:
        ValueError: the input is not UTF-8, is not of that format, or lacks a column.
    """
    if form == "pipe":
        for number, line in _lines(stream, name):
            yield columns.of_line(line, f"line {number} of {name}")
    elif form == "csv":
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            for number, row in enumerate(csv.DictReader(text), 1):
                yield columns.of_record(row, f"row {number} of {name}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        except csv.Error as error:
            raise ValueError(f"{name} is no CSV file: {error}") from None
    elif lines:
        for number, line in _lines(stream, name):
            if line.strip():
                yield columns.of_record(_parse(line, f"line {number} of {name}"), f"line {number} of {name}")
    else:
        data = _parse(_decode(stream.read(), name), name)
        if not isinstance(data, list):
            raise ValueError(f"{name} holds a {type(data).__name__}, expected a list of texts or objects")
        for number, record in enumerate(data, 1):
            yield columns.of_record(record, f"entry {number} of {name}")


def _lines(stream: Any, name: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(stream, 1):
        yield number, _decode(line, f"line {number} of {name}").rstrip("\r\n")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start} of {len(data)})") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None


# ---- writing -------------------------------------------------------------------------------------------------------


def write_results(results: Iterable[Any], stream: TextIO, form: str, lines: bool, flush: Callable[[], None]) -> int:
    """Write results as they come.

    Args:
        results: one for each input.
        stream: where to.
        form: "pipe" and JSON lines: each result on a line. "json": a list, and "csv": rows, of all results, where those
            that are lists count as several, as in transformers.
        lines: write JSON lines.
        flush: called after each result.
    Returns:
        How many inputs there were.
    Raises:
        ValueError: a result does not fit into a row of CSV.
    """
    count = 0
    if form == "csv":
        writer = None
        for result in results:
            count += 1
            for row in _flat(result):
                if not isinstance(row, dict):
                    raise ValueError(f"a {type(row).__name__} makes no row of CSV; write JSON: --output NAME.json")
                if writer is None:
                    writer = csv.DictWriter(stream, list(row), lineterminator="\n")
                    writer.writeheader()
                writer.writerow({name: _cell(value) for name, value in row.items()})
            flush()
    elif form == "pipe" or lines:
        for result in results:
            count += 1
            stream.write(json.dumps(result, ensure_ascii=False) + "\n")
            flush()
    else:
        written = False
        for result in results:
            count += 1
            for item in _flat(result):
                stream.write((",\n " if written else "[\n ") + json.dumps(item, ensure_ascii=False))
                written = True
            flush()
        stream.write("\n]\n" if written else "[]\n")
    return count


def _flat(result: Any) -> Iterator[Any]:
    if isinstance(result, list):
        yield from result
    else:
        yield result


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
