"""Rows of text from CSV, JSON, JSON lines and parquet files, and where the rows of a split stand.

    rows = load_split(dataset_config, "train", ("question", "answer"), hub_name="someone/some-questions")
    question = text(rows[0], "question")

What stands in the file is what comes out: in a CSV file `001`, `NA` and `None` are text. Every fault is one
`DataError` that names the file and, where it can be known, the line and the column. The standard library reads CSV
and JSON here because `datasets` turns `001` into 1 and `NA` into None, and names neither file nor line.
"""

import codecs
import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llmrecipes.errors import DataError, did_you_mean


class Row(dict[str, Any]):
    """One row, by column name; `place` says where it stands (`data.csv:3`), for messages."""

    __slots__ = ("place",)

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place


def load_rows(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Returns the rows of one file, at least one, with exactly `columns` in each (all columns if none is named).

    The suffix tells the format; a `.json` file is a list of objects, or one object a line as SAMSum's are.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: the suffix {path.suffix!r} is not one of {', '.join(_READERS)}")
    try:
        if not path.stat().st_size:
            raise DataError(f"{path}: the file is empty")
        rows = read(path, columns)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{path}: the file holds no rows")
    return rows


def load_split(
    dataset_config: Any, split: str, columns: Sequence[str] = (), hub_name: str | None = None, default_path: str = ""
) -> list[Row]:
    """Returns the rows of one split: from `dataset_config.data_path`, else `default_path`, else the hub's `hub_name`.

    A folder holds one file a split, named `train.csv` or `anything_train.csv`; a single file is the split that
    `dataset_config.train_split` names, and no other. Each row has exactly `columns` (all if none is named).
    `default_path` is the folder `data/NAME` that `llmrecipes data create NAME` writes.
    """
    flag = f"--{getattr(dataset_config, 'dataset', '') or 'custom_dataset'}.data_path"
    given = str(getattr(dataset_config, "data_path", "") or "")
    if not given and default_path and not Path(default_path).is_dir():
        command = f"llmrecipes data create {Path(default_path).name}"
        raise DataError(f"{default_path}: no such folder: make it with `{command}`, or give {flag} FOLDER")
    if given or default_path:
        train_split = getattr(dataset_config, "train_split", "train")
        return load_rows(_split_file(_expanded(given or default_path), split, train_split, flag), columns)
    if hub_name:
        return load_hub(hub_name, split, columns, way_out=f"{flag} FOLDER")
    raise DataError(f"no data set is named: give {flag} a folder with one file per split, such as {split}.csv")


def load_hub(hub_name: str, split: str, columns: Sequence[str] = (), *, way_out: str) -> list[Row]:
    """Returns the rows of a split of a hub data set; `way_out` is the flag that names local data instead."""
    import datasets

    place = f"hub data set {hub_name}, split {split}"
    try:
        loaded = datasets.load_dataset(hub_name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{place}: {said[:160]}; for data on this machine give {way_out}") from None
    _check_columns(loaded.column_names, columns, place)
    return [_row(values, columns, f"{place}: row {number}") for number, values in enumerate(loaded, start=1)]


def text(row: Mapping[str, Any], column: str, *, blank_allowed: bool = False) -> str:
    """Returns the text of one column; raises `DataError` naming the row where it is blank or no text."""
    value = row[column]
    place = getattr(row, "place", "a row")
    if not isinstance(value, str):
        raise DataError(f"{place}: column {column!r} holds {value!r:.40}, expected text: write it in quotes")
    if not blank_allowed and not value.strip():
        raise DataError(f"{place}: column {column!r} is blank: fill it in or take the row out")
    return value


def save_rows(files: Mapping[Path, Sequence[Mapping[str, str]]]) -> None:
    """Writes each file, as JSON lines or CSV by its suffix. No file is replaced before all are written in full."""
    parts = {path: path.with_name(f".{path.name}.part") for path in files}
    try:
        for path, rows in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with parts[path].open("w", encoding="utf-8", newline="") as file:
                if path.suffix == ".jsonl":
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                else:
                    _write_csv(file, rows)
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        raise DataError(f"{error.filename or next(iter(files))}: cannot be written: {error.strerror}") from None
    finally:
        for part in parts.values():
            if part.parent.is_dir():
                part.unlink(missing_ok=True)


def _write_csv(file: TextIO, rows: Sequence[Mapping[str, str]]) -> None:
    has_returns = any("\r" in value for row in rows for value in row.values())  # Python 3.11 leaves them unquoted
    writer = csv.DictWriter(
        file,
        fieldnames=list(rows[0]),
        lineterminator="\n",
        quoting=csv.QUOTE_ALL if has_returns else csv.QUOTE_MINIMAL,
    )
    writer.writeheader()
    writer.writerows(rows)


# --- where a split stands ---------------------------------------------------------------------------------------------


def _expanded(given: str) -> Path:
    try:
        return Path(given).expanduser()
    except RuntimeError as error:  # `~nobody`
        raise DataError(f"{given}: {error}") from None


def _split_file(place: Path, split: str, train_split: str, flag: str) -> Path:
    """Returns the file of `split`: `place` itself, or the one file of that name in the folder `place`."""
    if not place.exists():
        raise DataError(f"{place}: no such file or folder; {flag} names a file, or a folder with one file per split")
    if not place.is_dir():
        if split != train_split:
            raise DataError(
                f"{place} is one file, so it holds the split {train_split!r} only, and {split!r} was asked for: "
                f"give {flag} a folder with one file per split, or --run_validation false"
            )
        return place
    try:
        files = sorted(file for file in place.iterdir() if _is_data_file(file))
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error.strerror}") from None
    found = [file for file in files if file.stem == split or file.stem.endswith((f"_{split}", f"-{split}"))]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{place}: {len(found)} files for the split {split!r}: {_names(found)}; leave one of them")
    raise DataError(
        f"{place}: no file for the split {split!r}, expected {split}.csv or NAME_{split}.csv "
        f"(or {', '.join(list(_READERS)[1:])}); it holds {_names(files) or 'no data file'}"
    )


def _is_data_file(file: Path) -> bool:
    return file.suffix.lower() in _READERS and not file.name.startswith(".") and file.is_file()


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files[:8]) + (", ..." if len(files) > 8 else "")


