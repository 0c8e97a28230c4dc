"""Samples to windows of batches, an epoch at a time."""

import atexit
import math
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from llmrecipes.batch import (
    PREDICTING_MULTIPLE,
    PREDICTING_SHARE,
    SHORTEST_BOUND,
    Batch,
    Layout,
    Sample,
    SpanBounds,
    Window,
    document_groups,
    predictions,
)
from llmrecipes.data.packing import Row, chunks, length_grouped, packed_rows, rank_shares, sample_order
from llmrecipes.data.store import SampleStore
from llmrecipes.errors import LlmRecipesError, PluginError
from llmrecipes.plugins import blamed
from llmrecipes.prompts import IGNORED_LABEL

Collator = Callable[[list[dict[str, Any]]], Any]

ROOM = 1.25
"""Documents that a batch of fixed shape has room for, over the most that one of the first epoch holds."""

COLLATED = ("input_ids", "labels", "attention_mask")
"""What is read of a collator's batch."""


@dataclass(frozen=True)
class Loader:
    """The windows of a split. `seed` None keeps the samples' order (validation)."""

    samples: Sequence[Sample]
    strategy: str
    """packing or padding"""
    row_tokens: int
    batch_rows: int
    window_batches: int = 1
    seed: int | None = None
    group_by_length: bool = False
    grouped_rows: int = 0
    """rows of like length, a multiple of `batch_rows`, which are so many where this is 0: batches may be cut later"""
    workers: int = 0
    collator: Collator | None = None
    """a plug-in's own `get_data_collator`, padding only"""
    layout: Layout = document_groups
    """`document_groups` for CPUs, `document_spans` for GPUs"""
    fixed_shapes: bool = False
    """every batch is [batch_rows, row_tokens], filled up with padding, so that compiled code meets one shape only"""
    rank: int = 0
    ranks: int = 1
    """processes that share a window: each has rows of its own, as many tokens as the others, and together all"""

    def __post_init__(self) -> None:
        """Tries a collator on the first batch, so that what is wrong with it is said before the model is loaded."""
        if self.collator is None:
            return
        if not callable(self.collator):
            raise PluginError(f"get_data_collator: it returned {type(self.collator).__name__}, not a function")
        self.batch(self.window_rows(0)[0][0])

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        if isinstance(self.samples, SampleStore):
            return self.samples.lengths.tolist()
        return [len(sample.input_ids) for sample in self.samples]

    @property
    def useful_tokens(self) -> int:
        """Tokens of an epoch, without padding, of all ranks."""
        return sum(self.lengths)

    @cached_property
    def supervised_tokens(self) -> int:
        """Tokens of an epoch that enter the loss, of all ranks."""
        if isinstance(self.samples, SampleStore):
            return int(self.samples.supervised_counts.sum())
        return sum(sample.supervised_tokens for sample in self.samples)

    @cached_property
    def _bounds(self) -> SpanBounds:
        """Bounds of the spans of every batch: the longest sample, and room for as many documents as one may hold and
        for the pieces that padding is cut into."""
        rows = self._planned.get(0) or self._rows(0)  # another epoch's plan stays
        most = max(sum(map(len, batch)) for batch in chunks(rows, self.batch_rows))
        longest = max(SHORTEST_BOUND, max(self.lengths))
        return SpanBounds(int(ROOM * most) + self.batch_rows * math.ceil(self.row_tokens / longest), longest)

    @cached_property
    def _planned(self) -> dict[int, list[Row]]:
        """The rows of the epoch asked for last: planning a million samples takes seconds."""
        return {}

    def cut(self, pieces: int) -> "Loader":
        """Returns the loader with each batch cut into `pieces`; its windows hold the same rows."""
        return replace(self, batch_rows=self.batch_rows // pieces, window_batches=self.window_batches * pieces)

    def rows(self, epoch: int) -> list[Row]:
        """Returns the epoch's rows, of all ranks, each a list of indices into `samples`."""
        if epoch not in self._planned:
            self._planned.clear()
            self._planned[epoch] = self._rows(epoch)
        return self._planned[epoch]

    def _rows(self, epoch: int) -> list[Row]:
        order = sample_order(len(self.samples), self.seed, epoch)
        if self.strategy == "packing":
            return packed_rows(self.lengths, order, self.row_tokens, self.seed, epoch)
        if self.group_by_length and self.seed is not None:
            order = length_grouped(self.lengths, order, self.grouped_rows or self.batch_rows, self.seed, epoch)
        return [[index] for index in order]

    def window_rows(self, epoch: int) -> list[list[list[Row]]]:
        """Returns the epoch's windows as lists of this rank's batches of rows; in a window every rank has as many
        batches, of which the last may have no rows."""
        windows = chunks(self.rows(epoch), self.batch_rows * self.window_batches * self.ranks)
        if self.ranks == 1:
            return [chunks(rows, self.batch_rows) for rows in windows]
        tokens = self.lengths
        shared = []
        for rows in windows:
            shares = rank_shares(rows, [sum(tokens[index] for index in row) for row in rows], self.ranks)
            batches = [chunks(share, self.batch_rows) for share in shares]
            missing = max(map(len, batches)) - len(batches[self.rank])
            shared.append([*batches[self.rank], *([[]] * missing)])
        return shared

    def windows(self, epoch: int, start: int = 0) -> Iterator[Window]:
        """Yields the epoch's windows from number `start` on."""
        if self.workers:
            atexit.unregister(_end_workers)
            atexit.register(_end_workers)  # now, so that it runs before multiprocessing's own
        loader: DataLoader[Any] = DataLoader(
            list(enumerate(self.window_rows(epoch)))[start:],  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=partial(self._window_or_error, epoch),
            num_workers=self.workers,
            worker_init_fn=_deaf_to_signals,
            # Of its own: torch would draw the workers' seed from the generator that dropout uses.
            generator=torch.Generator().manual_seed((self.seed or 0) + epoch),
        )
        with _signals_held():
            windows = iter(loader)  # starts the workers
        for window in windows:
            if isinstance(window, LlmRecipesError):
                raise window
            yield window

    def _window_or_error(self, epoch: int, planned: tuple[int, list[list[Row]]]) -> Window | LlmRecipesError:
        """Returns an error instead of raising it, which in a worker would bury it in the worker's traceback."""
        number, batches = planned
        try:
            with own_draws(self.seed or 0, epoch, number) if self.collator is not None else nullcontext():
                return self.window(batches)
        except LlmRecipesError as error:
            return error

    def window(self, batches: list[list[Row]]) -> Window:
        """Returns the tensors of one planned window."""
        return [self.batch(rows) for rows in batches]

    def batch(self, rows: list[Row]) -> Batch:
        """Returns the tensors of one planned batch, padded on the right to its longest row."""
        grouped = [[self.samples[index] for index in row] for row in rows]
        if self.collator is not None and rows:
            return collated_batch([row[0] for row in grouped], self.collator)
        if not self.fixed_shapes:
            return padded_batch(grouped, self.layout)
        return padded_batch(grouped, self.layout, (self.batch_rows, self.row_tokens), self._bounds)


@contextmanager
def own_draws(*key: int) -> Iterator[None]:
    """Has what is drawn within (by a collator) depend on the key alone, and changes nothing that is drawn behind it.

    So a window is the same whichever process builds it, and after whichever other windows: a run that goes on finds it.
    """
    states = random.getstate(), np.random.get_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set a GPU's as well
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def padded_batch(
    rows: Sequence[Sequence[Sample]],
    layout: Layout = document_groups,
    shape: tuple[int, int] | None = None,
    bounds: SpanBounds | None = None,
) -> Batch:
    """Returns rows of whole samples as one `Batch`; within a row documents are numbered from 1, padding is 0.

    `shape` is the batch's [rows, tokens], by default the smallest that holds them, for no rows one token of padding;
    `bounds` those of its spans.
    """
    shape = shape or (max(1, len(rows)), max((sum(len(sample.input_ids) for sample in row) for row in rows), default=1))
    input_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    documents = np.zeros(shape, dtype=np.int64)
    for row_number, row in enumerate(rows):
        start = 0
        for document, sample in enumerate(row, start=1):
            end = start + len(sample.input_ids)
            input_ids[row_number, start:end] = sample.input_ids
            labels[row_number, start + 1 : end] = sample.labels[1:]
            documents[row_number, start:end] = document
            start = end
    multiple = max(PREDICTING_MULTIPLE, labels.size // PREDICTING_SHARE) if bounds else 1
    predicting, targets = predictions(torch.from_numpy(labels), multiple)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        documents=torch.from_numpy(documents),
        sample_rows=tuple(sample.row for row in rows for sample in row),
        layout=layout(documents, bounds),
        predicting=predicting,
        targets=targets,
        supervised_tokens=int((labels != IGNORED_LABEL).sum()),
        useful_tokens=int((documents > 0).sum()),
    )


def collated_batch(samples: Sequence[Sample], collator: Collator) -> Batch:
    """Returns what a plug-in's own collator makes of samples, as a `Batch`; one sample a row, padded on the right."""
    rows = [
        {
            "input_ids": sample.input_ids.tolist(),
            "labels": sample.labels.tolist(),
            "attention_mask": [1] * len(sample.input_ids),
        }
        for sample in samples
    ]
    with blamed("in the collator"):
        made = collator(rows)
    check_collated(made)
    input_ids, labels = _tensor(made, "input_ids"), _tensor(made, "labels")
    documents = _tensor(made, "attention_mask") if "attention_mask" in made else torch.ones_like(input_ids)
    _check_layout(input_ids, labels, documents, len(samples))
    labels = F.pad(labels[:, 1:], (1, 0), value=IGNORED_LABEL)
    predicting, targets = predictions(labels)
    return Batch(
        input_ids=input_ids * documents,  # padding may have an id for which the model has no row
        labels=labels,
        documents=documents,
        sample_rows=tuple(sample.row for sample in samples),
        layout=None,
        predicting=predicting,
        targets=targets,
        supervised_tokens=len(targets),
        useful_tokens=int(documents.sum()),
    )


def check_collated(made: Any) -> None:
    """Raises `PluginError` where a collator's result is no mapping of the three keys that are read."""
    if not isinstance(made, Mapping):
        raise PluginError(f"get_data_collator: expected a mapping with input_ids and labels, got {type(made).__name__}")
    missing = [name for name in COLLATED[:2] if name not in made]
    if missing:
        raise PluginError(f"get_data_collator: its batch has no {' and no '.join(missing)}")
    unread = [str(name) for name in made if name not in COLLATED]
    if unread:
        raise PluginError(
            f"get_data_collator: its batch has {', '.join(unread)} as well; only {', '.join(COLLATED)} are read"
        )


def _tensor(made: Mapping[str, Any], name: str) -> torch.Tensor:
    """Returns one entry of a collated batch as int64 [rows, tokens] on the CPU."""
    try:
        tensor = torch.as_tensor(made[name]).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise PluginError(f"get_data_collator: {name} cannot be made a tensor ({told}); pad all rows alike") from None
    if tensor.ndim != 2 or tensor.is_floating_point() or tensor.is_complex():
        found = f"{list(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"
        raise PluginError(f"get_data_collator: {name} must be whole numbers of shape [rows, tokens], got {found}")
    return tensor.long()


def _check_layout(input_ids: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor, samples: int) -> None:
    shapes = [list(tensor.shape) for tensor in (input_ids, labels, documents)]
    if shapes[1] != shapes[0] or shapes[2] != shapes[0]:
        raise PluginError(f"get_data_collator: input_ids, labels and attention_mask differ in shape: {shapes}")
    if shapes[0][0] != samples:
        raise PluginError(f"get_data_collator: it made {shapes[0][0]} rows of {samples} samples")
    if ((documents != 0) & (documents != 1)).any():
        raise PluginError("get_data_collator: attention_mask must be 1, and 0 for padding")
    if (documents[:, 1:] > documents[:, :-1]).any():
        raise PluginError("get_data_collator: it pads on the left; pad on the right (tokenizer.padding_side)")
    if ((labels != IGNORED_LABEL) & (documents == 0)).any():
        raise PluginError(f"get_data_collator: its labels supervise padding; they must be {IGNORED_LABEL} there")
    if (input_ids * documents < 0).any():
        raise PluginError("get_data_collator: an id below 0 that attention_mask does not tell to be padding")


def _deaf_to_signals(worker: int) -> None:
    """Leaves it to the trainer to end a worker: a signal to the whole group must not kill the step being saved."""
    for number in _asking_signals():
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Holds back in this thread, and in workers that it starts until they are deaf, what torch has them die of."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _asking_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _asking_signals() -> list[signal.Signals]:
    """Returns the signals that ask a run to stop or to save, as far as this system has them."""
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _end_workers() -> None:
    """Ends workers that are left when the process ends: multiprocessing would ask with SIGTERM and wait for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report each as killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
