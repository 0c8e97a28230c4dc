"""Laws of the loss: how samples are batched, padded, packed or accumulated does not change the gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from llmrecipes.batch import Batch, Sample
from llmrecipes.data.loaders import Loader, padded_batch
from llmrecipes.errors import TrainingError
from llmrecipes.kernels.attention import apply_document_attention
from llmrecipes.precision import Precision, resolve_precision
from llmrecipes.training import loss, probe
from llmrecipes.training.loss import model_inputs, prediction_targets
from llmrecipes.training.probe import check_no_leak

FP32 = resolve_precision("cpu", mixed_precision=False, use_fp16=False)

Samples = Callable[..., list[Sample]]


def window_gradient(model: Any, loader: Loader, precision: Precision = FP32) -> torch.Tensor:
    """The gradient of the first window's loss, by the trainer's own rule."""
    model.zero_grad()
    (window,) = loader.windows(0)
    supervised = sum(batch.supervised_tokens for batch in window)
    for batch in window:
        (loss.loss_sum(model, batch, precision) / supervised).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def reference_gradient(model: Any, samples: list[Sample]) -> torch.Tensor:
    """The gradient of the mean loss over all supervised tokens, each sample alone, nothing of ours used."""
    model.zero_grad()
    supervised = sum(int((sample.labels[1:] != -100).sum()) for sample in samples)
    for sample in samples:
        ids = torch.tensor(sample.input_ids.tolist())[None]
        labels = torch.tensor(sample.labels.tolist())
        logits = model(input_ids=ids).logits[0]
        (F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / supervised).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def build(tiny_model: Any, attention: str) -> Any:
    if attention != "documents":
        return tiny_model(attn_implementation=attention)
    model = tiny_model()
    assert apply_document_attention(model) == 2
    return model


LAYOUTS = {
    "one batch": {"strategy": "padding", "batch_rows": 20, "window_batches": 1},
    "accumulated": {"strategy": "padding", "batch_rows": 1, "window_batches": 20},
    "uneven accumulation": {"strategy": "padding", "batch_rows": 3, "window_batches": 7, "seed": 1},
    "grouped by length": {"strategy": "padding", "batch_rows": 4, "window_batches": 5, "seed": 1, "group_by_length": 1},
    "packed": {"strategy": "packing", "batch_rows": 20, "window_batches": 1, "seed": 2},
    "packed and accumulated": {"strategy": "packing", "batch_rows": 2, "window_batches": 20, "seed": 3},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "documents"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_layout_of_a_window_does_not_change_its_gradient(
    layout: dict[str, Any], attention: str, tiny_model: Any, random_samples: Samples
) -> None:
    model = build(tiny_model, attention)
    samples = random_samples(20)
    expected = reference_gradient(model, samples)
    found = window_gradient(model, Loader(samples, row_tokens=64, **layout))
    assert (found - expected).norm() / expected.norm() < 1e-5


BF16 = Precision(torch.device("cpu"), torch.bfloat16, torch.float32, loss_scaling=False)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "documents"])
def test_in_bfloat16_packing_errs_no_more_than_samples_one_by_one_do(
    attention: str, tiny_model: Any, random_samples: Samples
) -> None:
    model = build(tiny_model, attention)
    samples = random_samples(20)
    exact = reference_gradient(model, samples)
    layouts = {
        "alone": Loader(samples, "padding", 64, batch_rows=1, window_batches=20),
        "packed": Loader(samples, "packing", 64, batch_rows=20, seed=2),
    }
    errors = {
        name: (window_gradient(model, loader, BF16) - exact).norm() / exact.norm() for name, loader in layouts.items()
    }
    assert 0 < errors["packed"] < 1.2 * errors["alone"] < 0.05


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral, a window of 8": ("Mistral", {"sliding_window": 8}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 16}),
    "Gemma2, windows and soft caps": ("Gemma2", {"sliding_window": 8, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "Phi3": ("Phi3", {"pad_token_id": 0}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "GPT-2": ("GPT2", {}),
    "Falcon with ALiBi": ("Falcon", {"alibi": True, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "OLMo2": ("Olmo2", {}),
    "OPT": ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
}


REFUSED = ("Falcon with ALiBi",)


def family(name: str) -> Any:
    """A tiny model of another family, with the attention that a run would give it."""
    kind, changes = FAMILIES[name]
    settings = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**{**settings, **changes}))
    apply_document_attention(model)
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_pack_without_a_leak_or_are_refused_by_the_probe(name: str, random_samples: Samples) -> None:
    model = family(name)
    samples = random_samples(6)
    if name in REFUSED:
        with pytest.raises((TrainingError, ValueError)):  # a run of this family stops before its first step
            check_no_leak(model, padded_batch([samples]), FP32)
        return
    assert check_no_leak(model, padded_batch([samples]), FP32) == 0.0
    expected = reference_gradient(model, samples)
    found = window_gradient(model, Loader(samples, "packing", 256, batch_rows=1))
    assert (found - expected).norm() / expected.norm() < 1e-5


def drop_documents(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in ("input_ids", "use_cache")}


def supervise_first_tokens(batch: Batch) -> Batch:
    starts = batch.documents != F.pad(batch.documents[:, :-1], (1, 0))
    labels = torch.where(starts & (batch.documents > 0), batch.input_ids, batch.labels)
    return replace(batch, labels=labels, supervised_tokens=int((labels != -100).sum()))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "documents"])
@pytest.mark.parametrize("mutant", ["no document is kept apart", "labels cross"])
def test_the_law_catches_every_mutant(
    mutant: str, attention: str, tiny_model: Any, random_samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = build(tiny_model, attention), random_samples(20)
    loader = Loader(samples, "packing", 64, batch_rows=20, seed=2)
    expected = reference_gradient(model, samples)
    inputs, targets = loss.model_inputs, loss.loss_sum
    if mutant == "no document is kept apart":
        monkeypatch.setattr(loss, "model_inputs", lambda *given: drop_documents(inputs(*given)))
    else:
        monkeypatch.setattr(
            loss, "loss_sum", lambda model, batch, precision: targets(model, supervise_first_tokens(batch), precision)
        )
    found = window_gradient(model, loader)
    assert (found - expected).norm() / expected.norm() > 1e-3


def test_the_law_catches_positions_that_run_on(random_samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = family("GPT-2"), random_samples(6)  # rotary positions are relative: to them it is all one
    inputs = loss.model_inputs

    def without_positions(*given: Any) -> dict[str, Any]:
        return {name: value for name, value in inputs(*given).items() if name != "position_ids"}

    monkeypatch.setattr(loss, "model_inputs", without_positions)
    found = window_gradient(model, Loader(samples, "packing", 256, batch_rows=1))
    expected = reference_gradient(model, samples)
    assert (found - expected).norm() / expected.norm() > 1e-3
    monkeypatch.setattr(probe, "model_inputs", without_positions)
    with pytest.raises(TrainingError, match="loses positions or windows"):
        check_no_leak(model, padded_batch([samples]), FP32)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "documents"])
def test_a_packed_document_does_not_see_its_neighbours(
    attention: str, tiny_model: Any, random_samples: Samples
) -> None:
    model = build(tiny_model, attention)
    first, second = random_samples(2)
    batch = padded_batch([[first, second]])
    changed = batch.input_ids.clone()
    changed[0, : len(first.input_ids)] = 5
    inputs = model_inputs(model, batch, FP32)
    logits = [model(**{**inputs, "input_ids": ids}).logits for ids in (batch.input_ids, changed)]
    assert torch.equal(logits[0][0, len(first.input_ids) :], logits[1][0, len(first.input_ids) :])
    assert not torch.equal(logits[0], logits[1])


def test_positions_restart_with_each_document(tiny_model: Any, random_samples: Samples) -> None:
    samples = random_samples(3)
    positions = model_inputs(tiny_model(), padded_batch([samples]), FP32)["position_ids"][0].tolist()
    assert positions == [place for sample in samples for place in range(len(sample.input_ids))]


def test_a_target_is_predicted_from_the_token_before_it() -> None:
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, -100]])
    columns, targets = prediction_targets(labels)
    assert columns.tolist() == [0, 1, 2]
    assert targets.tolist() == [[-100, 7, 8], [5, -100, -100]]


def test_the_first_token_of_a_document_is_never_a_target(random_samples: Samples) -> None:
    samples = [Sample(sample.input_ids, sample.input_ids, sample.row) for sample in random_samples(4)]
    batch = padded_batch([samples[:2], samples[2:]])
    starts = batch.documents != F.pad(batch.documents[:, :-1], (1, 0))
    assert (batch.labels[starts] == -100).all()
    assert batch.supervised_tokens == sum(len(sample.input_ids) - 1 for sample in samples)
