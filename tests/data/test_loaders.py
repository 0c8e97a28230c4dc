"""Laws of windows and batches: every sample stands whole in one place, once an epoch, whoever builds the tensors."""

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import get_worker_info
from transformers import DataCollatorForSeq2Seq

from llmrecipes.batch import Batch, DocumentSpans, Sample, Window, document_groups, document_spans
from llmrecipes.data import loaders
from llmrecipes.data.loaders import Loader, collated_batch, padded_batch
from llmrecipes.data.store import store_of
from llmrecipes.errors import PluginError
from llmrecipes.precision import resolve_precision
from llmrecipes.training.loss import loss_sum

Samples = Callable[..., list[Sample]]

SAMPLE = Sample(np.array([5, 6, 7], np.int32), np.array([-100, 6, 7], np.int32), 0)
OTHER = Sample(np.array([8, 9], np.int32), np.array([8, 9], np.int32), 1)

LAYOUTS: dict[str, dict[str, Any]] = {
    "packing": {"strategy": "packing", "row_tokens": 64, "batch_rows": 2, "window_batches": 3, "seed": 1},
    "padding": {"strategy": "padding", "row_tokens": 64, "batch_rows": 4, "window_batches": 3, "seed": 1},
    "grouped": {"strategy": "padding", "row_tokens": 64, "batch_rows": 4, "seed": 1, "group_by_length": True},
    "validation": {"strategy": "padding", "row_tokens": 64, "batch_rows": 4},
    "packed validation": {"strategy": "packing", "row_tokens": 64, "batch_rows": 4},
}


def contents(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Returns (ids, labels) of every document of a batch, read back from its tensors."""
    found = []
    for row in range(len(batch.input_ids)):
        for document in range(1, int(batch.documents[row].max()) + 1):
            place = batch.documents[row] == document
            found.append((batch.input_ids[row][place].tolist(), batch.labels[row][place].tolist()))
    return found


def learned(sample: Sample) -> tuple[list[int], list[int]]:
    """What a sample must look like in a batch: nothing predicts its first token."""
    return sample.input_ids.tolist(), [-100, *sample.labels[1:].tolist()]


def same(one: list[Window], other: list[Window]) -> bool:
    pairs = [(a, b) for first, second in zip(one, other, strict=True) for a, b in zip(first, second, strict=True)]
    return all(
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.documents, b.documents)
        and (a.layout is None) == (b.layout is None)
        and (a.sample_rows, a.supervised_tokens, a.useful_tokens)
        == (b.sample_rows, b.supervised_tokens, b.useful_tokens)
        for a, b in pairs
    )


# --- one batch --------------------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, 300), min_size=1, max_size=12)


@st.composite
def drawn_rows(draw: st.DrawFn) -> list[list[Sample]]:
    """Rows of samples, the first label of each supervised or not."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        row = []
        for ids in draw(st.lists(IDS, min_size=1, max_size=5)):
            kept = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
            labels = [token if keep else -100 for token, keep in zip(ids, kept, strict=True)]
            row.append(Sample(np.array(ids, np.int32), np.array(labels, np.int32), len(rows) * 10 + len(row)))
        rows.append(row)
    return rows


@given(drawn_rows())
@settings(deadline=None)
def test_a_batch_holds_every_sample_whole_and_first_tokens_are_no_targets(rows: list[list[Sample]]) -> None:
    batch = padded_batch(rows)
    flat = [sample for row in rows for sample in row]
    assert contents(batch) == [learned(sample) for sample in flat]
    assert batch.sample_rows == tuple(sample.row for sample in flat)
    assert batch.useful_tokens == sum(len(sample.input_ids) for sample in flat) == int((batch.documents > 0).sum())
    assert batch.supervised_tokens == sum(sample.supervised_tokens for sample in flat)
    assert batch.supervised_tokens == int((batch.labels != -100).sum())


@given(drawn_rows())
@settings(deadline=None)
def test_padding_stands_behind_and_is_as_little_as_it_can_be(rows: list[list[Sample]]) -> None:
    batch = padded_batch(rows)
    lengths = [sum(len(sample.input_ids) for sample in row) for row in rows]
    assert batch.input_ids.shape == batch.labels.shape == batch.documents.shape == (len(rows), max(lengths))
    for row, length in enumerate(lengths):
        assert (batch.documents[row, :length] > 0).all() and (batch.documents[row, length:] == 0).all()
        assert (batch.labels[row, length:] == -100).all() and (batch.input_ids[row, length:] == 0).all()


@given(drawn_rows())
@settings(deadline=None)
def test_groups_hold_every_token_of_every_document_in_order(rows: list[list[Sample]]) -> None:
    batch = padded_batch(rows)
    if batch.layout is None:
        assert all(len(row) == 1 for row in rows)
        return
    gathered = torch.cat([places.flatten() for places in batch.layout.gather])
    useful = (batch.documents > 0).flatten()
    places = torch.arange(useful.numel())
    assert torch.equal(gathered[batch.layout.scatter][useful], places[useful])
    ids, documents = batch.input_ids.flatten(), batch.documents.flatten()
    held = [tuple(ids[line].tolist()) for group in batch.layout.gather for line in group]
    assert len(held) == sum(len(row) for row in rows)
    for group in batch.layout.gather:
        assert ((documents[group] == documents[group][:, :1]) & (documents[group] > 0)).all()


@given(drawn_rows())
@settings(deadline=None)
def test_spans_cover_every_token_once_and_none_is_longer_than_they_say(rows: list[list[Sample]]) -> None:
    batch = padded_batch(rows, document_spans, (len(rows) + 1, 300))
    spans = batch.layout
    if spans is None:
        assert all(len(row) == 1 for row in rows)
        return
    assert isinstance(spans, DocumentSpans) and spans.offsets.dtype == torch.int32
    offsets = spans.offsets.tolist()
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] == batch.documents.numel()
    assert max(end - start for start, end in itertools.pairwise(offsets)) <= spans.longest
    documents = batch.documents.flatten().tolist()
    held = [documents[start:end] for start, end in itertools.pairwise(offsets) if end > start]
    assert all(len(set(document)) == 1 for document in held)
    assert sum(document[0] > 0 for document in held) == sum(len(row) for row in rows)
    assert (len(offsets) - 1).bit_count() == 1 and (spans.longest.bit_count() == 1 or spans.longest == 300)


