"""Laws of fused layers: loss and every gradient are those of transformers' own layers, whatever a layer keeps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model

from llmrecipes.batch import Batch, Sample, predictions
from llmrecipes.data.loaders import padded_batch
from llmrecipes.kernels import decoder, head
from llmrecipes.kernels.attention import apply_document_attention
from llmrecipes.kernels.decoder import Keep
from llmrecipes.kernels.head import fused_loss_sum
from llmrecipes.kernels.layers import FusedLayer, UnknownLayerError, apply_fused_layers, decoder_layers
from llmrecipes.models.float8 import Float8Linear
from llmrecipes.precision import Precision
from llmrecipes.training.loss import loss_sum

Build = Callable[..., Any]
Samples = Callable[..., list[Sample]]

CPU = torch.device("cpu")
FLOAT32 = Precision(CPU, torch.float32, torch.float32, loss_scaling=False)

TRAINED: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, some layers": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "LoRA, biases": {"attention_bias": True},
    "LoRA, grouped queries": {"num_key_value_heads": 1},
    "the whole model": {"target_modules": []},
    "the whole model, biases": {"target_modules": [], "attention_bias": True, "mlp_bias": True},
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP and the head work through a tiny batch in several parts, the last one shorter."""
    monkeypatch.setattr(decoder, "MLP_ROWS", 50)
    monkeypatch.setattr(head, "CHUNK_LOGITS", 260 * 17)


@pytest.fixture
def build(tiny_model: Build) -> Build:
    """Returns `build(dtype, target_modules=..., dropout=..., **config)`: a model that attends by document, with LoRA
    that is not 0, or where nothing is adapted with weights that all train."""

    def made(
        dtype: torch.dtype, target_modules: str | list[str] = "all-linear", dropout: float = 0.0, stored: Any = None,
        **settings: Any,
    ) -> Any:  # fmt: skip
        settings = {"hidden_size": 64, "intermediate_size": 128 if stored else 96, **settings}
        model = tiny_model(**settings).to(dtype)
        for parent in [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]:
            for name, linear in list(parent.named_children()):
                if stored is not None and isinstance(linear, torch.nn.Linear):
                    setattr(parent, name, stored(linear))
        apply_document_attention(model)
        if not target_modules:
            return model.requires_grad_(True)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, lora_dropout=dropout, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.promote_types(dtype, torch.float32)) / 10
        return model

    return made


def packed(samples: list[Sample]) -> Batch:
    """Two rows of several documents, one of them a single token, with padding behind, and filled predictions."""
    one = Sample(samples[0].input_ids[:1], samples[0].labels[:1], 99)
    batch = padded_batch([[*samples[:5], one], samples[5:]])
    predicting, targets = predictions(batch.labels, 64)
    assert len(targets) > batch.supervised_tokens
    return replace(batch, predicting=predicting, targets=targets)


def by_row(samples: list[Sample]) -> Batch:
    return padded_batch([[sample] for sample in samples])


def result(model: Any, batch: Batch, precision: Precision, loss: Any = loss_sum) -> tuple[float, torch.Tensor]:
    """Returns the loss and the gradients of all that trains, one behind the other."""
    model.zero_grad()
    value = loss(model, batch, precision)
    value.backward()
    named = sorted((name, each) for name, each in model.named_parameters() if each.requires_grad)
    assert all(each.grad is not None for _, each in named)
    return value.item(), torch.cat([each.grad.double().flatten() for _, each in named])


def four_bit(linear: torch.nn.Linear) -> torch.nn.Linear:
    """A linear layer stored as NF4."""
    made = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
    made.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=made).to(CPU)
    return made


def float8(linear: torch.nn.Linear) -> torch.nn.Linear:
    """A linear layer stored in float8_e4m3fn."""
    made = Float8Linear(linear)
    made.weight = made.stored(linear.weight.data)
    made.bias = linear.bias
    return made


@pytest.mark.parametrize("keep", list(Keep), ids=lambda keep: keep.name)
@pytest.mark.parametrize("layout", [packed, by_row])
@pytest.mark.parametrize("kind", TRAINED)
def test_loss_and_gradients_are_transformers_own(
    kind: str, layout: Any, keep: Keep, build: Build, random_samples: Samples
) -> None:
    batch = layout(random_samples(8, longest=30))
    expected_loss, expected = result(build(torch.float32, **TRAINED[kind]), batch, FLOAT32)
    model = build(torch.float32, **TRAINED[kind])
    assert apply_fused_layers(model, torch.float32) == 2
    for layer in decoder_layers(model):
        layer.keep = keep
    for loss in (loss_sum, fused_loss_sum):
        found_loss, found = result(model, batch, FLOAT32, loss)
        assert found_loss == pytest.approx(expected_loss, rel=1e-6)
        assert (found - expected).norm() < 3e-6 * expected.norm()


@pytest.mark.parametrize("kind", TRAINED)
def test_in_bfloat16_the_error_is_not_above_the_plain_paths_own(
    kind: str, build: Build, random_samples: Samples
) -> None:
    batch = packed(random_samples(8, longest=30))
    _, exact = result(build(torch.float32, **TRAINED[kind]).to(torch.bfloat16).float(), batch, FLOAT32)
    whole = not TRAINED[kind].get("target_modules", True)
    bfloat16 = Precision(CPU, torch.bfloat16, torch.float32, loss_scaling=False)
    model_type = torch.float32 if whole else torch.bfloat16
    settings = {"dtype": model_type, **TRAINED[kind]}

    def rounded() -> Any:
        model = build(**settings)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
        return model

    _, plain = result(rounded(), batch, bfloat16)
    model = rounded()
    apply_fused_layers(model, torch.bfloat16)
    _, found = result(model, batch, bfloat16, fused_loss_sum)
    cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0)
    assert cosine > 0.9995
    assert (found - exact).norm() < 1.2 * (plain - exact).norm()


