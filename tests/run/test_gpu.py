"""Laws that only a GPU can break: every storage and precision trains, is saved, and answers as before when reloaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from faults import COMMON, assert_equal
from peft import LoraConfig, get_peft_model

from llmrecipes.batch import Batch, Sample, document_spans
from llmrecipes.data.loaders import Loader, padded_batch
from llmrecipes.kernels.attention import apply_document_attention, document_layout
from llmrecipes.kernels.decoder import Keep
from llmrecipes.kernels.graphs import Replayed
from llmrecipes.kernels.head import fused_loss_sum
from llmrecipes.kernels.layers import apply_fused_layers, decoder_layers
from llmrecipes.precision import Precision
from llmrecipes.run import infer as module
from llmrecipes.training.loss import loss_sum

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Command = Callable[..., int]

RUNS: dict[str, dict[str, str]] = {
    "bf16": {"mixed_precision": "true"},
    "fp32": {"mixed_precision": "false"},
    "fp16": {"mixed_precision": "None", "use_fp16": "true"},
    "8bit": {"mixed_precision": "true", "quantization": "8bit"},
    "nf4": {"mixed_precision": "true", "quantization": "4bit"},
    "fp8": {"mixed_precision": "true", "quantization": "fp8"},
    "fp8, int8": {"mixed_precision": "true", "quantization": "fp8", "quantization_config.compute": "int8"},
    "fp8, fp8": {"mixed_precision": "true", "quantization": "fp8", "quantization_config.compute": "fp8"},
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


SHAPES = {"heads of 16": (64, 128, 4, 2), "heads of 64": (576, 1536, 9, 3), "heads of 128": (512, 1408, 4, 4)}


@pytest.mark.parametrize("by_row", [False, True], ids=["packed", "by row"])
@pytest.mark.parametrize(
    ("dtype", "cosine"), [(torch.bfloat16, 0.9995), (torch.float16, 0.9999), (torch.float32, 0.9999)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_gradients_are_those_of_float32(
    shape: str, dtype: torch.dtype, cosine: float, by_row: bool, random_samples: Callable[..., list[Sample]]
) -> None:
    device = torch.device("cuda")
    hidden, inner, heads, key_heads = SHAPES[shape]
    samples = random_samples(9, longest=300)
    rows = [[sample] for sample in samples] if by_row else [samples[:5], samples[5:]]

    def gradient(kind: torch.dtype, fused: bool) -> torch.Tensor:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=heads,
            num_key_value_heads=key_heads, vocab_size=260, initializer_range=0.05,
        )  # fmt: skip
        model: Any = transformers.LlamaForCausalLM(config).to(torch.bfloat16).to(kind)
        apply_document_attention(model)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape) / 20
        model.to(device).train()
        precision = Precision(device, kind, torch.float32, loss_scaling=False)
        if fused:
            apply_fused_layers(model, kind)
            for layer in decoder_layers(model):
                layer.keep = Keep.OFFLOADED
        batch = padded_batch(rows, document_layout(precision)).to(device)
        ((fused_loss_sum if fused else loss_sum)(model, batch, precision) / 100).backward()
        return torch.cat([each.grad.double().flatten() for each in model.parameters() if each.requires_grad])

    exact, found = gradient(torch.float32, False), gradient(dtype, True)
    assert torch.nn.functional.cosine_similarity(found, exact, dim=0) > cosine


RESUMED: dict[str, dict[str, Any]] = {
    "lora with dropout": {"lora_config.lora_dropout": 0.2},
    "full": {"use_peft": None, "lora_config.lora_dropout": None, "lr": 1e-3},
    "nf4": {"quantization": "4bit", "mixed_precision": True, "lora_config.lora_dropout": 0.2},
    "packed, replayed": {"batching_strategy": "packing", "context_length": 16, "mixed_precision": True},
    "packed, int8 over nf4": {
        "batching_strategy": "packing", "context_length": 16, "mixed_precision": True, "quantization": "4bit",
        "quantization_config.compute": "int8", "optimizer": "adamw_fused",
    },
    "fp16, 8-bit optimizer": {"use_fp16": True, "mixed_precision": None, "optimizer": "adamw_8bit"},
    "paged optimizer": {"optimizer": "paged_adamw_8bit"},
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed_a_run_on_a_gpu_is_equal_to_the_bit(name: str, finetune: Command, tmp_path: Path) -> None:
    (tmp_path / "stop.py").write_text(
        "import os, signal\n"
        "def at_4(record):\n"
        "    if record['kind'] == 'step' and record['step'] == 4:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    flags = {**COMMON, "device": "cuda", "deterministic": True, **RESUMED[name]}
    assert finetune(tmp_path / "whole", **flags) == 0
    assert finetune(tmp_path / "cut", report_to=f"{tmp_path / 'stop.py'}:at_4", **flags) == 143
    assert finetune(tmp_path / "cut", **flags) == 0
    assert_equal(tmp_path / "cut", tmp_path / "whole")


def recorded(keep: Keep, random_samples: Callable[..., list[Sample]]) -> tuple[Any, Any, Loader]:
    """A model of two fused layers with LoRA, the loss that records its batches, and batches of one shape."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=260,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    apply_document_attention(model)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).cuda()
    apply_fused_layers(model, torch.bfloat16)
    layers: list[Any] = list(decoder_layers(model))
    for layer in layers:
        layer.keep = keep
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    replayed = Replayed(
        fused_loss_sum, parameters, lambda: [layer.refresh() for layer in layers],
        lambda: layers[0].host_memory.wait(torch.device("cuda")),
    )  # fmt: skip
    loader = Loader(
        random_samples(80, longest=100), "packing", 512, 1, seed=0, layout=document_spans, fixed_shapes=True
    )
    return model, replayed, loader


