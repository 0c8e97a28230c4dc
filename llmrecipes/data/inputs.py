"""What a split is made of: noted by our own readers while it is read, and told again when a kept one is to be used.

with watched() as inputs:
    samples = list(encode_pairs(tokenizer, load_rows(path)))
assert inputs.changed is None
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llmrecipes.data.formats import READERS

Input = tuple[str, str]
"""What is asked (a key of `QUESTIONS`), and of which path: absolute, links not followed, as they may be changed."""


@dataclass
class Inputs:
    """What a split was made of."""

    told: dict[Input, object] = field(default_factory=dict)
    """input -> what it was when it was first met"""
    unknown: str = ""
    """what was read of which nobody can tell whether it will be the same"""

    @property
    def changed(self) -> str | None:
        """The first path that is no longer what it was, or None."""
        return next((path for (kind, path), told in self.told.items() if not is_as_told(kind, path, told)), None)


_reading: list[Inputs] = []
"""The split that is being read, if one is."""


@contextmanager
def watched() -> Iterator[Inputs]:
    """Notes what our readers read within."""
    inputs = Inputs()
    _reading.append(inputs)
    try:
        yield inputs
    finally:
        _reading.remove(inputs)


def note_content(path: Path) -> None:
    """Notes that a file is about to be read, or that it is missed."""
    if path.exists() and not path.is_file():
        note_unknown(f"{path} is no plain file")
    else:
        _note("content", path)


def note_place(path: Path) -> None:
    """Notes that it matters whether there is a file or a folder, and which data files lie in it."""
    _note("place", path)


def note_unknown(what: str) -> None:
    """Notes that something is read that cannot be told again: the split is not kept."""
    for inputs in _reading[-1:]:
        inputs.unknown = inputs.unknown or what


def _note(kind: str, path: Path) -> None:
    name = str(path.absolute())
    for inputs in _reading[-1:]:
        if (kind, name) not in inputs.told:
            inputs.told[kind, name] = QUESTIONS[kind](Path(name))


def is_as_told(kind: str, path: str, told: object) -> bool:
    """Returns whether an input is what it was."""
    try:
        if kind == "content" and isinstance(told, list) and Path(path).stat().st_size != told[0]:
            return False
    except OSError:
        return False
    return QUESTIONS[kind](Path(path)) == told


def data_files(folder: Path) -> list[Path]:
    """Returns the files of a folder that a reader is known for; raises `OSError`."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in READERS and not file.name.startswith(".") and file.is_file()
    )


def content(path: Path) -> list[int | str] | None:
    """Returns size and SHA-256 of a file, None where it cannot be read; times count for nothing."""
    try:
        with path.open("rb") as file:
            return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError:
        return None


def _place(path: Path) -> list[str] | bool | None:
    """Returns the names of a folder's data files, else whether there is a file; None where that cannot be known."""
    try:
        return [file.name for file in data_files(path)] if path.is_dir() else path.exists()
    except OSError:
        return None


QUESTIONS: Mapping[str, Callable[[Path], object]] = {"content": content, "place": _place}
"""What may be asked of a path, and how the answer is found."""
