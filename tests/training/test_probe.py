"""Laws of the leak probe: silent where documents are apart, loud where any path joins them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipes.batch import Sample
from llmrecipes.config.schema import InferenceConfig
from llmrecipes.data.loaders import padded_batch
from llmrecipes.errors import TrainingError
from llmrecipes.kernels.attention import apply_document_attention
from llmrecipes.models.loading import load_model
from llmrecipes.models.quantization import rows_unrounded
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


def forget(forgotten: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a model attend to the whole row, and with `position_ids` also count on through it."""
    forward = model.forward

    def careless(**inputs: Any) -> Any:
        inputs.pop("attention_mask", None)
        if forgotten == "position_ids":
            inputs.pop("position_ids", None)
        return forward(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))

    monkeypatch.setattr(model, "forward", careless)


@pytest.mark.parametrize("forgotten", ["attention_mask", "position_ids"])
def test_a_forgotten_mask_is_found(
    forgotten: str, tiny_model: Any, random_samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    forget(forgotten, model, monkeypatch)
    with pytest.raises(TrainingError, match="leak probe.*batching_strategy padding"):
        check_no_leak(model, padded_batch([random_samples(4)]), FP32)


def test_a_batch_without_two_documents_needs_no_probe(tiny_model: Any, random_samples: Samples) -> None:
    assert check_no_leak(tiny_model(), padded_batch([[sample] for sample in random_samples(2)]), FP32) == 0.0
    assert loss.model_inputs(tiny_model(), padded_batch([random_samples(1)]), FP32).keys() == {"input_ids", "use_cache"}


@pytest.fixture
def eight_bit(tiny_model: Any, tmp_path: Path) -> Any:
    """An LLM.int8() base with large features, in bfloat16."""
    model = tiny_model(hidden_size=64, num_hidden_layers=12, initializer_range=0.2)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[::8] = 4.0
        layer.post_attention_layernorm.weight.data[::8] = 4.0
    model.save_pretrained(tmp_path)
    config = InferenceConfig(model_name=str(tmp_path), quantization="8bit")
    return load_model(config, str(tmp_path), BF16)


def test_the_rounding_of_an_8bit_base_is_no_leak_and_comes_back(eight_bit: Any, random_samples: Samples) -> None:
    batch = padded_batch([random_samples(4)])
    apply_document_attention(eight_bit)
    for threshold in (6.0, 0.0):  # whether columns are large by the batch, or each row is rounded by itself
        for layer in eight_bit.modules():
            if hasattr(layer, "state"):
                layer.state.threshold = threshold
        with pytest.raises(TrainingError, match="leak probe"):
            check_no_leak(eight_bit, batch, BF16)
    before = eight_bit(input_ids=batch.input_ids).logits
    with rows_unrounded(eight_bit):
        assert check_no_leak(eight_bit, batch, BF16) < 1e-3
        assert not torch.equal(eight_bit(input_ids=batch.input_ids).logits, before)
    assert torch.equal(eight_bit(input_ids=batch.input_ids).logits, before)


@pytest.mark.parametrize("forgotten", ["attention_mask", "position_ids"])
def test_a_leak_of_an_8bit_base_is_found(
    forgotten: str, eight_bit: Any, random_samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(forgotten, eight_bit, monkeypatch)
    with rows_unrounded(eight_bit), pytest.raises(TrainingError, match="leak probe.*batching_strategy padding"):
        check_no_leak(eight_bit, padded_batch([random_samples(4)]), BF16)
