"""Laws of an answer: the tuned model says it and stops, the prompt is the one of training, nothing else is printed."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import InferenceConfig, RunConfig
from llmrecipes.data.preprocessors import load_preprocessor
from llmrecipes.errors import ConfigError, DataError, HardwareError, ModelError
from llmrecipes.models.loading import load_tokenizer
from llmrecipes.plugins import plugin_folders
from llmrecipes.prompts import encode_prompt
from llmrecipes.run import infer as module
from llmrecipes.run.preparing import load_split

Command = Callable[..., int]
Printed = pytest.CaptureFixture[str]

SCHEMES: dict[str, dict[str, str]] = {
    "8bit": {"quantization": "8bit"},
    "fp8": {"quantization": "fp8"},
    "fp8, bfloat16": {"quantization": "fp8", "mixed_precision": "true"},
    "nf4": {"quantization": "4bit"},
    "fp4": {"quantization": "4bit", "quantization_config.quant_type": "fp4"},
    "nf4, double": {"quantization": "4bit", "quantization_config.use_double_quant": "true"},
    "nf4, bfloat16": {"quantization": "4bit", "mixed_precision": "true"},
}


@pytest.mark.parametrize(("prompt", "answer"), [("2+0=", "2"), ("9+3=", "12"), ("5+2=", "7")])
def test_the_answer_and_nothing_else_is_printed(
    prompt: str, answer: str, infer: Command, tuned: Path, capsys: Printed
) -> None:
    assert infer(prompt, peft_model=str(tuned)) == 0
    assert capsys.readouterr() == (f"{answer}\n", "")


def test_the_base_does_not_know_the_answer(infer: Command, capsys: Printed) -> None:
    infer("9+3=", max_new_tokens="5")
    assert capsys.readouterr().out.strip() != "12"


def test_a_prompt_has_the_ids_that_it_had_in_training(
    infer: Command, tuned: Path, sums_file: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    real = module.stream_text
    monkeypatch.setattr(module, "stream_text", lambda *given: asked.append(given[2]) or real(*given))
    infer("9+3=", peft_model=str(tuned))
    flags = {"model_name": str(model_folder), "output_dir": "x", "custom_dataset.file": sums_file}
    config = load_config(RunConfig, {**flags, "dataset": "custom_dataset"}).config
    tokenizer = load_tokenizer(config, str(model_folder))
    preprocessor = load_preprocessor(config, plugin_folders(None))
    samples, _ = load_split(config, tokenizer, preprocessor, "train", str(model_folder))
    assert asked == [samples[-1].prompt_ids]
    assert asked[0][0] == tokenizer.bos_token_id and asked[0].count(tokenizer.bos_token_id) == 1


def test_prompts_by_file_flag_and_standard_input_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "line 1\n\n  line 3 \n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    for given in ({"prompt": text}, {"prompt_file": str(tmp_path / "prompt.txt")}, {}, {"prompt_file": "-"}):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert module.read_prompt(load_config(InferenceConfig, {"model_name": "m", **given}).config) == text


BAD_PROMPTS: dict[str, tuple[dict[str, str], str]] = {
    "empty": ({"prompt": " \n"}, "the prompt is empty"),
    "two": ({"prompt": "a", "prompt_file": "b"}, "--prompt and --prompt_file"),
    "no file": ({"prompt_file": "/nowhere/p.txt"}, "--prompt_file /nowhere/p.txt: No such file"),
    "folder": ({"prompt_file": "/"}, "--prompt_file /: Is a directory"),
    "half a character": ({"prompt": "a\udc80"}, "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_prompt_that_is_none_is_told_before_the_model_loads(name: str, infer: Command, no_model_loads: None) -> None:
    flags, message = BAD_PROMPTS[name]
    with pytest.raises(ConfigError, match=message):
        infer(None, **flags)


def test_a_file_that_is_not_utf_8_is_told_with_its_byte(infer: Command, tmp_path: Path, no_model_loads: None) -> None:
    (tmp_path / "p.txt").write_bytes(b"abc\xff")
    with pytest.raises(ConfigError, match=r"p.txt: not UTF-8 text \(byte 3\)"):
        infer(None, prompt_file=str(tmp_path / "p.txt"))


def test_a_prompt_longer_than_the_model_is_told_before_the_model_loads(infer: Command, no_model_loads: None) -> None:
    with pytest.raises(DataError, match=r"has 101 tokens .* only 128 positions .* --max_new_tokens 27 or less"):
        infer("a" * 100)


def test_flags_of_generation_that_cannot_be_are_told_before_the_model_loads(
    infer: Command, no_model_loads: None
) -> None:
    for flags in ({"length_penalty": "2"}, {"min_new_tokens": "9", "max_new_tokens": "5"}):
        with pytest.raises(ConfigError, match=f"--{next(iter(flags))}"):
            infer("a", **flags)


@pytest.mark.parametrize("name", SCHEMES)
def test_an_adapter_on_a_quantized_base_answers_after_reloading_as_it_did_in_memory(
    name: str, finetune: Command, infer: Command, thorough: dict[str, str], in_memory: list[Any], tmp_path: Path,
    capsys: Printed, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    finetune(tmp_path / "out", run_validation=True, eval_steps=30, **thorough, **SCHEMES[name])
    capsys.readouterr()
    reloaded: list[Any] = []
    real = module.stream_text
    monkeypatch.setattr(module, "stream_text", lambda *given: reloaded.append(given[0]) or real(*given))
    adapter = tmp_path / "out" / "last" if (tmp_path / "out" / "last").exists() else tmp_path / "out"
    assert infer("9+3=", peft_model=str(adapter), **SCHEMES[name]) == 0
    shown = capsys.readouterr()
    assert shown.out == "12\n"
    assert "stored in another way" not in shown.err
    ids = torch.arange(20, 32)[None]
    with torch.inference_mode():
        found, expected = (model.eval()(input_ids=ids).logits for model in (reloaded[0], in_memory[0]))
    assert torch.equal(found, expected)


def test_a_base_stored_otherwise_than_in_training_is_told(
    finetune: Command, infer: Command, tmp_path: Path, capsys: Printed
) -> None:
    fp4 = SCHEMES["fp4"]
    finetune(tmp_path / "out", save_steps=3, **fp4)
    finetune(tmp_path / "plain")
    capsys.readouterr()

    def told(adapter: Path, **flags: str) -> str:
        infer("9+3=", peft_model=str(adapter), max_new_tokens="2", **flags)
        return capsys.readouterr().err

    wanted = "--quantization 4bit --quantization_config.quant_type fp4 would load it as it was"
    assert wanted in told(tmp_path / "out") and wanted in told(tmp_path / "out" / "step-000003")
    assert wanted in told(tmp_path / "out", **SCHEMES["nf4"])
    assert "stored in another way" not in told(tmp_path / "out", **fp4)
    assert "leave --quantization out" in told(tmp_path / "plain", quantization="8bit")
    assert wanted in told(tmp_path / "out", quantization="fp8")
    assert "stored in another way" not in told(tmp_path / "plain")
    settings = tmp_path / "plain" / "run.yaml"
    settings.write_text(settings.read_text() + "quantization: null\n")
    assert "stored in another way" not in told(tmp_path / "plain")


def test_a_prompt_of_another_form_than_in_training_is_told(infer: Command, tuned: Path, capsys: Printed) -> None:
    infer("9+3", peft_model=str(tuned))
    assert "training prompts end with '='" in capsys.readouterr().err


def test_the_tokenizer_that_the_adapter_was_trained_with_is_used(
    finetune: Command, infer: Command, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text((model_folder / name).read_text())
    written = json.loads((other / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    vocabulary["2"], vocabulary["Z"] = vocabulary["Z"], vocabulary["2"]
    (other / "tokenizer.json").write_text(json.dumps(written))
    finetune(tmp_path / "out", tokenizer_name=other)
    asked: list[list[int]] = []
    real = module.stream_text
    monkeypatch.setattr(module, "stream_text", lambda *given: asked.append(given[2]) or real(*given))
    infer("2", peft_model=str(tmp_path / "out"))
    infer("2", peft_model=str(tmp_path / "out"), tokenizer_name=str(model_folder))
    base = load_tokenizer(load_config(InferenceConfig, {"model_name": str(model_folder)}).config, str(model_folder))
    assert asked == [encode_prompt(base, "Z"), encode_prompt(base, "2")]


def test_sampling_is_the_same_with_the_same_seed(infer: Command, capsys: Printed) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        infer("9+3=", do_sample="true", seed=seed, max_new_tokens="8")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_faults_of_folders_and_machine_are_told_before_the_model_loads(
    infer: Command, tmp_path: Path, no_model_loads: None
) -> None:
    with pytest.raises(ModelError, match=f"--peft_model {tmp_path}/none: no such folder"):
        infer("a", peft_model=str(tmp_path / "none"))
    with pytest.raises(ModelError, match=f"--peft_model {tmp_path}: it has no adapter_config.json"):
        infer("a", peft_model=str(tmp_path))
    if not torch.cuda.is_available():
        with pytest.raises(HardwareError, match="--device cuda: this machine has 0 CUDA devices"):
            infer("a", device="cuda")
