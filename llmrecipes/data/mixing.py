"""Several sources of one split, in given shares; and a part of a split held out for validation.

    data_path: train.jsonl                              one file, the train split
    data_path: data/chats                               a folder with one file a split
    data_path: hub:someone/some-chats                   a hub data set
    data_path: a.jsonl,b.jsonl                          every row of both, once
    data_path: a.jsonl=0.7,hub:someone/some-chats=0.3   of all samples drawn, seven in ten from a.jsonl

Nothing here depends on anything but its arguments: the same seed draws the same rows and holds out the same ones.
"""

import hashlib
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np

from llmrecipes.data.files import load_hub, load_split
from llmrecipes.data.inputs import note_place
from llmrecipes.data.rows import Row, Rows
from llmrecipes.errors import ConfigError, DataError

FLAG = "--chat_dataset.data_path"
HUB = "hub:"


@dataclass(frozen=True)
class Source:
    """One place that rows come from. `weight` None: all of its rows, each once."""

    path: str
    weight: float | None = None

    def rows(self, dataset_config: Any, split: str) -> Rows[Row]:
        """Returns the rows of a split, all columns; raises `DataError`."""
        if self.path.startswith(HUB):
            return load_hub(self.path.removeprefix(HUB), split, way_out=f"{FLAG} FOLDER")
        train_split = dataset_config.train_split
        if split == dataset_config.test_split and split != train_split and Path(self.path).expanduser().is_file():
            raise DataError(
                f"{self.path} is one file and holds {train_split!r} only: hold some of it out with "
                f"--chat_dataset.validation_rows 100, give {FLAG} a folder with one file per split, or "
                "--run_validation false"
            )
        return load_split(SimpleNamespace(dataset="chat_dataset", data_path=self.path, train_split=train_split), split)


def sources_of(data_path: str) -> list[Source]:
    """Returns the sources that a data path names; raises `ConfigError` where it cannot be read."""
    if not data_path:
        raise ConfigError(f"{FLAG} is required: a file, a folder with one file per split, or hub:NAME")
    if _is_there(data_path):
        return [Source(data_path)]
    sources = [_source(part.strip(), data_path) for part in data_path.split(",")]
    paths = [source.path for source in sources]
    weighted = [source.weight is not None for source in sources]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"{FLAG} {data_path}: a source is named twice; raise its weight instead")
    if any(weighted) and (len(sources) == 1 or not all(weighted)):
        fault = "a weight has no effect on one source" if len(sources) == 1 else "some sources have no weight"
        raise ConfigError(f"{FLAG} {data_path}: {fault}; write A=0.7,B=0.3, or A,B for every row of both")
    return sources


def _source(part: str, data_path: str) -> Source:
    path, equals, given = part.rpartition("=")
    if not equals or _is_there(part):
        path, given = part, ""
    if not path:
        raise ConfigError(f"{FLAG} {data_path}: a source without a name; write A,B or A=0.7,B=0.3")
    if not equals or not given:
        return Source(path)
    try:
        weight = float(given)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"{FLAG} {data_path}: the weight {given!r} of {path} is no number above 0")
    return Source(path, weight)


def _is_there(path: str) -> bool:
    note_place(Path(path).expanduser())
    return Path(path).expanduser().exists()


def draw_counts(sizes: Sequence[int], weights: Sequence[float], seed: int) -> list[list[int]]:
    """Returns how often each row of each source is drawn: as many in all as there are, divided by weight.

    A source of few rows gives all of them, and again, before any row comes a second time more than another.
    """
    total, whole = sum(sizes), math.fsum(weights)
    exact = [total * weight / whole for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_rest = sorted(range(len(sizes)), key=lambda place: shares[place] - exact[place])
    for place in by_rest[: total - sum(shares)]:
        shares[place] += 1
    if not all(shares):
        raise DataError(
            f"{FLAG}: source {shares.index(0) + 1} is too small or weighs too little: no row of it is drawn"
        )
    return [
        _counts(size, share, f"{seed}/{place}") for place, (size, share) in enumerate(zip(sizes, shares, strict=True))
    ]


def _counts(size: int, share: int, seed: str) -> list[int]:
    counts = [share // size] * size
    for place in Random(seed).sample(range(size), share % size):
        counts[place] += 1
    return counts


@dataclass(frozen=True)
class HoldOut:
    """Which rows are held out: one for each of as many questions as are wanted; no other row may ask them.

    A question is held out for its own hash with the seed: more rows in the file move few of them.
    """

    seed: int
    largest: int
    """hash up to which questions are held out"""
    first: frozenset[int]
    """the rows held out, counted through all sources"""
    twins: int
    """rows beside those that ask the same"""
    offsets: tuple[int, ...]
    """row that each source begins at"""

    @classmethod
    def of(cls, questions: Sequence[Iterable[str]], wanted: int, seed: int) -> "HoldOut":
        """Returns what is held out of the questions of each source; raises `DataError` where nothing else is left."""
        hashes, offsets = array("Q"), []
        for source in questions:
            offsets.append(len(hashes))
            hashes.extend(_hash(seed, question) for question in source)
        different, first, counts = np.unique(np.array(hashes), return_index=True, return_counts=True)
        if wanted >= len(different):
            raise DataError(
                f"--chat_dataset.validation_rows {wanted}: the {len(hashes)} conversations ask {len(different)} "
                "different things, so none would be left to train on; ask for fewer"
            )
        held = frozenset(first[:wanted].tolist())
        return cls(seed, int(different[wanted - 1]), held, int(counts[:wanted].sum()) - wanted, tuple(offsets))

    def has(self, question: str, source: int, number: int) -> bool:
        """Returns whether row `number` of a source is held out."""
        return self.asks(question) and self.offsets[source] + number in self.first

    def asks(self, question: str) -> bool:
        """Returns whether a row asks what a row held out asks, or is one."""
        return _hash(self.seed, question) <= self.largest


def _hash(seed: int, question: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\n{question}".encode()).digest()[:8])
