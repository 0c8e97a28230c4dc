"""What every preprocessor promises, `(dataset_config, tokenizer, split) -> rows`, and a check of anybody's, by points.

for check in check_contract(preprocessor, dataset_config, tokenizer, ["train", "validation"], vocabulary_size):
    print(check.outcome, check.promise, check.detail)
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, count, islice
from typing import Any

import numpy as np

from llmrecipes.batch import IdArray, Sample
from llmrecipes.data.lints import (
    ALL_SUPERVISED,
    END_IGNORED,
    LINTS,
    NO_END,
    NO_START,
    TWO_STARTS,
    Marks,
    lint_flags,
    marks_of,
)
from llmrecipes.data.made_rows import (
    KEYS,
    LENGTHS,
    MASK,
    NUMBERS,
    VOCABULARY,
    RowError,
    iterated,
    named,
    samples_of,
)
from llmrecipes.data.overlap import digest, held
from llmrecipes.data.rows import BadRowError, BadRows, allowed_bad_rows, faults_text, noted_in
from llmrecipes.errors import LlmRecipesError, PluginError
from llmrecipes.plugins import Plugin
from llmrecipes.prompts import IGNORED_LABEL

CHUNK_ROWS = 2048

PASS, FAIL, NOTE, SKIP = "pass", "FAIL", "note", "skip"
"""Kept; broken; not promised, but probably unwanted; not to be known, because another promise was broken."""

RETURNS = "returns rows for every split"
LASTING = "what it returns can be gone through again, as a list can"
"""A generator cannot. More than going through is not asked of it: neither a length nor an index."""

LABELS = "a label is its token's own id, or -100"
SUPERVISED = "every row has a token to learn"
END = "every row ends with a supervised end token"
START = "every row opens with the start token, once, where the tokenizer has one"
PROMPTS = "prompts are not supervised"
DIFFER = "splits differ"
APART = "no row stands in two splits"
AGAIN = "a second call gives equal rows"
TOKENIZER = "the tokenizer is left as it was"

ROW_PROMISES = (KEYS, NUMBERS, LENGTHS, MASK, VOCABULARY, LABELS, SUPERVISED, END)
REFUSED = (KEYS, NUMBERS, LENGTHS, MASK, VOCABULARY, LABELS, SUPERVISED)
"""A row that breaks one of these is a bad row, which training leaves out as far as `skip_bad_rows` allows."""

HABITS = (START, PROMPTS)
"""What is promised by nobody, and still nearly always meant."""

PROMISES = (RETURNS, LASTING, *ROW_PROMISES, *HABITS, DIFFER, APART, AGAIN, TOKENIZER)
"""All that is checked, in the order of the report."""

LINTED = {END: (NO_END, END_IGNORED), START: (NO_START, TWO_STARTS), PROMPTS: (ALL_SUPERVISED,)}
"""Promise or habit -> the lints that break it."""


@dataclass(frozen=True)
class Check:
    """One promise, whether it was kept, and if not where."""

    outcome: str
    promise: str
    detail: str = ""


@dataclass
class Reading:
    """What one call of the preprocessor gave."""

    split: str
    error: str = ""
    is_lasting: bool = False
    rows: int = 0
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    broken: dict[str, dict[int, str]] = field(default_factory=dict)
    """promise -> row -> how it breaks it"""
    bad: BadRows = field(default_factory=BadRows)
    """rows that the preprocessor could not make anything of"""

    @property
    def bad_count(self) -> int:
        """Rows that training would leave out or refuse."""
        return self.bad.count + len({row for promise in REFUSED for row in self.broken.get(promise, ())})

    def note(self, promise: str, row: int, detail: str) -> None:
        """Takes down that a row breaks a promise."""
        self.broken.setdefault(promise, {})[row] = detail


def check_contract(
    preprocessor: Plugin, dataset_config: Any, tokenizer: Any, splits: Sequence[str], vocabulary_size: int
) -> list[Check]:
    """Returns every promise with its outcome; the preprocessor is called twice for each split."""
    before = _state(tokenizer)
    first, second = (
        [_reading(preprocessor, dataset_config, tokenizer, split, vocabulary_size) for split in splits]
        for _ in range(2)
    )
    changed = [f"{name} was {old}, and is {new}" for name, (old, new) in _changes(before, _state(tokenizer)).items()]
    return [
        _told(RETURNS, [f"split {reading.split}: {reading.error}" for reading in first if reading.error]),
        _told(LASTING, [f"split {reading.split}: {_LASTING_ADVICE}" for reading in first if not reading.is_lasting])
        if not any(reading.error for reading in first)
        else Check(SKIP, LASTING),
        *(_row_check(promise, first) for promise in (*ROW_PROMISES, *HABITS)),
        _differ_check(first),
        _apart_check(first),
        _again_check(first, second),
        _told(TOKENIZER, changed, NOTE),
    ]


def read_samples(
    preprocessor: Plugin, dataset_config: Any, tokenizer: Any, split: str, bad: BadRows
) -> Iterator[Sample]:
    """Yields a split's rows as samples as they are, unsupervised and overlong ones too; rows are counted from 0.

    Rows that cannot be used are noted in `bad`; raises `PluginError` for what is no row at all, where none is allowed.
    """
    place = f"{preprocessor.path.name}:{preprocessor.name}, split {split}"
    with noted_in(bad):
        made = preprocessor.each(samples_of(preprocessor(dataset_config, tokenizer, split), place))
    for number in count():
        with noted_in(bad):
            found = next(made, None)
        if isinstance(found, RowError) and not bad.allowed:
            raise PluginError(f"{place}, row {number}: {found}; promised is: {found.promise}")
        if isinstance(found, RowError):
            bad.note(BadRowError(f"row {number}", str(found)))
        elif found is None:
            return
        else:
            yield found


def _reading(preprocessor: Plugin, dataset_config: Any, tokenizer: Any, split: str, vocabulary_size: int) -> Reading:
    """Returns what one call gives; whatever goes wrong is taken down, not raised."""
    reading = Reading(split, bad=BadRows(allowed_bad_rows(dataset_config)))
    marks = marks_of(tokenizer)
    try:
        with noted_in(reading.bad):
            made = preprocessor(dataset_config, tokenizer, split)
            numbered = enumerate(preprocessor.each(samples_of(made, f"split {split}")))
            while chunk := list(islice(numbered, CHUNK_ROWS)):
                reading.rows += len(chunk)
                read = [_read_row(reading, found, number, vocabulary_size) for number, found in chunk]
                _lint_rows(reading, [sample for sample in read if sample is not None], marks)
            again = () if isinstance(made, Iterator) else preprocessor.each(iterated(made, f"split {split}"))
            reading.is_lasting = not reading.rows or any(True for _ in again)
    except LlmRecipesError as error:
        reading.error = str(error)
    if not reading.rows and not reading.error:
        reading.error = "no rows"
    if reading.bad_count > reading.bad.allowed > 0 and not reading.error:
        told = f": {faults_text(reading.bad.faults)}" if reading.bad.faults else ""
        reading.error = f"{reading.bad_count} bad rows, and skip_bad_rows allows {reading.bad.allowed}{told}"
    return reading


def _read_row(reading: Reading, sample: Sample | RowError, number: int, vocabulary_size: int) -> Sample | None:
    """Returns the sample where its tokens and labels can be talked about."""
    if isinstance(sample, RowError):
        reading.note(sample.promise, number, str(sample))
        return None
    ids, labels = sample.input_ids, sample.labels
    reading.digests.append(digest(ids, labels))
    if not len(ids):
        reading.note(LENGTHS, number, "no tokens")
        return None
    outside = ids[(ids < 0) | (ids >= vocabulary_size)]
    if len(outside):
        reading.note(VOCABULARY, number, f"id {outside[0]}, and the vocabulary has {vocabulary_size}")
    supervised = labels != IGNORED_LABEL
    if (labels[supervised] != ids[supervised]).any():
        reading.note(LABELS, number, _label_fault(ids, labels))
        return None
    if not sample.supervised_tokens:
        reading.note(SUPERVISED, number, "all labels behind the first are -100")
        return None
    return sample


def _lint_rows(reading: Reading, samples: Sequence[Sample], marks: Marks) -> None:
    flags = lint_flags(samples, marks) if samples else {}
    for promise, lints in LINTED.items():
        for lint in lints:
            for place in np.flatnonzero(flags.get(lint, ())).tolist():
                reading.note(promise, samples[place].row, f"{lint}: {LINTS[lint]}")


def _label_fault(ids: IdArray, labels: IdArray) -> str:
    ahead = labels[:-1] != IGNORED_LABEL
    if len(ids) > 1 and ahead.any() and (labels[:-1][ahead] == ids[1:][ahead]).all():
        return "labels are the next token's ids; leave them where they are, the trainer does the shift"
    if ((labels == 0) & (ids != 0)).any():
        return "0 stands where -100 is meant, so that the token 0 would be learned"
    return "a label is another id than its token's"


# --- checks -----------------------------------------------------------------------------------------------------------

_LASTING_ADVICE = "it can be gone through only once; return a list"


def _told(promise: str, faults: Sequence[str], outcome: str = FAIL) -> Check:
    return Check(outcome, promise, "; ".join(faults)) if faults else Check(PASS, promise)


def _row_check(promise: str, readings: Sequence[Reading]) -> Check:
    """Returns how the rows keep a promise; a row that is broken otherwise says nothing of it."""
    faults = []
    refused = promise not in HABITS
    for reading in readings:
        broken = reading.broken.get(promise, {})
        if broken:
            first = next(iter(broken.values()))
            faults.append(f"split {reading.split}, {named(list(broken))}: {first}")
    seen = any(reading.rows if promise == KEYS else reading.digests for reading in readings)
    if not faults and not seen:
        return Check(SKIP, promise)
    if promise in REFUSED:
        breaking = [reading for reading in readings if promise in reading.broken]
        refused = any(reading.bad_count > reading.bad.allowed for reading in breaking)
    return _told(promise, faults, FAIL if refused else NOTE)


def _differ_check(readings: Sequence[Reading]) -> Check:
    pairs = [pair for pair in combinations(readings, 2) if pair[0].digests and pair[1].digests]
    if not pairs:
        return Check(SKIP, DIFFER, "there are no two splits to compare")
    alike = [f"{first.split} and {second.split}" for first, second in pairs if _alike(first, second)]
    return _told(DIFFER, [f"{names} hold the very same rows: is the split's name used?" for names in alike])


def _apart_check(readings: Sequence[Reading]) -> Check:
    pairs = [pair for pair in combinations(readings, 2) if pair[0].digests and pair[1].digests]
    faults = []
    for first, second in pairs:
        shared = int(held(first.digests, second.digests).sum())
        if shared and not _alike(first, second):
            faults.append(f"{shared:,} of {second.rows:,} rows of {second.split} stand in {first.split} as well")
    if not pairs or (not faults and any(_alike(*pair) for pair in pairs)):
        return Check(SKIP, APART)
    return _told(APART, faults)


def _again_check(first: Sequence[Reading], second: Sequence[Reading]) -> Check:
    if not any(reading.digests for reading in first):
        return Check(SKIP, AGAIN)
    faults = []
    for one, two in zip(first, second, strict=True):
        if two.error and not one.error:
            faults.append(f"split {one.split}: the second call fails: {two.error}")
        elif one.rows != two.rows:
            faults.append(f"split {one.split}: {one.rows:,} rows at first, then {two.rows:,}")
        elif one.digests != two.digests:
            same = sorted(one.digests) == sorted(two.digests)
            changed = "the order differs" if same else "the rows differ"
            faults.append(f"split {one.split}: {changed}; draw with a generator of a fixed seed")
    return _told(AGAIN, faults)


def _alike(first: Reading, second: Reading) -> bool:
    return sorted(first.digests) == sorted(second.digests)


def _state(tokenizer: Any) -> dict[str, object]:
    """Returns what a preprocessor may not change in a tokenizer: it would be another for the next split."""
    names = ("bos_token", "eos_token", "pad_token", "padding_side", "truncation_side", "add_bos_token", "add_eos_token")
    return {"its size": len(tokenizer), **{name: getattr(tokenizer, name, None) for name in names}}


def _changes(before: Mapping[str, object], after: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}
