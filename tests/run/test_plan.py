"""Laws of the plan: its memory is what was measured, it decides as the trainer does, and needs no weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmrecipes.batch import Sample
from llmrecipes.command import run_command
from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import PlanConfig
from llmrecipes.data.loaders import Loader
from llmrecipes.errors import ConfigError, HardwareError
from llmrecipes.kernels.decoder import Keep
from llmrecipes.kernels.footprint import Shape
from llmrecipes.kernels.layers import apply_fused_layers, decoder_layers
from llmrecipes.models.adapters import attach_trained
from llmrecipes.run import plan as module
from llmrecipes.run.speed import EXACT, eight_bit_compute, fused_shape

SEVEN_BILLION = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LORA = {"use_peft": "true", "lora_config.r": "16", "lora_config.target_modules": "all-linear"}
LORA |= {"lora_config.lora_dropout": "0"}
NESTED = {"quantization": "4bit", "quantization_config.use_double_quant": "true"}

MEASURED: dict[str, tuple[dict[str, str], float]] = {
    "16,384 tokens, bf16": (LORA | {"batch_size_training": "4"}, 60.7),
    "16,384 tokens, NF4": (LORA | {"batch_size_training": "4", "quantization": "4bit"}, 51.8),
    "the whole model": ({"batch_size_training": "4", "pure_bf16": "true"}, 85.0),
    "4,096 tokens, NF4": (
        LORA | NESTED | {"batch_size_training": "1", "gradient_accumulation_steps": "4", "activation_memory": "keep"},
        16.0,
    ),
    "4,096 tokens, NF4, least memory": (
        LORA | NESTED | {"batch_size_training": "1", "gradient_accumulation_steps": "4", "activation_memory": "offload",
                         "optimizer": "adamw_8bit"},
        4.75,
    ),
}  # fmt: skip
"""Flags of a 7B with rows of 4,096 tokens -> peak GiB on an H200 (benchmarks/gpu.py, 2026-11-30, torch 2.11)."""


def sized(flags: dict[str, str], **shape: int) -> tuple[Any, Shape, Loader, PlanConfig]:
    """A model without weights, its shape, eight rows of 4,096 tokens, and the config."""
    config = load_config(PlanConfig, {"model_name": "7B", "context_length": "4096", **flags}).config
    precision = module.planned_precision(config)
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SEVEN_BILLION | shape))
        model = model.to(precision.compute if config.use_peft else precision.trained)
        model = attach_trained(model, config, precision)
    assert module.why_not_fused(model, config, precision) == ""
    compute = eight_bit_compute(config, (9, 0), 4096)
    made = fused_shape(model, decoder_layers(model)[0], config, precision, compute)
    ids = np.zeros(4096, dtype=np.int32)
    loader = Loader(
        [Sample(ids, ids, row) for row in range(8)], "packing", 4096, config.batch_size_training,
        config.gradient_accumulation_steps, fixed_shapes=True,
    )  # fmt: skip
    return model, made, loader, config


def planned(flags: dict[str, str], limit: int) -> tuple[int, list[Keep], module.Footprint]:
    model, shape, loader, config = sized(flags)
    return module.fitted(config, model, shape, loader, limit)


@pytest.mark.parametrize("name", MEASURED)
def test_its_memory_is_within_a_tenth_of_what_was_measured(name: str) -> None:
    flags, measured = MEASURED[name]
    pieces, _, found = planned(flags, limit=module.CARDS["h200"].memory)
    assert pieces == 1
    assert found.peak / 2**30 == pytest.approx(measured, rel=0.1)


def test_a_base_in_fp8_takes_a_byte_a_weight_and_four_a_row() -> None:
    flags = LORA | {"batch_size_training": "4"}
    stored, plain = (planned(flags | kind, 141 * 10**9)[2].weights for kind in ({"quantization": "fp8"}, {}))
    rows, weights = 32 * (5 * 4096 + 2 * 11008), 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert plain - stored == weights - 4 * rows


def test_a_large_model_takes_the_time_of_its_matmuls() -> None:
    _, shape, loader, config = sized(LORA | {"batch_size_training": "4"})
    seconds, bound, told = module.training_time(shape, loader, config, module.CARDS["h200"], EXACT)
    assert bound == "about" and "56% of its 989 TFLOP/s" in told
    assert seconds == module.operations(shape, loader, config) / (0.56 * 989e12)


def test_a_small_model_takes_at_least_the_time_of_its_kernels() -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 30}
    _, shape, loader, config = sized(LORA | {"batch_size_training": "2"}, **small)
    for pieces in (1, 2):  # a batch that is cut makes them again for each piece
        seconds, bound, told = module.training_time(shape, loader.cut(pieces), config, module.CARDS["4090"], EXACT)
        assert bound == "at least" and "115 a layer and batch, 4 microseconds each" in told
        assert seconds == pytest.approx(4 * pieces * 30 * 115 * 4e-6)


@pytest.mark.parametrize("dropout", ["0", "0.1"], ids=["in one matrix", "by themselves"])
def test_the_copies_of_lora_are_counted_as_the_layers_make_them(dropout: str, model_folder: Path) -> None:
    flags = {"use_peft": "true", "lora_config.target_modules": "all-linear", "lora_config.lora_dropout": dropout}
    config = load_config(PlanConfig, {"model_name": "m", **flags}).config
    precision = module.planned_precision(config)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=precision.compute)
    model = attach_trained(model, config, precision)
    shape = fused_shape(model, decoder_layers(model)[0], config, precision, EXACT)
    apply_fused_layers(model, precision.compute, EXACT)
    layers: list[Any] = list(decoder_layers(model))
    groups = [group for layer in layers for group in layer.decoder.groups]
    made = sum(group.down.nbytes + group.up.nbytes for group in groups)
    assert shape.adapter_copies == made
    assert {group.low_width % 64 for group in groups if group.room} == ({0} if dropout == "0" else set())


def test_a_card_may_be_written_in_capitals(plan: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(card="H200") == 0
    assert "on one H200" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--card: 'b200' is not one of 3090, 4090, a100, h100 or h200"):
        plan(card="B200")


def test_a_smaller_card_gets_smaller_batches_and_then_keeps_less() -> None:
    flags = LORA | NESTED | {"batch_size_training": "4"}
    pieces, keeps, found = planned(flags, 24 << 30)
    assert pieces == 4 and set(keeps) == {Keep.ALL} and found.peak < 24 << 30
    pieces, keeps, found = planned(flags, 12 << 30)
    assert pieces == 4 and Keep.ALL not in keeps[-1:] and found.peak < 12 << 30
    assert planned(flags, 3 << 30)[2].peak > 3 << 30


def test_the_same_lora_trains_as_many_bytes_whatever_its_base_is_stored_in() -> None:
    plain, stored = (planned(LORA | kind, 141 * 10**9)[2] for kind in ({}, {"quantization": "fp8"}))
    assert plain.trained == stored.trained
    assert plain.copies > stored.copies  # the first are filled up to stand beside the base's weights


@pytest.fixture
def plan(model_folder: Path, sums_file: str, tmp_path: Path) -> Callable[..., int]:
    """Plans the usual run, on a folder without weights."""
    folder = tmp_path / "described"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))

    def run(**flags: str) -> int:
        data = {"dataset": "custom_dataset", "custom_dataset.file": sums_file, "context_length": "64"}
        return run_command("plan", {"model_name": str(folder), **data, "run_validation": "false", **flags})

    return run


def test_it_needs_no_weights_and_tells_what_the_run_takes(
    plan: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    assert plan(use_peft="true", card="3090", num_epochs="2", batch_size_training="1") == 0
    told = " ".join(capsys.readouterr().out.split())
    for part in (
        "LoRA, r 8",
        "steps 4",
        "of 24.0 GiB: frozen",
        "2 layers keep all",
        "time at least",
        "on one GeForce RTX 3090",
        "LoRA's copies",
    ):
        assert part in told
    assert sorted(tmp_path.iterdir()) == before


def test_what_does_not_fit_is_told_by_the_exit_code(
    plan: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(fit="513MiB") == 2
    assert "it does not fit; try" in capsys.readouterr().out


def test_a_model_that_is_not_known_is_told(plan: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "described" / "config.json"
    config = transformers.GemmaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, head_dim=8)
    path.write_text(json.dumps(config.to_dict()))
    with pytest.raises(
        ConfigError,
        match="plan: it knows runs whose layers are fused, and this one's are not .GemmaDecoderLayer, not one of",
    ):
        plan()


def test_a_model_of_another_kind_is_told(plan: Callable[..., int], tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2)
    (tmp_path / "described" / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ConfigError, match="has no list of decoder layers"):
        plan()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"quantization": "8bit", "use_peft": "true"}, "--quantization 8bit; plan it with 4bit or fp8"),
        ({"use_fast_kernels": "false"}, "--use_fast_kernels false; leave it out"),
        ({"use_peft": "true", "lora_config.use_dora": "true"}, "DoRA"),
        ({"freeze_layers": "true"}, "--freeze_layers without --pure_bf16"),
        ({"use_peft": "true", "lora_config.target_modules": "q_proj,lm_head"}, "the head has LoRA"),
    ],
    ids=["8bit", "plain", "DoRA", "frozen layers", "LoRA on the head"],
)
def test_what_would_not_be_fused_is_not_planned(flags: dict[str, str], told: str, plan: Callable[..., int]) -> None:
    with pytest.raises(ConfigError, match=f"whose layers are fused, and this one's are not .{told}"):
        plan(**flags)


def test_a_card_computes_what_it_can(plan: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    stored = {"use_peft": "true", "quantization": "fp8"}
    with pytest.raises(HardwareError, match="fp8: this GPU has no 8-bit floating point"):
        plan(card="a100", **stored, **{"quantization_config.compute": "fp8"})
    assert plan(card="a100", **stored) == 0
    assert "base in fp8, matmuls exact" in capsys.readouterr().out  # too narrow for 8 bits to pay
    assert plan(card="3090", fit="100GiB") == 0
    assert "of 24.0 GiB" in capsys.readouterr().out


def test_padded_batches_are_planned_as_long_as_they_are(
    plan: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for length in ("64", "128"):
        plan(batching_strategy="padding", context_length=length)
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
