"""bitsandbytes' 4-bit weights, expanded for one matmul: to 16 bits exactly as bitsandbytes would, or to 8 bits.

Two weights stand in a byte, the first in its upper half; each is one of 16 numbers times the scale of its block of 64
(Dettmers et al. 2023, arXiv 2305.14314, section 3). Where the scales are quantized as well (double quantization), they
are 8-bit codes times a scale of 256 of them, plus an offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llmrecipes.kernels.jit import jit, runs_triton, tl, triton
from llmrecipes.kernels.quantize import in_8_bits, places, rotated, turned

BLOCK = 64


@dataclass(frozen=True)
class FourBit:
    """One weight of [rows, width] as bitsandbytes keeps it."""

    packed: torch.Tensor
    """uint8 [rows * width / 2], whatever type it was declared as"""
    table: torch.Tensor
    """float32 [16]"""
    scales: torch.Tensor
    """float32 [blocks], or uint8 codes where they are quantized as well"""
    scale_table: torch.Tensor | None
    """float32 [256], with double quantization"""
    scale_scales: torch.Tensor | None
    """float32 [blocks / 256]"""
    offset: torch.Tensor | None
    """float32, one number"""
    rows: int
    width: int
    block: int = BLOCK
    """weights of one scale"""
    scale_block: int = 256
    """scales of one scale of scales"""

    @classmethod
    def of(cls, weight: Any) -> FourBit:
        """Returns a `Params4bit`'s storage, shared with it."""
        state = weight.quant_state
        rows, width = state.shape
        nested = state.state2 if state.nested else None
        return cls(
            packed=weight.data.view(torch.uint8).flatten(),
            table=state.code.float(),
            scales=state.absmax,
            scale_table=nested.code.float() if nested else None,
            scale_scales=nested.absmax if nested else None,
            offset=state.offset.float() if nested else None,
            rows=rows,
            width=width,
            block=state.blocksize,
            scale_block=nested.blocksize if nested else 256,
        )

    def plain_scales(self) -> torch.Tensor:
        """Returns the scale of every block, float32 [blocks]."""
        if self.scale_table is None:
            return self.scales
        assert self.scale_scales is not None and self.offset is not None
        large = self.scale_scales.repeat_interleave(self.scale_block)[: len(self.scales)]
        return self.scale_table[self.scales.int()] * large + self.offset


def expand(weight: FourBit, out: torch.Tensor) -> torch.Tensor:
    """Writes the weight into `out`, [rows, width] of a floating type, and returns it: bitsandbytes' own numbers."""
    if not runs_triton(out):
        return out.copy_(expanded(weight))
    _expand(weight, out, out, rotation=1, scaled=False)
    return out


def expand_scaled(weight: FourBit, out: torch.Tensor, scales: torch.Tensor, rotation: int) -> torch.Tensor:
    """Writes the weight turned and over its scales, one a row, into `out`, [rows, width], and returns it.

    `out` is in 8 bits; int8 is rounded.
    """
    if runs_triton(out) and weight.width % (2 * rotation) == 0:
        _expand(weight, out, scales, rotation, scaled=True)
        return out
    return out.copy_(in_8_bits(rotated(expanded(weight), rotation) / scales[:, None], out.dtype))


