"""Rows of the GPU benchmark, small enough for a CPU."""

from collections.abc import Callable
from dataclasses import replace

import gpu
import pytest
from peers import Work

from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import RunConfig

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
FLAGS = {"model_name": "7B", "output_dir": "unused", "device": "cpu", "use_fast_kernels": "true"}


@pytest.fixture
def small_work(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Work]:
    """Returns a row's work by its name, of a small model and short samples: a step to warm up and one that counts."""
    monkeypatch.setattr(gpu, "SHAPE", gpu.SHAPE | SMALL)

    def work(name: str) -> Work:
        row = gpu.ROWS[name]
        row = replace(row, sample_tokens=min(row.sample_tokens, 128))
        flags = {**row.flags, **FLAGS, "context_length": "1300" if row.sample_tokens == 0 else "128"}
        flags = {key: value for key, value in flags.items() if key != "optimizer"}
        return gpu.work_of(row, load_config(RunConfig, flags).config, 1, 1)

    return work
