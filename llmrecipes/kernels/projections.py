"""Linear layers that read the same rows, multiplied as one: q, k and v, or gate and up, or one alone; with LoRA.

y = x W' + s (x A') B' (Hu et al. 2021, arXiv 2106.09685, section 4.1) and its gradients, written out. W lies frozen in
16, 8 or 4 bits, or trains itself. It multiplies in one of two ways:

- exactly, in the compute type. Where W is frozen in that type, LoRA costs no pass of its own: x stands in a buffer
  with room for x A' behind it, and [x | x A'] [W | s B]' is the whole of it; so is the gradient.
- in 8 bits, rows and weights with their scales, forward and for the gradient of x. LoRA stays in the compute type.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmrecipes.kernels.eight_bit import EightBit
from llmrecipes.kernels.quantize import Quantized, Quantizer
from llmrecipes.kernels.rowwise import dropped
from llmrecipes.kernels.storage import FrozenStorage, Storage, weight_gradient

ALIGNED, ALIGNED_ROOM = 16, 64
"""Columns of LoRA are filled up to a multiple of this many: what matrix units take, and where they stand behind other
columns, the numbers of a cache line."""


@dataclass(frozen=True)
class Adapter:
    """LoRA of one linear layer of a group."""

    down: torch.nn.Parameter
    """A, [rank, width]"""
    up: torch.nn.Parameter
    """B, [size, rank]"""
    scale: float
    dropout: float
    columns: slice
    """where the layer stands in the outputs of the group"""


@dataclass(frozen=True)
class Low:
    """What LoRA's backward needs of its forward."""

    rows: torch.Tensor
    """x A' of all adapters side by side, [rows, ranks], filled up with zeros"""
    seed: int | None
    """of the dropout, adapter by adapter counted on from it; None without"""


def joined(lows: Sequence[Low | None]) -> Low | None:
    """Returns what several parts of the rows, one after the other, need together."""
    first = lows[0]
    if first is None or len(lows) == 1:
        return first
    return Low(torch.cat([low.rows for low in lows if low is not None]), first.seed)


@dataclass
class Given:
    """Rows that a group multiplies, or the gradient of its outputs."""

    buffer: torch.Tensor
    """one of the group's own"""
    quantized: Quantized | None = None
    """the same in 8 bits, where it was made along the way"""

    def release(self) -> None:
        """Lets go of what is no longer needed where the same is there in 8 bits."""
        if self.quantized is not None:
            self.buffer = self.buffer.new_empty(0, 0)