def expand_transposed(weight: FourBit, out: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Writes the weight transposed and over its scales, one a column of it, into `out`, [width, rows], in 8 bits."""
    if not runs_triton(out):
        return out.copy_(in_8_bits(expanded(weight).t() / scales[:, None], out.dtype))
    height, pairs = 128, 32
    _expand_columns[(triton.cdiv(weight.rows, height), triton.cdiv(weight.width, 2 * pairs))](
        *_parts(weight), out, scales, weight.rows, weight.width, out.stride(0),
        block=weight.block, scale_block=weight.scale_block, nested=weight.scale_table is not None,
        aligned=2 * pairs == weight.block and weight.width % weight.block == 0, integer=out.dtype == torch.int8,
        height=height, pairs=pairs, num_warps=4,
    )  # fmt: skip
    return out


def _expand(weight: FourBit, out: torch.Tensor, scales: torch.Tensor, rotation: int, scaled: bool) -> None:
    pairs = triton.next_power_of_2(weight.width // (2 * rotation))
    _expand_rows[(weight.rows,)](
        *_parts(weight), out, scales, out.stride(0),
        block=weight.block, scale_block=weight.scale_block, nested=weight.scale_table is not None, scaled=scaled,
        integer=out.dtype == torch.int8, pieces=rotation, size=weight.width // rotation, pairs=pairs,
        num_warps=min(16, max(1, rotation * pairs // 2048)), enable_fp_fusion=False,
    )  # fmt: skip


def _parts(weight: FourBit) -> tuple[torch.Tensor, ...]:
    """Returns the tensors that a kernel reads; in place of those that are not there something never looked at."""
    nested = (weight.scale_table, weight.scale_scales, weight.offset)
    return (weight.packed, weight.table, weight.scales, *(weight.table if part is None else part for part in nested))


def expanded(weight: FourBit) -> torch.Tensor:
    """Returns the weight in float32, [rows, width], in plain PyTorch."""
    codes = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).flatten().int()
    scales = weight.plain_scales().repeat_interleave(weight.block)[: len(codes)]
    return (weight.table[codes] * scales).view(weight.rows, weight.width)


@jit
def _scale_at(
    scales, scale_table, scale_scales, offset, number, mask, scale_block: tl.constexpr, nested: tl.constexpr
):  # fmt: skip
    """The scale of the blocks of weights with these numbers."""
    if nested:
        code = tl.load(scales + number, mask=mask, other=0).to(tl.int32)
        large = tl.load(scale_scales + number // scale_block, mask=mask, other=0.0)
        scale = tl.load(scale_table + code) * large + tl.load(offset)
    else:
        scale = tl.load(scales + number, mask=mask, other=0.0)
    return scale


@jit
def _expand_rows(
    packed, table, scales, scale_table, scale_scales, offset, out, out_scales, stride,
    block: tl.constexpr, scale_block: tl.constexpr, nested: tl.constexpr, scaled: tl.constexpr, integer: tl.constexpr,
    pieces: tl.constexpr, size: tl.constexpr, pairs: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at, inside = places(pieces, size // 2, pairs)
    place = row * (pieces * size // 2) + at
    codes = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
    scale = _scale_at(scales, scale_table, scale_scales, offset, place // (block // 2), inside, scale_block, nested)
    first = turned(tl.load(table + (codes >> 4)) * scale, pairs, pieces)
    second = turned(tl.load(table + (codes & 15)) * scale, pairs, pieces)
    if scaled:
        factor = pieces**-0.5 / tl.load(out_scales + row)
        first *= factor
        second *= factor
    if integer:
        first = tl.floor(first + 0.5)
        second = tl.floor(second + 0.5)
    kind = out.dtype.element_ty
    numbers = tl.reshape(tl.permute(tl.join(first.to(kind), second.to(kind)), (0, 2, 1)), (2 * pairs, pieces))
    within = tl.arange(0, 2 * pairs)[:, None]
    at = tl.multiple_of(tl.arange(0, pieces)[None, :] * size + within, (2, 1))
    tl.store(out + row.to(tl.int64) * stride + at, numbers, mask=(within < size) & (at >= 0))


@jit
def _expand_columns(
    packed, table, scales, scale_table, scale_scales, offset, out, out_scales, rows, width, stride,
    block: tl.constexpr, scale_block: tl.constexpr, nested: tl.constexpr, aligned: tl.constexpr,
    integer: tl.constexpr, height: tl.constexpr, pairs: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * height + tl.arange(0, height))[:, None]
    pair = (tl.program_id(1) * pairs + tl.arange(0, pairs))[None, :]
    inside = (row < rows) & (2 * pair < width)
    place = row * (width // 2) + pair
    codes = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
    if aligned:  # a row of the tile is one block
        number = row * (width // block) + tl.program_id(1)
        scale = _scale_at(scales, scale_table, scale_scales, offset, number, row < rows, scale_block, nested)
    else:
        number = place // (block // 2)
        scale = _scale_at(scales, scale_table, scale_scales, offset, number, inside, scale_block, nested)
    column = (tl.program_id(1) * 2 * pairs + tl.arange(0, 2 * pairs))[None, :]
    numbers = tl.interleave(tl.load(table + (codes >> 4)) * scale, tl.load(table + (codes & 15)) * scale)
    numbers *= 1 / tl.load(out_scales + column, mask=column < width, other=1.0)
    if integer:
        numbers = tl.floor(numbers + 0.5)
    made = tl.trans(numbers.to(out.dtype.element_ty))
    column, row = tl.trans(column), tl.trans(row)
    tl.store(out + column.to(tl.int64) * stride + row, made, mask=(column < width) & (row < rows))
