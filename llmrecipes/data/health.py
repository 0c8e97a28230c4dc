"""How healthy a data set is: a profile of every split, what splits share, and a verdict.

The findings come as sentences with figures in them. `quick_findings` is the part that costs next to nothing: the
trainer always runs it.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrecipes.batch import Sample
from llmrecipes.data.limits import Overlong, SampleLimits, piece
from llmrecipes.data.lints import LINTS, NOTHING_SUPERVISED, Marks, lint_flags, marks_of, template_fault
from llmrecipes.data.loaders import Loader
from llmrecipes.data.made_rows import named
from llmrecipes.data.overlap import (
    Hashes,
    Overlap,
    Repeats,
    Sketch,
    among,
    digest,
    hashes_of,
    overlap,
    question_digest,
    repeats,
)
from llmrecipes.data.plans import padding_share
from llmrecipes.data.rows import BadRows, faults_text
from llmrecipes.prompts import IGNORED_LABEL

CHUNK_ROWS = 2048
"""Samples looked at together: few enough to hold a long split in bounded memory."""

TEMPLATE_ROWS = 50
"""First rows of a split that are compared with the tokenizer's own chat template."""

NOTED_PADDING = 0.1
"""Share of padding from which the trainer says so."""

NOTED_NUMBERS = 0.02
"""Share of rows with the same numbers and answer from which chance no longer explains them."""

PROBLEM, FINDING, NOTE = "problem", "finding", "note"
"""Training would refuse it; it is probably wrong; it is good to know."""

NO_TOKENS = "no tokens"
OUTSIDE = "an id outside the vocabulary"
WRONG_LABEL = "a label that is another id than its token's"
EMPTY_ANSWER = "an empty answer"
SHORT_ANSWER = "an answer of one character that is neither letter nor digit"
ONE_LETTER = "an answer of one letter or digit"
TEMPLATE = "prompts end unlike the tokenizer's own chat template"

PROBLEMS = (NO_TOKENS, OUTSIDE, WRONG_LABEL, NOTHING_SUPERVISED)
NOTES = (ONE_LETTER, TEMPLATE)


@dataclass(frozen=True)
class Finding:
    """One thing to know about the data. `level`: problem, finding or note."""

    level: str
    text: str


@dataclass
class Profile:
    """What a split is like, filled row by row."""

    split: str
    limits: SampleLimits
    sketch: Sketch
    rows: int = 0
    lengths: list[int] = field(default_factory=list)
    """tokens of each row"""
    supervised: int = 0
    kept_lengths: list[int] = field(default_factory=list)
    """tokens of each sample that training sees: overlong rows as `--overlong` leaves them"""
    kept_supervised: int = 0
    overlong: int = 0
    faults: dict[str, list[int]] = field(default_factory=dict)
    """what is wrong -> the rows it is wrong with"""
    bad: BadRows = field(default_factory=BadRows)
    """rows of which no sample could be made"""

    @property
    def bad_count(self) -> int:
        """Rows that training would leave out or refuse."""
        return self.bad.count + len({row for fault in PROBLEMS for row in self.faults.get(fault, ())})

    def note(self, fault: str, rows: Iterable[int]) -> None:
        """Adds rows to a fault."""
        found = list(rows)
        if found:
            self.faults.setdefault(fault, []).extend(found)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    @property
    def kept_tokens(self) -> int:
        """Useful tokens of an epoch."""
        return sum(self.kept_lengths)


@dataclass(frozen=True)
class Digests:
    """64 bits for every row of a split and for what it is asked, token by token: [rows] each."""

    name: str
    rows: Hashes
    questions: Hashes

    @classmethod
    def of(cls, name: str, samples: Iterable[Sample]) -> "Digests":
        """Returns the digests of samples."""
        rows, questions = array("Q"), array("Q")
        for sample in samples:
            rows.append(digest(sample.input_ids, sample.labels))
            questions.append(question_digest(sample.input_ids, sample.labels))
        return cls(name, hashes_of(rows), hashes_of(questions))


def profile_split(
    split: str, samples: Iterable[Sample], tokenizer: Any, limits: SampleLimits, bad: BadRows | None = None
) -> Profile:
    """Returns the profile of a split, whose rows are gone through once; `bad`: where those that cannot be used go."""
    profile = Profile(split, limits, Sketch(split), bad=bad or BadRows())
    marks = marks_of(tokenizer)
    for chunk in chunked(samples):
        profile.rows += len(chunk)
        profile.note(NO_TOKENS, (sample.row for sample in chunk if not len(sample.input_ids)))
        chunk = [sample for sample in chunk if len(sample.input_ids)]
        if chunk:
            _count(profile, chunk)
            _lint(profile, chunk, tokenizer, marks)
            _read(profile, chunk, tokenizer)
    return profile


