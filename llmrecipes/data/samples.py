"""A split's samples: read once, kept for the next run, checked, and cut or left out as the user chose.

samples, notices = load_samples(preprocessor, dataset_config, tokenizer, "train", limits)
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np

from llmrecipes.batch import Sample
from llmrecipes.data.cache import (
    Entry,
    entry_folder,
    entry_name,
    heard,
    keep,
    kept_entry,
    new_folder,
    random_states,
    unkept_reason,
)
from llmrecipes.data.inputs import watched
from llmrecipes.data.limits import Overlong, SampleLimits
from llmrecipes.data.made_rows import RowError, named, samples_of
from llmrecipes.data.rows import KEPT_FAULTS, BadRows, allowed_bad_rows, faults_text, noted_in
from llmrecipes.data.store import SampleStore, StoreBuilder
from llmrecipes.errors import ConfigError, DataError, PluginError
from llmrecipes.plugins import Plugin
from llmrecipes.prompts import IGNORED_LABEL

Progress = Callable[[int, int], None]
"""Told (rows read, about how many there are; 0: unknown)."""

TOLD_EVERY = 100
"""Rows between two words on progress."""


@dataclass(frozen=True)
class Reading:
    """How a split is read. `cache`: where tokenized splits are kept, None: nowhere; `seed`: the run's."""

    cache: Path | None = None
    seed: int = 0
    progress: Progress | None = None
    asked_for: bool = True
    """whether the user named the cache: one that cannot be written to is then an error, and else a notice"""


@dataclass
class Faults:
    """Rows of a split that cannot be used, by what is wrong with them."""

    rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, fault: str, row: int) -> None:
        """Notes one row."""
        self.rows.setdefault(fault, []).append(row)

    @property
    def count(self) -> int:
        """Rows noted."""
        return sum(map(len, self.rows.values()))

    @property
    def text(self) -> str:
        """The first rows of every fault."""
        return faults_text(self.rows, named)


def load_samples(
    preprocessor: Plugin,
    dataset_config: Any,
    tokenizer: Any,
    split: str,
    limits: SampleLimits,
    reading: Reading | None = None,
) -> tuple[SampleStore, list[str]]:
    """Returns a split's samples and notices on rows cut, dropped or left out; rows are counted from 0.

    Raises `DataError` naming rows without supervision, longer than the context or with impossible ids, where there are
    more of them than the data set's `skip_bad_rows`, and `PluginError` where the preprocessor returns something else
    than rows of ids and labels.
    """
    place = f"{preprocessor.path.name}:{preprocessor.name}, split {split}"
    allowed = allowed_bad_rows(dataset_config)
    entry = _entry(preprocessor, dataset_config, tokenizer, split, reading or Reading())
    faults, overlong = Faults({fault: list(rows) for fault, rows in entry.faults.items()}), Overlong(limits)
    samples = _within_limits(entry.store, limits, faults, overlong)
    wrong = [told for told in (faults.text, faults_text(entry.bad_rows)) if told]
    count = faults.count + sum(map(len, entry.bad_rows.values()))
    refused = count > allowed
    if overlong.tokens and limits.overlong == "error":
        wrong, refused = [*wrong, f"{named(list(overlong.tokens))}: {overlong.fault}"], True
    if refused:
        more = f"; {count} bad rows, and skip_bad_rows allows {allowed}" if count > allowed > 0 else ""
        raise DataError(f"{place}: {'; '.join(wrong)}{more}")
    notices = [*entry.notices]
    notices += [f"{place}: left out {count} bad rows: {'; '.join(wrong)}"] if wrong else []
    notices += [f"{place}: {overlong.notice}"] if overlong.tokens else []
    if not len(samples):
        raise DataError("; ".join([f"{place}: no samples in it", *notices]))
    return samples, notices


def _within_limits(store: SampleStore, limits: SampleLimits, faults: Faults, overlong: Overlong) -> SampleStore:
    """Returns the samples that the limits leave, long ones cut; what is wrong with the others goes to the notes."""
    inside = store.outside(limits.vocabulary_size) == 0
    if not inside.all():
        for row in store.rows[~inside].tolist():
            faults.add(
                f"an id outside the model's vocabulary of {limits.vocabulary_size}; is the tokenizer another model's, "
                "or was a token added to it?",
                row,
            )
        store = store.chosen(inside)
    if not (store.lengths > limits.longest).any():
        return store
    starts, ends, rows = [], [], []
    for index, length in enumerate(store.lengths.tolist()):
        start = int(store.starts[index])
        stretches = [slice(0, length)] if length <= limits.longest else overlong.stretches(store[index])
        starts += [start + at.start for at in stretches]
        ends += [start + at.stop for at in stretches]
        rows += [int(store.rows[index])] * len(stretches)
    return store.recut(*(np.array(places, dtype=np.int64) for places in (starts, ends, rows)))


