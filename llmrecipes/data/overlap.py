"""What splits have in common, and what a split says twice: exact, normalised, by runs of words, by numbers and answer.

A split is read once, row by row, into a `Sketch`: a few 64-bit hashes a row, and of its runs of words a bounded
number. Sketches are compared with each other within one process; Python's own hashes, of which they are made, are
others in the next.
"""

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from llmrecipes.batch import IdArray
from llmrecipes.prompts import IGNORED_LABEL

Hashes = npt.NDArray[np.uint64]

RUN_WORDS = 13
"""Words of a run: Brown et al. 2020 (GPT-3), appendix C, looked for runs of at most 13 words in test sets."""

KEPT_RUNS = 1 << 22
"""Runs of words kept of a split; where it has more, one in 2, 4, 8, ... of them, chosen by their hash."""

TEMPLATE_SHARE = 0.05
TEMPLATE_ROWS = 10
"""A run that more rows than both hold (a share, a count) is taken for a part of the prompt template."""

NEAR_SHARE = 0.5
"""A row is nearly in a split that holds at least this share of its runs."""

NUMERIC_SHARE = 0.5
"""Numbers are compared where at least this share of the rows ask with two numbers and answer with one."""

_FULL = (1 << 64) - 1
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio, odd: Knuth, The Art of Computer Programming, volume 3, section 6.4."""

_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−", "-"))
_PROSE = re.compile(
    r"""[!?;"'`()\[\]{}«»„“”‘’…。，、！？：；「」『』《》（）]|(?<!\d)[.,:]|[.,:](?!\d)|(?<=[^\W\d_])-(?=[^\W\d_])"""
)
"""Punctuation of prose. `3.5`, `12:30`, `-7` and the signs between numbers keep theirs: they mean something."""
_SIGN = re.compile(r"(?<=[\d)])\s*([-+*/×÷^=])\s*(?=[\d(])")
"""A sign between numbers, which some write with blanks around it."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
"""What stands between blanks; Chinese and Japanese, written without blanks, character by character."""
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Overlap:
    """Rows of `split` that `reference` holds as well, of `rows` in all."""

    reference: str
    split: str
    rows: int
    same_rows: int
    """question and answer alike, token by token"""
    same_questions: int
    """whatever the answer"""
    normalised_questions: int
    """the same but for case, blanks and punctuation: those of `same_questions` and more"""
    near: int
    """at least `NEAR_SHARE` of the row's runs of 13 words are there"""
    touched: int
    """at least one of its runs is"""
    one_in: int
    """1: every run was looked at; 4: one in 4, so `near` and `touched` are estimates"""
    same_numbers: int | None
    """the same numbers in the question and the same words in the answer, in any order; None where the rows are not
    about numbers"""
    identical: bool
    """both splits hold the very same rows, if in another order"""


@dataclass(frozen=True)
class Repeats:
    """Rows of one split that come after another one like them."""

    rows: int
    normalised_questions: int
    other_answers: int
    """rows that repeat a question, token by token, with another answer"""


@dataclass
class RunSketch:
    """Hashes of the runs of words of many rows: all, or a sample that depends on nothing but the runs themselves."""

    one_in: int = 1
    hashes: list[Hashes] = field(default_factory=list)
    rows: list[IdArray] = field(default_factory=list)
    kept: int = 0

    def add(self, rows: Sequence[list[str]], first_row: int) -> None:
        """Takes rows as lists of words, numbered from `first_row`."""
        hashes, numbers = runs(rows)
        self._keep(hashes, numbers + np.int32(first_row))
        while self.kept > KEPT_RUNS:
            self.one_in *= 2
            found = np.concatenate(self.hashes), np.concatenate(self.rows)
            self.hashes, self.rows, self.kept = [], [], 0
            self._keep(*found)

    def _keep(self, hashes: Hashes, rows: IdArray) -> None:
        chosen = sampled(hashes, self.one_in)
        self.hashes.append(hashes[chosen])
        self.rows.append(rows[chosen])
        self.kept += int(chosen.sum())

    def pairs(self, one_in: int) -> tuple[Hashes, IdArray]:
        """Returns (hash, row) of the runs, thinned to one in `one_in`."""
        if not self.hashes:
            return np.zeros(0, np.uint64), np.zeros(0, np.int32)
        hashes = np.concatenate(self.hashes)
        chosen = sampled(hashes, one_in)
        return hashes[chosen], np.concatenate(self.rows)[chosen]


