"""The loss of a model with fused layers: head and loss at the tokens that predict a supervised one, and nowhere else.

The head works through some rows at a time. The gradient of the hidden states is formed with the loss, so that no
logits are kept; they are float32 whatever the weights are.
"""

from typing import Any

import torch

from llmrecipes.batch import Batch
from llmrecipes.kernels.layers import FusedLayer, base_of, decoder_layers
from llmrecipes.precision import Precision
from llmrecipes.prompts import IGNORED_LABEL

CHUNK_LOGITS = 1 << 25
"""Logits formed together: 128 MiB in float32, 1,048 rows of a vocabulary of 32,000."""


def fused_loss_sum(model: Any, batch: Batch, precision: Precision) -> torch.Tensor:
    """Returns the sum, in float32, of -log p(label) over the batch's supervised tokens, a scalar.

    The same as `training.loss.loss_sum`, for a model whose layers are fused.
    """
    base = base_of(model)
    body, head = base.base_model, base.get_output_embeddings()
    positions = batch.positions
    with precision.autocast():
        x = body.embed_tokens(batch.input_ids)
        angles = body.rotary_emb(x, position_ids=positions)
        *layers, last = decoder_layers(model)
        for layer in layers:
            x = layer(x, position_embeddings=angles, layout=batch.layout)
        assert isinstance(last, FusedLayer)
        rows = body.norm(last.at(x, angles, batch.layout, batch.predicting))
    rows = rows.to(precision.compute)
    weight = head.weight if torch.is_grad_enabled() else head.weight.detach()
    total: torch.Tensor = _HeadLoss.apply(rows, weight, batch.targets)
    return total


class _HeadLoss(torch.autograd.Function):
    """Sum of cross entropies of rows [rows, width] times weight [vocabulary, width] transposed; rows whose target is
    `IGNORED_LABEL` do not enter it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        matrix = weight.detach().to(rows.dtype)
        total = torch.zeros((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        wants_rows, wants_weight, _ = ctx.needs_input_grad
        rows_gradient = torch.empty_like(rows) if wants_rows else None
        weight_gradient = torch.zeros_like(weight, dtype=total.dtype) if wants_weight else None
        size = max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(rows), size):
            chunk, wanted = rows[start : start + size], targets[start : start + size, None]
            ignored, wanted = wanted == IGNORED_LABEL, wanted.clamp(min=0)
            logits = _logits(chunk, matrix)
            normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (normalizer - logits.gather(1, wanted)).masked_fill_(ignored, 0).sum()
            if rows_gradient is None and weight_gradient is None:
                continue
            gradient = logits.sub_(normalizer.masked_fill_(ignored, torch.inf)).exp_()  # of an ignored row 0
            gradient.scatter_add_(1, wanted, ignored.to(gradient.dtype) - 1)
            gradient = gradient.to(rows.dtype)
            if rows_gradient is not None:
                torch.mm(gradient, matrix, out=rows_gradient[start : start + size])
            if weight_gradient is not None:
                weight_gradient += gradient.t() @ chunk
        ctx.gradients = (rows_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.gradients
        ctx.gradients = ()
        factor = gradients[0]
        return (
            None if rows is None else rows.mul_(factor),
            None if weight is None else weight.mul_(factor),
            None,
        )


def _logits(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Returns rows times matrix transposed, accumulated and kept in float32."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(rows, matrix.t(), out_dtype=torch.float32)
    return (rows @ matrix.t()).to(torch.promote_types(rows.dtype, torch.float32))
