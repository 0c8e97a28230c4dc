"""What is planned is what the loader makes."""

from dataclasses import replace
from typing import Any

import pytest

from llmrecipes.data.loaders import Loader
from llmrecipes.data.plans import BatchSettings, batch_plans, padding_share

SETTINGS = BatchSettings("packing", 64, 4, 2, 7)


@pytest.mark.parametrize("strategy", ["packing", "padding"])
@pytest.mark.parametrize("by_length", [False, True])
def test_a_plan_counts_what_the_loader_makes(strategy: str, by_length: bool, random_samples: Any) -> None:
    samples = random_samples(101)
    lengths = [len(sample.input_ids) for sample in samples]
    settings = replace(SETTINGS, strategy=strategy, group_by_length=by_length)
    by_length = by_length and strategy == "padding"
    real = Loader(samples, strategy, 64, batch_rows=4, window_batches=2, seed=7, group_by_length=by_length)
    plan = batch_plans(lengths, settings)[0]
    batches = [batch for window in real.windows(0) for batch in window]
    computed = sum(batch.input_ids.numel() for batch in batches)
    assert plan.rows == sum(len(batch.input_ids) for batch in batches)
    assert plan.fill == pytest.approx(sum(lengths) / (plan.rows * 64))
    assert plan.steps == len(list(real.windows(0)))
    assert plan.useful_share == pytest.approx(sum(lengths) / computed)
    assert padding_share(real) == pytest.approx(1 - sum(lengths) / computed)
    assert plan.name == strategy + (" by length" if by_length else "")


def test_the_other_ways_to_fill_batches_are_planned_once_each() -> None:
    names = [plan.name for plan in batch_plans([5, 6, 7], SETTINGS)]
    assert names == ["packing", "padding", "padding by length"]
    assert batch_plans([], SETTINGS) == []


def test_padding_is_that_of_a_rank_however_few_rows_it_has(random_samples: Any) -> None:
    samples = random_samples(3)
    parts = [Loader(samples, "padding", 64, batch_rows=1, rank=rank, ranks=4) for rank in range(4)]
    assert [padding_share(part) for part in parts] == [0, 0, 0, 0]
    parts = [Loader(samples, "padding", 64, batch_rows=2, rank=rank, ranks=2) for rank in range(2)]
    for part in parts:
        batches = [batch for window in part.windows(0) for batch in window]
        useful = sum(batch.useful_tokens for batch in batches)
        assert padding_share(part) == pytest.approx(1 - useful / sum(batch.input_ids.numel() for batch in batches))
