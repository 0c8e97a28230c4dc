"""Rows as they are read: one by one, as often as they are gone through, so that a million need no more room than one.

    rows = load_split(dataset_config, "train", ("thing", "color"))
    samples = encode_pairs(tokenizer, rows.map(lambda row: (f"What color is {row['thing']}?\\n", row["color"])))

A row that cannot be used is told with its place, and ends the run unless `skip_bad_rows` allows for it.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from llmrecipes.errors import DataError
from llmrecipes.prompts import Lasting

NAMED_FAULTS = 5
"""Kinds of faults told, and bad rows named of each; the others are counted."""

TOLD_CHARACTERS = 300
"""Characters told of one fault."""

KEPT_FAULTS = 1000
"""Bad rows beyond those allowed after which nobody needs to know how many more there are."""

NOWHERE = "a row"
"""Where a row stands that does not know it, as one that has become a plain dict."""

log = logging.getLogger("llmrecipes")

Item = TypeVar("Item")
Made = TypeVar("Made")


class Row(dict[str, Any]):
    """One row, by column name; `place` says where it stands (`data.csv:3`), for messages."""

    __slots__ = ("asked", "meant", "place")

    def __init__(self, values: Mapping[str, Any], place: str, asked: Sequence[str] = ()) -> None:
        super().__init__(values)
        self.place = place
        self.asked = asked
        """the columns that were asked for by name"""
        self.meant: tuple[str, ...] = ()
        """those that may be blank, as `text` was told"""

    @property
    def blanks(self) -> list[str]:
        """The columns asked for that are blank, though nobody said that they may be."""
        return [column for column in self.asked if _is_blank(self[column]) and column not in self.meant]


class BadRowError(DataError):
    """What is wrong with one row, and where that stands."""

    def __init__(self, place: str, told: str) -> None:
        super().__init__(f"{place}: {told}")
        self.place, self.told = place, told


Met = Counter[str]
"""How often each fault was met in one going through of rows."""


@dataclass
class BadRows:
    """Rows that cannot be used, up to `allowed` of which are left out and named; by default the first one is raised."""

    allowed: int = 0
    faults: dict[str, list[str]] = field(default_factory=dict)
    """what is wrong -> the places where it is"""
    _noted: set[tuple[str, int]] = field(default_factory=set)

    @property
    def count(self) -> int:
        """Rows noted."""
        return len(self._noted)

    @contextmanager
    def at(self, place: str, met: Met | None = None) -> Iterator[None]:
        """Notes what is wrong with the row at `place` instead of raising it, where rows may be left out."""
        try:
            yield
        except DataError as error:
            told = str(error).removeprefix(f"{place}: ").removeprefix(f"{NOWHERE}: ")
            self.note(BadRowError(place, told), met)

    def note(self, fault: DataError, met: Met | None = None) -> None:
        """Takes a fault down; raises it where no row may be left out, and stops where there are far too many.

        Rows may be gone through several times, so a fault counts once for as often as one going through, `met`, has
        it: two rows of one fault and one place are two.
        """
        if not self.allowed:
            raise fault
        met = Counter() if met is None else met
        met[str(fault)] += 1
        if (str(fault), met[str(fault)]) in self._noted:
            return
        self._noted.add((str(fault), met[str(fault)]))
        place, told = (fault.place, fault.told) if isinstance(fault, BadRowError) else (NOWHERE, str(fault))
        self.faults.setdefault(told, []).append(place)
        if self.count > self.allowed + KEPT_FAULTS:
            raise DataError(f"{faults_text(self.faults)}; skip_bad_rows allows {self.allowed}")


def allowed_bad_rows(dataset_config: Any) -> int:
    """Returns how many bad rows a data set's settings allow to be left out of a split."""
    return int(getattr(dataset_config, "skip_bad_rows", 0) or 0)


def places_text(places: Sequence[str]) -> str:
    """Returns the first places, and how many more there are."""
    more = f" and {len(places) - NAMED_FAULTS} more" if len(places) > NAMED_FAULTS else ""
    return ", ".join(places[:NAMED_FAULTS]) + more


def faults_text(faults: Mapping[str, Sequence[Any]], name: Callable[[Sequence[Any]], str] = places_text) -> str:
    """Returns each of the first faults behind what `name` makes of where it is, and how many more there are."""
    told = [f"{name(places)}: {shortened(fault)}" for fault, places in list(faults.items())[:NAMED_FAULTS]]
    others = list(faults.values())[NAMED_FAULTS:]
    told += [f"and {sum(map(len, others))} rows with {len(others)} other faults"] if others else []
    return "; ".join(told)


