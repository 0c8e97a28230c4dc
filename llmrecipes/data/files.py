"""Rows of text from CSV, JSON, JSON lines and parquet files or the hub, and where the rows of a split stand.

    rows = load_split(dataset_config, "train", ("question", "answer"), hub_name="someone/some-questions")
    for row in rows: ...

Files are read row by row, anew each time the rows are gone through. Every fault is one `DataError` that names the
file and, where it can be known, the line and the column.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llmrecipes.data.formats import EMPTY_FILE, READERS, Record, check_columns, record, row_estimate
from llmrecipes.data.inputs import data_files, note_content, note_place, note_unknown
from llmrecipes.data.rows import Row, Rows
from llmrecipes.errors import DataError


def load_rows(path: Path, columns: Sequence[str] = ()) -> Rows[Row]:
    """Returns the rows of one file, with exactly `columns` in each (all columns if none is named).

    The suffix tells the format; a `.json` file is a list of objects, or one object a line as SAMSum's are.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: the suffix {path.suffix!r} is not one of {', '.join(READERS)}")

    def read() -> Iterator[Record]:
        note_content(path)
        try:
            if path.is_file() and not path.stat().st_size:
                raise DataError(f"{path}: the file is empty: {EMPTY_FILE}")
            yield from reader(path, columns)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None

    def estimate() -> int:
        note_content(path)
        return row_estimate(path)

    return Rows(read, str(path), estimate)


def load_split(
    dataset_config: Any, split: str, columns: Sequence[str] = (), hub_name: str | None = None, default_path: str = ""
) -> Rows[Row]:
    """Returns the rows of one split: from `dataset_config.data_path`, else `default_path`, else the hub's `hub_name`.

    A folder holds one file a split, named `train.csv` or `anything_train.csv`; a single file is the split that
    `dataset_config.train_split` names, and no other. Each row has exactly `columns` (all if none is named).
    `default_path` is the folder `data/NAME` that `llmrecipes data create NAME` writes.
    """
    flag = f"--{getattr(dataset_config, 'dataset', '') or 'custom_dataset'}.data_path"
    given = str(getattr(dataset_config, "data_path", "") or "")
    if not given and default_path:
        note_place(Path(default_path))
        if not Path(default_path).is_dir():
            command = f"llmrecipes data create {Path(default_path).name}"
            raise DataError(f"{default_path}: no such folder: make it with `{command}`, or give {flag} FOLDER")
    if given or default_path:
        train_split = getattr(dataset_config, "train_split", "train")
        return load_rows(_split_file(_expanded(given or default_path), split, train_split, flag), columns)
    if hub_name:
        return load_hub(hub_name, split, columns, way_out=f"{flag} FOLDER")
    raise DataError(f"no data set is named: give {flag} a folder with one file per split, such as {split}.csv")


def load_hub(hub_name: str, split: str, columns: Sequence[str] = (), *, way_out: str) -> Rows[Row]:
    """Returns the rows of a split of a hub data set; `way_out` is the flag that names local data instead."""
    import datasets

    place = f"hub data set {hub_name}, split {split}"
    note_unknown(f"the hub may hold another {hub_name} by then")
    try:
        loaded = datasets.load_dataset(hub_name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{place}: {said[:160]}; for data on this machine give {way_out}") from None
    check_columns(loaded.column_names, columns, place)

    def read() -> Iterator[Record]:
        for number, values in enumerate(loaded, start=1):
            yield record(values, columns, f"{place}: row {number}")

    return Rows(read, place, lambda: len(loaded))


def save_rows(files: Mapping[Path, Sequence[Mapping[str, str]]]) -> None:
    """Writes each file, as JSON lines or CSV by its suffix. No file is replaced before all are written in full."""
    note_unknown("it writes files")
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
        raise DataError(
            f"{error.filename or next(iter(files))}: cannot be written: {error.strerror or error}"
        ) from None
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
    note_place(place)
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
        files = data_files(place)
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error.strerror or error}") from None
    found = [file for file in files if file.stem == split or file.stem.endswith((f"_{split}", f"-{split}"))]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{place}: {len(found)} files for the split {split!r}: {_names(found)}; leave one of them")
    raise DataError(
        f"{place}: no file for the split {split!r}, expected {split}.csv or NAME_{split}.csv "
        f"(or {', '.join(list(READERS)[1:])}); it holds {_names(files) or 'no data file'}"
    )


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files[:8]) + (", ..." if len(files) > 8 else "")
