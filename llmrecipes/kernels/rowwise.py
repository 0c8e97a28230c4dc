"""The parts of a decoder layer that work row by row, forward and backward, on a GPU one kernel each.

Every function is given in plain PyTorch, which is what a CPU runs and what the tests compare with, and in Triton.
Statistics are float32 whatever the type of the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmrecipes.kernels.jit import jit, runs_triton, tl, triton
from llmrecipes.kernels.quantize import (
    Quantized,
    Quantizer,
    options,
    part_of,
    places,
    quantized_plainly,
    room_for,
    rounding,
    statistics_of,
    store_quantized,
    store_scaled,
)

# --- dropout ----------------------------------------------------------------------------------------------------------


def dropped(rows: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """Returns [rows, width] with a share of its numbers at 0 and the others raised to make up for it.

    Which ones depends on the seed and the shape alone, so that the backward pass drops the same without a stored mask.
    """
    if runs_triton(rows):
        width = rows.shape[1]
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        _drop[(rows.shape[0], triton.cdiv(width, 1024))](
            rows, out, rows.stride(0), width, share, seed, block=1024, num_warps=4
        )
        return out
    generator = torch.Generator(rows.device).manual_seed(seed)
    kept = torch.empty(rows.shape, device=rows.device).uniform_(generator=generator) >= share
    return rows * (kept / (1 - share)).to(rows.dtype)


@jit
def _drop(rows, out, stride, width, share, seed, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    numbers = tl.load(rows + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    kept = tl.rand(seed, row * width + at) >= share
    numbers = tl.where(kept, numbers / (1 - share), 0.0)
    tl.store(out + row * width + at, numbers.to(out.dtype.element_ty), mask=inside)


# --- RMSNorm ----------------------------------------------------------------------------------------------------------


def rms_norm(
    rows: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor, quantizer: Quantizer | None = None
) -> Quantized | None:
    """Writes RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4) of [rows, width] into `out`.

    Returns it in 8 bits as well, where a quantizer is given.
    """
    if runs_triton(rows):
        width = rows.shape[1]
        made = room_for(rows, width, quantizer)
        _rms_norm[(rows.shape[0],)](
            rows, weight, out, *made, rows.stride(0), out.stride(0), epsilon,
            quantizes=quantizer is not None, **options(width, quantizer),
        )  # fmt: skip
        return made if quantizer else None
    numbers = rows.to(statistics_of(rows))
    out.copy_(numbers * torch.rsqrt(numbers.square().mean(1, keepdim=True) + epsilon) * weight)
    return quantized_plainly(out, quantizer) if quantizer else None


def rms_norm_backward(
    gradient: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, epsilon: float, beside: torch.Tensor
) -> torch.Tensor:
    """Returns the gradient of the rows, [rows, width], plus that of the residual `beside` the norm."""
    if runs_triton(rows):
        width = rows.shape[1]
        found = torch.empty_like(rows)
        _rms_norm_backward[(rows.shape[0],)](
            gradient, rows, weight, beside, found, gradient.stride(0), width, epsilon,
            block=triton.next_power_of_2(width), num_warps=_warps(width),
        )  # fmt: skip
        return found
    kind = statistics_of(rows)
    numbers = rows.to(kind)
    scale = torch.rsqrt(numbers.square().mean(1, keepdim=True) + epsilon)
    normed, weighted = numbers * scale, gradient.to(kind) * weight
    inner = (weighted * normed).mean(1, keepdim=True)
    return (beside + scale * (weighted - normed * inner)).to(rows.dtype)


def rms_norm_weight_gradient(gradient: torch.Tensor, rows: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Returns the gradient of a norm's weight, [width]."""
    numbers = rows.to(statistics_of(rows))
    normed = numbers * torch.rsqrt(numbers.square().mean(1, keepdim=True) + epsilon)
    return (gradient * normed).sum(0)


@jit
def _rms_norm(
    rows, weight, out, values, scales, stride, out_stride, epsilon, quantizes: tl.constexpr,
    largest: tl.constexpr, integer: tl.constexpr, pieces: tl.constexpr, size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, inside = places(pieces, size, block)
    numbers = tl.load(rows + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.sum(numbers * numbers, 1), 0) / (pieces * size) + epsilon)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = (numbers * scale * weights).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + at, normed, mask=inside)
    if quantizes:
        values += row * (pieces * size)
        store_quantized(normed.to(tl.float32), values, scales, row, at, inside, largest, integer, pieces, block)