# --- checks on rows ---------------------------------------------------------------------------------------------------


def _row(values: Mapping[str, Any], columns: Sequence[str], place: str) -> Row:
    """Returns the row, cut to `columns`, all of which must be there and not null."""
    _check_columns(values, columns, place)
    for column in columns:
        if values[column] is None:
            raise DataError(f"{place}: column {column!r} is null: fill it in or take the row out")
    return Row({column: values[column] for column in columns} if columns else values, place)


def _check_columns(found: Mapping[str, Any] | Sequence[str], columns: Sequence[str], place: str) -> None:
    for column in columns:
        if column not in found:
            names = ", ".join(map(repr, list(found)[:12])) or "none"
            raise DataError(f"{place}: no column {column!r}, it has {names}{did_you_mean(column, found)}")


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


def _decoded(path: Path) -> str:
    """Returns the text of a UTF-8 file, without its byte order mark."""
    data = path.read_bytes()
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            raise _encoding_error(path, data, 0, f"the file is {encoding}", encoding)
    if 0 in data[:2]:
        encoding = "UTF-16BE" if data[0] == 0 else "UTF-16LE"
        raise _encoding_error(path, data, data.index(0), f"a NUL byte, the file looks like {encoding}", encoding)
    if 0 in data:
        offset = data.index(0)
        raise DataError(f"{path}:{_line(data, offset)}: byte {offset} is a NUL byte, no text has that: take it out")
    try:
        decoded = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _encoding_error(path, data, error.start, "no UTF-8; if the file is Latin-1", "LATIN1") from None
    if not decoded.strip():
        raise DataError(f"{path}: the file is empty")
    return decoded


def _encoding_error(path: Path, data: bytes, offset: int, found: str, encoding: str) -> DataError:
    command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8{path.suffix}"
    return DataError(f"{path}:{_line(data, offset)}: byte {offset} (0x{data[offset]:02x}): {found}: {command}")


