"""Which samples share a row, a batch and a window: a pure function of (lengths, settings, seed, epoch).

Every sample stands in exactly one row of an epoch; nothing is dropped, and the order changes every epoch.
"""

import bisect
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

PACKING_WINDOW = 1024
"""Samples packed together: few enough to keep the order random, enough to fill rows (99.6 % of 4,096 on SAMSum)."""

SAMPLES_OF_A_ROW = 4
"""A sample that fits into a row this many times is short."""

LENGTH_GROUP = 64
"""Batches sorted by length together with `group_by_length`."""

Item = TypeVar("Item")

Row = list[int]
"""Indices of the samples in one row."""


def sample_order(samples: int, seed: int | None, epoch: int) -> list[int]:
    """Returns a permutation of range(samples) that depends on (seed, epoch) alone; seed None: as they come."""
    if seed is None:
        return list(range(samples))
    order: list[int] = _generator(seed, epoch).permutation(samples).tolist()
    return order


def packed_rows(
    lengths: Sequence[int], order: Sequence[int], row_tokens: int, seed: int | None, epoch: int
) -> list[Row]:
    """Returns rows of at most `row_tokens`, filled best-fit-decreasing within windows of the given order.

    A window's last row, the emptiest as a rule, is emptied again and its samples go to the next window.
    """
    generator = _generator(seed or 0, epoch, stream=1)
    rows: list[Row] = []
    left_over: Row = []
    for start in range(0, len(order), PACKING_WINDOW):
        end = start + PACKING_WINDOW
        filled = _best_fit(lengths, [*left_over, *order[start:end]], row_tokens)
        left_over = filled.pop() if end < len(order) else []
        rows += filled if seed is None else [filled[index] for index in generator.permutation(len(filled))]
    return rows


def length_grouped(lengths: Sequence[int], order: Sequence[int], batch_rows: int, seed: int, epoch: int) -> list[int]:
    """Returns the order with neighbours of like length: sorted within groups, the batches of each group shuffled."""
    generator = _generator(seed, epoch, stream=1)
    grouped: list[int] = []
    size = batch_rows * LENGTH_GROUP
    for start in range(0, len(order), size):
        group = sorted(order[start : start + size], key=lambda index: lengths[index])
        batches = chunks(group, batch_rows)
        tail = batches.pop() if len(batches[-1]) < batch_rows else []
        for index in generator.permutation(len(batches)):
            grouped += batches[index]
        grouped += tail
    return grouped


def rank_shares(rows: Sequence[Row], tokens: Sequence[int], ranks: int) -> list[list[Row]]:
    """Returns the rows of each rank, in their order: the longest are dealt first, to and fro, so that the ranks have
    about the same tokens and, but for one, the same number of rows."""
    longest_first = sorted(range(len(rows)), key=lambda row: -tokens[row])
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for turn, row in enumerate(longest_first):
        lap, place = divmod(turn, ranks)
        shares[place if lap % 2 == 0 else ranks - 1 - place].append(row)
    return [[rows[row] for row in sorted(share)] for share in shares]


def chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Returns the items in lists of `size`, the last one shorter where they do not divide."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _best_fit(lengths: Sequence[int], indices: Sequence[int], row_tokens: int) -> list[Row]:
    """Best-fit decreasing: each sample, longest first, goes to the fullest row that still holds it.

    Short ones fill gaps in any order, so theirs is kept: sorted as well, they would share rows with their like only,
    and samples of one length are often of one kind, which a step would then learn alone.
    """
    short = row_tokens // SAMPLES_OF_A_ROW
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(indices, key=lambda item: -max(lengths[item], short)):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            rows.append([])
            left, row = row_tokens, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(index)
        bisect.insort(room, (left - lengths[index], row))
    return rows


def _generator(seed: int, epoch: int, stream: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, stream])