@jit
def _rms_norm_backward(
    gradient, rows, weight, beside, found, gradient_stride, width, epsilon, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    numbers = tl.load(rows + row * width + at, mask=inside, other=0.0).to(tl.float32)
    weighted = tl.load(gradient + row * gradient_stride + at, mask=inside, other=0.0).to(tl.float32)
    weighted *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(beside + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / width + epsilon)
    normed = numbers * scale
    inner = tl.sum(weighted * normed, 0) / width
    result = residual + scale * (weighted - normed * inner)
    tl.store(found + row * width + at, result.to(found.dtype.element_ty), mask=inside)


# --- SwiGLU -----------------------------------------------------------------------------------------------------------


def swiglu(gate_up: torch.Tensor, out: torch.Tensor, quantizer: Quantizer | None = None) -> Quantized | None:
    """Writes silu(gate) * up (Shazeer 2020, arXiv 2002.05202, eq. 6) into `out`, [rows, width].

    `gate_up` is [rows, 2 * width], the gate first. Returns `out` in 8 bits as well, where a quantizer is given.
    """
    width = gate_up.shape[1] // 2
    if runs_triton(gate_up):
        made = room_for(gate_up, width, quantizer)
        _swiglu[(gate_up.shape[0],)](
            gate_up, out, *made, gate_up.stride(0), out.stride(0), quantizes=quantizer is not None,
            part=part_of(width), **options(width, quantizer, least_warps=8),
        )  # fmt: skip
        return made if quantizer else None
    gate, up = gate_up[:, :width], gate_up[:, width:]
    out.copy_(F.silu(gate.to(statistics_of(gate_up))) * up)
    return quantized_plainly(out, quantizer) if quantizer else None


def swiglu_backward(
    gradient: torch.Tensor,
    gate_up: torch.Tensor,
    out: torch.Tensor,
    hidden: torch.Tensor,
    quantizer: Quantizer | None = None,
) -> Quantized | None:
    """Writes the gradient of `gate_up` into `out`, and silu(gate) * up once more into `hidden`.

    `gradient` and `hidden` are [rows, width], `out` is [rows, 2 * width]; `out` may be `gate_up` and `hidden` may be
    `gradient`. Returns `out` in 8 bits as well, where a quantizer, which does not turn, is given.
    """
    width = gate_up.shape[1] // 2
    if runs_triton(gate_up):
        made = room_for(gate_up, 2 * width, quantizer)
        _swiglu_backward[(gate_up.shape[0],)](
            gradient, gate_up, out, hidden, *made, gradient.stride(0), gate_up.stride(0), out.stride(0),
            hidden.stride(0), quantizes=quantizer is not None,
            part=part_of(width), size=width, **rounding(quantizer),
            num_warps=min(16, max(1, part_of(width) // 32)),  # in place: no two threads have the same number
        )  # fmt: skip
        return made if quantizer else None
    kind = statistics_of(gate_up)
    gate, up = gate_up[:, :width].to(kind), gate_up[:, width:].to(kind)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    gate_gradient, up_gradient = gradient * up * sigmoid * (1 + gate * (1 - sigmoid)), gradient * silu
    hidden.copy_(silu * up)
    out[:, :width], out[:, width : 2 * width] = gate_gradient, up_gradient
    return quantized_plainly(out[:, : 2 * width], quantizer) if quantizer else None


@jit
def _swiglu(
    gate_up, out, values, scales, stride, out_stride, quantizes: tl.constexpr, part: tl.constexpr,
    largest: tl.constexpr, integer: tl.constexpr, pieces: tl.constexpr, size: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * stride
    out += row * out_stride
    width: tl.constexpr = pieces * size
    for start in tl.static_range(0, width, part):
        at = start + tl.arange(0, part)
        inside = at < width
        gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)
    if quantizes:
        tl.debug_barrier()  # what one thread has written another reads
        at, inside = places(pieces, size, block)
        hidden = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
        store_quantized(hidden, values + row * width, scales, row, at, inside, largest, integer, pieces, block)


@jit
def _swiglu_backward(
    gradient, gate_up, out, hidden, values, scales, gradient_stride, stride, out_stride, hidden_stride,
    quantizes: tl.constexpr, part: tl.constexpr, size: tl.constexpr, largest: tl.constexpr, integer: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gradient += row * gradient_stride
    gate_up += row * stride
    out += row * out_stride
    hidden += row * hidden_stride
    kind = out.dtype.element_ty
    most = tl.zeros((part,), tl.float32)
    for start in tl.static_range(0, size, part):
        at = start + tl.arange(0, part)
        inside = at < size
        given = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + size + at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        gate_gradient = (given * up * sigmoid * (1 + gate * (1 - sigmoid))).to(kind)
        up_gradient = (given * silu).to(kind)
        tl.store(hidden + at, (silu * up).to(kind), mask=inside)
        tl.store(out + at, gate_gradient, mask=inside)
        tl.store(out + size + at, up_gradient, mask=inside)
        both = tl.maximum(tl.abs(gate_gradient.to(tl.float32)), tl.abs(up_gradient.to(tl.float32)))
        most = tl.maximum(most, both)
    if quantizes:
        largest_here = tl.max(most, 0)
        tl.debug_barrier()  # what one thread has written another reads
        for start in tl.static_range(0, 2 * size, 2 * part):
            at = start + tl.arange(0, 2 * part)
            inside = at < 2 * size
            made = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
            store_scaled(made, largest_here, values + row * (2 * size), scales, row, at, inside, largest, integer, 1)


def _warps(width: int) -> int:
    return 8 if width >= 2048 else 4
