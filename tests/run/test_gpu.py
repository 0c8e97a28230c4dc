"""Laws that only a GPU can break: every storage and precision trains, is saved, and answers as before when reloaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipes.run import infer as module

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Command = Callable[..., int]

RUNS: dict[str, dict[str, str]] = {
    "bf16": {"mixed_precision": "true"},
    "fp32": {"mixed_precision": "false"},
    "fp16": {"mixed_precision": "None", "use_fp16": "true"},
    "8bit": {"mixed_precision": "true", "quantization": "8bit"},
    "nf4": {"mixed_precision": "true", "quantization": "4bit"},
    "fp4, double": {
        "mixed_precision": "true",
        "quantization": "4bit",
        "quantization_config.quant_type": "fp4",
        "quantization_config.use_double_quant": "true",
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_an_adapter_answers_after_reloading_as_it_did_in_memory(
    name: str, finetune: Command, infer: Command, thorough: dict[str, str], in_memory: list[Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    finetune(tmp_path / "out", device="cuda", **thorough, **RUNS[name])
    capsys.readouterr()
    reloaded: list[Any] = []
    real = module.stream_text
    monkeypatch.setattr(module, "stream_text", lambda *given: reloaded.append(given[0]) or real(*given))
    assert infer("9+3=", peft_model=str(tmp_path / "out"), **{"device": "cuda", **RUNS[name]}) == 0
    assert capsys.readouterr().out == "12\n"
    ids = torch.arange(20, 32, device="cuda")[None]
    with torch.inference_mode():
        found, expected = (model.eval()(input_ids=ids).logits.float() for model in (reloaded[0], in_memory[0]))
    assert torch.allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("name", ["adamw_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_every_optimizer_learns_on_a_gpu(
    name: str, finetune: Command, losses: Callable[[Path], list[float]], tmp_path: Path
) -> None:
    finetune(tmp_path / "out", device="cuda", optimizer=name, num_epochs=10)
    found = losses(tmp_path / "out")
    assert sum(found[-3:]) < sum(found[:3])


@pytest.mark.parametrize("strategy", ["padding", "packing"])
def test_the_losses_are_those_of_the_cpu(
    strategy: str, finetune: Command, losses: Callable[[Path], list[float]], tmp_path: Path
) -> None:
    for device in ("cpu", "cuda"):
        finetune(tmp_path / device, device=device, batching_strategy=strategy, context_length=24, lr=1e-3)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
