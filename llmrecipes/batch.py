"""The trainer's units: a sample (one unpadded example), a batch (one forward), a window (one optimizer step)."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from llmrecipes.prompts import IGNORED_LABEL

IdArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Sample:
    """One checked, unpadded example. `row` is its place in the preprocessor's result, for messages."""

    input_ids: IdArray
    """[tokens]"""
    labels: IdArray
    """[tokens]; `IGNORED_LABEL` where not supervised"""
    row: int

    @property
    def prompt_ids(self) -> list[int]:
        """The ids before the last supervised stretch: what the model is given at inference."""
        return self.input_ids[: self._last_stretch()[0]].tolist()

    @property
    def answer_ids(self) -> list[int]:
        """The ids of the last supervised stretch: what the model should say."""
        start, end = self._last_stretch()
        return self.input_ids[start:end].tolist()

    def _last_stretch(self) -> tuple[int, int]:
        supervised = np.flatnonzero(self.labels != IGNORED_LABEL)
        end = int(supervised[-1]) + 1
        breaks = np.flatnonzero(np.diff(supervised) > 1)
        start = int(supervised[breaks[-1] + 1]) if len(breaks) else int(supervised[0])
        return start, end

    @property
    def supervised_tokens(self) -> int:
        """Labels that enter the loss. The first token of a sample has nothing before it to be predicted from."""
        return int((self.labels[1:] != IGNORED_LABEL).sum())


BY_DOCUMENT = "documents"
"""Attention implementation (a model's `_attn_implementation`) that takes a `DocumentLayout` instead of a mask."""


def attention_window(config: Any) -> int:
    """Returns how many tokens the narrowest layer of a model looks at, by its transformers config; 0: all before."""
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    kinds = getattr(text, "layer_types", None) or ()
    found = [size for size in sizes if size]
    return min(found) if found else int(any("full" not in kind for kind in kinds))


GROUP_SPREAD = 1.25
"""The longest document of a group over its shortest: the share of attention spent on filling stays under a third."""


@dataclass(frozen=True)
class DocumentGroups:
    """The documents of a batch gathered by like length, so that attention runs once a group and not once a document."""

    gather: tuple[torch.Tensor, ...]
    """int64 [documents, tokens] each: places in the batch's tokens laid end to end; a document shorter than its group
    is filled up with its last token, which causal attention keeps out of sight of the real ones"""
    scatter: torch.Tensor
    """int64 [rows * tokens]: each token's place in the groups laid end to end; padding's is 0"""

    def to(self, device: torch.device) -> "DocumentGroups":
        """Returns the groups on `device`, copied without blocking."""
        return DocumentGroups(tuple(_moved(index, device) for index in self.gather), _moved(self.scatter, device))


TILE_TOKENS = 64
"""Tokens of a document that attention works on together."""

PREDICTING_MULTIPLE = 256
"""Rounds up the places of a batch that predict something: each new count costs a GPU's matmuls 6 ms of planning, and a
recorded batch its record."""

PREDICTING_SHARE = 32
"""Of a large batch it is one in so many tokens that they are rounded up to: what the head and one layer do in vain."""

SHORTEST_BOUND = 128
"""Tokens that `DocumentSpans.longest` is at least: below, a kernel gains nothing from knowing better."""


@dataclass(frozen=True)
class DocumentSpans:
    """Where the documents of a batch begin and end in its tokens laid end to end, as varlen kernels take it.

    Padding is cut into documents of its own, so that every token stands in one and none is longer than `longest`: a
    kernel writes all of its output. Counts and bounds are rounded up, so that few batches differ in shape.
    """

    offsets: torch.Tensor
    """int32 [documents + 1], ascending from 0 to the number of tokens; documents at the end may have no tokens"""
    longest: int
    """a power of two (or the width of a row) that no document exceeds"""
    tiles: torch.Tensor
    """int32 [tiles, 3]: of every `TILE_TOKENS` tokens of a document its start, its length, and the first of them in
    it; tiles at the end may be of a document without tokens"""
    equal_documents: int = 0
    """how many documents there are where all are of one length and nothing is padding, else 0"""

    def to(self, device: torch.device) -> "DocumentSpans":
        """Returns the spans with their offsets on `device`, copied without blocking."""
        return replace(self, offsets=_moved(self.offsets, device), tiles=_moved(self.tiles, device))


