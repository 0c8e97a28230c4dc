"""The records of CSV, JSON, JSON lines and parquet files, one by one as they stand in the file.

What stands in the file is what comes out: in a CSV file `001`, `NA` and `None` are text. A fault of one record is
yielded in its place, so that reading can go on behind it; one that spoils the file is raised. The standard library
reads CSV and JSON here because `datasets` turns `001` into 1 and `NA` into None, and names neither file nor line.
"""

import codecs
import csv
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llmrecipes.data.rows import BadRowError, Row
from llmrecipes.errors import DataError, did_you_mean

Record = Row | DataError

LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field: the module's own limit, 131072, is less than a long document."""

EMPTY_FILE = "write rows into it, or give another file"
"""What to do about a file that holds nothing."""

QUOTES = 'quotes within a cell are doubled ("")'
"""What to do about a quote that closes a cell too early."""

OTHER_SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}
"""What parts the columns of files that are called CSV and are not, each in words."""

PARQUET_ROWS = 1024
"""Rows of a parquet file that are turned into Python's own values at once."""


def record(values: Mapping[str, Any], columns: Sequence[str], place: str) -> Record:
    """Returns the row, cut to `columns` (all if none is named), or what is wrong where one is missing or null."""
    try:
        check_columns(values, columns, place)
    except BadRowError as fault:
        return fault
    for column in columns:
        if values[column] is None:
            return BadRowError(place, f"column {column!r} is null: fill it in or take the row out")
    return Row({column: values[column] for column in columns} if columns else values, place, columns)


def check_columns(found: Mapping[str, Any] | Sequence[str], columns: Sequence[str], place: str) -> None:
    """Raises `DataError` for a column that is not there."""
    for column in columns:
        if column not in found:
            names = ", ".join(map(repr, list(found)[:12])) or "none"
            raise BadRowError(place, f"no column {column!r}, it has {names}{did_you_mean(column, found)}")


def _check_no_duplicates(names: Sequence[str], place: str) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise DataError(f"{place}: two columns are named {name!r}: rename one")


# --- text -------------------------------------------------------------------------------------------------------------

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


@dataclass
class _Lines:
    """The lines of a UTF-8 file, line ends kept; `faults` are those of lines that are no text, by line number."""

    path: Path
    end_at_returns: bool = False
    """whether a carriage return alone ends a line"""
    faults: dict[int, BadRowError] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            self._check_encoding(file)
            offset = 0
            for number, data in enumerate(self._lines(file), start=1):
                yield self._decoded(data, offset, number)
                offset += len(data)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        for line in file:
            if self.end_at_returns and b"\r" in line.removesuffix(b"\n").removesuffix(b"\r"):
                yield from _LINE.findall(line)
            else:
                yield line

    def _check_encoding(self, file: BinaryIO) -> None:
        start = file.read(4)
        file.seek(0)
        for mark, encoding in _BYTE_ORDER_MARKS.items():
            if start.startswith(mark):
                raise _encoding_error(self.path, 1, 0, start[0], f"the file is {encoding}", encoding)
        if 0 in start[:2]:
            encoding, place = ("UTF-16BE", 0) if start[0] == 0 else ("UTF-16LE", 1)
            found = f"a NUL byte, the file looks like {encoding}"
            raise _encoding_error(self.path, 1, place, 0, found, encoding)

    def _decoded(self, data: bytes, offset: int, number: int) -> str:
        """Returns the text of one line; of one that is no text what can be read, and notes the fault."""
        if 0 in data:
            told = f"byte {offset + data.index(0)} is a NUL byte, no text has that: take it out"
            self.faults.setdefault(number, BadRowError(f"{self.path}:{number}", told))
        try:
            line = data.decode("utf-8")
        except UnicodeDecodeError as error:
            found = "no UTF-8; if the file is Latin-1"
            fault = _encoding_error(self.path, number, offset + error.start, data[error.start], found, "LATIN1")
            self.faults.setdefault(number, fault)
            line = data.decode("utf-8", errors="replace")
        return line.removeprefix("\ufeff") if offset == 0 else line

    def fault(self, last: int) -> BadRowError | None:
        """Returns the first fault of the lines up to `last`; forgets all of them."""
        found = [self.faults.pop(number) for number in sorted(self.faults) if number <= last]
        return found[0] if found else None


