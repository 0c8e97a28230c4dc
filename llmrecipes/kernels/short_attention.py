"""Causal attention within documents, for many documents that are short: no work is done for what lies between them.

A tile is 64 tokens of one document; tiles are listed with the batch (`DocumentSpans.tiles`), so that each program has
one, whatever the lengths. The backward pass is two kernels, one by keys and one by queries, and needs neither atomic
additions nor float32 copies (Dao 2023, arXiv 2307.08691, algorithm 2, with the loops in both orders).
"""

from __future__ import annotations

import torch

from llmrecipes.batch import TILE_TOKENS, DocumentSpans
from llmrecipes.kernels.jit import jit, runs_triton, tl


def takes(states: torch.Tensor) -> bool:
    """Returns whether these kernels take [tokens, heads, size]; of 256 the shared memory of smaller cards is short."""
    return runs_triton(states) and states.shape[2] in (16, 32, 64, 128)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: DocumentSpans, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns [tokens, heads, size], and the log of each softmax's sum, float32 [heads, tokens]."""
    tokens, heads, size = query.shape
    out = torch.empty(tokens, heads, size, dtype=query.dtype, device=query.device)
    sums = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    _forward[(len(spans.tiles), heads)](
        query, key, value, out, sums, spans.tiles, tokens,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1), scale,
        shared=heads // key.shape[1], size=size, tile=TILE_TOKENS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, sums


