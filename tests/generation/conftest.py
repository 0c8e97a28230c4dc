"""A tiny Llama and byte-level tokenizers, built here: real objects, no files, no network."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 260
"""256 bytes and four control tokens."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A tiny model gains nothing from a second thread, and on a busy machine loses a lot by waiting for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> Any:
    """A Llama of two layers in float32 with random weights, large enough that no two tokens are nearly as likely."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=96,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Bytes as tokens: id 4 + n is the n-th letter of GPT-2's byte alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", "<turn>", *alphabet]
    backend = Tokenizer(models.BPE(vocab={name: place for place, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<turn>"],
        clean_up_tokenization_spaces=True,
    )


@pytest.fixture(scope="session")
def fallback_tokenizer() -> Any:
    """Llama 2's way: letters are tokens, everything else falls back to tokens such as `<0xE5>`."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    backend = Tokenizer(
        models.BPE(
            vocab={name: place for place, name in enumerate(names)}, merges=[], byte_fallback=True, unk_token="<unk>"
        )
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