@dataclass
class Sketch:
    """What is kept of a split's rows to compare them: for each row four 64-bit hashes, and the runs of words."""

    split: str
    rows: "array[int]" = field(default_factory=lambda: array("Q"))
    questions: "array[int]" = field(default_factory=lambda: array("Q"))
    normalised: "array[int]" = field(default_factory=lambda: array("Q"))
    numbers: "array[int]" = field(default_factory=lambda: array("Q"))
    """0 where a row is not about numbers"""
    runs: RunSketch = field(default_factory=RunSketch)

    def add(self, ids: Sequence[tuple[IdArray, IdArray]], questions: Sequence[str], answers: Sequence[str]) -> None:
        """Takes rows: (input_ids, labels) of each, the text of what is not supervised and of what is."""
        first_row = len(self.rows)
        texts: list[list[str]] = []
        for (input_ids, labels), question, answer in zip(ids, questions, answers, strict=True):
            asked, answered = words(question), words(answer)
            self.rows.append(digest(input_ids, labels))
            self.questions.append(question_digest(input_ids, labels))
            self.normalised.append(hash(tuple(asked or question.split() or answered)) & _FULL)
            self.numbers.append(numbers_key(question, answered))
            texts.append(asked + answered)
        self.runs.add(texts, first_row)

    @property
    def is_numeric(self) -> bool:
        """Whether the rows are about numbers."""
        return len(self.numbers) > 0 and float((hashes_of(self.numbers) != 0).mean()) >= NUMERIC_SHARE


def overlap(reference: Sketch, other: Sketch) -> Overlap:
    """Returns what of `other` stands in `reference`."""
    near, touched, one_in = shared_runs(reference.runs, other.runs, len(reference.rows), len(other.rows))
    numeric = reference.is_numeric and other.is_numeric
    return Overlap(
        reference=reference.split,
        split=other.split,
        rows=len(other.rows),
        same_rows=int(held(reference.rows, other.rows).sum()),
        same_questions=int(held(reference.questions, other.questions).sum()),
        normalised_questions=int(held(reference.normalised, other.normalised).sum()),
        near=near,
        touched=touched,
        one_in=one_in,
        same_numbers=int(held(reference.numbers, other.numbers).sum()) if numeric else None,
        identical=np.array_equal(np.sort(hashes_of(reference.rows)), np.sort(hashes_of(other.rows))),
    )


def repeats(sketch: Sketch) -> Repeats:
    """Returns what a split says more than once."""
    rows, different = len(sketch.rows), len(set(sketch.rows))
    return Repeats(
        rows=rows - different,
        normalised_questions=rows - len(set(sketch.normalised)),
        other_answers=max(0, different - len(set(sketch.questions))),
    )


def shared_runs(reference: RunSketch, other: RunSketch, reference_rows: int, rows: int) -> tuple[int, int, int]:
    """Returns (rows of `other` that are nearly in `reference`, rows that share a run with it, one run in how many)."""
    one_in = max(reference.one_in, other.one_in)
    known, template = split_template(*reference.pairs(one_in), reference_rows)
    hashes, numbers = other.pairs(one_in)
    own = ~among(hashes, template)
    found = among(hashes, known)
    totals = np.bincount(numbers[own], minlength=rows)
    hits = np.bincount(numbers[found], minlength=rows)
    return int(((hits > 0) & (hits >= NEAR_SHARE * totals)).sum()), int((hits > 0).sum()), one_in


