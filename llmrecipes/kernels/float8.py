"""A frozen weight in float8_e4m3fn, a scale a row, expanded for one matmul: exactly, or to int8.

The kernels read bytes and make the numbers themselves, on cards without 8-bit floating point as well. Behind the sign
stand 4 bits of exponent, counted from -7, and 3 more; in a float16 5, counted from -15, and 10 more. So the same bits,
with a 0 before them, are a float16 of 1/256 of the number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmrecipes.kernels.jit import jit, runs_triton, tl, triton
from llmrecipes.kernels.quantize import FP8, in_8_bits, places, rotated, turned


@dataclass(frozen=True)
class Float8:
    """Weights one below the other, [rows, width]."""

    codes: torch.Tensor
    """uint8 [rows, width]: the bits of float8_e4m3fn"""
    scales: torch.Tensor
    """float32 [rows, 1]"""

    @property
    def values(self) -> torch.Tensor:
        """The codes as what they are, float8_e4m3fn [rows, width]; times the scales they are the weights."""
        return self.codes.view(FP8)


def expand(weight: Float8, out: torch.Tensor) -> torch.Tensor:
    """Writes the weight into `out`, [rows, width] of a floating type, rounded once, and returns it."""
    if not runs_triton(out):
        return out.copy_(expanded(weight))
    _expand(weight, out, out, rotation=1, scaled=False)
    return out


def expand_scaled(weight: Float8, out: torch.Tensor, scales: torch.Tensor, rotation: int) -> torch.Tensor:
    """Writes the weight turned and over its scales, one a row, into `out`, int8 [rows, width], and returns it."""
    if not runs_triton(out):
        return out.copy_(in_8_bits(rotated(expanded(weight), rotation) / scales[:, None], out.dtype))
    _expand(weight, out, scales, rotation, scaled=True)
    return out


def expand_transposed(weight: Float8, out: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Writes the weight transposed and over its scales, one a column of it, into `out`, int8 [width, rows]."""
    if not runs_triton(out):
        return out.copy_(in_8_bits(expanded(weight).t() / scales[:, None], out.dtype))
    (rows, width), height, across = weight.codes.shape, 128, 64
    _expand_columns[(triton.cdiv(rows, height), triton.cdiv(width, across))](
        weight.codes, weight.scales, out, scales, rows, width, out.stride(0),
        height=height, across=across, num_warps=4,
    )  # fmt: skip
    return out


def _expand(weight: Float8, out: torch.Tensor, scales: torch.Tensor, rotation: int, scaled: bool) -> None:
    rows, width = weight.codes.shape
    block = triton.next_power_of_2(width // rotation)
    _expand_rows[(rows,)](
        weight.codes, weight.scales, out, scales, out.stride(0),
        scaled=scaled, pieces=rotation, size=width // rotation, block=block,
        num_warps=min(16, max(1, rotation * block // 2048)),
    )  # fmt: skip


def expanded(weight: Float8) -> torch.Tensor:
    """Returns the weight in float32, [rows, width], in plain PyTorch."""
    return weight.values.float() * weight.scales


@jit
def _numbers(codes):
    """The numbers that bytes stand for, over 256, float32: exactly, those below float8's normal ones as well."""
    codes = codes.to(tl.uint16)
    return (((codes & 128) << 8) | ((codes & 127) << 7)).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _expand_rows(
    codes, scales, out, out_scales, stride,
    scaled: tl.constexpr, pieces: tl.constexpr, size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, inside = places(pieces, size, block)
    numbers = _numbers(tl.load(codes + row * (pieces * size) + at, mask=inside, other=0))
    factor = 256 * tl.load(scales + row)
    if scaled:  # the scale of a row may as well come behind the turn
        factor *= pieces**-0.5 / tl.load(out_scales + row)
        numbers = tl.floor(turned(numbers, block, pieces) * factor + 0.5)
    else:
        numbers *= factor
    tl.store(out + row * stride + at, numbers.to(out.dtype.element_ty), mask=inside)


@jit
def _expand_columns(
    codes, scales, out, out_scales, rows, width, stride, height: tl.constexpr, across: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * height + tl.arange(0, height))[:, None]
    column = (tl.program_id(1) * across + tl.arange(0, across))[None, :]
    inside = (row < rows) & (column < width)
    numbers = _numbers(tl.load(codes + row.to(tl.int64) * width + column, mask=inside, other=0))
    numbers *= 256 * tl.load(scales + row, mask=row < rows, other=0.0)
    numbers = tl.floor(numbers / tl.load(out_scales + column, mask=column < width, other=1.0) + 0.5)
    place = tl.trans(column).to(tl.int64) * stride + tl.trans(row)
    tl.store(out + place, tl.trans(numbers.to(out.dtype.element_ty)), mask=tl.trans(inside))
