"""Laws of what trains: an adapter switched off leaves the base, `all-linear` means all, counts are of weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import RunConfig
from llmrecipes.errors import ModelError
from llmrecipes.models.adapters import adapter_switched_off, attach_trained, count_parameters, load_adapter
from llmrecipes.precision import Precision

Build = Callable[..., Any]

IDS = torch.arange(20, 32)[None]
FP32 = Precision(torch.device("cpu"), torch.float32, torch.float32, loss_scaling=False)
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def config(**flags: str) -> RunConfig:
    given = {"model_name": "m", "output_dir": "o", "dataset": "alpaca_dataset", "use_peft": "true", **flags}
    return load_config(RunConfig, given).config


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def disturbed(model: Any) -> Any:
    """The model after its trained parameters have moved."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.5
    return model


METHODS: dict[str, dict[str, str]] = {
    "lora": {},
    "lora with biases": {"lora_config.bias": "all"},
    "dora": {"lora_config.use_dora": "true"},
    "prefix": {"peft_method": "prefix"},
    "llama_adapter": {"peft_method": "llama_adapter", "llama_adapter_config.adapter_layers": "2"},
}


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_switched_off_leaves_the_base_and_comes_back(name: str, tiny_model: Build, tmp_path: Path) -> None:
    settings = {"attention_bias": True, "initializer_range": 0.2}
    base = logits(tiny_model(**settings))
    trained = disturbed(attach_trained(tiny_model(**settings), config(**METHODS[name]), FP32))
    trained.save_pretrained(tmp_path)
    model = load_adapter(tiny_model(**settings), str(tmp_path), "peft_model")
    tuned = logits(model)
    assert torch.equal(tuned, logits(trained)) and not torch.allclose(tuned, base, atol=1e-3)
    with adapter_switched_off(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned)
    with pytest.raises(ZeroDivisionError), adapter_switched_off(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), tuned)


def test_all_linear_is_every_linear_but_the_output(tiny_model: Build, tmp_path: Path) -> None:
    model = attach_trained(tiny_model(), config(**{"lora_config.target_modules": "all-linear"}), FP32)
    adapted = {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == LINEARS
    model.save_pretrained(tmp_path)
    # Names, not places: an adapter of two layers must not load into a base of three.
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == LINEARS
    with pytest.raises(ModelError, match="trained on another base model"):
        load_adapter(tiny_model(num_hidden_layers=3), str(tmp_path), "peft_model")


def test_a_layer_may_be_named_by_its_place(tiny_model: Build) -> None:
    named = {"lora_config.target_modules": "layers.1.mlp.up_proj"}
    model = attach_trained(tiny_model(), config(**named), FP32)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 and all(".layers.1.mlp.up_proj." in name for name in trained)


def test_counts_are_of_weights(tiny_model: Build) -> None:
    model = tiny_model()
    total = sum(parameter.numel() for parameter in model.parameters())
    adapted = attach_trained(model, config(), FP32)
    lora = 2 * 8 * (32 + 32) + 2 * 8 * (32 + 16)  # two layers; q_proj 32 to 32, v_proj 32 to 16
    assert count_parameters(adapted) == (total + lora, lora)


def test_an_adapter_that_trains_further_trains_and_one_that_answers_does_not(tiny_model: Build, tmp_path: Path) -> None:
    attach_trained(tiny_model(), config(), FP32).save_pretrained(tmp_path)
    answering = load_adapter(tiny_model(), str(tmp_path), "peft_model")
    assert count_parameters(answering)[1] == 0
    further = attach_trained(tiny_model(), config(from_peft_checkpoint=str(tmp_path)), FP32)
    assert count_parameters(further)[1] > 0
