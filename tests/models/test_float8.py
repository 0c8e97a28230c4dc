"""Laws of a weight in float8_e4m3fn: as near as its three bits are, and never taken for what it is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from llmrecipes.config.schema import InferenceConfig
from llmrecipes.errors import ModelError
from llmrecipes.models.adapters import load_adapter
from llmrecipes.models.float8 import FLOAT8, LARGEST, Float8Linear
from llmrecipes.models.loading import load_model
from llmrecipes.precision import Precision

Build = Callable[..., Any]

FP32 = Precision(torch.device("cpu"), torch.float32, torch.float32, loss_scaling=False)


def linear(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> Float8Linear:
    layer = Float8Linear(torch.nn.Linear(weight.shape[1], len(weight), bias=False, dtype=dtype))
    layer.weight = layer.stored(weight)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_number_comes_back_to_a_sixteenth(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 576).mul(torch.logspace(-4, 4, 64)[:, None]).to(dtype)
    weight[3] = 0
    layer = linear(weight)
    found, weight = layer.expanded(), weight.float()
    smallest = layer.scales * torch.finfo(FLOAT8).smallest_normal
    assert torch.all((found - weight).abs() <= weight.abs().where(weight.abs() > smallest, smallest) / 16)
    assert torch.all(found.abs().amax(1) - weight.abs().amax(1) <= 1e-6 * weight.abs().amax(1))
    assert torch.equal(layer.weight.view(FLOAT8).float().abs().amax(1) == LARGEST, weight.any(1))
    assert (layer.weight.numel(), layer.weight.element_size(), layer.scales.numel()) == (64 * 576, 1, 64)


def test_an_answer_and_its_gradient_are_those_of_the_rounded_weight() -> None:
    torch.manual_seed(0)
    layer, x = linear(torch.randn(24, 40)), torch.randn(3, 5, 40, requires_grad=True)
    expected = torch.nn.functional.linear(x, layer.expanded())
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    for found in (layer(x), checkpoint(layer, x, use_reentrant=False)):
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found.square().sum(), x)[0], wanted)


def test_nothing_in_16_bits_is_kept_for_the_gradient() -> None:
    layer, x = linear(torch.randn(24, 40)), torch.randn(3, 40, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert kept == []


def test_under_autocast_it_answers_in_the_type_that_it_multiplies_in() -> None:
    layer = linear(torch.randn(24, 40), torch.bfloat16)
    layer.bias = torch.nn.Parameter(torch.randn(24))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 40)).dtype == torch.bfloat16
    assert layer(torch.randn(3, 40)).dtype == torch.bfloat16


@pytest.fixture
def folder(tiny_model: Build, tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, quantization: str | None) -> Any:
    return load_model(InferenceConfig(model_name=str(folder), quantization=quantization), str(folder), FP32)


def test_a_new_adapter_is_that_of_an_unquantized_base(folder: Path) -> None:
    found = []
    for quantization in ("fp8", None):
        torch.manual_seed(0)
        model = get_peft_model(load(folder, quantization), LoraConfig(r=4, target_modules="all-linear"))
        found.append({name: each for name, each in model.named_parameters() if "lora_" in name})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2 * 2 * 7
    assert all(torch.equal(each, found[1][name]) for name, each in found[0].items())


@pytest.mark.parametrize(
    "kind", [LoraConfig(use_dora=True, target_modules=["q_proj"]), LoHaConfig(target_modules=["q_proj"])]
)
def test_an_adapter_that_reads_the_weights_is_refused(kind: Any, folder: Path, tmp_path: Path) -> None:
    get_peft_model(load(folder, None), kind).save_pretrained(tmp_path / "adapter")
    load_adapter(load(folder, None), str(tmp_path / "adapter"), "peft_model")
    with pytest.raises(
        ModelError, match=r"--peft_model .*adapter: .* cannot from fp8; use --quantization 4bit or 8bit"
    ):
        load_adapter(load(folder, "fp8"), str(tmp_path / "adapter"), "peft_model")
