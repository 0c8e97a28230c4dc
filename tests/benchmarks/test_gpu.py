"""The GPU benchmark's rows, in small on the CPU: all of them run, and both sides learn."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import RunConfig

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
SPEC = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
assert SPEC is not None
assert SPEC.loader is not None
gpu: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu)

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
FLAGS = {"model_name": "7B", "output_dir": "unused", "device": "cpu", "use_fast_kernels": "true"}


@pytest.mark.parametrize("side", gpu.SIDES)
@pytest.mark.parametrize("name", gpu.ROWS)
def test_a_row_is_measured(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SHAPE", gpu.SHAPE | SMALL | {"vocab_size": 32000})
    row = gpu.ROWS[name]
    row = replace(row, sample_tokens=min(row.sample_tokens, 128))
    flags = {**row.flags, **FLAGS, "context_length": "1300" if row.sample_tokens == 0 else "128"}
    flags = {key: value for key, value in flags.items() if key != "optimizer"}
    *steps, end = gpu.SIDES[side](row, load_config(RunConfig, flags).config, 1, 1)
    assert len(steps) == 1 and end["warm"] > 0
    assert 9 < steps[0]["loss"] < 12  # near ln 32000: nothing is known yet
    assert row.told in gpu.line(side, name, {"steps": steps, "end": end, "ceiling": 1e12})


def test_samples_have_the_lengths_of_samsum() -> None:
    samples = gpu.samples_of(gpu.ROWS["samsum-bf16"], 400_000)
    mean = sum(len(sample.input_ids) for sample in samples) / len(samples)
    supervised = sum(sample.supervised_tokens for sample in samples) / len(samples)
    assert mean == pytest.approx(215.7, rel=0.05) and supervised == pytest.approx(30.0, rel=0.05)