def gradient(model: Any, loss: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and all its gradients."""
    device = torch.device("cuda")
    model.zero_grad()
    value = loss(model, batch.to(device), Precision(device, torch.bfloat16, torch.float32, loss_scaling=False))
    (value / 7).backward()
    return value.detach(), torch.cat([each.grad.flatten() for each in model.parameters() if each.requires_grad])


@pytest.mark.parametrize("keep", [Keep.ALL, Keep.OFFLOADED])
def test_a_replayed_batch_is_the_computed_one_to_the_bit(
    keep: Keep, random_samples: Callable[..., list[Sample]]
) -> None:
    model, replayed, loader = recorded(keep, random_samples)
    losses = []
    optimizer = torch.optim.AdamW(replayed.parameters, lr=1e-2, fused=True)
    for window in loader.windows(0):
        computed = Replayed(fused_loss_sum, replayed.parameters, replayed.refresh)
        expected_loss, expected = gradient(model, computed, window[0])
        found_loss, found = gradient(model, replayed, window[0])
        assert torch.equal(found_loss, expected_loss) and torch.equal(found, expected)
        losses.append(float(found_loss))
        optimizer.step()
        torch.autograd.graph.increment_version(replayed.parameters)
    assert len(set(losses)) == len(losses) > 4
    assert replayed.records


@pytest.mark.parametrize("keep", [Keep.ALL, Keep.OFFLOADED])
def test_a_record_that_the_memory_does_not_hold_is_given_up(
    keep: Keep, random_samples: Callable[..., list[Sample]]
) -> None:
    model, replayed, loader = recorded(keep, random_samples)

    def loss(*given: Any) -> torch.Tensor:
        total = fused_loss_sum(*given)
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return total

    batch = next(iter(loader.windows(0)))[0]
    expected_loss, expected = gradient(model, replayed, batch)
    replayed.loss = loss
    for _ in range(2):
        found_loss, found = gradient(model, replayed, batch)
        assert torch.equal(found_loss, expected_loss) and torch.equal(found, expected)
    assert not replayed.records and not replayed.most
