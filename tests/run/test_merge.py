"""Laws of merging: the merged model answers as base and adapter did, and is a plain folder for everyone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrecipes.errors import ConfigError, ModelError

Command = Callable[..., int]
Printed = pytest.CaptureFixture[str]

IDS = torch.arange(20, 32)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.5), ("float16", 0.1)], ids=lambda value: str(value)
)
def test_the_merged_model_answers_the_same_and_plain_transformers_loads_it(
    dtype: str, tolerance: float, merge: Command, evaluate: Command, model_folder: Path, tuned: Path, tmp_path: Path,
    capsys: Printed,
) -> None:  # fmt: skip
    assert merge(tuned, tmp_path / "out", dtype=dtype) == 0
    capsys.readouterr()
    evaluate(model_name=str(tmp_path / "out"))
    assert "| exact_match | 100.0 %" in capsys.readouterr().out
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {getattr(torch, dtype)}
    assert saved.keys() == load_file(model_folder / "model.safetensors").keys()
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base, tuned))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (found - expected).abs().max() < tolerance
    prompt = AutoTokenizer.from_pretrained(tmp_path / "out")("9+3=")["input_ids"]
    assert prompt == AutoTokenizer.from_pretrained(model_folder)("9+3=")["input_ids"]


def test_the_command_that_is_proposed_answers(
    merge: Command, infer: Command, tuned: Path, tmp_path: Path, capsys: Printed
) -> None:
    merge(tuned, tmp_path / "out")
    told = capsys.readouterr().out
    assert f"llmrecipes.inference --model_name {tmp_path / 'out'} --prompt 2+0=\n" in told
    assert " nats a token (0: it answers the same; above 0.1 nothing would have been written)\n" in told
    infer("9+3=", model_name=str(tmp_path / "out"))
    assert capsys.readouterr() == ("12\n", "")
    infer("9+3", model_name=str(tmp_path / "out"))
    assert "training prompts end with" in capsys.readouterr().err  # the prompt contract came along


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"lora_config.use_rslora": True},
    "dora": {"lora_config.use_dora": True},
    "8bit": {"quantization": "8bit"},
    "fp8": {"quantization": "fp8"},
    "nf4": {"quantization": "4bit"},
    "fp4": {"quantization": "4bit", "quantization_config.quant_type": "fp4"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_lora_is_merged_right(
    name: str, finetune: Command, merge: Command, model_folder: Path, tmp_path: Path, capsys: Printed
) -> None:
    finetune(tmp_path / "adapter", **VARIANTS[name])
    capsys.readouterr()
    merge(tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert ("stored with --quantization" in capsys.readouterr().err) == ("quantization" in VARIANTS[name])
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.allclose(found, expected, atol=1e-3) and not torch.allclose(found, before, atol=1e-1)


def test_shared_input_and_output_weights_are_parted_where_the_adapter_changes_one(
    finetune: Command, merge: Command, tied_folder: Path, tmp_path: Path
) -> None:
    finetune(tmp_path / "adapter", model_name=tied_folder, **{"lora_config.target_modules": "lm_head,q_proj"})
    merge(tmp_path / "adapter", tmp_path / "out", model_name=str(tied_folder), dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(tied_folder, dtype=torch.float32)
    before = base.get_input_embeddings().weight.detach().clone()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert not torch.equal(merged.get_output_embeddings().weight, before)
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert torch.allclose(logits(merged), expected, atol=1e-3)


def test_shared_weights_stay_shared_where_the_adapter_leaves_them(
    finetune: Command, merge: Command, tied_folder: Path, tmp_path: Path
) -> None:
    finetune(tmp_path / "adapter", model_name=tied_folder)
    merge(tmp_path / "adapter", tmp_path / "out", model_name=str(tied_folder), dtype="float32")
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(tied_folder / "model.safetensors").keys()
    )


@pytest.fixture(scope="module")
def tied_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with one matrix for input and output."""
    import shutil

    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


def test_a_disk_too_small_for_the_model_is_told_before_it_is_read(
    merge: Command, tuned: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (model_folder / "model.safetensors").stat().st_size
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free[0]})())
    with monkeypatch.context() as unread:
        unread.setattr("llmrecipes.run.merge.load_model", lambda *given: pytest.fail("the weights were read"))
        for free[0] in (1000, (16 << 20) + size // 2):  # float32 takes as much as the base; bfloat16 half of it
            told = r"--output_dir .*: the merged model takes 1\d MiB in float32, and \d+ MiB are free; make room"
            with pytest.raises(ConfigError, match=told):
                merge(tuned, tmp_path / "out", dtype="float32")
        assert not (tmp_path / "out").exists()
    assert merge(tuned, tmp_path / "out", dtype="bfloat16") == 0
    free[0] = (16 << 20) - 1000  # what it replaces makes room
    with pytest.raises(ConfigError, match="make room"):
        merge(tuned, tmp_path / "other", dtype="bfloat16")
    assert merge(tuned, tmp_path / "out", dtype="bfloat16", overwrite_output_dir="true") == 0


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prefix", "llama_adapter"])
def test_an_adapter_that_changes_no_weights_is_not_merged(
    method: str, finetune: Command, merge: Command, tmp_path: Path
) -> None:
    layers = {"llama_adapter_config.adapter_layers": 2} if method == "llama_adapter" else {}
    finetune(tmp_path / "adapter", peft_method=method, **{"lora_config.lora_dropout": None}, **layers)
    with pytest.raises(ConfigError, match="--peft_model .* cannot be merged"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_the_type_cannot_hold_are_refused(
    merge: Command, tuned: Path, model_folder: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    import shutil

    shutil.copytree(model_folder, large)
    weights = load_file(large / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"--dtype: model.layers.0.mlp.up_proj.weight overflows .*choose bfloat16"):
        merge(tuned, tmp_path / "out", model_name=str(large), dtype="float16")
    assert not (tmp_path / "out").exists()
    assert merge(tuned, tmp_path / "out", model_name=str(large)) == 0


def test_a_merged_model_is_replaced_only_when_told_and_only_if_it_is_one(
    merge: Command, tuned: Path, model_folder: Path, tmp_path: Path
) -> None:
    merge(tuned, tmp_path / "out")
    with pytest.raises(ConfigError, match="--output_dir .* holds a run already"):
        merge(tuned, tmp_path / "out")
    assert merge(tuned, tmp_path / "out", overwrite_output_dir="true") == 0
    for place in (model_folder, tuned):
        with pytest.raises(ConfigError, match="this run reads"):
            merge(tuned, place, overwrite_output_dir="true")
    import shutil

    shutil.copytree(model_folder, tmp_path / "somebody's")
    with pytest.raises(ConfigError, match="holds files that no run wrote"):
        merge(tuned, tmp_path / "somebody's", overwrite_output_dir="true")
    assert (tmp_path / "somebody's" / "model.safetensors").is_file()


def test_a_type_that_changes_the_answers_is_refused(
    merge: Command, model_folder: Path, tuned: Path, tmp_path: Path, capsys: Printed
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] += 300  # all logits alike, which says nothing; rounded to 8 bits it hides what does
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    flags = {"model_name": str(base), "allow_base_mismatch": True}
    with pytest.raises(ModelError, match=r"--dtype bfloat16: .* nats a token off .*; choose float32"):
        merge(tuned, tmp_path / "out", dtype="bfloat16", **flags)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert merge(tuned, tmp_path / "out", dtype="float32", **flags) == 0
    told = capsys.readouterr().out
    assert float(told.split("base and adapter: ")[1].split()[0]) < 1e-3