class Projections:
    """The linear layers of one group."""

    def __init__(
        self,
        storage: Storage,
        adapters: Sequence[Adapter],
        eight_bit: EightBit | None = None,
        takes_room: bool = True,
    ) -> None:
        """`eight_bit` multiplies in 8 bits, None exactly; `takes_room`: rows come in a buffer of the group's own."""
        self.storage, self.adapters, self.eight_bit = storage, list(adapters), eight_bit
        self.size, self.width, self.dtype = storage.size, storage.width, storage.dtype
        self.ranks = [each.down.shape[0] for each in adapters]
        self.drops = any(each.dropout for each in adapters)
        in_one = takes_room and isinstance(storage, FrozenStorage) and eight_bit is None and not self.drops
        aligned = ALIGNED_ROOM if in_one else ALIGNED
        self.low_width = -(-sum(self.ranks) // aligned) * aligned
        self.room = self.low_width if in_one else 0
        self._versions: list[int] = []
        if adapters:
            self._lay_out_copies()

    def _lay_out_copies(self) -> None:
        """Makes place for the adapters in the compute type: `down` [ranks, width], `up` [size, ranks].

        Each adapter has columns of its own in `up`, which are 0 where another layer's outputs are.
        """
        if self.room:
            assert isinstance(self.storage, FrozenStorage)
            self.whole = self.storage.make_room(self.room)
            self.down, self.up = self.whole[self.size :, : self.width], self.whole[: self.size, self.width :]
        else:
            like = self.adapters[0].up.new_empty(0, dtype=self.dtype)
            self.down = like.new_zeros(self.low_width, self.width)
            self.up = like.new_zeros(self.size, self.low_width)

    def refresh(self) -> None:
        """Copies the adapters, scale and all, into the compute type where an update has changed them."""
        versions = [version for each in self.adapters for version in (each.down._version, each.up._version)]
        if versions == self._versions:
            return
        for adapter, columns in zip(self.adapters, self._columns(), strict=True):
            self.down[columns] = adapter.down.detach()
            torch.mul(adapter.up.detach(), adapter.scale, out=self.up[adapter.columns, columns])
        self._versions = versions

    def _columns(self) -> list[slice]:
        """Returns which of the low columns are each adapter's."""
        ends = [sum(self.ranks[: place + 1]) for place in range(len(self.ranks))]
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that train, in the order of `gradients`."""
        return [*self.storage.trained, *(parameter for each in self.adapters for parameter in (each.down, each.up))]

    def buffer(self, rows: int, device: torch.device) -> torch.Tensor:
        """Returns [rows, width + room] for the rows that are multiplied: write them into its first `width` columns."""
        return torch.empty(rows, self.width + self.room, dtype=self.dtype, device=device)

    def gradient_buffer(self, rows: int, device: torch.device) -> torch.Tensor:
        """Returns [rows, size + room] for the gradient of the outputs, likewise."""
        return torch.empty(rows, self.size + self.room, dtype=self.dtype, device=device)

    @property
    def quantizer(self) -> Quantizer | None:
        """How the rows are rounded, or None where they multiply as they are."""
        return self.eight_bit.rows if self.eight_bit else None

    @property
    def gradient_quantizer(self) -> Quantizer | None:
        """How the gradient of the outputs is rounded, or None."""
        return self.eight_bit.gradients if self.eight_bit else None

    def forward(
        self, given: Given, seed: int | None = None, plus: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Low | None]:
        """Returns [rows, size], `plus` added to it, and what the gradients need.

        `seed` is that of LoRA's dropout, None for none.
        """
        rows, low = given.buffer[:, : self.width], None
        if self.adapters:
            self.refresh()
            low = self._low(rows, seed if self.drops else None)
        if self.eight_bit:
            added = (low.rows, self.up) if low else None
            made = self.eight_bit.product(rows, given.quantized, added, plus)
        elif self.room and low is not None:
            given.buffer[:, self.width :] = low.rows
            made = _multiplied(given.buffer, self.whole[: self.size], plus)
        else:
            made = _multiplied(rows, self.storage.matrix(), plus)
            if low is not None:
                made.addmm_(low.rows, self.up.t())
        return made if self.storage.bias is None else made.add_(self.storage.bias), low

    def _low(self, rows: torch.Tensor, seed: int | None) -> Low:
        if seed is None:
            return Low(rows @ self.down.t(), None)
        found = rows.new_zeros(rows.shape[0], self.low_width)
        for place, columns in enumerate(self._columns()):
            kept = dropped(rows, self.adapters[place].dropout, seed + place)
            found[:, columns] = kept @ self.down[columns].t()
        return Low(found, seed)

    def backward(
        self, gradient: Given, rows: torch.Tensor, low: Low | None, wanted: bool = True
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Returns the gradient of the rows, [rows, width], where it is wanted, and those of `trained`.

        `rows` are in a buffer. Lets go of the gradient of the outputs where it is there in 8 bits.
        """
        inner = self.low_gradient(gradient, low)
        found = self.gradients(gradient, rows, low, inner)
        gradient.release()
        return self.rows_gradient(gradient, low, inner) if wanted else None, found

    def low_gradient(self, gradient: Given, low: Low | None) -> torch.Tensor | None:
        """Returns the gradient of LoRA's low columns, [rows, ranks], or None without LoRA."""
        return None if low is None else gradient.buffer[:, : self.size] @ self.up

    def rows_gradient(self, gradient: Given, low: Low | None, inner: torch.Tensor | None) -> torch.Tensor:
        """Returns the gradient of the rows, [rows, width]; `inner` is that of the low columns."""
        given = gradient.buffer[:, : self.size]
        beside = low is not None and low.seed is not None
        if self.eight_bit:
            added = None if inner is None or beside else (inner, self.down.t())
            made = self.eight_bit.rows_gradient(given, gradient.quantized, added)
        elif self.room and inner is not None:
            gradient.buffer[:, self.size :] = inner
            made = gradient.buffer @ self.whole[:, : self.width]
        else:
            made = given @ self.storage.matrix()
            if inner is not None and not beside:
                made.addmm_(inner, self.down)
        if beside and low is not None and low.seed is not None and inner is not None:
            for place, columns in enumerate(self._columns()):
                dropout = self.adapters[place].dropout
                made += dropped(inner[:, columns] @ self.down[columns], dropout, low.seed + place)
        return made

    def gradients(
        self, gradient: Given, rows: torch.Tensor, low: Low | None, inner: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Returns the gradients of `trained`; `rows` are in a buffer."""
        given, rows = gradient.buffer[:, : self.size], rows[:, : self.width]
        found = self.storage.gradients(given, rows)
        if low is None or inner is None:
            return found
        downs = None
        if low.seed is None:
            downs = weight_gradient(inner[:, : sum(self.ranks)], rows, self.adapters[0].down.dtype)
        for place, (adapter, columns) in enumerate(zip(self.adapters, self._columns(), strict=True)):
            if downs is None:
                kept = dropped(rows, adapter.dropout, (low.seed or 0) + place)
                down = weight_gradient(inner[:, columns], kept, adapter.down.dtype)
            else:
                down = downs[columns]
            up = weight_gradient(given[:, adapter.columns], low.rows[:, columns], adapter.up.dtype)
            found += [down, up.mul_(adapter.scale)]
        return found


def _multiplied(rows: torch.Tensor, matrix: torch.Tensor, plus: torch.Tensor | None) -> torch.Tensor:
    """Returns rows times matrix transposed, plus `plus`."""
    if plus is None:
        return rows @ matrix.t()
    return torch.addmm(plus, rows, matrix.t()) if plus.dtype == rows.dtype else plus + rows @ matrix.t()
