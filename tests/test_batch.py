"""Laws of a batch cut in half: together both are what it was."""

from collections.abc import Callable

import pytest
import torch

from llmrecipes.batch import Layout, Sample, document_groups, document_spans, halved, predictions
from llmrecipes.data.loaders import padded_batch

Samples = Callable[..., list[Sample]]


@pytest.mark.parametrize("layout", [document_groups, document_spans])
@pytest.mark.parametrize("rows", [[3, 1, 4], [2, 2], [1, 1, 1, 1]])
def test_halves_are_the_batch(rows: list[int], layout: Layout, random_samples: Samples) -> None:
    samples = iter(random_samples(sum(rows)))
    batch = padded_batch([[next(samples) for _ in range(row)] for row in rows], layout)
    halves = halved(batch)
    assert [len(half.input_ids) for half in halves] == [len(rows) // 2, len(rows) - len(rows) // 2]
    for name in ("input_ids", "labels", "documents", "positions"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(batch, name))
    assert torch.equal(torch.cat([half.targets for half in halves]), batch.targets)
    first = halves[0].input_ids.numel()
    assert torch.equal(torch.cat([halves[0].predicting, halves[1].predicting + first]), batch.predicting)
    assert sum((half.sample_rows for half in halves), ()) == batch.sample_rows
    for name in ("supervised_tokens", "useful_tokens", "attention_pairs"):
        assert sum(getattr(half, name) for half in halves) == getattr(batch, name)
    for half in halves:
        assert (half.layout is None) == (int(half.documents.max()) <= 1)
        assert half.layout is None or isinstance(half.layout, type(batch.layout))


def test_one_row_stays_whole(random_samples: Samples) -> None:
    batch = padded_batch([random_samples(3)])
    assert halved(batch) == [batch]


def test_pairs_are_those_within_documents(random_samples: Samples) -> None:
    samples = random_samples(5)
    lengths = [len(sample.input_ids) for sample in samples]
    batch = padded_batch([samples[:3], samples[3:]])
    assert batch.attention_pairs == sum(length * (length + 1) // 2 for length in lengths)


def test_predictions_are_filled_up_with_places_that_predict_nothing() -> None:
    labels = torch.tensor([[-100, 5, -100, 7], [-100, -100, 8, -100]])
    places, targets = predictions(labels, 4)
    assert places[:3].tolist() == [0, 2, 5] and targets[:3].tolist() == [5, 7, 8]
    assert len(places) == len(targets) == 4 and len(set(places.tolist())) == 4
    assert sorted(predictions(labels, 64)[0].tolist()) == list(range(8))  # there are no more
    assert predictions(labels)[0].tolist() == [0, 2, 5]
