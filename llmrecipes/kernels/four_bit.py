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
from llmrecipes.kernels.quantize import in_8_bits, rotated, turned

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
    _expand_blocks(weight, out, None)
    return out


def expand_scaled(weight: FourBit, out: torch.Tensor, scales: torch.Tensor, rotation: int) -> torch.Tensor:
    """Writes the weight turned and over its scales, one a row, into `out`, [rows, width], and returns it.

    `out` is in 8 bits; int8 is rounded, and alone is turned by a kernel.
    """
    turns = out.dtype == torch.int8 and weight.width % (2 * rotation) == 0 and _in_words(out, 2)
    if runs_triton(out) and rotation == 1:
        _expand_blocks(weight, out, scales)
    elif runs_triton(out) and turns:
        half = weight.width // (2 * rotation)
        pairs = min(2048 // rotation, weight.block // 2, triton.next_power_of_2(half))
        _expand_turned[(weight.rows, triton.cdiv(half, pairs))](
            *_parts(weight), out.view(torch.int16), scales, weight.rows, out.stride(0) // 2, **_constants(weight),
            pieces=rotation, half=half, pairs=pairs, num_warps=1,
        )  # fmt: skip
    else:
        out.copy_(in_8_bits(rotated(expanded(weight), rotation) / scales[:, None], out.dtype))
    return out


def _expand_blocks(weight: FourBit, out: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Has the weight written into `out` as it is, or over `scales`, one a row."""
    held = max(1, 2048 // weight.block)
    blocks = triton.cdiv(weight.rows * weight.width, weight.block)
    _expand[(triton.cdiv(blocks, held),)](
        *_parts(weight), out, out if scales is None else scales, weight.rows * weight.width, out.stride(0),
        **_constants(weight), width=weight.width, scaled=scales is not None, integer=out.dtype == torch.int8,
        held=held, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def expand_transposed(weight: FourBit, out: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Writes the weight transposed and over its scales, one a column of it, into `out`, [width, rows], in 8 bits."""
    if not runs_triton(out) or weight.width % 2 or not _in_words(out, 4):
        return out.copy_(in_8_bits(expanded(weight).t() / scales[:, None], out.dtype))
    fours, pairs = 16, 32
    _expand_columns[(triton.cdiv(weight.rows, 4 * fours), triton.cdiv(weight.width, 2 * pairs))](
        *_parts(weight), out.view(torch.int32), scales, weight.rows, weight.width, out.stride(0) // 4,
        **_constants(weight), integer=out.dtype == torch.int8, fours=fours, pairs=pairs,
        aligned=2 * pairs == weight.block and weight.width % weight.block == 0, num_warps=1,
    )  # fmt: skip
    return out


def _in_words(out: torch.Tensor, size: int) -> bool:
    """Returns whether rows of 8 bits can be written in words of so many bytes."""
    return out.shape[1] % size == 0 and out.stride(0) % size == 0 and out.storage_offset() % size == 0


def _constants(weight: FourBit) -> dict[str, Any]:
    """Returns a kernel's constants for how the weight is stored."""
    return {"block": weight.block, "scale_block": weight.scale_block, "nested": weight.scale_table is not None}


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
def _numbers(table, codes):
    """What 4-bit codes, [rows, columns], stand for. A kernel of one warp holds the table in its lanes."""
    flat = tl.reshape(codes, (codes.shape[0] * codes.shape[1],))
    return tl.reshape(tl.gather(tl.load(table + tl.arange(0, 16)), flat, 0), codes.shape)


@jit
def _bits(numbers, integer: tl.constexpr):
    """Numbers over their scales as 8 bits, in the lowest of an int32."""
    if integer:
        # The unit of a float32 of this size is 1: adding it rounds, and leaves the integer in the lowest bits.
        bits = (numbers + 12582912.0).to(tl.int32, bitcast=True) & 255
    else:
        bits = numbers.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    return bits


@jit
def _expand(
    packed, table, scales, scale_table, scale_scales, offset, out, out_scales, total, stride,
    block: tl.constexpr, scale_block: tl.constexpr, nested: tl.constexpr,
    width: tl.constexpr, scaled: tl.constexpr, integer: tl.constexpr, held: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * held + tl.arange(0, held)[:, None]
    at = number * (block // 2) + tl.arange(0, block // 2)[None, :]
    codes = tl.load(packed + at, mask=2 * at < total, other=0).to(tl.int32)
    scale = _scale_at(scales, scale_table, scale_scales, offset, number, number * block < total, scale_block, nested)
    numbers = tl.join(_numbers(table, codes >> 4) * scale, _numbers(table, codes & 15) * scale)
    numbers = tl.reshape(numbers, (held, block))
    at = number * block + tl.arange(0, block)[None, :]
    inside = at < total
    row = number // (width // block) if width % block == 0 else at // width
    if scaled:
        numbers *= 1 / tl.load(out_scales + row, mask=row * width < total, other=1.0)
    if integer:
        numbers = tl.floor(numbers + 0.5)
    tl.store(out + row * stride + (at - row * width), numbers.to(out.dtype.element_ty), mask=inside)


@jit
def _expand_turned(
    packed, table, scales, scale_table, scale_scales, offset, out, out_scales, rows, stride,
    block: tl.constexpr, scale_block: tl.constexpr, nested: tl.constexpr,
    pieces: tl.constexpr, half: tl.constexpr, pairs: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, pairs)[:, None]
    piece = tl.arange(0, pieces)[None, :]
    first_pair = tl.program_id(1) * pairs
    at = tl.multiple_of(piece * half + first_pair + within, (1, 1))  # as in `places`
    inside = (within >= 0) & (piece >= 0)
    if half % pairs > 0:
        inside &= first_pair + within < half
    codes = tl.load(packed + row * (pieces * half) + at, mask=inside, other=0).to(tl.int32)
    # What a program has of a piece is of one block, or of two that follow each other.
    start = row * (pieces * half) + piece * half + first_pair
    number = start // (block // 2)
    scale = _scale_at(scales, scale_table, scale_scales, offset, number, piece >= 0, scale_block, nested)
    if half % (block // 2) > 0 or block // 2 % pairs > 0:
        there = (number + 1) * (block // 2) // (pieces * half) < rows  # the row that it begins in
        after = _scale_at(scales, scale_table, scale_scales, offset, number + 1, there, scale_block, nested)
        scale = tl.where(start % (block // 2) + within < block // 2, scale, after)
    factor = pieces**-0.5 / tl.load(out_scales + row)
    first = turned(_numbers(table, codes >> 4) * scale, pairs, pieces) * factor
    second = turned(_numbers(table, codes & 15) * scale, pairs, pieces) * factor
    both = _bits(first, True) | (_bits(second, True) << 8)
    tl.store(out + row * stride + at, both.to(tl.int16), mask=inside)


@jit
def _expand_columns(
    packed, table, scales, scale_table, scale_scales, offset, out, out_scales, rows, width, stride,
    block: tl.constexpr, scale_block: tl.constexpr, nested: tl.constexpr, integer: tl.constexpr,
    aligned: tl.constexpr, fours: tl.constexpr, pairs: tl.constexpr,
):  # fmt: skip
    """Four rows at a time: they are one word of a column."""
    four = (tl.program_id(0) * fours + tl.arange(0, fours))[:, None]
    pair = (tl.program_id(1) * pairs + tl.arange(0, pairs))[None, :]
    inside = (four < rows // 4) & (pair < width // 2)
    column = tl.program_id(1) * 2 * pairs + tl.arange(0, 2 * pairs)
    factors = 1 / tl.load(out_scales + column, mask=column < width, other=1.0)
    first_factor, second_factor = tl.split(tl.reshape(factors, (1, pairs, 2)))
    first = tl.zeros((fours, pairs), tl.int32)
    second = tl.zeros((fours, pairs), tl.int32)
    for place in tl.static_range(4):
        row = 4 * four + place
        at = row.to(tl.int64) * (width // 2) + pair
        codes = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
        if aligned:  # what a program has of a row is one block
            number = row * (width // block) + tl.program_id(1)
            there = four < rows // 4
        else:
            number = at // (block // 2)
            there = inside
        scale = _scale_at(scales, scale_table, scale_scales, offset, number, there, scale_block, nested)
        first |= _bits(_numbers(table, codes >> 4) * scale * first_factor, integer) << (8 * place)
        second |= _bits(_numbers(table, codes & 15) * scale * second_factor, integer) << (8 * place)
    at = column[:, None].to(tl.int64) * stride + tl.trans(four)
    made = tl.trans(tl.interleave(first, second))
    tl.store(out + at, made, mask=(column[:, None] < width) & (tl.trans(four) < rows // 4))
