"""Laws of a quantized base: stored as asked, near the original, never changed by looking at it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional

from llmrecipes.config.schema import InferenceConfig, QuantizationConfig
from llmrecipes.errors import HardwareError
from llmrecipes.models import quantization
from llmrecipes.models.adapters import count_parameters
from llmrecipes.models.loading import load_model
from llmrecipes.models.quantization import is_quantized
from llmrecipes.precision import Precision

Build = Callable[..., Any]

CPU = torch.device("cpu")
FP32 = Precision(CPU, torch.float32, torch.float32, loss_scaling=False)
BF16 = Precision(CPU, torch.bfloat16, torch.float32, loss_scaling=False)
IDS = torch.arange(20, 32)[None]

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "8bit": ("8bit", {}),
    "nf4": ("4bit", {}),
    "fp4": ("4bit", {"quant_type": "fp4"}),
    "double": ("4bit", {"use_double_quant": True}),
    "stored as float32": ("4bit", {"quant_storage": "float32"}),
    "stored as bytes": ("4bit", {"quant_storage": "uint8"}),
    "computing in bfloat16": ("4bit", {"compute_dtype": "bfloat16"}),
    "fp8": ("fp8", {}),
}


@pytest.fixture
def folder(tiny_model: Build, tmp_path: Path) -> Path:
    """A model whose width is a multiple of bitsandbytes' block of 64."""
    tiny_model(hidden_size=64, initializer_range=0.2).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, scheme: str = "", precision: Precision = FP32) -> Any:
    kind, options = SCHEMES.get(scheme, (None, {}))
    config = InferenceConfig(
        model_name=str(folder), quantization=kind, quantization_config=QuantizationConfig(**options)
    )
    return load_model(config, str(folder), precision)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_but_the_output_is_rounded_and_the_model_answers_as_one_of_rounded_weights(
    scheme: str, folder: Path
) -> None:
    plain, model = load(folder), load(folder, scheme)
    total, stored = count_parameters(plain)[0], dict(model.named_parameters())
    rounded = {name: weight for name, weight in stored.items() if is_quantized(weight)}
    assert len(rounded) == 2 * 7 and not any("lm_head" in name for name in rounded)
    assert count_parameters(model)[0] == total
    for name, parameter in plain.named_parameters():
        if name in rounded:
            weight = unpacked(model.get_submodule(name.removesuffix(".weight")))
            assert 0.001 < (weight - parameter).norm() / parameter.norm() < (0.01 if scheme == "8bit" else 0.15)
            parameter.data = weight
    tolerance = 0.05 if scheme in ("8bit", "computing in bfloat16") else 1e-4
    assert (logits(model) - logits(plain)).norm() / logits(plain).norm() < tolerance


def unpacked(linear: Any) -> torch.Tensor:
    """The numbers that a layer's stored weight stands for, float32."""
    weight = linear.weight
    if getattr(weight, "quant_state", None) is not None:
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if weight.dtype == torch.uint8:
        return weight.view(torch.float8_e4m3fn).float() * linear.scales
    return weight.CB.float() * weight.SCB[:, None] / 127


@pytest.mark.parametrize("scheme", SCHEMES)
def test_answering_changes_neither_the_weights_nor_the_gradients_behind(scheme: str, folder: Path) -> None:
    model = load(folder, scheme)
    model.requires_grad_(False)

    def gradient() -> torch.Tensor:
        states = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
        model.train()
        model(inputs_embeds=states).logits.float().square().mean().backward()
        model.eval()
        assert states.grad is not None
        return states.grad

    before, first = gradient(), logits(model)
    assert torch.equal(logits(model), first)
    assert before.abs().max() > 0 and torch.equal(gradient(), before)


def test_the_types_of_the_scheme_are_those_asked_for(folder: Path) -> None:
    model = load(folder, "nf4", BF16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.bfloat16 and layer.weight.dtype == torch.bfloat16
    assert layer.weight.quant_state.quant_type == "nf4" and not layer.weight.quant_state.nested
    assert load(folder, "fp4").model.layers[0].mlp.up_proj.weight.quant_state.quant_type == "fp4"
    assert load(folder, "double").model.layers[0].mlp.up_proj.weight.quant_state.nested
    stored = load(folder, "stored as float32").model.layers[0].mlp.up_proj.weight
    assert stored.dtype == torch.float32


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "double"])
@pytest.mark.parametrize("right", [True, False])
def test_a_width_is_refused_on_a_cpu_where_bitsandbytes_unpacks_it_wrongly(
    right: bool, scheme: str, tiny_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(hidden_size=96, intermediate_size=128).save_pretrained(tmp_path)
    monkeypatch.setattr(quantization, "unpacks_any_width", lambda: right)
    if right:
        load(tmp_path, scheme)
    else:
        with pytest.raises(HardwareError, match=r"model.layers.0.self_attn.q_proj is 96 wide; use --quantization 8bit"):
            load(tmp_path, scheme)
    load(tmp_path, "8bit")


def test_whether_a_cpu_unpacks_any_width_is_tried() -> None:
    weight = torch.randn(96, 96)
    off = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")) - weight
    assert quantization.unpacks_any_width() == bool(off.norm() / weight.norm() < 0.2)