# --- reading ----------------------------------------------------------------------------------------------------------


def _entry(preprocessor: Plugin, dataset_config: Any, tokenizer: Any, split: str, reading: Reading) -> Entry:
    """Returns the split as the preprocessor makes it, from the cache where all that it was made of is the same."""
    arguments = (dataset_config, tokenizer, split)
    if reading.cache is None:
        return _read(preprocessor, arguments, StoreBuilder(), reading)
    why = unkept_reason(preprocessor, tokenizer)
    if why:
        return _unkept(preprocessor, _read(preprocessor, arguments, StoreBuilder(), reading), why)
    folder = entry_folder(reading.cache, entry_name(preprocessor, *arguments))
    kept = kept_entry(folder, reading.seed)
    if kept is not None:
        return kept
    try:
        temporary = new_folder(reading.cache)
    except OSError as error:
        why = f"{reading.cache} cannot be written to ({error.strerror or error})"
        if reading.asked_for:
            raise ConfigError(f"--data_cache {why}; --data_cache off keeps nothing") from None
        return _unkept(preprocessor, _read(preprocessor, arguments, StoreBuilder(), reading), why)
    try:
        entry, why = _read_and_keep(preprocessor, arguments, reading, temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _unkept(preprocessor, entry, why) if why else entry


def _unkept(preprocessor: Plugin, entry: Entry, why: str) -> Entry:
    """Returns the entry with a word on why the next run will read anew."""
    told = f"{preprocessor.path.name}:{preprocessor.name}: its samples are made anew in each run: {why}"
    return replace(entry, notices=(*entry.notices, told))


def _read_and_keep(
    preprocessor: Plugin, arguments: tuple[Any, Any, str], reading: Reading, temporary: Path, folder: Path
) -> tuple[Entry, str]:
    """Returns the split as the preprocessor makes it, and why it could not be kept in `folder`, or ""."""
    builder = StoreBuilder(temporary)
    states = random_states()
    with watched() as inputs:
        entry = _read(preprocessor, arguments, builder, reading)
    if entry.bad_count > allowed_bad_rows(arguments[0]):
        return entry, ""  # it will be refused
    if builder.failure is not None:
        return entry, f"{reading.cache} cannot be written to ({builder.failure.strerror or builder.failure})"
    if entry_name(preprocessor, *arguments) != folder.name:
        return entry, "it changes its tokenizer or settings"
    why = unkept_reason(preprocessor, arguments[1])
    if not why:
        why = keep(temporary, folder, inputs, reading.seed if random_states() != states else None, entry)
    return entry, why


def _read(preprocessor: Plugin, arguments: tuple[Any, Any, str], builder: StoreBuilder, reading: Reading) -> Entry:
    """Returns what one call of the preprocessor gives; what no limit would mend is noted as a fault of its row."""
    dataset_config, _, split = arguments
    place = f"{preprocessor.path.name}:{preprocessor.name}, split {split}"
    faults = Faults()
    with noted_in(BadRows(allowed_bad_rows(dataset_config))) as bad, heard() as notices:
        made = preprocessor(*arguments)
        total = _about(made) if reading.progress else 0
        for number, found in enumerate(preprocessor.each(samples_of(made, place))):
            if reading.progress and number % TOLD_EVERY == 0:
                reading.progress(number, total)
            if isinstance(found, RowError) and not bad.allowed:
                raise PluginError(f"{place}, row {number}: {found}")
            fault = str(found) if isinstance(found, RowError) else _fault(found)
            if fault:
                faults.add(fault, number)
            elif isinstance(found, Sample):
                builder.add(found)
            if fault and bad.count + faults.count > bad.allowed + KEPT_FAULTS:
                told = "; ".join(filter(None, (faults.text, faults_text(bad.faults))))
                raise DataError(f"{place}: {told}; skip_bad_rows allows {bad.allowed}, so no more rows were read")
    return Entry(builder.finish(), tuple(notices), faults.rows, bad.faults)


def _about(made: Any) -> int:
    try:
        return length_hint(made, 0)
    except Exception:  # somebody's own class
        return 0


def _fault(sample: Sample) -> str | None:
    """Returns why no model could learn from a sample, or None."""
    if len(sample.input_ids) == 0:
        return "no tokens"
    supervised = sample.labels != IGNORED_LABEL
    if (sample.labels[supervised] != sample.input_ids[supervised]).any():
        return "labels must equal input_ids or be -100 (the shift is the trainer's)"
    return None if supervised[1:].any() else "no supervised token (all labels behind the first are -100)"
