"""Laws of the fast path in a whole run: demanded, it learns as the plain one does; where it cannot, that is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from llmrecipes.batch import Sample, document_spans
from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import RunConfig
from llmrecipes.data.loaders import Loader
from llmrecipes.errors import ConfigError
from llmrecipes.kernels.graphs import MOST, Replayed
from llmrecipes.kernels.layers import UnknownLayerError
from llmrecipes.precision import Precision
from llmrecipes.run.speed import ROOM_BYTES, Fused, check_fusible, replay_batches
from llmrecipes.training.loss import loss_sum

Command = Callable[..., int]
Losses = Callable[[Path], list[float]]

RUNS: dict[str, dict[str, Any]] = {
    "padding": {"lora_config.target_modules": "all-linear"},
    "packing": {"batching_strategy": "packing", "context_length": 24, "lora_config.target_modules": "all-linear"},
    "the whole model": {"use_peft": None, "lora_config.lora_dropout": None, "lr": 1e-3},
    "adamw_fused": {"optimizer": "adamw_fused"},
    "4bit": {"quantization": "4bit", "quantization_config.compute": "bf16"},
    "fp8": {"quantization": "fp8", "quantization_config.compute": "bf16"},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("memory", ["keep", "recompute", "offload", "1KiB"])
def test_fused_layers_learn_as_the_plain_ones(
    memory: str, name: str, finetune: Command, losses: Losses, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"lr": 1e-3, "run_validation": True, **RUNS[name]}
    finetune(tmp_path / "plain", use_fast_kernels=False, **flags)
    capsys.readouterr()
    finetune(tmp_path / "fast", use_fast_kernels=True, activation_memory=memory, **flags)
    assert "2 fused layers" in " ".join(capsys.readouterr().out.split())
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=2e-4)


@pytest.mark.parametrize(("quantization", "compute"), [("4bit", "int8"), ("fp8", "int8"), ("fp8", "fp8")])
def test_8_bit_matmuls_learn_and_their_error_is_told(
    quantization: str, compute: str, finetune: Command, losses: Losses, thorough: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = {**thorough, "quantization": quantization}
    finetune(tmp_path / "exact", **flags, **{"quantization_config.compute": "bf16"})
    capsys.readouterr()
    finetune(tmp_path / "rounded", **flags, **{"quantization_config.compute": compute})
    told = " ".join(capsys.readouterr().out.split())
    assert f"matmuls in {compute} (error of a layer" in told
    assert ("beyond the bound" in told) == (compute == "fp8")
    exact, rounded = losses(tmp_path / "exact"), losses(tmp_path / "rounded")
    assert rounded != exact and rounded[:3] == pytest.approx(exact[:3], rel=0.05)
    assert rounded[-1] < 0.1 * rounded[0]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"peft_method": "prefix", "lora_config.lora_dropout": None}, "cannot attend by document"),
        ({"peft_method": "llama_adapter", "lora_config.lora_dropout": None,
          "llama_adapter_config.adapter_layers": 2}, "the layers cannot be fused"),
        ({"lora_config.use_dora": True}, "DoRA"),
        ({"quantization": "8bit"}, "Linear8bitLt"),
        ({"lora_config.target_modules": "q_proj,lm_head"}, "the head has LoRA"),
    ],
    ids=["prefix", "llama_adapter", "DoRA", "8bit", "LoRA on the head"],
)  # fmt: skip
def test_what_cannot_be_fused_is_told_where_it_is_demanded(
    flags: dict[str, Any], told: str, finetune: Command, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"--use_fast_kernels true: .*{told}.*; leave the flag out"):
        finetune(tmp_path / "out", use_fast_kernels=True, **flags)
    assert finetune(tmp_path / "out", **flags) == 0


def test_8_bits_and_the_plain_path_contradict_each_other(finetune: Command, tmp_path: Path) -> None:
    flags = {"quantization": "4bit", "quantization_config.compute": "int8"}
    with pytest.raises(ConfigError, match="--use_fast_kernels false switches off"):
        finetune(tmp_path / "out", use_fast_kernels=False, **flags)


def test_a_model_with_windows_keeps_its_layers(
    finetune: Command, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "windows"
    shutil.copytree(model_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    config = transformers.MistralConfig(**{**settings, "sliding_window": 4, "model_type": "mistral", "head_dim": 16})
    torch.manual_seed(0)
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ConfigError, match="cannot attend by document"):
        finetune(tmp_path / "out", model_name=folder, use_fast_kernels=True)
    model = transformers.MistralForCausalLM(config)
    wanted = load_config(RunConfig, {"model_name": "m", "output_dir": "o", "use_peft": "true"}).config
    precision = Precision(torch.device("cpu"), torch.float32, torch.float32, loss_scaling=False)
    with pytest.raises(UnknownLayerError, match="does not attend by document"):
        check_fusible(model, wanted, precision)


PEAK = 8 << 30
RECORDED = 10 * 2**30 + 40 * MOST + ROOM_BYTES


@pytest.mark.parametrize(
    ("limit", "changed", "recorded"),
    [
        (RECORDED, {}, True),
        (RECORDED - 1, {}, False),
        (RECORDED, {"drops": True}, False),
        (RECORDED, {"rope_type": "dynamic"}, False),
        (RECORDED, {"fixed_shapes": False}, False),
    ],
    ids=["fits", "does not", "dropout", "angles by length", "shapes differ"],
)
def test_batches_are_recorded_where_that_is_right_and_a_validation_fits_beside(
    limit: int, changed: dict[str, Any], recorded: bool, random_samples: Callable[..., list[Sample]]
) -> None:
    found = {"drops": False, "rope_type": "default", "fixed_shapes": True} | changed
    layer: Any = SimpleNamespace(
        decoder=SimpleNamespace(drops=found["drops"]),
        self_attn=SimpleNamespace(config=SimpleNamespace(rope_parameters={"rope_type": found["rope_type"]})),
    )  # fmt: skip
    precision = Precision(torch.device("cuda"), torch.bfloat16, torch.float32, loss_scaling=False)
    updater: Any = SimpleNamespace(precision=precision, parameters=[torch.nn.Parameter(torch.zeros(10))], loss=loss_sum)
    loader = Loader(random_samples(8), "packing", 64, 1, layout=document_spans, fixed_shapes=found["fixed_shapes"])
    config = load_config(RunConfig, {"model_name": "m", "output_dir": "o", "use_peft": "true"}).config
    told = replay_batches(config, Fused("", loss_sum, [layer]), loader, updater, PEAK, limit)
    assert told == ("batches replayed as CUDA graphs" if recorded else "")
    assert isinstance(updater.loss, Replayed) == recorded