def _encoding_error(path: Path, line: int, offset: int, byte: int, found: str, encoding: str) -> BadRowError:
    command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8{path.suffix}"
    return BadRowError(f"{path}:{line}", f"byte {offset} (0x{byte:02x}): {found}: {command}")


def _first_line(path: Path) -> str:
    """Returns the first line of a file that is not blank, stripped; raises `DataError` where there is none."""
    for line in filter(str.strip, _Lines(path, end_at_returns=True)):
        return line.strip()
    raise DataError(f"{path}: the file is empty: {EMPTY_FILE}")


def _line_estimate(path: Path) -> int:
    """Returns about how many lines a file has: by its size, and the lines of its first megabyte."""
    with path.open("rb") as file:
        start = file.read(1 << 20)
    return round(path.stat().st_size * max(1, start.count(b"\n")) / max(1, len(start)))


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_FIELD)
    first_line = _first_line(path)
    records = _csv_fields(path)
    header = next(records)
    if not set(columns) <= set(header.fields):
        _check_separator(first_line, columns, f"{path}:{header.first}")
    if header.fault is not None:
        raise header.fault
    _check_no_duplicates(header.fields, f"{path}:{header.first}")
    check_columns(header.fields, columns, f"{path}:{header.first}")
    empty = True
    for found in records:
        empty = False
        wrong = len(found.fields) != len(header.fields)
        if found.fault is not None and not (wrong and found.last > found.first):
            yield found.fault
        elif wrong:
            yield from _wrong_count(path, found, len(header.fields))
        else:
            yield record(dict(zip(header.fields, found.fields, strict=True)), columns, f"{path}:{found.first}")
    if empty:
        raise DataError(f"{path}:{header.first}: a header and no rows: write rows below it, or give another file")


def _check_separator(header: str, columns: Sequence[str], place: str) -> None:
    """Raises `DataError` where the columns are all there, and parted by another character than a comma."""
    for separator, name in OTHER_SEPARATORS.items():
        if set(columns) <= {part.strip(' "') for part in header.split(separator)}:
            raise DataError(
                f"{place}: the columns are separated by {name}, commas are expected: save the file with them"
            )


class _Fields(NamedTuple):
    """One record: its first and last line, its fields, and what is wrong with its text."""

    first: int
    last: int
    fields: list[str]
    fault: BadRowError | None


def _csv_fields(path: Path) -> Iterator[_Fields]:
    """Yields every record; blank lines are none.

    A quote that is never closed, or lines later by another that is astray, swallows rows, so it is raised.
    """
    lines = _Lines(path, end_at_returns=True)
    reader = csv.reader(lines, strict=True)
    first = 1
    while True:
        fields, fault = [], None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise DataError(f"{path}:{first}: a quote is opened in this row and never closed") from None
            if reader.line_num > first:
                told = f"a quote that is opened in this row goes on to line {reader.line_num}: {error}: {QUOTES}"
                raise DataError(f"{path}:{first}: {told}") from None
            fault = BadRowError(
                f"{path}:{first}", f"{error}: {QUOTES}" if "expected after" in str(error) else str(error)
            )
        fault = lines.fault(reader.line_num) or fault
        if fields or fault is not None:
            yield _Fields(first, reader.line_num, fields, fault)
        first = reader.line_num + 1


def _wrong_count(path: Path, found: _Fields, expected: int) -> Iterator[BadRowError]:
    """Yields a fault for each line of a record: a stray quote may have made one row of many."""
    count = f"{len(found.fields)} field{'s' if len(found.fields) != 1 else ''}"
    lines = f" in lines {found.first} to {found.last}" if found.last > found.first else ""
    advice = "is a quote missing?" if lines else "quote a field that holds a comma"
    for line in range(found.first, found.last + 1):
        yield BadRowError(f"{path}:{line}", f"{count}{lines}, header has {expected}: {advice}")


# --- JSON -------------------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_BLANKS = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _json_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Yields the objects of a list, or one a line."""
    empty = True
    is_list = _first_line(path)[0] == "[" and path.suffix.lower() == ".json"
    for found in _json_list(path) if is_list else _json_lines(path):
        empty = False
        if isinstance(found, DataError):
            yield found
            continue
        place, source, value = found
        if not isinstance(value, dict):
            yield BadRowError(place, f"expected an object with named columns, found {json.dumps(value):.40}")
        elif half := _half_character(value, source):
            yield BadRowError(place, f"{half} is half a character (a lone surrogate), no text has that")
        else:
            yield record(value, columns, place)
    if empty:
        raise DataError(f"{path}: the file holds no rows")