def split_template(hashes: Hashes, numbers: IdArray, rows: int) -> tuple[Hashes, Hashes]:
    """Returns a split's different runs in two, each sorted: its own, and those that so many rows hold that they are
    the prompt's template."""
    order = np.lexsort((numbers, hashes))
    hashes, numbers = hashes[order], numbers[order]
    new_hash = np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)]
    new_row = new_hash | np.concatenate([[True], numbers[1:] != numbers[:-1]])[: len(hashes)]
    starts = np.flatnonzero(new_hash)
    holders = np.add.reduceat(new_row.astype(np.int64), starts) if len(starts) else np.zeros(0, np.int64)
    is_template = holders > max(TEMPLATE_ROWS, TEMPLATE_SHARE * rows)
    return hashes[starts][~is_template], hashes[starts][is_template]


def runs(rows: Sequence[list[str]]) -> tuple[Hashes, IdArray]:
    """Returns the hash of every run of 13 words of every row, and the row's number; shorter rows have none."""
    lengths = [len(row) for row in rows]
    flat = np.fromiter((hash(word) & _FULL for row in rows for word in row), dtype=np.uint64, count=sum(lengths))
    numbers = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
    if len(flat) < RUN_WORDS:
        return np.zeros(0, np.uint64), np.zeros(0, np.int32)
    places = len(flat) - RUN_WORDS + 1
    mixed = np.zeros(places, dtype=np.uint64)
    for shift in range(RUN_WORDS):
        mixed = mixed * _FACTOR + flat[shift : shift + places]
    inside = numbers[:places] == numbers[RUN_WORDS - 1 :]
    mixed = mixed[inside]
    return (mixed ^ (mixed >> np.uint64(29))) * _FACTOR, numbers[:places][inside]


def sampled(hashes: Hashes, one_in: int) -> npt.NDArray[np.bool_]:
    """Returns which hashes belong to the sample of one in `one_in`, a power of two."""
    return (hashes >> np.uint64(32)) % np.uint64(one_in) == 0


def words(text: str) -> list[str]:
    """Returns the words of a text as they are compared: case, blanks and the punctuation of prose make no difference.

    >>> words("What is 3 - 4.5?  Well-known!")
    ['what', 'is', '3', '-', '4.5', 'well', 'known']
    """
    plain = unicodedata.normalize("NFKC", text).translate(_DASHES).casefold()
    return _WORD.findall(_PROSE.sub(" ", _SIGN.sub(r" \1 ", plain)))


def numbers_key(question: str, answer: Sequence[str]) -> int:
    """Returns the hash of the question's numbers and the answer's words, each in any order; 0 for none.

    Two numbers asked and one answered is the least that can be called arithmetic.
    """
    asked = sorted(_NUMBER.findall(question))
    if len(asked) < 2 or not any(_NUMBER.search(word) for word in answer):
        return 0
    return hash((tuple(asked), tuple(sorted(answer)))) & _FULL or 1


def digest(input_ids: IdArray, labels: IdArray) -> int:
    """Returns 64 bits that stand for a row, ids and labels."""
    return int.from_bytes(hashlib.blake2b(input_ids.tobytes() + labels.tobytes(), digest_size=8).digest())


def question_digest(input_ids: IdArray, labels: IdArray) -> int:
    """Returns 64 bits that stand for what a row is asked: its unsupervised ids, or all where hardly any are."""
    asked = input_ids[labels == IGNORED_LABEL]
    asked = asked if len(asked) > 1 else input_ids
    return int.from_bytes(hashlib.blake2b(asked.tobytes(), digest_size=8).digest())


def held(reference: "array[int]", other: "array[int]") -> npt.NDArray[np.bool_]:
    """Returns for each hash of `other` whether `reference` holds it; 0 stands for nothing and is held by none."""
    mine = hashes_of(other)
    return among(mine, np.sort(hashes_of(reference))) & (mine != 0)


def among(hashes: Hashes, known: Hashes) -> npt.NDArray[np.bool_]:
    """Returns for each hash whether `known`, which is sorted, holds it (numpy's own `isin` takes 20 times as long)."""
    if not len(known):
        return np.zeros(len(hashes), dtype=bool)
    return known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes


def hashes_of(kept: "array[int]") -> Hashes:
    """Returns hashes as numpy's."""
    return np.array(kept, dtype=np.uint64)
