"""Tiny real objects that the tests share: a byte-level tokenizer, a Llama of some 30,000 weights, folders of both."""

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrecipes.environment import prepare_environment

os.environ.setdefault("HF_HUB_OFFLINE", "1")
cache = tempfile.TemporaryDirectory(prefix="llmrecipes-tests-")  # removed when the tests end
os.environ["LLMRECIPES_CACHE"] = cache.name
# Read when a kernel is defined, by the imports below; tests/kernels/conftest.py switches it on test by test.
os.environ.setdefault("TRITON_INTERPRET", "1" if not Path("/dev/nvidia0").exists() else "0")
prepare_environment()

# A shell that starts the tests behind its back (`pytest &`, nohup) has them ignore Ctrl-C, and all their children.
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmrecipes.batch import Sample
from llmrecipes.kernels import float8, four_bit, rotary, rowwise, scaled_matmul, short_attention  # noqa: F401
from llmrecipes.kernels.jit import triton

if triton is not None:
    triton.knobs.runtime.interpret = False

VOCABULARY = 260


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """Bytes as tokens behind `<unk> <s> </s> <turn>`; opens every text with `<s>`."""
    names = ["<unk>", "<s>", "</s>", "<turn>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={name: place for place, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<turn>"],
    )


def build_tiny_model(**changes: Any) -> Any:
    """Returns a Llama of two layers with random float32 weights, always the same."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """The builder of tiny models."""
    return build_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny model and tokenizer, as a user would name it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny_model().save_pretrained(str(folder))
    byte_tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture
def random_samples() -> Callable[..., list[Sample]]:
    """Makes samples of random ids whose second half is supervised."""

    def make(count: int, longest: int = 30, seed: int = 0) -> list[Sample]:
        generator = np.random.default_rng(seed)
        samples = []
        for row in range(count):
            ids = generator.integers(4, VOCABULARY, int(generator.integers(3, longest + 1))).astype(np.int32)
            labels = ids.copy()
            labels[: len(ids) // 2] = -100
            samples.append(Sample(ids, labels, row))
        return samples

    return make