@pytest.mark.parametrize(
    ("stored", "settings"),
    [(four_bit, {}), (float8, {}), (float8, {"attention_bias": True})],
    ids=["4 bits", "fp8", "fp8, biases"],
)
def test_expanded_weights_are_their_own_layers(
    stored: Any, settings: dict[str, Any], build: Build, random_samples: Samples
) -> None:
    batch = packed(random_samples(8, longest=30))
    expected_loss, expected = result(build(torch.float32, stored=stored, **settings), batch, FLOAT32)
    model = build(torch.float32, stored=stored, **settings)
    apply_fused_layers(model, torch.float32)
    found_loss, found = result(model, batch, FLOAT32, fused_loss_sum)
    assert found_loss == pytest.approx(expected_loss, rel=1e-5)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("compute", ["int8", "fp8"])
@pytest.mark.parametrize("stored", [None, four_bit, float8], ids=["16 bits", "4 bits", "fp8"])
def test_8_bits_come_near(stored: Any, compute: str, build: Build, random_samples: Samples) -> None:
    batch = packed(random_samples(8, longest=30))
    exact = build(torch.float32, stored=stored)
    apply_fused_layers(exact, torch.float32)
    expected_loss, expected = result(exact, batch, FLOAT32, fused_loss_sum)
    model = build(torch.float32, stored=stored)
    apply_fused_layers(model, torch.float32, compute)
    found_loss, found = result(model, batch, FLOAT32, fused_loss_sum)
    assert found_loss == pytest.approx(expected_loss, rel=2e-2) and found_loss != expected_loss
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99


@pytest.mark.parametrize("keep", [Keep.INPUT, Keep.WITHOUT_GATE_UP], ids=lambda keep: keep.name)
def test_dropout_is_the_same_when_made_again(keep: Keep, build: Build, random_samples: Samples) -> None:
    batch = packed(random_samples(8, longest=30))
    model = build(torch.float32, dropout=0.3).train()
    apply_fused_layers(model, torch.float32)
    found = []
    for kept in (Keep.ALL, keep):
        for layer in decoder_layers(model):
            layer.keep = kept
        torch.manual_seed(5)
        found.append(result(model, batch, FLOAT32, fused_loss_sum))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    torch.manual_seed(6)
    assert result(model, batch, FLOAT32, fused_loss_sum)[0] != found[0][0]
    assert result(model.eval(), batch, FLOAT32, fused_loss_sum)[0] != found[0][0]


def test_an_update_of_the_adapters_is_seen(build: Build, random_samples: Samples) -> None:
    batch = packed(random_samples(8, longest=30))
    plain, fused = build(torch.float32), build(torch.float32)
    apply_fused_layers(fused, torch.float32)
    for model in (plain, fused):
        result(model, batch, FLOAT32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= 0.01 * parameter.grad
    found, expected = (result(model, batch, FLOAT32)[0] for model in (fused, plain))
    assert found == pytest.approx(expected, rel=1e-6)


def test_answers_and_names_are_the_models_own(build: Build) -> None:
    plain, fused = build(torch.float32), build(torch.float32)
    names = [name for name, _ in plain.named_parameters()]
    apply_fused_layers(fused, torch.float32)
    assert [name for name, _ in fused.named_parameters()] == names
    prompt = torch.tensor([[5, 6, 7, 8]])
    answers = [model.eval().generate(input_ids=prompt, max_new_tokens=12, do_sample=False) for model in (plain, fused)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_other_models_of_this_shape_are_right_too(kind: str, random_samples: Samples) -> None:
    settings: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 128, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    settings |= {"sliding_window": None} if kind == "Mistral" else {}
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
        assert apply_document_attention(model) == 2
        if fused:
            assert apply_fused_layers(model, torch.float32) == 2
        results.append(
            result(model, packed(random_samples(8, longest=30)), FLOAT32, fused_loss_sum if fused else loss_sum)
        )
    (expected_loss, expected), (found_loss, found) = results
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    assert (found - expected).norm() < 3e-6 * expected.norm()


def frozen_bilinear() -> torch.nn.Module:
    return torch.nn.Bilinear(2, 2, 2, bias=False).requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "gelu"),
        (lambda model: model.model.layers[1].mlp.down_proj.half(), "float16"),
        (
            lambda model: setattr(
                model.model.layers[1].mlp, "up_proj", torch.nn.Bilinear(2, 2, 2, bias=False).requires_grad_(False)
            ),
            "Bilinear",
        ),
    ],
)
def test_what_is_not_known_stays_as_it_was(change: Any, told: str, tiny_model: Build) -> None:
    model = tiny_model().requires_grad_(False)
    change(model)
    with pytest.raises(UnknownLayerError, match=told):
        apply_fused_layers(model, torch.float32)
    assert not any(isinstance(module, FusedLayer) for module in model.modules())


@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("keep", list(Keep), ids=lambda keep: keep.name)
def test_a_batch_in_which_nothing_is_supervised_adds_nothing(
    keep: Keep, compute: str, build: Build, random_samples: Samples
) -> None:
    samples = [replace(sample, labels=np.full_like(sample.labels, -100)) for sample in random_samples(3)]
    model = build(torch.float32)
    apply_fused_layers(model, torch.float32, compute)
    for layer in decoder_layers(model):
        layer.keep = keep
    loss, gradient = result(model, padded_batch([samples]), FLOAT32, fused_loss_sum)
    assert loss == 0 and not gradient.any()