DocumentLayout = DocumentGroups | DocumentSpans
"""Where the documents of a batch are, as the device's attention wants to know it."""


@dataclass(frozen=True)
class Batch:
    """What one forward takes. `documents` tells which tokens see each other; padding is document 0."""

    input_ids: torch.Tensor
    """int64 [rows, tokens]"""
    labels: torch.Tensor
    """int64 [rows, tokens]; the label of a token is its own id. A document's first token has `IGNORED_LABEL`."""
    documents: torch.Tensor
    """int64 [rows, tokens]; 1, 2, ... within a row, 0 for padding"""
    sample_rows: tuple[int, ...]
    """`Sample.row` of every sample in it"""
    layout: DocumentLayout | None
    """where the documents are; None where every row holds one, and padding behind it"""
    predicting: torch.Tensor
    """int64 [supervised or more]; places, in the tokens laid end to end, from which a supervised token is predicted,
    and others behind them, worked on so that few batches differ in shape, which count for nothing"""
    targets: torch.Tensor
    """int64 [supervised or more]; the tokens that are predicted there, `IGNORED_LABEL` where none is"""
    supervised_tokens: int
    useful_tokens: int

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on `device`, copied without blocking."""
        names = ("input_ids", "labels", "documents", "predicting", "targets")
        moved: dict[str, Any] = {name: _moved(getattr(self, name), device) for name in names}
        return replace(self, **moved, layout=self.layout.to(device) if self.layout else None)

    @property
    def positions(self) -> torch.Tensor:
        """Each token's place in its own document, int64 [rows, tokens]."""
        index = torch.arange(self.documents.shape[1], device=self.documents.device)
        starts = F.pad(self.documents[:, 1:] != self.documents[:, :-1], (1, 0), value=True)
        return index - torch.where(starts, index, 0).cummax(dim=1).values

    @property
    def attention_pairs(self) -> int:
        """How many pairs of tokens look at each other, a token at itself included."""
        within = self.positions[self.documents > 0] + 1
        return int(within.sum())


