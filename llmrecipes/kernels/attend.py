"""Causal attention within documents as two plain steps, forward and backward, for layers that write their own gradient.

Short documents of many lengths go to FlashAttention-2's varlen kernel; rows that are one document each, to the dense
kernel, cuDNN's where there is one (on Hopper it takes half the time of FlashAttention-2 at 4,096 tokens); on a CPU
documents of like length are attended together.
"""

from dataclasses import dataclass

import torch

from llmrecipes.batch import DocumentGroups, DocumentLayout, DocumentSpans
from llmrecipes.kernels import short_attention
from llmrecipes.kernels.attention import SHORT_ON_CPU, takes_flash

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """How the tokens of one batch attend."""

    rows: int
    layout: DocumentLayout | None
    """None: every row is one document"""
    scale: float

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns [tokens, heads, size] and what `backward` needs of it; `key` and `value` may have fewer heads."""
        if isinstance(self.layout, DocumentGroups):
            return _grouped(query, key, value, self.layout, self.scale)
        if self._is_short(query):
            assert isinstance(self.layout, DocumentSpans)
            attended, sums = short_attention.forward(query, key, value, self.layout, self.scale)
            return attended, (sums,)
        if self._is_flash(query):
            offsets, longest = self._flash_places(query)
            states = [self._flash_shape(each) for each in (query, key, value)]
            attended, statistics, seed, unused, _ = aten._flash_attention_forward(
                *states, offsets, offsets, longest, longest, 0.0, True, False, scale=self.scale
            )
            return attended.view_as(query), (statistics, seed, unused)
        attended, *statistics = _dense(*(self._by_row(states) for states in (query, key, value)), scale=self.scale)
        return attended.transpose(1, 2).flatten(0, 1), tuple(statistics)

    def backward(
        self,
        gradient: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        attended: torch.Tensor,
        statistics: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the gradients of query, key and value, each [tokens, heads, size]."""
        if isinstance(self.layout, DocumentGroups):
            return _grouped_backward(gradient, states, statistics, self.layout, self.scale)
        if self._is_short(gradient):
            assert isinstance(self.layout, DocumentSpans)
            return short_attention.backward(gradient, states, attended, statistics[0], self.layout, self.scale)
        if self._is_flash(gradient):
            offsets, longest = self._flash_places(gradient)
            given = [self._flash_shape(each) for each in (gradient, *states, attended)]
            found = aten._flash_attention_backward(
                *given, statistics[0], offsets, offsets, longest, longest, 0.0, True, statistics[1], statistics[2],
                scale=self.scale,
            )  # fmt: skip
            query, key, value = (made.view_as(each) for made, each in zip(found, states, strict=True))
            return query, key, value
        dense = _dense_backward(
            self._by_row(gradient), tuple(self._by_row(each) for each in states), self._by_row(attended), statistics,
            self.scale,
        )  # fmt: skip
        query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in dense)
        return query, key, value

    def _by_row(self, states: torch.Tensor) -> torch.Tensor:
        """Returns [rows, heads, tokens, size] of [rows * tokens, heads, size]."""
        return states.unflatten(0, (self._dense_rows, -1)).transpose(1, 2)

    @property
    def _dense_rows(self) -> int:
        """How many documents of one length there are, 0 where their lengths differ."""
        return self.layout.equal_documents if isinstance(self.layout, DocumentSpans) else self.rows

    def _is_short(self, states: torch.Tensor) -> bool:
        """Returns whether it is one for the kernels of short documents."""
        if not isinstance(self.layout, DocumentSpans) or not short_attention.takes(states):
            return False
        return self.layout.longest <= SHORT and not self._is_long(states)

    def _is_long(self, states: torch.Tensor) -> bool:
        """Returns whether all documents are of one length, long enough for the dense kernel to be the faster one."""
        count = self._dense_rows
        sizes = states.shape[2] in (64, 128) and takes_flash(states.device, states.shape[2])
        return sizes and count > 0 and states.shape[0] // count >= LONG

    def _is_flash(self, states: torch.Tensor) -> bool:
        """Returns whether it is one for FlashAttention-2, which has 16 bits only."""
        return states.element_size() == 2 and takes_flash(states.device, states.shape[2]) and not self._is_long(states)

    def _flash_places(self, states: torch.Tensor) -> tuple[torch.Tensor | None, int]:
        """Returns where documents begin, and the length of the longest; None where rows are documents."""
        if isinstance(self.layout, DocumentSpans):
            return self.layout.offsets, self.layout.longest
        return None, states.shape[0] // self.rows

    def _flash_shape(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the states as they are where offsets tell documents apart, else [rows, tokens, heads, size]."""
        return states if isinstance(self.layout, DocumentSpans) else states.unflatten(0, (self.rows, -1))


SHORT = 2048
"""Tokens up to which the longest document of a batch is one for the kernels of short documents."""

LONG = 1024
"""Tokens from which documents of one length go to the dense kernel."""


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float) -> tuple[torch.Tensor, ...]:
    """Returns attention over [rows, heads, tokens, size] and its three statistics."""
    if not query.is_cuda:
        attended, statistics = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scale
        )
        return attended, statistics, statistics, statistics
    key, value = (_repeated(states, query.shape[1]) for states in (key, value))
    if query.element_size() > 2 or not takes_flash(query.device, query.shape[3]):
        found: tuple[torch.Tensor, ...] = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, True, scale=scale
        )
        return found
    attended, statistics, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, True, False, scale=scale
    )
    return attended, statistics, seed, offset


def _dense_backward(
    gradient: torch.Tensor,
    states: tuple[torch.Tensor, ...],
    attended: torch.Tensor,
    statistics: tuple[torch.Tensor, ...],
    scale: float,
) -> tuple[torch.Tensor, ...]:
    query, key, value = states
    if not query.is_cuda:
        found: tuple[torch.Tensor, ...] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, attended, statistics[0], 0.0, True, scale=scale
        )
        return found
    shared = query.shape[1] // key.shape[1]
    key, value = (_repeated(each, query.shape[1]) for each in (key, value))
    tokens = query.shape[2]
    if query.element_size() > 2 or not takes_flash(query.device, query.shape[3]):
        query, key, value, _ = aten._scaled_dot_product_efficient_attention_backward(
            gradient, query, key, value, None, attended, *statistics, 0.0, [True, True, True, False], True, scale=scale
        )
    else:
        query, key, value = aten._scaled_dot_product_cudnn_attention_backward(
            gradient, query, key, value, attended, *statistics, None, None, None, tokens, tokens, 0.0, True,
            scale=scale,
        )  # fmt: skip
    if shared > 1:
        key, value = (each.unflatten(1, (-1, shared)).sum(2) for each in (key, value))
    return query, key, value


def _repeated(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns keys or values with as many heads as there are queries."""
    shared = heads // states.shape[1]
    return states if shared == 1 else states.repeat_interleave(shared, dim=1)


# --- documents of like length, on a CPU -------------------------------------------------------------------------------


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: DocumentGroups, scale: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    attended, statistics = [], []
    for index in groups.gather:
        found, *kept = _dense(*(_gathered(states, index) for states in (query, key, value)), scale=scale)
        attended.append(found.to(value.dtype).transpose(1, 2).flatten(0, 1))
        statistics += [found, *kept]  # four tensors a group
    return torch.cat(attended)[groups.scatter], tuple(statistics)


def _grouped_backward(
    gradient: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    statistics: tuple[torch.Tensor, ...],
    groups: DocumentGroups,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = tuple(torch.zeros_like(each, memory_format=torch.contiguous_format) for each in states)
    for place, index in enumerate(groups.gather):
        attended, *kept = statistics[4 * place : 4 * place + 4]
        # A document shorter than its group is filled up with its last token, which is nobody's a second time.
        real = torch.ones_like(index, dtype=torch.bool)
        real[:, 1:] = index[:, 1:] != index[:, :-1]
        given = _gathered(gradient, index).masked_fill(~real[:, None, :, None], 0)
        made = _dense_backward(given, tuple(_gathered(each, index) for each in states), attended, tuple(kept), scale)
        for whole, part in zip(found, made, strict=True):
            whole[index[real]] = part.transpose(1, 2)[real].to(whole.dtype)
    query, key, value = found
    return query, key, value


def _gathered(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns [documents, heads, tokens, size]; short documents in float32."""
    gathered = states[index].transpose(1, 2)
    return gathered.float() if index.shape[1] <= SHORT_ON_CPU and states.element_size() < 4 else gathered
