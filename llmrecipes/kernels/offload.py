"""Layers' inputs in the host's memory, brought there and back while the GPU computes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class HostMemory:
    """Where the layers of one model put their inputs, the last one in being the first one out.

    Copies have a stream of their own. The host hands out work far ahead of the GPU, so memory is not left to the
    allocator's marks: a tensor that is being copied is held until the next one is, and the GPU waits for it then.
    Places in the host's memory are used again, as many as are in use at once and as large as the largest batch wants
    them; those of a recorded computation stay where they are.
    """

    def __init__(self) -> None:
        self._lane: torch.cuda.Stream | None = None
        """of the copies"""
        self._last: weakref.ref[Stored] | None = None
        self._leaving: torch.Tensor | None = None
        self._idle: list[torch.Tensor] = []
        self._recorded: list[torch.Tensor] = []
        self._copies = False
        """whether copies are under way"""

    def store(self, x: torch.Tensor) -> Stored:
        """Returns what brings `x` back."""
        self.wait(x.device)
        self._leaving = x
        stored = Stored(x, self, self._last)
        self._last = weakref.ref(stored)
        return stored

    @contextmanager
    def copying(self, device: torch.device) -> Iterator[None]:
        """Copies behind all that the GPU has been given so far, on a stream of their own."""
        self._lane = self._lane or torch.cuda.Stream(device)
        self._lane.wait_stream(torch.cuda.current_stream(device))
        self._copies = True
        with torch.cuda.stream(self._lane):
            yield

    def wait(self, device: torch.device) -> None:
        """Has the GPU wait for the copies that are under way; what left may then be written over."""
        if self._copies and self._lane is not None:
            torch.cuda.current_stream(device).wait_stream(self._lane)
        self._leaving, self._copies = None, False

    def place_for(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a place in pinned memory for `x`, flat and perhaps larger; one that is too small makes way for it."""
        fitting = [place for place in self._idle if place.dtype == x.dtype and place.numel() >= x.numel()]
        chosen = min(fitting or self._idle, key=torch.Tensor.numel, default=None)
        self._idle = [place for place in self._idle if place is not chosen]
        place = chosen if chosen is not None and fitting else pinned(x)
        if torch.cuda.is_current_stream_capturing():
            self._recorded.append(place)
        return place

    def give_back(self, place: torch.Tensor) -> None:
        """Takes back a place; what is copied there from now on follows what was copied from there."""
        self._idle.append(place)


def pinned(x: torch.Tensor) -> torch.Tensor:
    """Returns unwritten pinned memory for the numbers of a tensor, flat."""
    return torch.empty(x.numel(), dtype=x.dtype, pin_memory=True)


class Stored:
    """One tensor in pinned memory."""

    def __init__(self, x: torch.Tensor, memory: HostMemory, before: weakref.ref[Stored] | None) -> None:
        self._memory, self._device, self._before = memory, x.device, before
        self._back: torch.Tensor | None = None
        self._place = memory.place_for(x)
        self._host = self._place[: x.numel()].view(x.shape)
        with memory.copying(x.device):
            self._host.copy_(x, non_blocking=True)

    def fetch(self) -> None:
        """Begins to bring it back, into memory that belongs to the stream that computes."""
        self._back = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
        with self._memory.copying(self._device):
            self._back.copy_(self._host, non_blocking=True)

    def take(self) -> torch.Tensor:
        """Returns the tensor on its device, and begins to fetch the one stored before: it is wanted next."""
        if self._back is None:
            self.fetch()
        assert self._back is not None
        self._memory.wait(self._device)
        self._memory.give_back(self._place)
        before = self._before() if self._before else None
        if before is not None:
            before.fetch()
        back, self._back = self._back, None
        return back