def _line(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    decoded = _decoded(path)
    former_limit = csv.field_size_limit(len(decoded) + 1)  # the default, 131072, is less than a long document
    try:
        records = list(_csv_records(path, decoded))
    finally:
        csv.field_size_limit(former_limit)
    first_line, header = records[0]
    _check_no_duplicates(header, f"{path}:{first_line}")
    _check_columns(header, columns, f"{path}:{first_line}")
    rows = []
    for line, fields in records[1:]:
        if len(fields) != len(header):
            count = f"{len(fields)} field{'s' if len(fields) != 1 else ''}"
            raise DataError(f"{path}:{line}: {count}, header has {len(header)}: quote a field that holds a comma")
        rows.append(_row(dict(zip(header, fields, strict=True)), columns, f"{path}:{line}"))
    if not rows:
        raise DataError(f"{path}:{first_line}: a header and no rows")
    return rows


def _csv_records(path: Path, decoded: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the first line and the fields of every record; blank lines are none."""
    reader = csv.reader(io.StringIO(decoded, newline=""), strict=True)
    first_line = 1
    try:
        for fields in reader:
            if fields:
                yield first_line, fields
            first_line = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise DataError(f"{path}:{first_line}: a quote is opened in this row and never closed") from None
        raise DataError(f"{path}:{reader.line_num}: {error}") from None


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


def _json_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    decoded = _decoded(path)
    is_list = path.suffix.lower() == ".json" and decoded.lstrip().startswith("[")
    values = _json_list(path, decoded) if is_list else _json_lines(path, decoded)
    may_hold_surrogates = _SURROGATE.search(decoded) is not None
    rows = []
    for place, value in values:
        if not isinstance(value, dict):
            raise DataError(f"{place}: expected an object with named columns, found {json.dumps(value):.40}")
        if may_hold_surrogates:
            _check_no_surrogate(value, place)
        rows.append(_row(value, columns, place))
    return rows


def _json_lines(path: Path, decoded: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(decoded.split("\n"), start=1):
        if line.strip():
            value, end = _json_value(path, line, _blanks_end(line, 0), first_line=number)
            end = _blanks_end(line, end)
            if end < len(line):
                raise DataError(f"{path}:{number}:{end + 1}: something follows the object: expected one a line")
            yield f"{path}:{number}", value


def _json_list(path: Path, decoded: str) -> Iterator[tuple[str, Any]]:
    """Yields the values of a list one by one, so that the line of each is known."""
    line, counted = 1, 0
    at = _blanks_end(decoded, decoded.index("[") + 1)
    closed = decoded[at : at + 1] == "]"
    while not closed:
        value, end = _json_value(path, decoded, at, first_line=1)
        line, counted = line + decoded.count("\n", counted, at), at
        yield f"{path}:{line}", value
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
        raise DataError(f"{place}: {error.msg}: expected one object a line, or a list of objects") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{first_line + decoded.count(chr(10), 0, start)}: {error}") from None


def _blanks_end(decoded: str, start: int) -> int:
    blanks = _BLANKS.match(decoded, start)
    return blanks.end() if blanks else start


def _position(path: Path, decoded: str, at: int) -> str:
    return f"{path}:{decoded.count(chr(10), 0, at) + 1}:{at - decoded.rfind(chr(10), 0, at)}"


def _check_no_surrogate(value: Mapping[str, Any], place: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{place}: {code} is half a character (a lone surrogate), no text has that") from None


# --- parquet ----------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_no_duplicates(file.schema_arrow.names, str(path))
            _check_columns(file.schema_arrow.names, columns, str(path))
            values = file.read(columns=list(columns) or None).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: no readable parquet: {said[:160]}") from None
    return [_row(row, columns, f"{path}: row {number}") for number, row in enumerate(values, start=1)]


_READERS: dict[str, Callable[[Path, Sequence[str]], list[Row]]] = {
    ".csv": _csv_rows,
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}