def backward(
    gradient: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    sums: torch.Tensor,
    spans: DocumentSpans,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value; `gradient` and `out` are contiguous."""
    query, key, value = states
    tokens, heads, size = query.shape
    key_heads = key.shape[1]
    made = tuple(torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in states)
    inner = torch.empty_like(sums)
    strides = (query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1))
    options = {"shared": heads // key_heads, "size": size, "tile": TILE_TOKENS, "num_warps": 4, "num_stages": 2}
    _query_gradient[(len(spans.tiles), heads)](
        query, key, value, out, gradient, sums, inner, made[0], spans.tiles, tokens, *strides, scale, **options
    )
    _key_gradient[(len(spans.tiles), key_heads)](
        query, key, value, gradient, sums, inner, made[1], made[2], spans.tiles, tokens, *strides, scale, heads,
        **options,
    )  # fmt: skip
    return made[0], made[1], made[2]


@jit
def _forward(
    query, key, value, out, sums, tiles, tokens, q_stride, q_head, k_stride, k_head, v_stride, v_head, scale,
    shared: tl.constexpr, size: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    start = tl.load(tiles + 3 * tl.program_id(0)).to(tl.int64)
    length = tl.load(tiles + 3 * tl.program_id(0) + 1)
    first = tl.load(tiles + 3 * tl.program_id(0) + 2)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    if length > 0:
        row = first + tl.arange(0, tile)
        at = tl.arange(0, size)
        inside = (row < length)[:, None]
        place = query + (start + row)[:, None] * q_stride + head * q_head + at[None, :]
        asked = tl.load(place, mask=inside, other=0.0)
        largest = tl.full([tile], -float("inf"), tl.float32)
        total = tl.zeros([tile], tl.float32)
        result = tl.zeros([tile, size], tl.float32)
        exponent = scale * 1.4426950408889634  # log2(e): powers of 2 are what the hardware has
        for column in range(0, tl.minimum(first + tile, length), tile):
            col = column + tl.arange(0, tile)
            there = (col < length)[:, None]
            token = (start + col)[:, None]
            keys = tl.load(key + token * k_stride + (head // shared) * k_head + at[None, :], mask=there, other=0.0)
            values = tl.load(value + token * v_stride + (head // shared) * v_head + at[None, :], mask=there, other=0.0)
            score = tl.dot(asked, keys.T, input_precision="ieee") * exponent
            score = tl.where((col[None, :] <= row[:, None]) & (col < length)[None, :], score, -float("inf"))
            new = tl.maximum(largest, tl.max(score, 1))
            weight = tl.exp2(score - new[:, None])
            fade = tl.exp2(largest - new)
            total = total * fade + tl.sum(weight, 1)
            result = result * fade[:, None]
            result = tl.dot(weight.to(values.dtype), values, result, input_precision="ieee")
            largest = new
        result = result / total[:, None]
        place = out + ((start + row)[:, None] * heads + head) * size + at[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=inside)
        tl.store(sums + head.to(tl.int64) * tokens + start + row, largest + tl.log2(total), mask=row < length)


@jit
def _query_gradient(
    query, key, value, out, gradient, sums, inner, made, tiles, tokens,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, scale,
    shared: tl.constexpr, size: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    start = tl.load(tiles + 3 * tl.program_id(0)).to(tl.int64)
    length = tl.load(tiles + 3 * tl.program_id(0) + 1)
    first = tl.load(tiles + 3 * tl.program_id(0) + 2)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    if length > 0:
        row = first + tl.arange(0, tile)
        at = tl.arange(0, size)
        inside = (row < length)[:, None]
        flat = ((start + row)[:, None] * heads + head) * size + at[None, :]
        place = query + (start + row)[:, None] * q_stride + head * q_head + at[None, :]
        asked = tl.load(place, mask=inside, other=0.0)
        given = tl.load(gradient + flat, mask=inside, other=0.0)
        summed = tl.load(sums + head.to(tl.int64) * tokens + start + row, mask=row < length, other=0.0)
        told = tl.load(out + flat, mask=inside, other=0.0).to(tl.float32)
        product = tl.sum(told * given.to(tl.float32), 1)
        tl.store(inner + head.to(tl.int64) * tokens + start + row, product, mask=row < length)
        result = tl.zeros([tile, size], tl.float32)
        exponent = scale * 1.4426950408889634
        for column in range(0, tl.minimum(first + tile, length), tile):
            col = column + tl.arange(0, tile)
            there = (col < length)[:, None]
            token = (start + col)[:, None]
            keys = tl.load(key + token * k_stride + (head // shared) * k_head + at[None, :], mask=there, other=0.0)
            values = tl.load(value + token * v_stride + (head // shared) * v_head + at[None, :], mask=there, other=0.0)
            score = tl.dot(asked, keys.T, input_precision="ieee") * exponent
            visible = (col[None, :] <= row[:, None]) & (col < length)[None, :]
            weight = tl.where(visible, tl.exp2(score - summed[:, None]), 0.0)
            change = tl.dot(given, values.T, input_precision="ieee")
            change = weight * (change - product[:, None])
            result = tl.dot(change.to(keys.dtype), keys, result, input_precision="ieee")
        tl.store(made + flat, (result * scale).to(made.dtype.element_ty), mask=inside)


@jit
def _key_gradient(
    query, key, value, gradient, sums, inner, made_key, made_value, tiles, tokens,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, scale, heads,
    shared: tl.constexpr, size: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    start = tl.load(tiles + 3 * tl.program_id(0)).to(tl.int64)
    length = tl.load(tiles + 3 * tl.program_id(0) + 1)
    first = tl.load(tiles + 3 * tl.program_id(0) + 2)
    key_head = tl.program_id(1)
    key_heads = tl.num_programs(1)
    if length > 0:
        col = first + tl.arange(0, tile)
        at = tl.arange(0, size)
        inside = (col < length)[:, None]
        token = (start + col)[:, None]
        keys = tl.load(key + token * k_stride + key_head * k_head + at[None, :], mask=inside, other=0.0)
        values = tl.load(value + token * v_stride + key_head * v_head + at[None, :], mask=inside, other=0.0)
        key_result = tl.zeros([tile, size], tl.float32)
        value_result = tl.zeros([tile, size], tl.float32)
        exponent = scale * 1.4426950408889634
        for member in range(0, shared):
            head = key_head * shared + member
            for begin in range(first, length, tile):
                row = begin + tl.arange(0, tile)
                there = row < length
                asker = query + (start + row)[:, None] * q_stride + head * q_head + at[None, :]
                asked = tl.load(asker, mask=there[:, None], other=0.0)
                flat = ((start + row)[:, None] * heads + head) * size + at[None, :]
                given = tl.load(gradient + flat, mask=there[:, None], other=0.0)
                line = head.to(tl.int64) * tokens + start + row
                summed = tl.load(sums + line, mask=there, other=0.0)
                product = tl.load(inner + line, mask=there, other=0.0)
                score = tl.dot(keys, asked.T, input_precision="ieee") * exponent
                visible = (col[:, None] <= row[None, :]) & there[None, :]
                weight = tl.where(visible, tl.exp2(score - summed[None, :]), 0.0)
                value_result = tl.dot(weight.to(given.dtype), given, value_result, input_precision="ieee")
                change = tl.dot(values, given.T, input_precision="ieee")
                change = weight * (change - product[None, :])
                key_result = tl.dot(change.to(asked.dtype), asked, key_result, input_precision="ieee")
        mine = ((start + col)[:, None] * key_heads + key_head) * size + at[None, :]
        tl.store(made_key + mine, (key_result * scale).to(made_key.dtype.element_ty), mask=inside)
        tl.store(made_value + mine, value_result.to(made_value.dtype.element_ty), mask=inside)