def findings(profiles: Sequence[Profile], overlaps: Sequence[Overlap]) -> list[Finding]:
    """Returns all that is to be said, problems first."""
    told = [finding for profile in profiles for finding in _profile_findings(profile)]
    told += [finding for pair in overlaps for finding in _overlap_findings(pair)]
    order = (PROBLEM, FINDING, NOTE)
    return sorted(told, key=lambda finding: order.index(finding.level))


def overlaps_of(profiles: Sequence[Profile]) -> list[Overlap]:
    """Returns what every split shares with every one before it."""
    return [overlap(first.sketch, second.sketch) for first, second in combinations(profiles, 2)]


def quick_findings(loaders: Mapping[str, Loader | None], tokenizer: Any) -> list[str]:
    """Returns what the trainer tells of its data before it begins, one sentence each: none where all is well.

    `loaders` are those of the run by a name for the user, training first; reads ids only, no text.
    """
    told: list[str] = []
    marks = marks_of(tokenizer)
    seen: list[Digests] = []
    for name, loader in loaders.items():
        if loader is None or not loader.samples:
            continue
        found = Digests.of(name, loader.samples)
        told += _quick_lints(name, loader.samples, marks)
        repeated = len(found.rows) - len(set(found.rows.tolist()))
        told += (
            [f"{name}: {_of(repeated, len(found.rows))} repeat another row, question and answer"] if repeated else []
        )
        told += [text for first in seen if (text := _shared_text(first, found))]
        told += _padding_text(name, loader)
        seen.append(found)
    return told


