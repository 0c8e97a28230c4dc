"""Laws of the footprint: bytes are those of the tensors that a layer really keeps, operations those that are done."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from llmrecipes.batch import Sample
from llmrecipes.data.loaders import padded_batch
from llmrecipes.kernels import decoder
from llmrecipes.kernels.attend import Attention
from llmrecipes.kernels.attention import apply_document_attention
from llmrecipes.kernels.decoder import Keep, Shared
from llmrecipes.kernels.footprint import Shape, keeps_within
from llmrecipes.kernels.head import fused_loss_sum
from llmrecipes.kernels.layers import apply_fused_layers, decoder_layers
from llmrecipes.precision import Precision

Build = Callable[..., Any]
Samples = Callable[..., list[Sample]]

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = Shape(32, 4096, 11008, 32, 32, 128, 32000, LINEARS, 16, eight_bit=True)


def tensors(kept: Any) -> int:
    """Bytes of all tensors that a layer keeps."""
    low = [each.rows for each in kept.low if each is not None]
    found = [kept.x, kept.states, kept.attended, kept.middle, kept.gate_up, *kept.statistics[:1], *low]
    return sum(each.numel() * each.element_size() for each in found if each is not None)


@pytest.mark.parametrize("adapted", [(), ("q_proj", "v_proj"), LINEARS])
@pytest.mark.parametrize("keep", list(Keep), ids=lambda keep: keep.name)
def test_what_is_counted_is_what_a_layer_keeps(
    keep: Keep, adapted: tuple[str, ...], tiny_model: Build, random_samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "MLP_ROWS", 10)
    batch = padded_batch([random_samples(1)])
    model = tiny_model().requires_grad_(False)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=list(adapted), task_type="CAUSAL_LM"))
    apply_document_attention(model)
    apply_fused_layers(model, torch.float32)
    shape = Shape.of(model.config, adapted=adapted, rank=4, stream=4, compute=4, in_one=True)
    tokens, layer = batch.input_ids.numel(), decoder_layers(model)[0]
    x = torch.randn(tokens, model.config.hidden_size)
    angles = torch.randn(2, tokens, layer.decoder.head_size)
    shared = Shared(angles[0], angles[1], Attention(1, None, 1.0))
    _, kept = layer.decoder.forward(x, shared, None, keep)
    brought_away = tokens * shape.width * shape.stream if keep == Keep.OFFLOADED else 0
    assert tensors(kept) - brought_away == tokens * shape.kept_bytes(keep)


@pytest.mark.parametrize("trains_all", [True, False])
def test_operations_are_those_that_pytorch_counts(trains_all: bool, tiny_model: Build) -> None:
    model = tiny_model(attn_implementation="eager")
    adapted = () if trains_all else LINEARS
    if not trains_all:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=list(LINEARS), task_type="CAUSAL_LM"))
        model.enable_input_require_grads()  # so that the first layer's rows have a gradient, as all others' have
    ids = torch.arange(4, 44)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    shape = Shape.of(model.config, adapted=adapted, rank=4)
    counted = counter.get_flop_counts()["Global"]
    linear = sum(number for name, number in counted.items() if "bmm" not in str(name))
    attention = sum(number for name, number in counted.items() if "bmm" in str(name))
    assert shape.operations(40, 40, 0, trains_all) == linear
    # Eager attention looks at all 40 x 40 pairs, and multiplies twice forward and four times backward: one less, since
    # it has kept what a fused kernel computes again.
    everywhere = shape.operations(0, 0, 40 * 40, trains_all)
    assert everywhere * 6 / 7 == attention


def test_fused_layers_do_no_more_operations_than_are_counted(tiny_model: Build) -> None:
    model = tiny_model()
    apply_document_attention(model)
    apply_fused_layers(model, torch.float32)
    ids = torch.arange(4, 44, dtype=torch.int32).numpy()
    batch = padded_batch([[Sample(ids, np.where(np.arange(40) < 30, -100, ids), 0)]])
    with FlopCounterMode(display=False) as counter:
        fused_loss_sum(model, batch, Precision(torch.device("cpu"), torch.float32, torch.float32, False)).backward()
    counted = counter.get_flop_counts()["Global"]
    linear = sum(number for name, number in counted.items() if "attention" not in str(name))
    assert batch.supervised_tokens == 10
    assert Shape.of(model.config).operations(40, 10, 0, trains_all=True) == linear


@given(st.integers(1, 64), st.integers(0, 10**11))
def test_a_budget_is_kept_and_used(tokens: int, budget: int) -> None:
    tokens *= 256
    keeps = keeps_within(SHAPE, tokens, budget)
    taken = sum(tokens * SHAPE.kept_bytes(keep) for keep in keeps)
    assert len(keeps) == SHAPE.layers
    assert taken <= budget or set(keeps) == {Keep.OFFLOADED}
    more = keeps_within(SHAPE, tokens, 2 * budget)
    assert all(keep <= other for keep, other in zip(keeps, more, strict=True))
    dearest = tokens * (SHAPE.kept_bytes(Keep.ALL) - SHAPE.kept_bytes(Keep.WITHOUT_GATE_UP))
    assert set(keeps) in ({Keep.ALL}, {Keep.OFFLOADED}) or budget - taken < dearest
