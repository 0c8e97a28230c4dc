"""Layers' inputs in the host's memory, brought there and back while the GPU computes."""

from __future__ import annotations

import weakref

import torch


class HostMemory:
    """Where the layers of one model put their inputs, the last one in being the first one out."""

    def __init__(self) -> None:
        self._lane: torch.cuda.Stream | None = None
        self._last: weakref.ref[Stored] | None = None

    def store(self, x: torch.Tensor) -> Stored:
        """Returns what brings `x` back; its own memory is free once the copy is done."""
        if self._lane is None:
            self._lane = torch.cuda.Stream(x.device)
        stored = Stored(x, self._lane, self._last)
        self._last = weakref.ref(stored)
        return stored


class Stored:
    """One tensor in pinned memory."""

    def __init__(self, x: torch.Tensor, lane: torch.cuda.Stream, before: weakref.ref[Stored] | None) -> None:
        self._lane, self._device, self._before = lane, x.device, before
        self._back: torch.Tensor | None = None
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        lane.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(lane):
            self._host.copy_(x, non_blocking=True)
        x.record_stream(lane)

    def fetch(self) -> None:
        """Begins to bring it back."""
        with torch.cuda.stream(self._lane):
            self._back = self._host.to(self._device, non_blocking=True)

    def take(self) -> torch.Tensor:
        """Returns the tensor on its device, and begins to fetch the one stored before: it is wanted next."""
        if self._back is None:
            self.fetch()
        assert self._back is not None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._lane)
        self._back.record_stream(current)
        before = self._before() if self._before else None
        if before is not None:
            before.fetch()
        return self._back
