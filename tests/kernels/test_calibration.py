"""Laws of calibration: a layer whose 8-bit matmuls are too far off is exact afterwards, and only such a one."""

from collections.abc import Callable
from typing import Any

import torch

from llmrecipes.batch import Sample
from llmrecipes.data.loaders import padded_batch
from llmrecipes.kernels.attention import apply_document_attention
from llmrecipes.kernels.calibration import calibrate
from llmrecipes.kernels.layers import apply_fused_layers, decoder_layers
from llmrecipes.precision import Precision
from llmrecipes.training.loss import loss_sum

Build = Callable[..., Any]
Samples = Callable[..., list[Sample]]


def test_layers_above_the_bound_become_exact(tiny_model: Build, random_samples: Samples) -> None:
    batch = padded_batch([random_samples(6)])
    precision = Precision(torch.device("cpu"), torch.float32, torch.float32, loss_scaling=False)

    def built(compute: str) -> Any:
        model = tiny_model(num_hidden_layers=4).requires_grad_(False)
        apply_document_attention(model)
        apply_fused_layers(model, torch.float32, compute)
        return model.train()

    def loss(model: Any) -> float:
        return float(loss_sum(model, batch, precision))

    model = built("int8")
    rounded = loss(model)
    layers = list(decoder_layers(model))
    errors = calibrate(model.model, layers, batch, bound=1.0)
    assert len(errors) == 4 and all(0 < error < 0.2 for error in errors)
    assert loss(model) == rounded and all(layer.training for layer in layers)
    between = sorted(errors)[1] + 1e-9
    assert calibrate(model.model, layers, batch, bound=between) == errors
    are_exact = [all(group.eight_bit is None for group in layer.decoder.groups) for layer in layers]
    assert are_exact == [error > between for error in errors] and sum(are_exact) == 2
    assert loss(model) != rounded
    calibrate(model.model, layers, batch, bound=0.0)
    assert loss(model) == loss(built("exact"))
