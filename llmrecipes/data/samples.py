"""A preprocessor's rows to checked samples: everything wrong with the data is said here, before a weight is read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmrecipes.batch import IdArray, Sample
from llmrecipes.errors import DataError, PluginError
from llmrecipes.plugins import Plugin
from llmrecipes.prompts import IGNORED_LABEL

NAMED_ROWS = 5
"""Rows named in a message; the others are counted."""

ID_RANGE = np.iinfo(np.int32)


@dataclass(frozen=True)
class SampleLimits:
    """What a sample must keep to."""

    context_length: int
    max_positions: int
    """the model's own limit"""
    vocabulary_size: int
    overlong: str = "error"
    """error, truncate, drop or split"""

    @property
    def longest(self) -> int:
        """Tokens that a sample may have."""
        return min(self.context_length, self.max_positions)

    @property
    def reason(self) -> str:
        """What sets the limit, for messages."""
        own = f"the model's {self.max_positions} positions"
        return own if self.max_positions < self.context_length else f"--context_length {self.context_length}"


@dataclass
class Faults:
    """Rows of a split that cannot be used, by what is wrong with them."""

    rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, fault: str, row: int) -> None:
        """Notes one row."""
        self.rows.setdefault(fault, []).append(row)

    def check(self, place: str) -> None:
        """Raises one `DataError` that names the first rows of every fault."""
        if self.rows:
            told = "; ".join(f"{named(rows)}: {fault}" for fault, rows in self.rows.items())
            raise DataError(f"{place}: {told}")


@dataclass
class Overlong:
    """Rows longer than the limits allow, their lengths, and those of which nothing was left."""

    limits: SampleLimits
    tokens: dict[int, int] = field(default_factory=dict)
    """row -> its length"""
    lost: list[int] = field(default_factory=list)

    def pieces(self, sample: Sample) -> list[Sample]:
        """Returns what is left of an overlong sample: its pieces that still hold a supervised token."""
        self.tokens[sample.row] = len(sample.input_ids)
        length = self.limits.longest
        ends = {"split": len(sample.input_ids), "truncate": length}.get(self.limits.overlong, 0)
        stretches = [slice(start, start + length) for start in range(0, ends, length)]
        cut = [replace(sample, input_ids=sample.input_ids[at], labels=sample.labels[at]) for at in stretches]
        kept = [piece for piece in cut if piece.supervised_tokens]
        if not kept:
            self.lost.append(sample.row)
        return kept

    @property
    def fault(self) -> str:
        """What is wrong with these rows, and what to do."""
        raised = "" if self.limits.max_positions < self.limits.context_length else "raise it, or "
        return (
            f"longer than {self.limits.reason} (longest {max(self.tokens.values())} tokens; {raised}say with "
            "--overlong what becomes of them)"
        )

    @property
    def notice(self) -> str:
        """What became of these rows."""
        verb = {"truncate": "cut", "drop": "dropped"}.get(self.limits.overlong, "split")
        longest = max(self.tokens.values())
        told = f"{verb} {named(list(self.tokens))}: longer than {self.limits.reason} (longest {longest} tokens)"
        if self.limits.overlong == "drop" or not self.lost:
            return told
        return f"{told}; left out {named(self.lost)}: no supervised token was left"


def named(rows: Sequence[int]) -> str:
    """Returns `row 3`, or `rows 1, 2, 3, 4, 5 and 7 more`."""
    first = ", ".join(str(row) for row in rows[:NAMED_ROWS])
    more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {first}{more}"


def load_samples(
    preprocessor: Plugin, dataset_config: Any, tokenizer: Any, split: str, limits: SampleLimits
) -> tuple[list[Sample], list[str]]:
    """Returns a split's samples and notices on rows cut or dropped; rows are counted from 0.

    Raises `DataError` naming rows without supervision, longer than the context or with impossible ids, and
    `PluginError` where the preprocessor returns something else than rows of ids and labels.
    """
    place = f"{preprocessor.path.name}:{preprocessor.name}, split {split}"
    rows = _rows(preprocessor(dataset_config, tokenizer, split), place)
    faults, overlong = Faults(), Overlong(limits)
    samples: list[Sample] = []
    for number, row in enumerate(preprocessor.each(rows)):
        sample = _sample(row, number, f"{place}, row {number}")
        fault = _fault(sample, limits)
        if fault:
            faults.add(fault, number)
        elif len(sample.input_ids) <= limits.longest:
            samples.append(sample)
        else:
            samples += overlong.pieces(sample)
    if overlong.tokens and limits.overlong == "error":
        faults.rows[overlong.fault] = list(overlong.tokens)
    faults.check(place)
    notices = [f"{place}: {overlong.notice}"] if overlong.tokens else []
    if not samples:
        raise DataError("; ".join([*notices, "no sample is left"]) if notices else f"{place}: no samples in it")
    return samples, notices


