"""Laws of the leak probe: silent where documents are apart, loud where any path joins them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrecipes.batch import Sample
from llmrecipes.data.loaders import padded_batch
from llmrecipes.errors import TrainingError
from llmrecipes.kernels.attention import apply_document_attention
from llmrecipes.precision import resolve_precision
from llmrecipes.training import loss
from llmrecipes.training.probe import check_no_leak

FP32 = resolve_precision("cpu", mixed_precision=False, use_fp16=False)
BF16 = resolve_precision("cpu", mixed_precision=True, use_fp16=False)

Samples = Callable[..., list[Sample]]


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "documents"])
def test_documents_kept_apart_pass(attention: str, precision: Any, tiny_model: Any, random_samples: Samples) -> None:
    model = tiny_model() if attention == "documents" else tiny_model(attn_implementation=attention)
    if attention == "documents":
        apply_document_attention(model)
    model.train()
    assert check_no_leak(model, padded_batch([random_samples(4)]), precision) < 1e-3
    assert model.training


@pytest.mark.parametrize("forgotten", ["attention_mask", "position_ids"])
def test_a_forgotten_mask_is_found(
    forgotten: str, tiny_model: Any, random_samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    forward = model.forward

    def careless(**inputs: Any) -> Any:
        inputs.pop("attention_mask", None)
        if forgotten == "position_ids":
            inputs.pop("position_ids", None)
        return forward(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))

    monkeypatch.setattr(model, "forward", careless)
    with pytest.raises(TrainingError, match="leak probe.*batching_strategy padding"):
        check_no_leak(model, padded_batch([random_samples(4)]), FP32)


def test_a_batch_without_two_documents_needs_no_probe(tiny_model: Any, random_samples: Samples) -> None:
    assert check_no_leak(tiny_model(), padded_batch([[sample] for sample in random_samples(2)]), FP32) == 0.0
    assert loss.model_inputs(tiny_model(), padded_batch([random_samples(1)]), FP32).keys() == {"input_ids", "use_cache"}
