"""Laws of attention by document: equal to attention under a mask, forward and backward; plain without documents."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrecipes.batch import BY_DOCUMENT, Batch, Sample
from llmrecipes.data.loaders import padded_batch
from llmrecipes.kernels.attention import SHORT_ON_CPU, apply_document_attention, document_attention
from llmrecipes.precision import Precision
from llmrecipes.training.loss import loss_sum

Build = Callable[..., Any]
Samples = Callable[..., list[Sample]]

CPU = torch.device("cpu")


def packed(samples: list[Sample]) -> Batch:
    """Two rows of several documents and one of a single one, with padding behind."""
    return padded_batch([samples[:5], samples[5:7], samples[7:8]])


def gradient(model: Any, batch: Batch, precision: Precision) -> torch.Tensor:
    model.zero_grad()
    loss_sum(model, batch, precision).backward()
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


@pytest.mark.parametrize("heads", [1, 2, 4], ids="{} key heads".format)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
def test_loss_and_gradient_are_those_of_attention_under_a_mask(
    heads: int, dtype: torch.dtype, tolerance: float, tiny_model: Build, random_samples: Samples
) -> None:
    batch = packed(random_samples(8, longest=20))
    # The plain path computes in float64 where that is asked, else in float32: what bfloat16 is held against too.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    plain = tiny_model(num_key_value_heads=heads, attn_implementation="eager").to(exact)
    fast = tiny_model(num_key_value_heads=heads).to(dtype)
    assert apply_document_attention(fast) == 2
    expected = gradient(plain, batch, Precision(CPU, exact, exact, loss_scaling=False))
    found = gradient(fast, batch, Precision(CPU, dtype, dtype, loss_scaling=False))
    assert (found - expected).norm() / expected.norm() < tolerance


def test_long_documents_in_bfloat16_are_right_too(tiny_model: Build, random_samples: Samples) -> None:
    samples = random_samples(3, longest=3 * SHORT_ON_CPU, seed=3)
    assert max(len(sample.input_ids) for sample in samples) > SHORT_ON_CPU
    batch = padded_batch([samples])
    settings = {"max_position_embeddings": 1024}
    fast = tiny_model(**settings).to(torch.bfloat16)
    apply_document_attention(fast)
    plain = tiny_model(**settings, attn_implementation="eager")
    expected = gradient(plain, batch, Precision(CPU, torch.float32, torch.float32, loss_scaling=False))
    found = gradient(fast, batch, Precision(CPU, torch.bfloat16, torch.bfloat16, loss_scaling=False))
    assert (found - expected).norm() / expected.norm() < 5e-2


def test_the_result_has_the_inputs_type_and_shape(random_samples: Samples) -> None:
    groups = packed(random_samples(8)).layout
    assert groups is not None
    tokens = len(groups.scatter) // 3
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        query, key = (torch.randn(3, heads, tokens, 8, dtype=dtype) for heads in (4, 2))
        attended, weights = document_attention(torch.nn.Module(), query, key, key, None, layout=groups)
        assert attended.shape == (3, tokens, 4, 8) and attended.dtype == dtype and weights is None
        assert attended.isfinite().all()


def test_the_scale_is_the_models_own(random_samples: Samples) -> None:
    groups = packed(random_samples(8)).layout
    assert groups is not None
    states = torch.randn(3, 2, len(groups.scatter) // 3, 8)
    module = torch.nn.Module()
    usual, _ = document_attention(module, states, states, states, None, layout=groups)
    named, _ = document_attention(module, states, states, states, None, layout=groups, scaling=8**-0.5)
    other, _ = document_attention(module, states, states, states, None, layout=groups, scaling=1.0)
    assert torch.allclose(usual, named) and not torch.allclose(usual, other)


def test_without_documents_the_model_answers_as_with_sdpa(tiny_model: Build) -> None:
    plain, fast = tiny_model(attn_implementation="sdpa"), tiny_model()
    apply_document_attention(fast)
    ids = torch.arange(20, 40).reshape(2, 10)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected, found = (model.generate(ids, attention_mask=mask, **options) for model in (plain, fast))
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, plain(ids).logits)


def test_a_model_that_looks_through_a_window_is_left_alone(tiny_model: Build) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    windowed, whole = (
        MistralForCausalLM(MistralConfig(**settings, num_key_value_heads=2, vocab_size=50, sliding_window=window))
        for window in (8, None)
    )
    assert apply_document_attention(windowed) == 0 and windowed.config._attn_implementation != BY_DOCUMENT
    assert apply_document_attention(whole) == 1 and whole.config._attn_implementation == BY_DOCUMENT


def test_layers_count_whatever_their_projections_are_called() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50))
    assert apply_document_attention(gpt2) == 3 and gpt2.config._attn_implementation == BY_DOCUMENT
    neox = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert apply_document_attention(GPTNeoXForCausalLM(GPTNeoXConfig(**neox, vocab_size=50))) == 2