def _rows(made: Any, place: str) -> Iterable[Any]:
    """Returns what a preprocessor made as something to go through; a map-style torch data set has only an index."""
    if not isinstance(made, Mapping | str | bytes):
        if isinstance(made, Iterable):
            return made
        if hasattr(made, "__getitem__") and hasattr(made, "__len__"):
            return _indexed(made)
    keys = f" with {', '.join(map(str, list(made)[:NAMED_ROWS]))}" if isinstance(made, Mapping) else ""
    raise PluginError(
        f"{place}: expected a sequence of rows, each with input_ids and labels, but it returned {_kind(made)}{keys}"
    )


def _indexed(made: Any) -> Iterator[Any]:
    for index in range(len(made)):
        yield made[index]


def _sample(row: Any, number: int, where: str) -> Sample:
    if not (hasattr(row, "keys") and hasattr(row, "get")):  # a dict, a BatchEncoding, a pandas row
        raise PluginError(f"{where}: expected a mapping with input_ids and labels, got {_kind(row)}")
    missing = [key for key in ("input_ids", "labels") if key not in row]
    if missing:
        raise PluginError(f"{where}: no {' and no '.join(missing)}, only {', '.join(map(str, row.keys()))}")
    input_ids = _ids(row["input_ids"], "input_ids", where)
    labels = _ids(row["labels"], "labels", where)
    mask = row.get("attention_mask")
    attended = np.ones_like(input_ids) if mask is None else _ids(mask, "attention_mask", where)
    for name, values in (("labels", labels), ("attention_mask", attended)):
        if len(values) != len(input_ids):
            raise PluginError(f"{where}: {len(values)} {name} for {len(input_ids)} input_ids")
    kept = np.flatnonzero(attended)
    start, end = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, 0)
    if (attended[start:end] != 1).any():
        raise PluginError(f"{where}: attention_mask must be 1, and 0 for padding at the ends only")
    return Sample(input_ids[start:end], labels[start:end], number)


def _ids(values: Any, name: str, where: str) -> IdArray:
    """Returns a list, array or tensor of one sample as int32 [tokens]; `[1, tokens]`, a batch of one, is taken too."""
    try:
        array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    except (ValueError, TypeError, RuntimeError):
        raise PluginError(f"{where}: {name} is no flat list of whole numbers, but {_kind(values)}") from None
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    kinds = "iub" if name == "attention_mask" else "iu"
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise PluginError(f"{where}: {name} must be a flat list of whole numbers, got {_shape(values, array)}")
    if array.size and not ID_RANGE.min <= int(array.min()) <= int(array.max()) <= ID_RANGE.max:
        raise PluginError(f"{where}: {name} holds {_farthest(array)}, which no token has for its id")
    return array.astype(np.int32)


def _fault(sample: Sample, limits: SampleLimits) -> str | None:
    ids, labels = sample.input_ids, sample.labels
    if len(ids) == 0:
        return "no tokens"
    if ids.min() < 0 or ids.max() >= limits.vocabulary_size:
        return (
            f"an id outside the model's vocabulary of {limits.vocabulary_size}; is the tokenizer another model's, or "
            "was a token added to it?"
        )
    supervised = labels != IGNORED_LABEL
    if (labels[supervised] != ids[supervised]).any():
        return "labels must equal input_ids or be -100 (the shift is the trainer's)"
    return None if sample.supervised_tokens else "no supervised token (all labels behind the first are -100)"


def _shape(values: Any, array: npt.NDArray[Any]) -> str:
    return _kind(values) if array.ndim == 0 else f"{_kind(values)} of shape {list(array.shape)}, {array.dtype}"


def _farthest(array: npt.NDArray[Any]) -> int:
    return int(array.max()) if int(array.max()) > ID_RANGE.max else int(array.min())


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
