"""Whether 8-bit matmuls are near enough, layer by layer, on a batch of the run itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from llmrecipes.batch import Batch
from llmrecipes.kernels.layers import FusedLayer

BOUND = 0.06
"""Largest error of what a layer adds to its input, over its norm, that is near enough. int8 makes 0.013 to 0.020 in
the layers of a trained 15M model and 0.024 to 0.052 in random ones of 7B, where the gradient still has a cosine of
0.992 to the exact one; an outlier that spoils its row makes 0.1 and more."""


@contextmanager
def exact_matmuls(layers: Sequence[FusedLayer]) -> Iterator[None]:
    """Lets layers multiply exactly while the context lasts."""
    groups = [group for layer in layers for group in layer.decoder.groups]
    kinds = [group.eight_bit for group in groups]
    try:
        for group in groups:
            group.eight_bit = None
        yield
    finally:
        for group, kind in zip(groups, kinds, strict=True):
            group.eight_bit = kind


@torch.no_grad()
def calibrate(body: Any, layers: Sequence[FusedLayer], batch: Batch, bound: float = BOUND) -> list[float]:
    """Returns the error that 8-bit matmuls make in each layer; layers above the bound compute exactly from now on.

    `body` is the model without its head; each layer is given what the exact layers before it make of the batch.
    """
    x = body.embed_tokens(batch.input_ids)
    angles = body.rotary_emb(x, position_ids=batch.positions)
    errors = []
    for layer in layers:
        was_training = layer.training
        layer.eval()
        rounded = layer(x, position_embeddings=angles, layout=batch.layout)
        with exact_matmuls([layer]):
            exact = layer(x, position_embeddings=angles, layout=batch.layout)
        errors.append(float((rounded - exact).float().norm() / (exact - x).float().norm()))
        if not errors[-1] <= bound:
            for group in layer.decoder.groups:
                group.eight_bit = None
        layer.train(was_training)
        x = exact
    return errors
