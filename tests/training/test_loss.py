"""Laws of the loss: how samples are batched, padded, packed or accumulated does not change the gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmrecipes.batch import Sample
from llmrecipes.data.loaders import Loader, padded_batch
from llmrecipes.kernels.attention import apply_document_attention
from llmrecipes.precision import resolve_precision
from llmrecipes.training.loss import loss_sum, model_inputs, prediction_targets

FP32 = resolve_precision("cpu", mixed_precision=False, use_fp16=False)

Samples = Callable[..., list[Sample]]


def window_gradient(model: Any, loader: Loader) -> torch.Tensor:
    """The gradient of the first window's loss, by the trainer's own rule."""
    model.zero_grad()
    (window,) = loader.windows(0)
    supervised = sum(batch.supervised_tokens for batch in window)
    for batch in window:
        (loss_sum(model, batch, FP32) / supervised).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def reference_gradient(model: Any, samples: list[Sample]) -> torch.Tensor:
    """The gradient of the mean loss over all supervised tokens, each sample alone, nothing of ours used."""
    model.zero_grad()
    supervised = sum(int((sample.labels[1:] != -100).sum()) for sample in samples)
    for sample in samples:
        ids = torch.tensor(sample.input_ids.tolist())[None]
        labels = torch.tensor(sample.labels.tolist())
        logits = model(input_ids=ids).logits[0]
        (F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / supervised).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def build(tiny_model: Any, attention: str) -> Any:
    if attention != "documents":
        return tiny_model(attn_implementation=attention)
    model = tiny_model()
    assert apply_document_attention(model) == 2
    return model


LAYOUTS = {
    "one batch": {"strategy": "padding", "batch_rows": 20, "window_batches": 1},
    "accumulated": {"strategy": "padding", "batch_rows": 1, "window_batches": 20},
    "uneven accumulation": {"strategy": "padding", "batch_rows": 3, "window_batches": 7, "seed": 1},
    "grouped by length": {"strategy": "padding", "batch_rows": 4, "window_batches": 5, "seed": 1, "group_by_length": 1},
    "packed": {"strategy": "packing", "batch_rows": 20, "window_batches": 1, "seed": 2},
    "packed and accumulated": {"strategy": "packing", "batch_rows": 2, "window_batches": 20, "seed": 3},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "documents"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_layout_of_a_window_does_not_change_its_gradient(
    layout: dict[str, Any], attention: str, tiny_model: Any, random_samples: Samples
) -> None:
    model = build(tiny_model, attention)
    samples = random_samples(20)
    expected = reference_gradient(model, samples)
    found = window_gradient(model, Loader(samples, row_tokens=64, **layout))
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager", "documents"])
def test_a_packed_document_does_not_see_its_neighbours(
    attention: str, tiny_model: Any, random_samples: Samples
) -> None:
    model = build(tiny_model, attention)
    first, second = random_samples(2)
    batch = padded_batch([[first, second]])
    changed = batch.input_ids.clone()
    changed[0, : len(first.input_ids)] = 5
    inputs = model_inputs(model, batch, FP32)
    logits = [model(**{**inputs, "input_ids": ids}).logits for ids in (batch.input_ids, changed)]
    assert torch.equal(logits[0][0, len(first.input_ids) :], logits[1][0, len(first.input_ids) :])
    assert not torch.equal(logits[0], logits[1])


def test_positions_restart_with_each_document(tiny_model: Any, random_samples: Samples) -> None:
    samples = random_samples(3)
    positions = model_inputs(tiny_model(), padded_batch([samples]), FP32)["position_ids"][0].tolist()
    assert positions == [place for sample in samples for place in range(len(sample.input_ids))]


def test_a_target_is_predicted_from_the_token_before_it() -> None:
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, -100]])
    columns, targets = prediction_targets(labels)
    assert columns.tolist() == [0, 1, 2]
    assert targets.tolist() == [[-100, 7, 8], [5, -100, -100]]


def test_the_first_token_of_a_document_is_never_a_target(random_samples: Samples) -> None:
    samples = [Sample(sample.input_ids, sample.input_ids, sample.row) for sample in random_samples(4)]
    batch = padded_batch([samples[:2], samples[2:]])
    starts = batch.documents != F.pad(batch.documents[:, :-1], (1, 0))
    assert (batch.labels[starts] == -100).all()
    assert batch.supervised_tokens == sum(len(sample.input_ids) - 1 for sample in samples)
