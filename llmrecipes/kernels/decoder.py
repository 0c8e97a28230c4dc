"""A decoder layer of Llama's shape as one step, its gradient written out: nothing is multiplied a second time.

    middle = x + output(attention(rotate(qkv(norm(x)))))
    y = middle + down(swiglu(gate_up(norm(middle))))

Kept for the backward pass are x, middle, the rotated q, k and v, what attention gave, gate and up. All else, the norms
and SwiGLU, is made again, which costs no matmul. A layer may keep less (`Keep`) and multiply again instead.
"""

import enum
from dataclasses import dataclass

import torch

from llmrecipes.kernels import rotary, rowwise
from llmrecipes.kernels.attend import Attention
from llmrecipes.kernels.projections import Given, Low, Projections, joined

Gradients = list[torch.Tensor]


@dataclass(frozen=True)
class Norm:
    """An RMSNorm, frozen or trained."""

    weight: torch.nn.Parameter
    epsilon: float

    def of(self, rows: torch.Tensor, group: Projections, multiplies: bool = True) -> Given:
        """Returns the rows normed, for the group that multiplies them, or else only for its gradients."""
        buffer = group.buffer(rows.shape[0], rows.device)
        quantizer = group.quantizer if multiplies else None
        weight, out = self.weight.detach(), buffer[:, : group.width]
        return Given(buffer, rowwise.rms_norm(rows, weight, self.epsilon, out, quantizer))

    def backward(
        self, gradient: torch.Tensor, rows: torch.Tensor, beside: torch.Tensor
    ) -> tuple[torch.Tensor, Gradients]:
        """Returns the gradient of the rows plus that of the residual beside, and that of the weight if it trains."""
        found = rowwise.rms_norm_backward(gradient, rows, self.weight.detach(), self.epsilon, beside)
        return found, self.weight_gradient(gradient, rows)

    def weight_gradient(self, gradient: torch.Tensor, rows: torch.Tensor) -> Gradients:
        """Returns the gradient of the weight, or nothing where it is frozen."""
        if not self.weight.requires_grad:
            return []
        return [rowwise.rms_norm_weight_gradient(gradient, rows, self.epsilon).to(self.weight.dtype)]

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Its weight, if that trains."""
        return [self.weight] if self.weight.requires_grad else []


@dataclass(frozen=True)
class Shared:
    """What all layers of one forward share."""

    cosine: torch.Tensor
    """[rows, head size]"""
    sine: torch.Tensor
    attention: Attention
    needed: torch.Tensor | None = None
    """places of the rows that the layer's output is needed at: only they go on behind attention; None: all"""


class Keep(enum.IntEnum):
    """What a layer keeps for its backward pass: the less, the more matmuls are made again."""

    OFFLOADED = 0
    """its input, in the host's memory"""
    INPUT = 1
    WITHOUT_GATE_UP = 2
    ALL = 3


MLP_ROWS = 2048
"""Rows that the MLP works on together where a layer keeps its input only: gate and up of all would be the peak."""


@dataclass
class Kept:
    """What a layer's backward pass has of its forward pass; None is made again."""

    x: torch.Tensor
    states: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    statistics: tuple[torch.Tensor, ...] = ()
    middle: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    low: tuple[Low | None, ...] = (None, None, None, None)
    """of qkv, output, gate_up, down"""


