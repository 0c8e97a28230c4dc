"""Rows in 8 bits, each with its scale; turned by a Hadamard matrix first where a large number would spoil its row.

The turn (Ashkboos et al. 2024, arXiv 2404.00456, section 3) mixes numbers that stand far apart: a row is 64 pieces,
and the matrix mixes the pieces number by number. So a kernel holds a piece in registers, and the turn is six rounds of
additions between registers, with no exchange between threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from llmrecipes.kernels.jit import jit, runs_triton, tl, triton

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
"""Largest number of float8_e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433, table 1)."""
INT8_LARGEST = 127.0

SMALLEST_SCALE = 1e-12
"""Scale of a row of zeros: nothing is ever divided by 0."""


class Quantized(NamedTuple):
    """Rows in 8 bits: `values` [rows, width] times `scales`, float32 [rows, 1], are the numbers."""

    values: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class Quantizer:
    """How rows are rounded to 8 bits, int8 or float8_e4m3fn; `rotation` is 1 where they are not turned."""

    dtype: torch.dtype
    rotation: int = 1

    @property
    def largest(self) -> float:
        """The largest number of the type."""
        return FP8_LARGEST if self.dtype == FP8 else INT8_LARGEST


def rotation_of(width: int) -> int:
    """Returns the largest power of two up to 64 that divides a width; below 16 nothing is turned, which is 1."""
    pieces = min(64, width & -width)
    return pieces if pieces >= 16 else 1


def rotated(rows: torch.Tensor, rotation: int) -> torch.Tensor:
    """Returns [rows, width] turned: `rotation` pieces of each row mixed by Sylvester's Hadamard matrix of 1 and -1,
    over its root. The same turn of two rows leaves their product as it was."""
    pieces = rows.unflatten(1, (rotation, -1))
    step = 1
    while step < rotation:
        first, second = pieces.unflatten(1, (-1, 2, step)).unbind(2)
        pieces = torch.stack([first + second, first - second], dim=2).flatten(1, 3)
        step *= 2
    return pieces.flatten(1) * rotation**-0.5


def quantized_rows(rows: torch.Tensor, quantizer: Quantizer, factors: torch.Tensor | None = None) -> Quantized:
    """Returns [rows, width] in 8 bits, one scale a row: its largest absolute value over the type's.

    `factors`, float32 [width], are multiplied in first.
    """
    if not runs_triton(rows):
        return quantized_plainly(rows if factors is None else rows * factors, quantizer)
    made = room_for(rows, rows.shape[1], quantizer)
    _quantize[(rows.shape[0],)](
        rows, rows if factors is None else factors, *made, rows.stride(0),
        multiplies=factors is not None, **options(rows.shape[1], quantizer),
    )  # fmt: skip
    return made


def quantized_plainly(rows: torch.Tensor, quantizer: Quantizer) -> Quantized:
    """The same in plain PyTorch."""
    numbers = rotated(rows.to(statistics_of(rows)), quantizer.rotation)
    scales = (numbers.abs().amax(1, keepdim=True) / quantizer.largest).clamp(min=SMALLEST_SCALE)
    return Quantized(in_8_bits(numbers / scales, quantizer.dtype), scales.float())


def in_8_bits(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns numbers that are over their scales already in int8 or float8_e4m3fn, to the nearest."""
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype)


def room_for(rows: torch.Tensor, width: int, quantizer: Quantizer | None) -> Quantized:
    """Returns unwritten room for the quantized rows; without a quantizer something that is never looked at."""
    if quantizer is None:
        return Quantized(rows, rows)
    values = torch.empty(rows.shape[0], width, dtype=quantizer.dtype, device=rows.device)
    return Quantized(values, torch.empty(rows.shape[0], 1, dtype=torch.float32, device=rows.device))


def options(width: int, quantizer: Quantizer | None, least_warps: int = 1) -> dict[str, Any]:
    """Returns a kernel's constants for one row a program, held in registers as a whole, piece by piece."""
    pieces = quantizer.rotation if quantizer else 1
    block = triton.next_power_of_2(width // pieces)
    return {
        **rounding(quantizer),
        "pieces": pieces,
        "size": width // pieces,
        "block": block,
        "num_warps": min(16, max(least_warps, pieces * block // 2048)),
    }


def rounding(quantizer: Quantizer | None) -> dict[str, Any]:
    """Returns a kernel's constants for the type that is rounded to; without a quantizer they are never looked at."""
    if quantizer is None:
        return {"largest": 0.0, "integer": False}
    return {"largest": quantizer.largest, "integer": quantizer.dtype == torch.int8}


def part_of(width: int) -> int:
    """Returns how much of a row a kernel holds in registers where all of it would not fit beside what is made of it."""
    return min(4096, triton.next_power_of_2(width))


def statistics_of(rows: torch.Tensor) -> torch.dtype:
    """Returns the type that is computed in: float32 at least."""
    return torch.promote_types(rows.dtype, torch.float32)


@jit
def places(pieces: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """Where the numbers of a row stand, [block, pieces], and which of them there are."""
    within = tl.arange(0, block)[:, None]
    at = tl.arange(0, pieces)[None, :] * size + within
    if pieces > 1:
        # Said to be aligned to nothing, numbers are loaded one by one, and a thread has the same of every piece.
        at = tl.multiple_of(at, (1, 1))
    return at, (within < size) & (at >= 0)


@jit
def turned(numbers, block: tl.constexpr, pieces: tl.constexpr):
    """Mixes [block, pieces] over its pieces, and leaves the root to the scale.

    Each round splits off the lowest bit of a piece's number and puts it before the others, so that after all rounds
    every piece is where it was.
    """
    for power in tl.static_range(6):
        if 2**power < pieces:
            first, second = tl.split(tl.reshape(numbers, (block, pieces // 2, 2)))
            both = tl.join(first + second, first - second)
            numbers = tl.reshape(tl.permute(both, (0, 2, 1)), (block, pieces))
    return numbers


@jit
def store_quantized(
    numbers, values, scales, row, at, inside,
    largest: tl.constexpr, integer: tl.constexpr, pieces: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Writes a row, [block, pieces] with 0 where it is not `inside`, turned and over its scale, and the scale."""
    numbers = turned(numbers, block, pieces)
    most = tl.max(tl.max(tl.abs(numbers), 1), 0)
    store_scaled(numbers, most, values, scales, row, at, inside, largest, integer, pieces)


@jit
def store_scaled(
    numbers, most, values, scales, row, at, inside,
    largest: tl.constexpr, integer: tl.constexpr, pieces: tl.constexpr,
):  # fmt: skip
    """Writes a row over the scale of its largest number, and the scale."""
    scale = tl.maximum(most / largest, 1e-12)
    tl.store(scales + row, scale * pieces**-0.5)
    scaled = numbers / scale
    if integer:
        scaled = tl.floor(scaled + 0.5)
    tl.store(values + at, scaled.to(values.dtype.element_ty), mask=inside)


@jit
def _quantize(
    rows, factors, values, scales, stride, multiplies: tl.constexpr,
    largest: tl.constexpr, integer: tl.constexpr, pieces: tl.constexpr, size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, inside = places(pieces, size, block)
    numbers = tl.load(rows + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    if multiplies:
        numbers *= tl.load(factors + at, mask=inside, other=0.0)
    values += row * (pieces * size)
    store_quantized(numbers, values, scales, row, at, inside, largest, integer, pieces, block)