Value = tuple[str, str, Any]
"""Where a JSON value stands, its text, and the value."""


def _json_lines(path: Path) -> Iterator[Value | DataError]:
    lines = _Lines(path)
    for number, line in enumerate(lines, start=1):
        fault = lines.fault(number)
        if fault is not None:
            yield fault
        elif line.strip():
            try:
                yield f"{path}:{number}", line, _whole_value(path, line.rstrip("\n"), number)
            except DataError as error:
                yield error


def _whole_value(path: Path, line: str, number: int) -> Any:
    value, end = _json_value(path, line, _blanks_end(line, 0), first_line=number)
    end = _blanks_end(line, end)
    if end < len(line):
        raise BadRowError(f"{path}:{number}:{end + 1}", "something follows the object: expected one a line")
    return value


def _json_list(path: Path) -> Iterator[Value | DataError]:
    """Yields the values of a list one by one, so that the line of each is known; the text is held in memory.

    The first value on a line stands at that line, others there at their column, too: no two stand in one place.
    """
    lines = _Lines(path)
    decoded = "".join(lines)
    fault = lines.fault(max(lines.faults, default=0))
    if fault is not None:
        raise fault
    line, last_line, counted = 1, 0, 0
    at = _blanks_end(decoded, decoded.index("[") + 1)
    closed = decoded[at : at + 1] == "]"
    while not closed:
        value, end = _json_value(path, decoded, at, first_line=1)
        line, counted = line + decoded.count("\n", counted, at), at
        place = f"{path}:{line}" if line > last_line else _position(path, decoded, at)
        last_line = line
        yield place, decoded[at:end], value
        at = _blanks_end(decoded, end)
        closed = decoded[at : at + 1] == "]"
        if not closed and decoded[at : at + 1] != ",":
            raise DataError(f"{_position(path, decoded, at)}: expected ',' or the ']' that closes the list")
        if not closed:
            at = _blanks_end(decoded, at + 1)
    if decoded[at + 1 :].strip():
        raise DataError(f"{_position(path, decoded, _blanks_end(decoded, at + 1))}: something follows the list")


def _json_value(path: Path, decoded: str, start: int, *, first_line: int) -> tuple[Any, int]:
    """Returns the JSON value that begins at `start` and where it ends; `first_line` is the line `decoded` begins at."""
    try:
        return _DECODER.raw_decode(decoded, start)
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno + first_line - 1}:{error.colno}"
        raise BadRowError(place, f"{error.msg}: expected one object a line, or a list of objects") from None
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{path}:{first_line + decoded.count(chr(10), 0, start)}", str(error)) from None


def _blanks_end(decoded: str, start: int) -> int:
    blanks = _BLANKS.match(decoded, start)
    return blanks.end() if blanks else start


def _position(path: Path, decoded: str, at: int) -> str:
    return f"{path}:{decoded.count(chr(10), 0, at) + 1}:{at - decoded.rfind(chr(10), 0, at)}"


def _half_character(value: Mapping[str, Any], source: str) -> str:
    """Returns the escape of a lone surrogate that a value holds, or an empty text."""
    if _SURROGATE.search(source):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            return f"\\u{ord(error.object[error.start]):04x}"
    return ""


# --- parquet ----------------------------------------------------------------------------------------------------------


def _parquet_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_no_duplicates(file.schema_arrow.names, str(path))
            check_columns(file.schema_arrow.names, columns, str(path))
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(columns) or None):
                for values in batch.to_pylist():
                    number += 1
                    yield record(values, columns, f"{path}: row {number}")
    except (pyarrow.ArrowException, ValueError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: no readable parquet: {said[:160]}") from None
    if not number:
        raise DataError(f"{path}: the file holds no rows")


def _parquet_estimate(path: Path) -> int:
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(path).num_rows)


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Record]]] = {
    ".csv": _csv_records,
    ".json": _json_records,
    ".jsonl": _json_records,
    ".parquet": _parquet_records,
}
"""Suffix -> `(path, columns) -> records`."""


def row_estimate(path: Path) -> int:
    """Returns about how many rows a file has, for a progress bar; 0 where that cannot be known."""
    try:
        return _parquet_estimate(path) if path.suffix.lower() == ".parquet" else _line_estimate(path)
    except Exception:  # what is wrong with the file is told by whoever reads it
        return 0