@dataclass(frozen=True)
class Decoder:
    """One layer."""

    first_norm: Norm
    qkv: Projections
    output: Projections
    second_norm: Norm
    gate_up: Projections
    down: Projections
    heads: int
    key_heads: int
    head_size: int

    @property
    def groups(self) -> tuple[Projections, ...]:
        """The linear layers, as they are multiplied."""
        return self.qkv, self.output, self.gate_up, self.down

    @property
    def drops(self) -> bool:
        """Whether there is dropout in its LoRA."""
        return any(group.drops for group in self.groups)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that train, in the order of `backward`'s gradients."""
        parts = (self.first_norm, self.qkv, self.output, self.second_norm, self.gate_up, self.down)
        return [parameter for part in parts for parameter in part.trained]

    def forward(
        self, x: torch.Tensor, shared: Shared, seed: int | None, keep: Keep = Keep.ALL
    ) -> tuple[torch.Tensor, Kept]:
        """Returns the layer's output, [rows, width], and what its backward pass keeps.

        `seed` is that of LoRA's dropout, None for none.
        """
        kept = self._attended(x, shared, seed)
        assert kept.middle is not None
        made, lows = [], []
        for rows in [slice(None)] if keep == Keep.ALL else self._mlp_parts(kept.middle):
            y, kept.gate_up, low = self._mlp(kept.middle[rows], seed)
            made.append(y)
            lows.append(low)
        kept.gate_up = kept.gate_up if keep == Keep.ALL else None
        kept.low = (*kept.low[:2], *(joined(parts) for parts in zip(*lows, strict=True)))
        y = torch.cat(made) if len(made) > 1 else made[0]
        return y, kept if keep >= Keep.WITHOUT_GATE_UP else Kept(x, low=kept.low)

    def _attended(self, x: torch.Tensor, shared: Shared, seed: int | None) -> Kept:
        """Returns the layer's first half: its `middle`, [needed rows, width], and what its backward pass needs."""
        seeds = (None, None) if seed is None else (seed, seed + 8)
        states, low_qkv = self.qkv.forward(self.first_norm.of(x, self.qkv), seeds[0])
        rotary.rotate(self._turned(states), shared.cosine, shared.sine)
        attended, statistics = shared.attention.forward(*self._split(states))
        needed = Given(_chosen(attended.flatten(1), shared.needed))
        middle, low_output = self.output.forward(needed, seeds[1], plus=_chosen(x, shared.needed))
        return Kept(x, states, attended, statistics, middle, low=(low_qkv, low_output, None, None))

    def _mlp(self, middle: torch.Tensor, seed: int | None) -> tuple[torch.Tensor, torch.Tensor, list[Low | None]]:
        """Returns the layer's output, gate and up, and what LoRA's backward pass needs of both groups."""
        gate_up, low_gate_up = self._gate_up(middle, seed)
        y, low_down = self.down.forward(self._hidden(gate_up), None if seed is None else seed + 24, plus=middle)
        return y, gate_up, [low_gate_up, low_down]

    def _gate_up(self, middle: torch.Tensor, seed: int | None) -> tuple[torch.Tensor, Low | None]:
        return self.gate_up.forward(self.second_norm.of(middle, self.gate_up), None if seed is None else seed + 16)

    def _mlp_parts(self, middle: torch.Tensor) -> list[slice]:
        """Returns the rows, none perhaps, that the MLP works on one after the other; dropout wants all at once."""
        if self.gate_up.drops or self.down.drops:
            return [slice(None)]
        return [slice(start, start + MLP_ROWS) for start in range(0, max(1, len(middle)), MLP_ROWS)]

    def backward(
        self, gradient: torch.Tensor, kept: Kept, shared: Shared, seed: int | None, wants_x: bool
    ) -> tuple[torch.Tensor | None, Gradients]:
        """Returns the gradients of x, [rows, width], and of `trained`; uses up what was kept."""
        if kept.middle is None:
            low, kept = kept.low, self._attended(kept.x, shared, seed)
            kept.low = low
        middle_gradient, behind = self._mlp_backward(gradient, kept, seed)
        normed_gradient, before = self._attention_backward(middle_gradient, kept, shared, wants_x)
        if normed_gradient is None:
            return None, before + behind
        if not wants_x:
            return None, self.first_norm.weight_gradient(normed_gradient, kept.x) + before + behind
        beside = _spread(middle_gradient, shared.needed, len(kept.x))
        x_gradient, norm = self.first_norm.backward(normed_gradient, kept.x, beside)
        return x_gradient, norm + before + behind

    def _mlp_backward(self, gradient: torch.Tensor, kept: Kept, seed: int | None) -> tuple[torch.Tensor, Gradients]:
        """Returns the gradients of the middle, [rows, width], and of what trains behind it; uses up what was kept."""
        assert kept.middle is not None
        found: list[torch.Tensor] = []
        total: Gradients = []
        for rows in self._mlp_parts(kept.middle) if kept.gate_up is None else [slice(None)]:
            if kept.gate_up is None:
                kept.gate_up = self._gate_up(kept.middle[rows], seed)[0]
            made, gradients = self._mlp_part_backward(gradient[rows], kept, rows)
            found.append(made)
            total = [one + other for one, other in zip(total, gradients, strict=True)] if total else gradients
        kept.middle = None
        return torch.cat(found) if len(found) > 1 else found[0], total

    def _mlp_part_backward(self, gradient: torch.Tensor, kept: Kept, part: slice) -> tuple[torch.Tensor, Gradients]:
        """Returns the same of some of the rows; gate and up are theirs, and used up."""
        assert kept.middle is not None and kept.gate_up is not None
        middle = kept.middle[part]
        low_gate_up, low_down = (low and Low(low.rows[part], low.seed) for low in kept.low[2:])
        rows, device = gradient.shape[0], gradient.device
        given = Given(_into(gradient, self.down.gradient_buffer(rows, device), self.down.size))
        inner = self.down.low_gradient(given, low_down)
        hidden_gradient = self.down.rows_gradient(given, low_down, inner)
        # What is made lies where what it is made of lay, unless there has to be room beside it.
        hidden = self.down.buffer(rows, device) if self.down.room else hidden_gradient
        made = self.gate_up.gradient_buffer(rows, device) if self.gate_up.room else kept.gate_up
        quantized = rowwise.swiglu_backward(
            hidden_gradient, kept.gate_up, made, hidden[:, : self.down.width], self.gate_up.gradient_quantizer
        )
        made_gradient, kept.gate_up = Given(made, quantized), None
        down = self.down.gradients(given, hidden, low_down, inner)
        del hidden, hidden_gradient, given, made
        normed = self.second_norm.of(middle, self.gate_up, multiplies=False).buffer
        normed_gradient, gate_up = self.gate_up.backward(made_gradient, normed, low_gate_up)
        assert normed_gradient is not None
        del normed, made_gradient
        middle_gradient, norm = self.second_norm.backward(normed_gradient, middle, gradient)
        return middle_gradient, norm + gate_up + down

    def _attention_backward(
        self, gradient: torch.Tensor, kept: Kept, shared: Shared, wants_x: bool
    ) -> tuple[torch.Tensor | None, Gradients]:
        """Returns the gradients of x normed, [rows, width], and of what trains in between; the states are used up."""
        assert kept.states is not None and kept.attended is not None
        low_qkv, low_output = kept.low[:2]
        rows = len(kept.x)
        given = gradient.to(self.output.dtype)
        attended = _chosen(kept.attended.flatten(1), shared.needed)
        attended_gradient, output = self.output.backward(Given(given), attended, low_output)
        assert attended_gradient is not None
        attended_gradient = _spread(attended_gradient, shared.needed, rows)
        states_gradients = shared.attention.backward(
            attended_gradient.unflatten(1, (self.heads, self.head_size)),
            self._split(kept.states),
            kept.attended,
            kept.statistics,
        )
        kept.states = kept.attended = None
        made = self.qkv.gradient_buffer(rows, gradient.device)
        quantized = rotary.rotate_back(
            states_gradients, shared.cosine, shared.sine, made[:, : self.qkv.size], self.qkv.gradient_quantizer
        )
        made_gradient = Given(made, quantized)
        del states_gradients, made
        normed = self.first_norm.of(kept.x, self.qkv, multiplies=False).buffer
        wanted = wants_x or self.first_norm.weight.requires_grad
        normed_gradient, qkv = self.qkv.backward(made_gradient, normed, low_qkv, wanted)
        return normed_gradient, qkv + output

    def _hidden(self, gate_up: torch.Tensor) -> Given:
        """Returns SwiGLU of gate and up, for `down`."""
        buffer = self.down.buffer(gate_up.shape[0], gate_up.device)
        return Given(buffer, rowwise.swiglu(gate_up, buffer[:, : self.down.width], self.down.quantizer))

    def _turned(self, states: torch.Tensor) -> torch.Tensor:
        """Returns a view of the queries and keys, which are rotated, [rows, heads, head size]."""
        return states.unflatten(1, (-1, self.head_size))[:, : self.heads + self.key_heads]

    def _split(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns views of query, key and value, [rows, heads, head size]."""
        by_head = states[:, : self.qkv.size].unflatten(1, (-1, self.head_size))
        query, key, value = by_head.split([self.heads, self.key_heads, self.key_heads], dim=1)
        return query, key, value


def _chosen(rows: torch.Tensor, needed: torch.Tensor | None) -> torch.Tensor:
    """Returns the rows that are needed."""
    return rows if needed is None else rows[needed]


def _spread(gradient: torch.Tensor, needed: torch.Tensor | None, rows: int) -> torch.Tensor:
    """Returns the gradient of all rows from that of the needed ones: 0 elsewhere."""
    if needed is None:
        return gradient
    return gradient.new_zeros(rows, gradient.shape[1]).index_copy_(0, needed, gradient)


def _into(rows: torch.Tensor, buffer: torch.Tensor, width: int) -> torch.Tensor:
    """Returns rows in a buffer of their group, or as they are where that has no room and is of their type."""
    if buffer.shape[1] == width and buffer.dtype == rows.dtype:
        return rows
    buffer[:, :width] = rows
    return buffer
