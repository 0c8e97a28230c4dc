"""Laws of the order and the rows of an epoch: every sample once, no row too long, the same again for (seed, epoch)."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrecipes.data import packing
from llmrecipes.data.packing import PACKING_WINDOW, chunks, length_grouped, packed_rows, rank_shares, sample_order

SAMSUM = Path(__file__).parents[3] / "shared" / "data" / "samsum" / "train.json"

ROW_TOKENS = 64
LENGTHS = st.lists(st.integers(1, ROW_TOKENS), min_size=1, max_size=200)
SEEDS = st.integers(0, 2**32)
EPOCHS = st.integers(0, 1000)


def many_lengths(count: int) -> list[int]:
    return np.random.default_rng(0).integers(1, ROW_TOKENS + 1, count).tolist()


def shaken() -> None:
    """Moves every global random generator on."""
    random.random()
    np.random.random()


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets many packing windows follow each other in a test of few samples."""
    monkeypatch.setattr(packing, "PACKING_WINDOW", 16)


# --- the order --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), SEEDS, EPOCHS)
def test_an_order_is_a_permutation_that_seed_and_epoch_alone_decide(samples: int, seed: int, epoch: int) -> None:
    order = sample_order(samples, seed, epoch)
    shaken()
    assert sorted(order) == list(range(samples))
    assert sample_order(samples, seed, epoch) == order