@dataclass(frozen=True)
class SpanBounds:
    """What all spans of a run are rounded up to at least, so that they have one shape."""

    documents: int = 0
    longest: int = SHORTEST_BOUND


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor on a device; to a GPU by way of pinned memory, so that the copy waits for nothing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def predictions(labels: torch.Tensor, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (places, targets), int64 each, of [rows, tokens] labels: see `Batch.predicting`.

    The token at position i of a row is predicted from position i - 1. So many places that predict nothing follow as
    make a multiple of `multiple` of all, or as there are.
    """
    predicts = F.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1)).flatten()
    places = torch.nonzero(predicts).flatten()
    filling = torch.nonzero(~predicts).flatten()[: -len(places) % multiple]
    return torch.cat([places, filling]), F.pad(labels.flatten()[places + 1], (0, len(filling)), value=IGNORED_LABEL)


def document_groups(documents: npt.NDArray[np.int64], bounds: SpanBounds | None = None) -> DocumentGroups | None:
    """Returns the groups of [rows, tokens] document numbers; None where no row holds two documents."""
    if documents.max() <= 1:
        return None
    spans = sorted(_spans(documents), key=lambda span: span[1] - span[0])
    scatter = np.zeros(documents.size, dtype=np.int64)
    gather, group, filled = [], [spans[0]], 0
    for span in [*spans[1:], None]:
        if span is not None and span[1] - span[0] <= GROUP_SPREAD * (group[0][1] - group[0][0]):
            group.append(span)
            continue
        width = group[-1][1] - group[-1][0]
        places = np.stack([np.minimum(np.arange(start, start + width), end - 1) for start, end in group])
        for number, (start, end) in enumerate(group):
            scatter[start:end] = filled + number * width + np.arange(end - start)
        gather.append(torch.from_numpy(places))
        filled += places.size
        group = [span] if span is not None else []
    return DocumentGroups(tuple(gather), torch.from_numpy(scatter))


def document_spans(documents: npt.NDArray[np.int64], bounds: SpanBounds | None = None) -> DocumentSpans | None:
    """Returns the spans of [rows, tokens] document numbers; None where no row holds two documents and `bounds` are
    not given: with bounds every batch has spans, of one shape."""
    if bounds is None and documents.max() <= 1:
        return None
    bounds = bounds or SpanBounds()
    rows, width = documents.shape
    starts = np.flatnonzero(np.diff(documents, axis=1, prepend=-1).ravel())
    ends = np.append(starts[1:], rows * width)
    useful = documents.ravel()[starts] > 0
    longest = min(width, _power_of_two(max(bounds.longest, int((ends - starts)[useful].max(initial=0)))))
    padding = [np.arange(start, end, longest) for start, end in zip(starts[~useful], ends[~useful], strict=True)]
    offsets = np.sort(np.concatenate([starts[useful], *padding]))
    filled = np.full(_power_of_two(max(bounds.documents, len(offsets))) + 1, rows * width, dtype=np.int32)
    filled[: len(offsets)] = offsets
    lengths = ends - starts
    equal = bool(useful.all()) and int(lengths.min()) == int(lengths.max())
    return DocumentSpans(torch.from_numpy(filled), longest, _tiles(filled), len(starts) if equal else 0)


def _tiles(offsets: npt.NDArray[np.int32]) -> torch.Tensor:
    lengths = np.diff(offsets)
    counts = -(-lengths // TILE_TOKENS)
    document = np.repeat(np.arange(len(counts)), counts)
    first = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * TILE_TOKENS
    tiles = np.zeros((-(-len(document) // TILE_TOKENS) * TILE_TOKENS, 3), dtype=np.int32)
    tiles[: len(document)] = np.stack([offsets[document], lengths[document], first], axis=1)
    return torch.from_numpy(tiles)


Layout = Callable[[npt.NDArray[np.int64], SpanBounds | None], DocumentLayout | None]
"""[rows, tokens] document numbers -> where the documents are."""


def _power_of_two(number: int) -> int:
    """Returns the smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def _spans(documents: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Returns (start, end) of every document, padding left out, in the tokens laid end to end."""
    spans = []
    tokens = documents.shape[1]
    for row, numbers in enumerate(documents):
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), tokens]
        runs = [(start, end) for start, end in itertools.pairwise(edges) if numbers[start] > 0]
        spans += [(row * tokens + start, row * tokens + end) for start, end in runs]
    return spans


def halved(batch: Batch) -> list[Batch]:
    """Returns the upper and the lower half of a batch's rows; a batch of one row as it is."""
    rows = len(batch.input_ids)
    return [_part(batch, slice(0, rows // 2)), _part(batch, slice(rows // 2, rows))] if rows > 1 else [batch]


def _part(batch: Batch, rows: slice) -> Batch:
    documents, labels = batch.documents[rows], batch.labels[rows]
    samples = batch.documents.amax(dim=1).tolist()
    first = sum(samples[: rows.start])
    layout = document_spans if isinstance(batch.layout, DocumentSpans) else document_groups
    predicting, targets = predictions(labels)
    return Batch(
        input_ids=batch.input_ids[rows],
        labels=labels,
        documents=documents,
        sample_rows=batch.sample_rows[first : first + sum(samples[rows])],
        layout=layout(documents.numpy()) if batch.layout else None,
        predicting=predicting,
        targets=targets,
        supervised_tokens=len(targets),
        useful_tokens=int((documents > 0).sum()),
    )


Window = list[Batch]
"""The batches of one optimizer step."""
