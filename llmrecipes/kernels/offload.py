"""Layers' inputs in the host's memory, brought there and back while the GPU computes."""

from __future__ import annotations

import weakref

import torch


class HostMemory:
    """Where the layers of one model put their inputs, the last one in being the first one out.

    Copies have a stream of their own. The host hands out work far ahead of the GPU, so memory is not left to the
    allocator's marks: a tensor that is being copied is held until the next one is, and the GPU waits for it then.
    """

    def __init__(self) -> None:
        self.lane: torch.cuda.Stream | None = None
        """of the copies"""
        self._last: weakref.ref[Stored] | None = None
        self._leaving: torch.Tensor | None = None

    def store(self, x: torch.Tensor) -> Stored:
        """Returns what brings `x` back."""
        if self.lane is None:
            self.lane = torch.cuda.Stream(x.device)
        self.wait(x.device)
        self._leaving = x
        stored = Stored(x, self, self.lane, self._last)
        self._last = weakref.ref(stored)
        return stored

    def wait(self, device: torch.device) -> None:
        """Has the GPU wait for the copies that are under way; what left may then be written over."""
        if self.lane is not None:
            torch.cuda.current_stream(device).wait_stream(self.lane)
        self._leaving = None


class Stored:
    """One tensor in pinned memory."""

    def __init__(
        self, x: torch.Tensor, memory: HostMemory, lane: torch.cuda.Stream, before: weakref.ref[Stored] | None
    ) -> None:
        self._memory, self._lane, self._device, self._before = memory, lane, x.device, before
        self._back: torch.Tensor | None = None
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        lane.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(lane):
            self._host.copy_(x, non_blocking=True)

    def fetch(self) -> None:
        """Begins to bring it back, into memory that belongs to the stream that computes."""
        self._back = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
        self._lane.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._lane):
            self._back.copy_(self._host, non_blocking=True)

    def take(self) -> torch.Tensor:
        """Returns the tensor on its device, and begins to fetch the one stored before: it is wanted next."""
        if self._back is None:
            self.fetch()
        assert self._back is not None
        self._memory.wait(self._device)
        before = self._before() if self._before else None
        if before is not None:
            before.fetch()
        back, self._back = self._back, None
        return back