def test_every_seed_and_epoch_has_an_order_of_its_own() -> None:
    orders = {tuple(sample_order(50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_without_a_seed_samples_come_as_they_are() -> None:
    assert sample_order(5, None, 3) == [0, 1, 2, 3, 4]


# --- packing ----------------------------------------------------------------------------------------------------------


@given(LENGTHS, st.one_of(st.none(), SEEDS), EPOCHS)
@settings(deadline=None)
def test_a_packed_epoch_holds_every_sample_once_and_no_row_is_too_long(
    lengths: list[int], seed: int | None, epoch: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PACKING_WINDOW", 16)
        order = sample_order(len(lengths), seed, epoch)
        rows = packed_rows(lengths, order, ROW_TOKENS, seed, epoch)
        shaken()
        assert packed_rows(lengths, order, ROW_TOKENS, seed, epoch) == rows
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= ROW_TOKENS for row in rows)


@given(LENGTHS)
def test_within_a_window_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    rows = packed_rows(lengths, range(len(lengths)), ROW_TOKENS, None, 0)
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > ROW_TOKENS


def test_a_sample_goes_to_the_fullest_row_that_holds_it() -> None:
    rows = packed_rows([6, 5, 4, 3, 2], range(5), 10, None, 0)
    assert sorted(sorted(row) for row in rows) == [[0, 2], [1, 3, 4]]


def test_the_longest_samples_are_placed_first() -> None:
    assert len(packed_rows([3, 3, 7, 7], range(4), 10, None, 0)) == 2


@pytest.mark.usefixtures("small_windows")
def test_rows_change_with_epoch_and_seed() -> None:
    lengths = many_lengths(200)

    def rows(seed: int, epoch: int) -> frozenset[frozenset[int]]:
        order = sample_order(200, seed, epoch)
        return frozenset(frozenset(row) for row in packed_rows(lengths, order, ROW_TOKENS, seed, epoch) if len(row) > 1)

    first = rows(0, 0)
    for other in (rows(0, 1), rows(1, 0), rows(1, 1)):
        assert len(first & other) < len(first) / 4


@pytest.mark.parametrize(("row_tokens", "fullness"), [(256, 0.95), (350, 0.96), (700, 0.97), (1400, 0.98)])
def test_short_samples_of_all_lengths_share_a_row(row_tokens: int, fullness: float) -> None:
    lengths = np.random.default_rng(0).integers(25, 50, 5000).tolist()
    rows = packed_rows(lengths, sample_order(5000, 0, 0), row_tokens, 0, 0)
    spread = np.mean([np.std([lengths[index] for index in row]) for row in rows]) / np.std(lengths)
    assert spread > 0.85  # 0.1 to 0.2 where they are sorted by length
    assert sum(lengths) / (row_tokens * len(rows)) > fullness


def test_rows_are_not_ordered_by_length() -> None:
    lengths = many_lengths(200)
    rows = packed_rows(lengths, sample_order(200, 0, 0), ROW_TOKENS, 0, 0)
    longest = [max(lengths[index] for index in row) for row in rows]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3


@pytest.mark.usefixtures("small_windows")
def test_rows_keep_near_the_place_of_their_samples_in_the_order() -> None:
    order = sample_order(200, 0, 0)
    rows = packed_rows(many_lengths(200), order, ROW_TOKENS, 0, 0)
    spread = [max(map(order.index, row)) - min(map(order.index, row)) for row in rows]
    assert np.median(spread) < 2 * packing.PACKING_WINDOW


def test_samsum_fills_rows_of_4096_to_99_5_percent_in_a_moment() -> None:
    if not SAMSUM.is_file():
        pytest.skip(f"no SAMSum corpus at {SAMSUM}")
    corpus = [json.loads(line) for line in SAMSUM.read_text(encoding="utf-8").splitlines()]
    # A token has about four characters; the real tokenizer's lengths, which take seconds, fill the rows as well.
    lengths = [12 + (len(row["dialogue"]) + len(row["summary"])) // 4 for row in corpus]
    assert len(lengths) > 10 * PACKING_WINDOW
    for epoch in range(3):
        rows = packed_rows(lengths, sample_order(len(lengths), 42, epoch), 4096, 42, epoch)
        assert sum(lengths) / (4096 * len(rows)) >= 0.995


# --- batches of like length -------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 5), SEEDS, EPOCHS)
def test_grouping_keeps_every_sample_and_depends_on_seed_and_epoch_alone(
    lengths: list[int], batch_rows: int, seed: int, epoch: int
) -> None:
    order = sample_order(len(lengths), seed, epoch)
    grouped = length_grouped(lengths, order, batch_rows, seed, epoch)
    shaken()
    assert length_grouped(lengths, order, batch_rows, seed, epoch) == grouped
    assert sorted(grouped) == list(range(len(lengths)))


def padding(lengths: list[int], order: list[int], batch_rows: int) -> int:
    batches = [[lengths[index] for index in batch] for batch in chunks(order, batch_rows)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches)


@pytest.mark.parametrize("count", [256, 259, 1000])
def test_grouping_leaves_a_tenth_of_the_padding(count: int) -> None:
    lengths = many_lengths(count)
    order = sample_order(count, 0, 0)
    grouped = length_grouped(lengths, order, 4, 0, 0)
    assert padding(lengths, grouped, 4) < padding(lengths, order, 4) / 10


def test_a_batch_holds_neighbours_in_length_and_the_last_is_the_short_one() -> None:
    lengths = many_lengths(250)
    batches = chunks(length_grouped(lengths, range(250), 4, 0, 0), 4)
    by_length = chunks(sorted(range(250), key=lambda index: lengths[index]), 4)
    assert set(map(frozenset, batches)) == set(map(frozenset, by_length))
    assert [len(batch) for batch in batches] == [4] * 62 + [2]


def test_groups_are_shuffled_and_change_with_the_epoch() -> None:
    lengths = many_lengths(256)
    grouped = [length_grouped(lengths, sample_order(256, 0, epoch), 4, 0, epoch) for epoch in range(2)]
    longest = [max(lengths[index] for index in batch) for batch in chunks(grouped[0], 4)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert grouped[0] != grouped[1]


# --- several ranks ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, ROW_TOKENS), max_size=60), st.integers(1, 8))
def test_ranks_share_a_window_without_gap_or_overlap_and_about_evenly(tokens: list[int], ranks: int) -> None:
    rows = [[number] for number in range(len(tokens))]
    shares = rank_shares(rows, tokens, ranks)
    assert sorted(row for share in shares for row in share) == rows
    assert all(share == sorted(share) for share in shares)  # in the order of the window
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    sums = [sum(tokens[row[0]] for row in share) for share in shares]
    assert max(sums) - min(sums) <= max(tokens, default=0)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 9), st.randoms())
def test_rows_of_evenly_spread_lengths_are_shared_to_the_token(
    ranks: int, laps: int, step: int, generator: random.Random
) -> None:
    tokens = [step * number for number in range(1, 2 * laps * ranks + 1)]
    generator.shuffle(tokens)
    shares = rank_shares([[number] for number in range(len(tokens))], tokens, ranks)
    assert len({sum(tokens[row[0]] for row in share) for share in shares}) == 1


# --- chunks -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers()), st.integers(1, 7))
def test_chunks_are_full_but_the_last_and_lose_nothing(items: list[int], size: int) -> None:
    parts = chunks(items, size)
    assert [item for part in parts for item in part] == items
    assert all(len(part) == size for part in parts[:-1])
    assert all(0 < len(part) <= size for part in parts)