def shortened(text: str) -> str:
    """Returns a text, its end left out where it is too long to be told."""
    return text if len(text) <= TOLD_CHARACTERS else f"{text[: TOLD_CHARACTERS - 3]}..."


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


class _Placed(NamedTuple):
    """What was made of a row, and where that stands."""

    made: Any
    place: str
    row: Row | None = None
    """what it was made of, where that was a row"""


@dataclass(frozen=True)
class Rows(Lasting, Generic[Item]):
    """Rows of one file or data set, or what was made of them. `list(rows)` holds all at once."""

    read: Callable[[], Iterator[Item | DataError]]
    """begins anew; yields the fault of a row in its place, where reading can go on behind it"""
    place: str
    estimate: Callable[[], int] = lambda: 0
    """how many there are, more or less, for a progress bar; 0: unknown"""

    def __iter__(self) -> Iterator[Item]:
        for placed in self._placed():
            yield placed.made

    def _placed(self) -> Iterator[_Placed]:
        """Yields the usable rows, each with its place as far as that is known."""
        bad, met = bad_rows(), Met()
        for item in self.read():
            if isinstance(item, DataError):
                bad.note(item, met)
            else:
                yield item if isinstance(item, _Placed) else _Placed(item, getattr(item, "place", self.place))

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

        def read() -> Iterator[Any]:
            bad, met = bad_rows(), Met()
            for item, place, _ in self._placed():
                made: Made | None = None
                with bad.at(place, met):
                    made = make(item)
                if made is not None:
                    yield _Placed(made, place, item if isinstance(item, Row) else None)

        return Rows(read, self.place, self.estimate)

    def filled(self) -> "Rows[Item]":
        """Returns the (prompt, answer) pairs; one that is blank or no text is a bad row.

        A blank column within a longer prompt may be meant, so such rows stay: how many there are is said at the end.
        """

        def read() -> Iterator[Any]:
            total, blank, first = 0, Counter[str](), dict[str, str]()
            for placed in self._placed():
                total += 1
                fault = _pair_fault(placed)
                for column in placed.row.blanks if placed.row is not None and not fault else ():
                    blank[column] += 1
                    first.setdefault(column, placed.place)
                yield BadRowError(placed.place, fault) if fault else placed
            for column, count in blank.items():
                log.warning(
                    "%s: column %r is blank in %d of %d rows that are learned (first: %s): fill it in, or read it with "
                    "llmrecipes.data.rows.text, which refuses blanks or, with blank_allowed=True, says they are meant",
                    self.place, column, count, total, first[column],
                )  # fmt: skip

        return Rows(read, self.place, self.estimate)


def _pair_fault(placed: _Placed) -> str:
    """Returns what is wrong with a (prompt, answer) pair, and the column that it stands in, or an empty text."""
    pair = placed.made
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return ""
    for name, value in zip(("prompt", "answer"), pair, strict=True):
        if isinstance(value, str) and value.strip():
            continue
        columns = [column for column, held in (placed.row or {}).items() if held is value]
        columns = columns or [column for column, held in (placed.row or {}).items() if held == value]
        told = f"column {columns[0]!r}, the {name}," if len(columns) == 1 else f"the {name}"
        if isinstance(value, str):
            return f"{told} is blank: fill it in or take the row out"
        return f"{told} holds {value!r:.40}, expected text: write it in quotes"
    return ""


def _is_blank(value: object) -> bool:
    return isinstance(value, str) and not value.strip()


def with_text(rows: Rows[Row], column: str, title: str) -> Rows[Row]:
    """Returns the rows whose `column` is not blank; once they are gone through, says how many others there are."""

    def read() -> Iterator[Row | DataError]:
        total = blank = 0
        for row in rows:
            total += 1
            try:
                is_blank = not text(row, column, blank_allowed=True).strip()
            except DataError as error:
                yield error
                continue
            blank += is_blank
            if not is_blank:
                yield row
        if blank:
            log.warning("%s: left out %d of %d rows, their %s is blank", title, blank, total, column)

    return Rows(read, rows.place, rows.estimate)


def text(row: Mapping[str, Any], column: str, *, blank_allowed: bool = False) -> str:
    """Returns the text of one column; raises `DataError` naming the row where it is blank or no text."""
    value = row[column]
    place = getattr(row, "place", NOWHERE)
    if blank_allowed and isinstance(row, Row) and column not in row.meant:
        row.meant += (column,)
    if not isinstance(value, str):
        raise BadRowError(place, f"column {column!r} holds {value!r:.40}, expected text: write it in quotes")
    if not blank_allowed and not value.strip():
        raise BadRowError(place, f"column {column!r} is blank: fill it in or take the row out")
    return value