def chunked(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Yields the samples in lists of at most `CHUNK_ROWS`."""
    waiting = iter(samples)
    while chunk := list(islice(waiting, CHUNK_ROWS)):
        yield chunk


# --- profile ----------------------------------------------------------------------------------------------------------


def _count(profile: Profile, samples: Sequence[Sample]) -> None:
    """Takes down lengths, and what the context length leaves of them."""
    longest = profile.limits.longest
    for sample in samples:
        fits = len(sample.input_ids) <= longest
        kept = [sample] if fits else [piece(sample, at) for at in Overlong(profile.limits).stretches(sample)]
        profile.lengths.append(len(sample.input_ids))
        profile.supervised += sample.supervised_tokens
        profile.kept_lengths += [len(piece.input_ids) for piece in kept]
        profile.kept_supervised += sum(piece.supervised_tokens for piece in kept)
        profile.overlong += not fits


def _lint(profile: Profile, samples: Sequence[Sample], tokenizer: Any, marks: Marks) -> None:
    """Takes down the rows that look wrong by their ids."""
    for lint, flags in lint_flags(samples, marks).items():
        profile.note(lint, (samples[place].row for place in np.flatnonzero(flags).tolist()))
    size = profile.limits.vocabulary_size
    outside = [sample.row for sample in samples if not 0 <= sample.input_ids.min() <= sample.input_ids.max() < size]
    profile.note(OUTSIDE, outside)
    supervised = [sample.labels != IGNORED_LABEL for sample in samples]
    differ = [(s.labels[mask] != s.input_ids[mask]).any() for s, mask in zip(samples, supervised, strict=True)]
    profile.note(WRONG_LABEL, (samples[place].row for place in np.flatnonzero(differ).tolist()))
    if profile.rows <= CHUNK_ROWS:
        examined = samples[:TEMPLATE_ROWS]
        profile.note(TEMPLATE, (sample.row for sample in examined if template_fault(sample, tokenizer)))


def _read(profile: Profile, samples: Sequence[Sample], tokenizer: Any) -> None:
    """Takes down the rows that look wrong by their text, and what is needed to compare texts."""
    size = len(tokenizer)
    masks = [sample.labels != IGNORED_LABEL for sample in samples]
    questions = _texts(tokenizer, [sample.input_ids[~mask] for sample, mask in zip(samples, masks, strict=True)], size)
    answers = _texts(tokenizer, [sample.input_ids[mask] for sample, mask in zip(samples, masks, strict=True)], size)
    for sample, mask, text in zip(samples, masks, answers, strict=True):
        answer = text.strip()
        if len(answer) < 2 and mask.any():
            kind = EMPTY_ANSWER if not answer else ONE_LETTER if answer.isalnum() else SHORT_ANSWER
            profile.note(kind, [sample.row])
    profile.sketch.add([(sample.input_ids, sample.labels) for sample in samples], questions, answers)


def _texts(tokenizer: Any, rows: Sequence[npt.NDArray[np.int32]], size: int) -> list[str]:
    ids = [row[(row >= 0) & (row < size)].tolist() for row in rows]
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


# --- findings ---------------------------------------------------------------------------------------------------------


def _profile_findings(profile: Profile) -> Iterator[Finding]:
    refused = profile.bad_count > profile.bad.allowed
    if profile.bad.count:
        more = f" ({profile.bad_count} with those below), and skip_bad_rows allows {profile.bad.allowed}"
        told = f"{profile.split}: {profile.bad.count} bad rows{more if refused else ' left out'}"
        yield Finding(PROBLEM if refused else FINDING, f"{told}: {faults_text(profile.bad.faults)}")
    if not profile.rows:
        yield Finding(PROBLEM, f"{profile.split}: no rows in it")
        return
    order = [*PROBLEMS, *LINTS, EMPTY_ANSWER, SHORT_ANSWER, *NOTES]
    for fault in sorted(profile.faults, key=order.index):
        level = PROBLEM if fault in PROBLEMS and refused else NOTE if fault in NOTES else FINDING
        total = min(profile.rows, TEMPLATE_ROWS) if fault == TEMPLATE else profile.rows
        yield Finding(level, _fault_text(profile.split, fault, profile.faults[fault], total))
    yield from _overlong_findings(profile)
    yield from _repeat_findings(profile, repeats(profile.sketch))


def _overlong_findings(profile: Profile) -> Iterator[Finding]:
    if not profile.overlong:
        return
    told = f"{profile.split}: {_of(profile.overlong, profile.rows)} longer than {profile.limits.reason}"
    if profile.limits.overlong == "error":
        yield Finding(PROBLEM, f"{told}; {profile.limits.remedy}")
        return
    lost = profile.tokens - profile.kept_tokens
    unlearned = profile.supervised - profile.kept_supervised
    yield Finding(
        FINDING,
        f"{told}: --overlong {profile.limits.overlong} leaves out {lost:,} tokens ({_share(lost, profile.tokens)}), "
        f"{unlearned:,} of them supervised ({_share(unlearned, profile.supervised)})",
    )


def _repeat_findings(profile: Profile, repeated: Repeats) -> Iterator[Finding]:
    if repeated.rows:
        yield Finding(
            FINDING, f"{profile.split}: {_of(repeated.rows, profile.rows)} repeat another row, question and answer"
        )
    more = repeated.normalised_questions - repeated.rows
    if more > 0:
        yield Finding(
            NOTE,
            f"{profile.split}: {_of(more, profile.rows)} repeat a question but for case, blanks and punctuation, "
            f"{repeated.other_answers:,} of the very same wording with another answer",
        )


def _overlap_findings(pair: Overlap) -> Iterator[Finding]:
    title = f"{pair.split} and {pair.reference}"
    if pair.identical and pair.rows:
        yield Finding(FINDING, f"{title} hold the very same rows: a copy, or a preprocessor that ignores the split")
        return
    if pair.same_numbers:
        level = FINDING if pair.same_numbers > NOTED_NUMBERS * pair.rows else NOTE
        counted = f"{_of(pair.same_numbers, pair.rows)} of {pair.split} stand in {pair.reference}"
        yield Finding(level, f"{title}: by the same numbers in the question and the same answer, {counted}")
    told = []
    if pair.normalised_questions:
        told.append(
            f"{_of(pair.normalised_questions, pair.rows)} of {pair.split} ask what {pair.reference} asks "
            f"({pair.same_questions:,} token by token, {pair.same_rows:,} with the same answer)"
        )
    if pair.near > pair.normalised_questions:
        estimated = f" (estimated from one in {pair.one_in})" if pair.one_in > 1 else ""
        told.append(f"{_of(pair.near, pair.rows)} share half or more of their runs of 13 words{estimated}")
    if told:
        yield Finding(FINDING, f"{title}: {'; '.join(told)}")


def _quick_lints(name: str, samples: Sequence[Sample], marks: Marks) -> list[str]:
    faults: dict[str, list[int]] = {}
    for chunk in chunked(samples):
        for lint, flags in lint_flags(chunk, marks).items():
            faults.setdefault(lint, []).extend(chunk[place].row for place in np.flatnonzero(flags).tolist())
    return [_fault_text(name, lint, rows, len(samples)) for lint, rows in faults.items() if rows]


def _shared_text(first: Digests, second: Digests) -> str:
    asked = int(among(second.questions, np.sort(first.questions)).sum())
    if not asked:
        return ""
    same = int(among(second.rows, np.sort(first.rows)).sum())
    told = f"{_of(asked, len(second.rows))} ask what {first.name} asks, {same:,} of them with the same answer"
    return f"{second.name}: {told}"


def _padding_text(name: str, loader: Loader) -> list[str]:
    if loader.collator is not None:
        return []
    share = padding_share(loader)
    if share <= NOTED_PADDING:
        return []
    way = "a longer --context_length" if loader.strategy == "packing" else "--batching_strategy packing"
    return [f"{name}: {share:.0%} of the tokens computed are padding; {way} would have less"]


def _fault_text(split: str, fault: str, rows: Sequence[int], total: int) -> str:
    meaning = f" ({LINTS[fault]})" if fault in LINTS else ""
    return f"{split}: {_of(len(rows), total)}: {fault}{meaning}: {named(rows)}"


def _of(part: int, whole: int) -> str:
    """Returns `311 of 500 rows (62.2 %)`."""
    return f"{part:,} of {whole:,} rows ({_share(part, whole)})"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0.0 %"
