"""Rows as they are read: one by one, as often as they are gone through, so that a million need no more room than one.

    rows = load_split(dataset_config, "train", ("thing", "color"))
    samples = encode_pairs(tokenizer, rows.map(lambda row: (f"What color is {row['thing']}?\\n", row["color"])))

A row that cannot be used is told with its place, and ends the run unless `skip_bad_rows` allows for it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from llmrecipes.errors import DataError

NAMED_FAULTS = 5
"""Bad rows told in full; the others are counted."""

KEPT_FAULTS = 1000
"""Bad rows beyond those allowed after which nobody needs to know how many more there are."""

log = logging.getLogger("llmrecipes")

Item = TypeVar("Item")
Made = TypeVar("Made")


class Row(dict[str, Any]):
    """One row, by column name; `place` says where it stands (`data.csv:3`), for messages."""

    __slots__ = ("place",)

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place


@dataclass
class BadRows:
    """Rows that cannot be used, up to `allowed` of which are left out and named; by default the first one is raised."""

    allowed: int = 0
    faults: list[str] = field(default_factory=list)

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Notes what is wrong with the row at `place` instead of raising it, where rows may be left out."""
        try:
            yield
        except DataError as error:
            text = str(error)
            self.note(DataError(text if text.startswith(place) else f"{place}: {text}"))

    def note(self, fault: DataError) -> None:
        """Takes a fault down, once; raises it where no row may be left out, and stops where there are far too many."""
        if not self.allowed:
            raise fault
        if str(fault) not in self.faults:
            self.faults.append(str(fault))
        if len(self.faults) > self.allowed + KEPT_FAULTS:
            raise DataError(f"{faults_text(self.faults)}; skip_bad_rows allows {self.allowed}")


def faults_text(faults: Sequence[str]) -> str:
    """Returns the first faults, and how many more there are."""
    more = [f"and {len(faults) - NAMED_FAULTS} more"] if len(faults) > NAMED_FAULTS else []
    return "; ".join([*faults[:NAMED_FAULTS], *more])


_bad_rows: ContextVar[BadRows | None] = ContextVar("bad_rows", default=None)


def bad_rows() -> BadRows:
    """Returns where bad rows are noted while a split is read; outside of that every one is raised."""
    return _bad_rows.get() or BadRows()


@contextmanager
def noted_in(bad: BadRows) -> Iterator[BadRows]:
    """Lets all that is read within note its bad rows in one place, so that `skip_bad_rows` counts all of them."""
    token = _bad_rows.set(bad)
    try:
        yield bad
    finally:
        _bad_rows.reset(token)


@dataclass(frozen=True)
class Rows(Generic[Item]):
    """Rows of one file or data set, or what was made of them. `list(rows)` holds all at once."""

    read: Callable[[], Iterator[Item | DataError]]
    """begins anew; yields the fault of a row in its place, where reading can go on behind it"""
    place: str
    estimate: Callable[[], int] = lambda: 0
    """how many there are, more or less, for a progress bar; 0: unknown"""

    def __iter__(self) -> Iterator[Item]:
        bad = bad_rows()
        for item in self.read():
            if isinstance(item, DataError):
                bad.note(item)
            else:
                yield item

    def __length_hint__(self) -> int:
        return self.estimate()

    @property
    def first(self) -> Item:
        """The first row; raises `DataError` where there is none."""
        for item in self:
            return item
        raise DataError(f"{self.place}: no usable row in it")

    def map(self, make: "Callable[[Item], Made | None]") -> "Rows[Made]":
        """Returns what `make` makes of each row; None leaves a row out, a `DataError` makes it a bad one."""

        def read() -> Iterator[Made | DataError]:
            bad = bad_rows()
            for item in self:
                made: Made | None = None
                with bad.at(getattr(item, "place", self.place)):
                    made = make(item)
                if made is not None:
                    yield made

        return Rows(read, self.place, self.estimate)


def with_text(rows: Rows[Row], column: str, title: str) -> Rows[Row]:
    """Returns the rows whose `column` is not blank; once they are gone through, says how many others there are."""

    def read() -> Iterator[Row | DataError]:
        total = blank = 0
        for row in rows:
            total += 1
            if text(row, column, blank_allowed=True).strip():
                yield row
            else:
                blank += 1
        if blank:
            log.warning("%s: left out %d of %d rows, their %s is blank", title, blank, total, column)

    return Rows(read, rows.place, rows.estimate)


def text(row: Mapping[str, Any], column: str, *, blank_allowed: bool = False) -> str:
    """Returns the text of one column; raises `DataError` naming the row where it is blank or no text."""
    value = row[column]
    place = getattr(row, "place", "a row")
    if not isinstance(value, str):
        raise DataError(f"{place}: column {column!r} holds {value!r:.40}, expected text: write it in quotes")
    if not blank_allowed and not value.strip():
        raise DataError(f"{place}: column {column!r} is blank: fill it in or take the row out")
    return value
