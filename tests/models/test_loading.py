"""Laws of loading a model: the type and the attention are the run's, a failure's reason survives in one line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmrecipes.config.schema import InferenceConfig
from llmrecipes.errors import ModelError, first_line
from llmrecipes.models.loading import load_model, load_tokenizer, model_limits, resolve_model
from llmrecipes.precision import Precision

CPU = torch.device("cpu")
FP32 = Precision(CPU, torch.float32, torch.float32, loss_scaling=False)
BF16 = Precision(CPU, torch.bfloat16, torch.float32, loss_scaling=False)


def config(folder: Path, **changes: object) -> InferenceConfig:
    return InferenceConfig(model_name=str(folder), **changes)  # type: ignore[arg-type]


def test_the_weights_are_those_of_the_file(tiny_folder: Path) -> None:
    model = load_model(config(tiny_folder), str(tiny_folder), FP32)
    stored = load_file(tiny_folder / "model.safetensors")
    loaded = model.state_dict()
    assert stored.keys() == loaded.keys() and all(torch.equal(stored[name], loaded[name]) for name in stored)
    assert not model.training


@pytest.mark.parametrize(("precision", "dtype", "expected"), [
    (FP32, None, torch.float32), (BF16, None, torch.bfloat16), (BF16, torch.float32, torch.float32),
])  # fmt: skip
def test_the_type_is_the_computes_unless_one_is_asked_for(
    precision: Precision, dtype: torch.dtype | None, expected: torch.dtype, tiny_folder: Path
) -> None:
    model = load_model(config(tiny_folder), str(tiny_folder), precision, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize(("fast", "attention"), [(None, "sdpa"), (True, "sdpa"), (False, "eager")])
def test_the_attention_is_the_runs(fast: bool | None, attention: str, tiny_folder: Path) -> None:
    model = load_model(config(tiny_folder, use_fast_kernels=fast), str(tiny_folder), FP32)
    assert model.config._attn_implementation == attention


def test_a_model_without_fast_attention_falls_back_unless_it_is_demanded(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=50)).save_pretrained(tmp_path)
    assert load_model(config(tmp_path), str(tmp_path), FP32).config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="does not support an attention implementation"):
        load_model(config(tmp_path, use_fast_kernels=True), str(tmp_path), FP32)


def test_limits_are_those_of_the_config(tiny_folder: Path) -> None:
    assert model_limits(config(tiny_folder), str(tiny_folder)) == (260, 128)


def test_a_folder_may_be_named_from_home(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    named = config(Path("~/model"), tokenizer_name="~/model")
    assert resolve_model(named) == str(tiny_folder)
    assert load_tokenizer(named, "nowhere").eos_token == "</s>"


def test_padding_gets_a_token_that_is_not_the_end(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(config(tiny_folder), str(tiny_folder))
    assert tokenizer.pad_token == "<unk>" != tokenizer.eos_token


def test_a_reason_is_one_line() -> None:
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert first_line(RuntimeError("Errors:\n\n   size mismatch\nmore")) == "RuntimeError: Errors: size mismatch"
    assert first_line(KeyError()) == "KeyError: no message"
    assert len(first_line(ValueError("x" * 1000))) < 220


@pytest.mark.parametrize(("offline", "way"), [
    (True, "the hub is not reached: HF_HUB_OFFLINE is set; give a folder, or unset it)"),
    (False, "the hub is not reached: no network; give a folder)"),
])  # fmt: skip
def test_a_model_that_is_nowhere_is_told_with_what_to_do(
    offline: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmrecipes.models.loading.is_offline_mode", lambda: offline)
    for read in (resolve_model, lambda named: load_tokenizer(named, "nosuch/model")):
        with pytest.raises(ModelError) as caught:
            read(config(Path("nosuch/model")))
        told = str(caught.value)
        assert told.startswith("--model_name nosuch/model: ") and told.endswith(way) and "\n" not in told
        assert "(no such folder is here, nor in the local cache, and" in told and "OSError" not in told
