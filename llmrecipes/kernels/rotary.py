"""Rotary positions: queries and keys turned by the angles of their places, and their gradients turned back.

Given in plain PyTorch, which is what a CPU runs and what the tests compare with, and in Triton.
"""

from __future__ import annotations

import torch

from llmrecipes.kernels.jit import jit, runs_triton, tl, triton
from llmrecipes.kernels.quantize import (
    Quantized,
    Quantizer,
    part_of,
    quantized_plainly,
    room_for,
    rounding,
    statistics_of,
    store_scaled,
)


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    """Rotates `states` in place (RoPE, Su et al. 2021, arXiv 2104.09864, section 3.4.2).

    They are [rows, heads, size], a view perhaps; `cosine` and `sine` are [rows, size], their halves alike as
    transformers lays them out.
    """
    heads, size = states.shape[1:]
    if runs_triton(states):
        _rotate[(states.shape[0],)](
            states, cosine, sine, states.stride(0), states.stride(1), cosine.stride(0),
            heads=heads, half=size // 2, padded_heads=triton.next_power_of_2(heads),
            padded_half=triton.next_power_of_2(size // 2), num_warps=4,
        )  # fmt: skip
        return
    states.copy_(_rotated(states, cosine, sine))


def rotate_back(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cosine: torch.Tensor,
    sine: torch.Tensor,
    out: torch.Tensor,
    quantizer: Quantizer | None = None,
) -> Quantized | None:
    """Writes the gradients of query, key and value side by side into `out`, [rows, width]: the first two are those of
    rotated states, and are turned back.

    Each is [rows, heads, size]. Returns `out` in 8 bits as well, where a quantizer, which does not turn, is given.
    """
    query, key, value = gradients
    (rows, heads, size), key_heads, width = query.shape, key.shape[1], out.shape[1]
    if runs_triton(out):
        made = room_for(out, width, quantizer)
        strides = [stride for each in gradients for stride in each.stride()[:2]]
        _rotate_back[(rows,)](
            query, key, value, out, *made, cosine, sine, *strides, out.stride(0), cosine.stride(0),
            heads=heads, key_heads=key_heads, half=size // 2,
            padded_heads=triton.next_power_of_2(heads), padded_key_heads=triton.next_power_of_2(key_heads),
            padded_half=triton.next_power_of_2(size // 2), quantizes=quantizer is not None, width=width,
            part=part_of(width), **rounding(quantizer), num_warps=8,
        )  # fmt: skip
        return made if quantizer else None
    turned = [_rotated(each, cosine, -sine) for each in (query, key)]
    out.copy_(torch.cat([*turned, value.to(turned[0].dtype)], dim=1).flatten(1))
    return quantized_plainly(out, quantizer) if quantizer else None


def _rotated(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    half, kind = states.shape[2] // 2, statistics_of(states)
    cosine, sine = cosine[:, None, :half].to(kind), sine[:, None, :half].to(kind)
    first, second = states[..., :half].to(kind), states[..., half:].to(kind)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=2)


@jit
def _rotate(
    states, cosine, sine, stride, head_stride, angle_stride, heads: tl.constexpr, half: tl.constexpr,
    padded_heads: tl.constexpr, padded_half: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, padded_half)[None, :]
    turn = tl.load(cosine + row * angle_stride + at, mask=at < half, other=0.0).to(tl.float32)
    tilt = tl.load(sine + row * angle_stride + at, mask=at < half, other=0.0).to(tl.float32)
    states += row * stride
    _turn(states, states, turn, tilt, head_stride, head_stride, heads, half, padded_heads, padded_half)


@jit
def _turn(
    states, out, turn, tilt, head_stride, out_head_stride,
    heads: tl.constexpr, half: tl.constexpr, padded_heads: tl.constexpr, padded_half: tl.constexpr,
):  # fmt: skip
    """Writes the heads of a row rotated, and returns the largest of them, [padded heads, padded half]."""
    head = tl.arange(0, padded_heads)[:, None]
    at = tl.arange(0, padded_half)[None, :]
    inside = (head < heads) & (at < half)
    place = states + head * head_stride + at
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    place = out + head * out_head_stride + at
    kind = out.dtype.element_ty
    low = (first * turn - second * tilt).to(kind)
    high = (second * turn + first * tilt).to(kind)
    tl.store(place, low, mask=inside)
    tl.store(place + half, high, mask=inside)
    return tl.maximum(tl.abs(low.to(tl.float32)), tl.abs(high.to(tl.float32)))


@jit
def _rotate_back(
    query, key, value, out, values, scales, cosine, sine,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, angle_stride,
    heads: tl.constexpr, key_heads: tl.constexpr, half: tl.constexpr,
    padded_heads: tl.constexpr, padded_key_heads: tl.constexpr, padded_half: tl.constexpr,
    quantizes: tl.constexpr, width: tl.constexpr, part: tl.constexpr, largest: tl.constexpr, integer: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out += row * out_stride
    size: tl.constexpr = 2 * half
    at = tl.arange(0, padded_half)[None, :]
    turn = tl.load(cosine + row * angle_stride + at, mask=at < half, other=0.0).to(tl.float32)
    tilt = -tl.load(sine + row * angle_stride + at, mask=at < half, other=0.0).to(tl.float32)
    most = tl.max(_turn(query + row * q_stride, out, turn, tilt, q_head, size, heads, half, padded_heads, padded_half))
    out_key = out + heads * size
    turned = _turn(key + row * k_stride, out_key, turn, tilt, k_head, size, key_heads, half, padded_key_heads,
                   padded_half)  # fmt: skip
    most = tl.maximum(most, tl.max(turned))
    head = tl.arange(0, padded_key_heads)[:, None]
    at = tl.arange(0, 2 * padded_half)[None, :]
    inside = (head < key_heads) & (at < size)
    numbers = tl.load(value + row * v_stride + head * v_head + at, mask=inside, other=0.0)
    tl.store(out_key + key_heads * size + head * size + at, numbers.to(out.dtype.element_ty), mask=inside)
    most = tl.maximum(most, tl.max(tl.abs(numbers.to(tl.float32))))
    if quantizes:
        tl.debug_barrier()  # what one thread has written another reads
        for start in tl.static_range(0, width, part):
            at = start + tl.arange(0, part)
            inside = at < width
            made = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
            store_scaled(made, most, values + row * width, scales, row, at, inside, largest, integer, 1)
