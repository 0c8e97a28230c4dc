"""Laws of batches that are recorded: the gradients are the loss's own. Playing them is tested on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrecipes.batch import Sample
from llmrecipes.data.loaders import padded_batch
from llmrecipes.kernels.graphs import Replayed
from llmrecipes.precision import Precision
from llmrecipes.training.loss import loss_sum

FLOAT32 = Precision(torch.device("cpu"), torch.float32, torch.float32, loss_scaling=False)


@pytest.mark.parametrize("unused", [False, True])
def test_loss_and_gradients_are_those_of_the_loss(
    unused: bool, tiny_model: Callable[..., Any], random_samples: Callable[..., list[Sample]]
) -> None:
    model = tiny_model()
    parameters = list(model.parameters()) + ([torch.nn.Parameter(torch.zeros(2))] if unused else [])
    calls = []
    replayed = Replayed(loss_sum, parameters, lambda: calls.append("refresh"), lambda: calls.append("room") is not None)
    for _ in range(3):  # seen, looked for room, computed as ever
        batch = padded_batch([random_samples(3)])
        found = replayed(model, batch, FLOAT32)
        expected = loss_sum(model, batch, FLOAT32)
        assert torch.equal(found, expected)
        gradients = torch.autograd.grad(found / 3, parameters, allow_unused=True)
        for one, other in zip(gradients, torch.autograd.grad(expected / 3, parameters, allow_unused=True), strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.allclose(one, other, rtol=1e-3, atol=1e-6)
    assert calls.count("refresh") == 3 and calls.count("room") <= 1
    with torch.no_grad():
        assert torch.equal(replayed(model, batch, FLOAT32), loss_sum(model, batch, FLOAT32))
    assert calls.count("refresh") == 3  # nothing is recorded where no gradient is wanted
