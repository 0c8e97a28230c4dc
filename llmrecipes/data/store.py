"""The samples of a split laid end to end, five bytes a token, in memory or in files that are mapped."""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from llmrecipes.batch import IdArray, Sample
from llmrecipes.prompts import IGNORED_LABEL

Places = npt.NDArray[np.int64]

KINDS: Mapping[str, Any] = {"ids": np.int32, "supervised": np.bool_, "starts": np.int64, "ends": np.int64,
                            "rows": np.int64}  # fmt: skip
"""The arrays of a store and their types."""

FLUSH_TOKENS = 1 << 20
"""Tokens gathered before they are written."""

COUNTED_SAMPLES = 1 << 13
"""Samples whose tokens are counted together."""


@dataclass(frozen=True)
class SampleStore(Sequence[Sample]):
    """Samples, read-only. A sample is a stretch of `ids`; several may share one, or none may cover a part of it."""

    ids: IdArray
    """[tokens]"""
    supervised: npt.NDArray[np.bool_]
    """[tokens]"""
    starts: Places
    """[samples]"""
    ends: Places
    """[samples]"""
    rows: Places
    """[samples]; `Sample.row`"""

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        at = slice(int(self.starts[index]), int(self.ends[index]))
        ids = np.asarray(self.ids[at])
        return Sample(ids, np.where(self.supervised[at], ids, np.int32(IGNORED_LABEL)), int(self.rows[index]))

    def __iter__(self) -> Iterator[Sample]:
        for index in range(len(self)):
            yield self[index]

    @property
    def lengths(self) -> Places:
        """Tokens of each sample, [samples]."""
        return self.ends - self.starts

    @property
    def supervised_counts(self) -> Places:
        """`Sample.supervised_tokens` of each, [samples]: the first token of a sample is nobody's to predict."""
        return self.counts(lambda at: self.supervised[at], np.minimum(self.starts + 1, self.ends))

    def outside(self, size: int) -> Places:
        """Returns how many ids of each sample are not in 0 to `size` - 1, [samples]."""
        return self.counts(lambda at: (self.ids[at] < 0) | (self.ids[at] >= size), self.starts)

    def counts(self, flags: Callable[[slice], npt.NDArray[np.bool_]], starts: Places) -> Places:
        """Returns how many tokens from `starts`, [samples], to each sample's end `flags` is true of.

        Some samples at a time: tokens of a million samples would need gigabytes.
        """
        counted = np.zeros(len(self), dtype=np.int64)
        for first in range(0, len(self), COUNTED_SAMPLES):
            chosen = slice(first, first + COUNTED_SAMPLES)
            start, end = int(starts[chosen].min()), int(self.ends[chosen].max())
            before = np.zeros(end - start + 1, dtype=np.int64)
            np.cumsum(flags(slice(start, end)), out=before[1:])
            counted[chosen] = before[self.ends[chosen] - start] - before[starts[chosen] - start]
        return counted

    def chosen(self, kept: npt.NDArray[np.bool_]) -> "SampleStore":
        """Returns the samples for which `kept`, [samples], is true."""
        return replace(self, starts=self.starts[kept], ends=self.ends[kept], rows=self.rows[kept])

    def recut(self, starts: Places, ends: Places, rows: Places) -> "SampleStore":
        """Returns samples of other stretches of the same tokens."""
        return replace(self, starts=starts, ends=ends, rows=rows)


@dataclass
class StoreBuilder:
    """Gathers samples into a store: into files of `folder`, or without one, or once it is full, into memory."""

    folder: Path | None = None
    failure: OSError | None = None
    """why `folder` is no longer written to"""
    _parts: dict[str, list[npt.NDArray[Any]]] = field(default_factory=lambda: {"ids": [], "supervised": []})
    _waiting: list[Sample] = field(default_factory=list)
    _waiting_tokens: int = 0
    _tokens: int = 0
    _ends: "array[int]" = field(default_factory=lambda: array("q"))
    _rows: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, sample: Sample) -> None:
        """Takes one sample."""
        self._waiting.append(sample)
        self._waiting_tokens += len(sample.input_ids)
        self._tokens += len(sample.input_ids)
        self._ends.append(self._tokens)
        self._rows.append(sample.row)
        if self._waiting_tokens >= FLUSH_TOKENS:
            self._flush()

    def finish(self) -> SampleStore:
        """Returns the store of all that was added."""
        self._flush()
        ends = np.array(self._ends, dtype=np.int64)
        starts = np.concatenate([np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1]])
        small = {"starts": starts, "ends": ends, "rows": np.array(self._rows, dtype=np.int64)}
        if self.folder is not None:
            try:
                for name, values in small.items():
                    _append(self.folder, name, values)
                return mapped_store(self.folder)
            except OSError as error:
                self._go_on_in_memory(self.folder, self._tokens, error)
        large = {name: np.concatenate([np.zeros(0, KINDS[name]), *parts]) for name, parts in self._parts.items()}
        return SampleStore(**{name: values.astype(KINDS[name], copy=False) for name, values in (large | small).items()})

    def _flush(self) -> None:
        ids = np.concatenate([np.zeros(0, np.int32), *(sample.input_ids for sample in self._waiting)])
        labels = np.concatenate([np.zeros(0, np.int32), *(sample.labels for sample in self._waiting)])
        arrays = {"ids": ids, "supervised": labels != IGNORED_LABEL}
        if self.folder is not None:
            try:
                for name, values in arrays.items():
                    _append(self.folder, name, values)
            except OSError as error:
                self._go_on_in_memory(self.folder, self._tokens - self._waiting_tokens, error)
        if self.folder is None:
            for name, values in arrays.items():
                self._parts[name].append(values)
        self._waiting, self._waiting_tokens = [], 0

    def _go_on_in_memory(self, folder: Path, written_tokens: int, failure: OSError) -> None:
        """Takes back what was written in full, before the folder could take no more."""
        self.folder, self.failure = None, failure
        for name, parts in self._parts.items():
            path = folder / f"{name}.bin"
            if path.exists():
                parts.append(np.fromfile(path, KINDS[name], written_tokens))


def _append(folder: Path, name: str, values: npt.NDArray[Any]) -> None:
    with (folder / f"{name}.bin").open("ab") as file:
        file.write(values.data)  # `tofile` does not say why it fails


def store_of(samples: Sequence[Sample]) -> SampleStore:
    """Returns samples as a store in memory."""
    builder = StoreBuilder()
    for sample in samples:
        builder.add(sample)
    return builder.finish()


def mapped_store(folder: Path) -> SampleStore:
    """Returns the store whose files lie in `folder`; raises `OSError` or `ValueError` where one is not as it was."""
    arrays = {}
    for name, kind in KINDS.items():
        path = folder / f"{name}.bin"
        empty = path.stat().st_size == 0  # nothing can be mapped there
        arrays[name] = np.zeros(0, kind) if empty else np.memmap(path, dtype=kind, mode="r")
    return SampleStore(**arrays)
