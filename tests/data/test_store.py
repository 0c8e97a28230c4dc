"""A store gives back what was put into it, from memory and from files, and cuts without copying."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrecipes.batch import Sample
from llmrecipes.data import store as module
from llmrecipes.data.store import SampleStore, StoreBuilder, mapped_store, store_of

IDS = st.lists(st.integers(0, 50), min_size=1, max_size=9)


@st.composite
def drawn_samples(draw: st.DrawFn) -> list[Sample]:
    samples = []
    for row, ids in enumerate(draw(st.lists(IDS, max_size=12))):
        kept = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        labels = [token if keep else -100 for token, keep in zip(ids, kept, strict=True)]
        samples.append(Sample(np.array(ids, np.int32), np.array(labels, np.int32), row * 3))
    return samples


def same(found: SampleStore, samples: list[Sample]) -> bool:
    return [(s.input_ids.tolist(), s.labels.tolist(), s.row) for s in found] == [
        (s.input_ids.tolist(), s.labels.tolist(), s.row) for s in samples
    ]


@given(drawn_samples())
def test_what_is_put_in_comes_out(samples: list[Sample]) -> None:
    store = store_of(samples)
    assert same(store, samples)
    assert len(store) == len(samples)
    assert store.lengths.tolist() == [len(sample.input_ids) for sample in samples]
    assert store.supervised_counts.tolist() == [sample.supervised_tokens for sample in samples]
    assert store.outside(25).tolist() == [int((sample.input_ids >= 25).sum()) for sample in samples]
    assert [sample.row for sample in store[1:3]] == [sample.row for sample in samples[1:3]]


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_store_in_files_is_the_same(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_TOKENS", 4)
    monkeypatch.setattr(module, "COUNTED_SAMPLES", 2)
    samples = [Sample(np.arange(3, dtype=np.int32), np.array([-100, 1, -100], np.int32), row) for row in range(size)]
    builder = StoreBuilder(tmp_path)
    for sample in samples:
        builder.add(sample)
    for store in (builder.finish(), mapped_store(tmp_path)):
        assert same(store, samples)
        assert store.supervised_counts.tolist() == [1] * size
    assert not size or isinstance(store.ids, np.memmap)


def test_stretches_of_the_same_tokens_are_samples_of_their_own() -> None:
    whole = store_of([Sample(np.arange(6, dtype=np.int32), np.array([-100, 1, 2, -100, 4, 5], np.int32), 7)])
    pieces = whole.recut(np.array([0, 4]), np.array([3, 6]), np.array([7, 7]))
    assert [sample.labels.tolist() for sample in pieces] == [[-100, 1, 2], [4, 5]]
    assert pieces.supervised_counts.tolist() == [2, 1]
    assert pieces.ids is whole.ids
    assert [sample.input_ids.tolist() for sample in pieces.chosen(np.array([False, True]))] == [[4, 5]]