@pytest.mark.parametrize("strategy", ["packing", "padding"])
def test_fixed_shapes_are_one_shape_and_nothing_but_padding_more(strategy: str, random_samples: Samples) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "row_tokens": 64, "batch_rows": 3, "seed": 1}
    samples = random_samples(20)
    plain = [batch for window in Loader(samples, **settings).windows(0) for batch in window]
    fixed = [batch for window in Loader(samples, **settings, fixed_shapes=True).windows(0) for batch in window]
    assert {tuple(batch.input_ids.shape) for batch in fixed} == {(3, 64)}
    assert [contents(batch) for batch in fixed] == [contents(batch) for batch in plain]
    assert [batch.sample_rows for batch in fixed] == [batch.sample_rows for batch in plain]


@pytest.mark.parametrize(("row_tokens", "multiple"), [(2048, 256), (8192, 512), (16384, 1024)])
def test_places_that_predict_are_rounded_up_the_more_the_larger_the_batch(
    row_tokens: int, multiple: int, random_samples: Samples
) -> None:
    settings: dict[str, Any] = {"strategy": "packing", "row_tokens": row_tokens, "batch_rows": 2, "seed": 1}
    samples = random_samples(1200, longest=60)
    for fixed in (True, False):
        loader = Loader(samples, **settings, layout=document_spans, fixed_shapes=fixed)
        batches = [batch for window in loader.windows(0) for batch in window]
        rounded = [len(batch.predicting) == -(-batch.supervised_tokens // multiple) * multiple for batch in batches]
        assert all(rounded) if fixed else not any(rounded)


def test_one_shape_of_spans_serves_a_whole_epoch_of_samsum_like_lengths() -> None:
    lengths = np.random.default_rng(0).lognormal(5.0, 0.5, 3000).astype(int).clip(10, 900)
    nothing = np.zeros(1, dtype=np.int32)
    samples = [Sample(*[np.broadcast_to(nothing, (length,))] * 2, row) for row, length in enumerate(lengths.tolist())]
    loader = Loader(samples, "packing", 4096, 2, seed=0, layout=document_spans, fixed_shapes=True)
    layouts = [batch.layout for epoch in (0, 1) for window in loader.windows(epoch) for batch in window]
    shapes = {(len(spans.offsets), spans.longest) for spans in layouts if isinstance(spans, DocumentSpans)}
    assert len(layouts) > 60 and len(shapes) == 1 and None not in layouts


@pytest.mark.parametrize("strategy", ["packing", "padding"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_fixed_shapes_have_spans_of_one_shape_however_little_is_in_them(
    strategy: str, ranks: int, random_samples: Samples
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "row_tokens": 4096, "batch_rows": 2, "layout": document_spans}
    for samples in (random_samples(1), random_samples(7), random_samples(400)):
        parts = [
            Loader(samples, **settings, seed=1, fixed_shapes=True, rank=rank, ranks=ranks) for rank in range(ranks)
        ]
        batches = [batch for part in parts for window in part.windows(0) for batch in window]
        spans = [batch.layout for batch in batches if isinstance(batch.layout, DocumentSpans)]
        assert len(spans) == len(batches) >= ranks
        assert {tuple(batch.input_ids.shape) for batch in batches} == {(2, 4096)}
        assert len({(len(each.offsets), each.longest) for each in spans}) == 1
        assert all(int(each.offsets[-1]) == 2 * 4096 for each in spans)


def test_bounds_leave_the_plan_of_the_epoch_at_hand(random_samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(random_samples(20), "packing", 64, 2, seed=0, layout=document_spans, fixed_shapes=True)
    planned = loader.rows(3)
    loader.batch(planned[:2])
    monkeypatch.setattr(Loader, "_rows", lambda *_: pytest.fail("planned again"))
    assert loader.rows(3) is planned


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 53])
def test_ranks_train_on_disjoint_parts_of_the_same_windows(ranks: int, count: int, random_samples: Samples) -> None:
    samples = random_samples(count)
    settings: dict[str, Any] = {"strategy": "packing", "row_tokens": 64, "batch_rows": 2, "seed": 1}
    together = Loader(samples, **settings, window_batches=2 * ranks)
    parts = [Loader(samples, **settings, window_batches=2, rank=rank, ranks=ranks) for rank in range(ranks)]
    for whole, *shares in zip(together.windows(3), *(part.windows(3) for part in parts), strict=True):
        rows = [row for batch in whole for row in batch.sample_rows]
        assert sorted(row for share in shares for batch in share for row in batch.sample_rows) == sorted(rows)
        tokens = [sum(batch.useful_tokens for batch in share) for share in shares]
        assert sum(tokens) == sum(batch.useful_tokens for batch in whole)
        assert max(tokens) - min(tokens) <= 64
        assert len({len(share) for share in shares}) == 1 and shares[0]  # all meet as often, or some would wait


def test_a_rank_without_rows_has_a_batch_of_padding_that_teaches_nothing(
    random_samples: Samples, tiny_model: Callable[..., Any]
) -> None:
    part = Loader(random_samples(1), "padding", 64, batch_rows=2, rank=1, ranks=2, collator=pad)
    ((batch,),) = part.windows(0)
    assert batch.input_ids.shape == (1, 1) and batch.sample_rows == ()
    assert (batch.useful_tokens, batch.supervised_tokens, int(batch.documents.sum())) == (0, 0, 0)
    for layout, shape in ((document_groups, None), (document_groups, (2, 64)), (document_spans, (2, 64))):
        model = tiny_model()
        loss = loss_sum(model, padded_batch([], layout, shape), resolve_precision("cpu", False, False))
        loss.backward()
        assert loss.item() == 0
        assert all(not weight.grad.any() for weight in model.parameters() if weight.grad is not None)


def test_a_store_is_batched_as_the_samples_in_it(random_samples: Samples) -> None:
    samples = random_samples(23)
    for layout in LAYOUTS.values():
        plain, stored = Loader(samples, **layout), Loader(store_of(samples), **layout)
        assert same(list(plain.windows(1)), list(stored.windows(1)))
        assert (plain.lengths, plain.supervised_tokens) == (stored.lengths, stored.supervised_tokens)


def test_a_batch_on_another_device_is_the_same_batch() -> None:
    batch = padded_batch([[SAMPLE, OTHER]])
    assert same([[batch.to(torch.device("cpu"))]], [[batch]])
    assert batch.to(torch.device("meta")).labels.device.type == "meta"


# --- an epoch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_an_epoch_holds_every_sample_once_and_all_its_tokens(layout: dict[str, Any], random_samples: Samples) -> None:
    samples = random_samples(53)
    loader = Loader(samples, **layout)
    batches = [batch for window in loader.windows(2) for batch in window]
    assert sorted(row for batch in batches for row in batch.sample_rows) == list(range(53))
    expected = sorted(learned(sample) for sample in samples)
    assert sorted(document for batch in batches for document in contents(batch)) == expected
    assert sum(batch.useful_tokens for batch in batches) == loader.useful_tokens
    assert sum(batch.supervised_tokens for batch in batches) == loader.supervised_tokens


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_batches_and_windows_keep_their_sizes_and_the_last_is_not_dropped(
    layout: dict[str, Any], random_samples: Samples
) -> None:
    loader = Loader(random_samples(53), **layout)
    windows = list(loader.windows(0))
    rows = [len(batch.input_ids) for window in windows for batch in window]
    assert rows[:-1] == [loader.batch_rows] * (len(rows) - 1) and 0 < rows[-1] <= loader.batch_rows
    sizes = [len(window) for window in windows]
    assert sizes[:-1] == [loader.window_batches] * (len(sizes) - 1) and 0 < sizes[-1] <= loader.window_batches
    assert len(windows) == len(loader.window_rows(0))
    if loader.strategy == "packing":
        assert all(batch.input_ids.shape[1] <= 64 for window in windows for batch in window)


def test_fewer_samples_than_a_batch_are_a_batch(random_samples: Samples) -> None:
    ((batch,),) = Loader(random_samples(1), "padding", 64, batch_rows=8, window_batches=8, seed=0).windows(0)
    assert batch.sample_rows == (0,)


@pytest.mark.parametrize("name", ["packing", "padding", "grouped"])
def test_epochs_differ_and_each_is_the_same_again(name: str, random_samples: Samples) -> None:
    samples = random_samples(53)
    first, again, second, other_seed = (
        [
            batch.sample_rows
            for window in Loader(samples, **{**LAYOUTS[name], "seed": seed}).windows(epoch)
            for batch in window
        ]
        for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert first == again
    assert first != second and first != other_seed


def test_validation_goes_through_the_samples_in_their_order(random_samples: Samples) -> None:
    for grouped in (False, True):
        loader = Loader(random_samples(10), "padding", 64, batch_rows=3, group_by_length=grouped)
        assert [row for (batch,) in loader.windows(5) for row in batch.sample_rows] == list(range(10))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("start", [0, 2, 1000])
def test_an_epoch_continues_where_it_is_told_to(layout: dict[str, Any], start: int, random_samples: Samples) -> None:
    loader = Loader(random_samples(53), **layout)
    assert same(list(loader.windows(1, start=start)), list(loader.windows(1))[start:])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_workers_build_the_same_windows_in_the_same_order(layout: dict[str, Any], random_samples: Samples) -> None:
    samples = random_samples(23)
    here, there = Loader(samples, **layout), Loader(samples, **layout, workers=2)
    assert same(list(here.windows(1)), list(there.windows(1)))
    assert same(list(here.windows(1, start=1)), list(there.windows(1, start=1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_going_through_an_epoch_leaves_the_dropouts_generator_alone(workers: int, random_samples: Samples) -> None:
    loader = Loader(random_samples(5), "packing", 64, batch_rows=1, seed=0, workers=workers)
    before = torch.get_rng_state()
    list(loader.windows(0))
    assert torch.equal(torch.get_rng_state(), before)


# --- a plug-in's own collator -----------------------------------------------------------------------------------------


def pad(rows: list[dict[str, Any]], filling: int = 0, side: str = "right") -> dict[str, Any]:
    """What a plain collator does."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        spare = [[value] * (width - len(row[name])) for row in rows]
        lines = [row[name] + gap if side == "right" else gap + row[name] for row, gap in zip(rows, spare, strict=True)]
        return torch.tensor(lines)

    return {
        "input_ids": filled("input_ids", filling),
        "labels": filled("labels", -100),
        "attention_mask": filled("attention_mask", 0),
    }


def changed(**entries: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """A collator whose result is that of `pad` but for some entries; a function is called with the entry."""

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        made = pad(rows)
        for name, value in entries.items():
            made[name] = value(made.get(name)) if callable(value) else value
        return {name: value for name, value in made.items() if value is not None}

    return collator


GOOD: dict[str, Any] = {
    "tensors": pad,
    "arrays": lambda rows: {name: entry.numpy() for name, entry in pad(rows).items()},
    "lists": lambda rows: {name: entry.tolist() for name, entry in pad(rows).items()},
    "32 bits": lambda rows: {name: entry.int() for name, entry in pad(rows).items()},
    "a mask of truths": changed(attention_mask=lambda mask: mask.bool()),
    "padding that the model has no row for": lambda rows: pad(rows, filling=32000),
    "padding below zero": lambda rows: pad(rows, filling=-1),
}


@pytest.mark.parametrize("collator", GOOD.values(), ids=GOOD.keys())
def test_a_good_collators_batch_is_the_trainers_own(collator: Any) -> None:
    made = collated_batch([SAMPLE, OTHER], collator)
    assert same([[made]], [[padded_batch([[SAMPLE], [OTHER]])]])
    assert {tensor.dtype for tensor in (made.input_ids, made.labels, made.documents)} == {torch.int64}


def test_transformers_collator_will_do(byte_tokenizer: Any, random_samples: Samples) -> None:
    byte_tokenizer.pad_token = "<unk>"
    samples = random_samples(10)
    collator = DataCollatorForSeq2Seq(byte_tokenizer)
    ours, theirs = (Loader(samples, "padding", 64, batch_rows=4, collator=made) for made in (None, collator))
    assert same(list(ours.windows(0)), list(theirs.windows(0)))


def test_without_a_mask_every_token_is_useful() -> None:
    batch = collated_batch([SAMPLE, OTHER], changed(attention_mask=None))
    assert batch.useful_tokens == 6
    assert batch.supervised_tokens == 3


BAD: list[tuple[Any, str]] = [
    (lambda rows: None, "expected a mapping with input_ids and labels, got NoneType"),
    (lambda rows: [1, 2], "expected a mapping with input_ids and labels, got list"),
    (lambda rows: (row for row in rows), "expected a mapping with input_ids and labels, got generator"),
    (changed(labels=None), "its batch has no labels"),
    (changed(labels=None, input_ids=None), "its batch has no input_ids and no labels"),
    (changed(pixel_values=torch.zeros(2)), "has pixel_values as well; only input_ids, labels, attention_mask are read"),
    (changed(position_ids=torch.zeros(2, 3)), "its batch has position_ids as well"),
    (changed(labels=[[1, 2], [3]]), "labels cannot be made a tensor .*; pad all rows alike"),
    (changed(input_ids=["a", "b"]), "input_ids cannot be made a tensor"),
    (changed(input_ids=lambda ids: ids / 2), r"input_ids must be whole numbers of shape .* got \[2, 3\], float32"),
    (changed(input_ids=lambda ids: ids[0]), r"input_ids must be whole numbers of shape .* got \[3\], int64"),
    (changed(attention_mask=torch.ones(2, 1, 3, 3)), r"attention_mask must be whole numbers of shape \[rows, tokens\]"),
    (changed(labels=lambda labels: labels[:, :2]), r"differ in shape: \[\[2, 3\], \[2, 2\], \[2, 3\]\]"),
    (changed(attention_mask=lambda mask: mask[:, :2]), r"differ in shape: \[\[2, 3\], \[2, 3\], \[2, 2\]\]"),
    (lambda rows: pad(rows[:1]), "it made 1 rows of 2 samples"),
    (lambda rows: pad(rows, side="left"), "it pads on the left; pad on the right"),
    (changed(attention_mask=lambda mask: mask * 2), "attention_mask must be 1, and 0 for padding"),
    (changed(labels=lambda labels: labels.clamp(min=0)), "its labels supervise padding; they must be -100 there"),
    (changed(input_ids=lambda ids: ids - 6), "an id below 0 that attention_mask does not tell to be padding"),
    (lambda rows: rows[5], r"test_loaders.py:\d+: in the collator: IndexError"),
    (lambda: None, "in the collator: TypeError"),
    (5, "it returned int, not a function"),
]  # fmt: skip


@pytest.mark.parametrize(("collator", "message"), BAD)
def test_what_is_wrong_with_a_collator_is_told_before_anything_is_trained(collator: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message) as caught:
        Loader([SAMPLE, OTHER], "padding", 64, batch_rows=2, collator=collator)
    assert "\n" not in str(caught.value)


def in_a_worker(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator that fails on the second batch, in a worker only."""
    if get_worker_info() is not None and len(rows) == 1:
        raise ValueError("a bad row")
    return pad(rows)


def drawing(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator that draws from every generator of the process."""
    drawn = [random.randrange(1000), int(np.random.randint(1000)), int(torch.randint(1000, (1,)))]
    return {"input_ids": [[5, *drawn] for _ in rows], "labels": [[5, *drawn] for _ in rows]}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_collator_draws_depends_on_the_place_alone(workers: int, random_samples: Samples) -> None:
    loader = Loader(random_samples(12), "padding", 64, batch_rows=2, seed=3, collator=drawing)
    expected = [list(loader.windows(epoch)) for epoch in (0, 1)]
    drawn = {tuple(window[0].input_ids[0].tolist()) for epoch in expected for window in epoch}
    assert len(drawn) == 12
    there = replace(loader, workers=workers)
    before = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    assert same(list(there.windows(1, start=3)), expected[1][3:])
    assert before == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_an_error_in_a_worker_stays_one_line() -> None:
    loader = Loader([SAMPLE, OTHER, SAMPLE], "padding", 64, batch_rows=2, workers=1, collator=in_a_worker)
    windows = loader.windows(0)
    assert len(next(windows)) == 1
    with pytest.raises(PluginError, match=r"^\S+test_loaders.py:\d+: in the collator: ValueError: a bad row \(.*\)$"):
        next(windows)


def refuse_signals_heard(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator that fails in a worker which a signal to the whole group would end."""
    heard = [kind for kind in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(kind) is not signal.SIG_IGN]
    if get_worker_info() is not None and heard:
        raise ValueError(f"{heard} are heard")
    return pad(rows)


def test_a_worker_leaves_signals_to_the_trainer() -> None:
    loader = Loader([SAMPLE, OTHER], "padding", 64, batch_rows=2, workers=1, collator=refuse_signals_heard)
    assert len(list(loader.windows(0))) == 1


LEFT_WORKERS = """
import numpy as np
from llmrecipes.batch import Sample
from llmrecipes.data.loaders import Loader
ids = np.arange(3, dtype=np.int32)
windows = Loader([Sample(ids, ids, row) for row in range(50)], "padding", 8, batch_rows=1, workers=1).windows(0)
next(windows)
raise KeyError("our own bug")
"""


DEAF = loaders._deaf_to_signals


def asked_to_stop_before_it_is_deaf(worker: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    DEAF(worker)


def test_a_signal_that_meets_a_worker_at_its_start_ends_nothing(
    random_samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "_deaf_to_signals", asked_to_stop_before_it_is_deaf)
    loader = Loader(random_samples(9), "packing", 64, 2, workers=2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert len(list(loader.windows(0))) == len(loader.window_rows(0)) > 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_process_with_workers_left_ends_all_the_same() -> None:
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", LEFT_WORKERS],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'our own bug'\n"), done.stderr


@pytest.mark.parametrize("pieces", [2, 4])
def test_batches_that_are_cut_hold_the_same_windows(pieces: int, random_samples: Samples) -> None:
    samples = random_samples(40)
    whole = Loader(samples, "padding", 64, batch_rows=4, window_batches=2, seed=0, group_by_length=True, grouped_rows=4)
    cut = replace(whole, batch_rows=4 // pieces, window_batches=2 * pieces)
    for epoch in (0, 1):
        found, expected = (
            [[row for batch in window for row in batch] for window in loader.window_rows(epoch)]
            for loader in (cut, whole)
        )
        assert found == expected
