"""A batch's loss and gradient as one CUDA graph: the host hands the GPU one thing and not some four thousand.

Where batches are small or the host is slow, the GPU waits for it otherwise. Nothing is computed in another way: the
first batch of a shape is computed as ever, the second is recorded, and from then on the record is played with other
numbers in the same places.
"""

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from llmrecipes.batch import Batch, DocumentSpans
from llmrecipes.precision import Precision, is_out_of_memory

LossSum = Callable[[Any, Batch, Precision], torch.Tensor]
Result = tuple[torch.Tensor, Sequence[torch.Tensor | None]]

MOST = 8
"""Shapes that are recorded; each holds a gradient of its own."""


class Replayed:
    """A loss of a model, summed over a batch's supervised tokens, that is recorded and played where gradients are
    wanted. One backward follows each forward: the next forward writes over the gradient.

    `refresh` brings what the loss derives from the parameters up to date; `settle` has the GPU wait for what streams
    of the loss's own are doing. Records share the memory that a forward and backward need, and hold it for as long as
    they live: where the rest does not suffice, they are given up for good.
    """

    def __init__(
        self,
        loss: LossSum,
        parameters: Sequence[torch.nn.Parameter],
        refresh: Callable[[], None],
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.loss, self.parameters, self.most = loss, list(parameters), MOST
        self.refresh, self.settle = refresh, settle
        self.seen: set[Hashable] = set()
        """shapes of batches"""
        self.records: dict[Hashable, Record] = {}
        """of shapes seen twice"""
        self._stream: torch.cuda.Stream | None = None
        """of all that is computed: a record cannot be made on a device's first stream, nor wait for it"""
        self._pool: Any = None

    def __call__(self, model: Any, batch: Batch, precision: Precision) -> torch.Tensor:
        """Returns the loss as `loss` does."""
        try:
            return self._loss(model, batch, precision)
        except RuntimeError as error:
            if not is_out_of_memory(error) or not self.most:
                raise
        self.records, self.most = {}, 0
        gc.collect()
        return self._loss(model, batch, precision)

    def _loss(self, model: Any, batch: Batch, precision: Precision) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.loss(model, batch, precision)
        with self._own_stream(batch.input_ids.device):
            total: torch.Tensor = _Played.apply(self, model, batch, precision, *self.parameters)
        return total

    @contextmanager
    def _own_stream(self, device: torch.device) -> Iterator[None]:
        """Has a GPU work on a stream of the records; what comes before and after waits in turn."""
        if device.type != "cuda":
            yield
            return
        around, self._stream = torch.cuda.current_stream(device), self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(around)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            around.wait_stream(self._stream)

    def result(self, model: Any, batch: Batch, precision: Precision) -> Result:
        """Returns the loss, which is the caller's own, and its gradients, which the next call writes over."""
        self.refresh()
        shape = _shape(batch)
        if shape not in self.seen:
            self.seen.add(shape)
            return self._computed(model, batch, precision)
        if shape not in self.records and len(self.records) < self.most:
            self.records[shape] = self._record(model, batch, precision)
        record = self.records.get(shape)
        return record.play(batch) if record else self._computed(model, batch, precision)

    def _record(self, model: Any, batch: Batch, precision: Precision) -> "Record":
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return Record(lambda given: self._computed(model, given, precision), batch, self._pool, self.settle)

    def _computed(self, model: Any, batch: Batch, precision: Precision) -> Result:
        with torch.enable_grad():
            total = self.loss(model, batch, precision)
        return total.detach(), torch.autograd.grad(total, self.parameters, allow_unused=True)


class Record:
    """One recorded computation of a batch's loss and gradients."""

    def __init__(self, compute: Callable[[Batch], Result], batch: Batch, pool: Any, settle: Callable[[], None]) -> None:
        moved: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(batch).items()}
        layout = batch.layout
        if isinstance(layout, DocumentSpans):
            layout = replace(layout, offsets=layout.offsets.clone(), tiles=layout.tiles.clone())
        self.batch = replace(batch, **moved, layout=layout)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads of the process go on; what they do is not recorded.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                self.total, self.gradients = compute(self.batch)
            except BaseException:
                settle()  # a record that a stream has not come back to ends in an error that hides this one
                raise

    def play(self, batch: Batch) -> Result:
        """Returns what was computed, for another batch of the same shape."""
        for mine, given in zip(_inputs(self.batch), _inputs(batch), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.total.clone(), self.gradients


class _Played(torch.autograd.Function):
    """The loss, whose gradients are there as soon as it is."""

    @staticmethod
    def forward(ctx: Any, replayed: Replayed, model: Any, batch: Batch, precision: Precision, *_: Any) -> torch.Tensor:
        total, ctx.gradients = replayed.result(model, batch, precision)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found, ctx.gradients = ctx.gradients, ()  # which a record that is given up must not outlive
        scaled = iter(torch._foreach_mul([each for each in found if each is not None], gradients[0]))
        return None, None, None, None, *(None if each is None else next(scaled) for each in found)


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name) for name in ("input_ids", "labels", "documents", "predicting", "targets")}


def _inputs(batch: Batch) -> list[torch.Tensor]:
    layout = batch.layout
    spans = [layout.offsets, layout.tiles] if isinstance(layout, DocumentSpans) else []
    return [*_tensors(batch).values(), *spans]


def _shape(batch: Batch) -> Hashable:
    """Returns all that a batch has besides numbers in tensors: it decides what is computed."""
    layout = batch.layout
    bounds = (layout.longest, layout.equal_documents) if isinstance(layout, DocumentSpans) else ()
    return type(layout), bounds, *(tuple(each.shape) for each in _inputs(batch))
