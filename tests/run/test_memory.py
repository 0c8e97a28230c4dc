"""Laws of fitting a run into memory: batches are cut first, then layers keep less; what cannot fit is told."""

from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrecipes.batch import Batch, Sample
from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import RunConfig
from llmrecipes.data.loaders import Loader
from llmrecipes.errors import ConfigError, HardwareError
from llmrecipes.kernels.decoder import Keep
from llmrecipes.kernels.footprint import Shape
from llmrecipes.precision import Precision
from llmrecipes.run import memory
from llmrecipes.run.speed import Fused
from llmrecipes.training.loss import loss_sum

Samples = Callable[..., list[Sample]]

SHAPE = Shape(4, 64, 128, 4, 4, 16, 260)
STATIC = 100_000
"""Bytes that a rehearsal takes beside what layers keep."""

TRAINED = [torch.nn.Parameter(torch.zeros(10))]
LATER = 2 * 4 * 10
"""Bytes of AdamW's state for it."""


class Rehearsals:
    """Stands for the GPU: takes what the shape says, and counts how often it was asked."""

    def __init__(self, fused: Fused) -> None:
        self.fused, self.count = fused, 0

    def __call__(self, model: Any, batch: Batch, updater: Any) -> int | None:
        self.count += 1
        tokens = batch.input_ids.numel()
        return STATIC + sum(tokens * SHAPE.kept_bytes(layer.keep) for layer in self.fused.layers)


def config_of(**flags: str) -> RunConfig:
    return load_config(RunConfig, {"model_name": "m", "output_dir": "o", **flags}).config


def fitted(
    limit: int, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, **flags: str
) -> tuple[memory.Fitted, list[Keep], int]:
    layers: list[Any] = [SimpleNamespace(keep=Keep.ALL) for _ in range(SHAPE.layers)]
    fused = Fused("", loss_sum, layers, shape=SHAPE)
    rehearse = Rehearsals(fused)
    monkeypatch.setattr(memory, "rehearse", rehearse)
    monkeypatch.setattr(memory, "memory_limit", lambda config, device: limit)
    precision = Precision(torch.device("cuda"), torch.bfloat16, torch.float32, loss_scaling=False)
    updater: Any = SimpleNamespace(precision=precision, parameters=TRAINED)
    loader = Loader(samples, "padding", 64, batch_rows=4, window_batches=2)
    found = memory.fit_memory(config_of(**flags), None, loader, updater, fused)
    return found, [layer.keep for layer in layers], rehearse.count


@pytest.fixture
def samples(random_samples: Samples) -> list[Sample]:
    """Eight samples, padded to 30 tokens at most."""
    return random_samples(8, longest=30)


def bytes_of(samples: list[Sample], rows: int, keep: Keep) -> int:
    """What a batch of the longest samples takes."""
    batches = [samples[start : start + rows] for start in range(0, len(samples), rows)]
    tokens = max(len(batch) * max(len(sample.input_ids) for sample in batch) for batch in batches)
    return STATIC + LATER + 40 + SHAPE.layers * tokens * SHAPE.kept_bytes(keep)


def test_what_fits_stays_as_it_is(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    found, keeps, count = fitted(bytes_of(samples, 4, Keep.ALL), samples, monkeypatch)
    assert (found.training.batch_rows, found.training.window_batches, count) == (4, 2, 2)
    assert set(keeps) == {Keep.ALL} and "cut" not in found.told
    assert found.peak_bytes == bytes_of(samples, 4, Keep.ALL)


@pytest.mark.parametrize(("rows", "pieces"), [(2, 2), (1, 4)])
def test_batches_are_cut_before_anything_is_computed_twice(
    rows: int, pieces: int, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, keeps, _ = fitted(bytes_of(samples, rows, Keep.ALL), samples, monkeypatch)
    assert (found.training.batch_rows, found.training.window_batches) == (rows, 2 * pieces)
    assert set(keeps) == {Keep.ALL} and f"cut into {pieces} of {rows} rows" in found.told
    whole = Loader(samples, "padding", 64, batch_rows=4, window_batches=2).window_rows(0)
    cut = found.training.window_rows(0)
    assert [list(chain(*window)) for window in cut] == [list(chain(*window)) for window in whole]


def test_then_layers_keep_what_there_is_room_for(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    limit = (bytes_of(samples, 1, Keep.ALL) + bytes_of(samples, 1, Keep.WITHOUT_GATE_UP)) // 2
    found, keeps, _ = fitted(limit, samples, monkeypatch)
    assert found.training.batch_rows == 1
    assert sorted(keeps) == [Keep.WITHOUT_GATE_UP, Keep.WITHOUT_GATE_UP, Keep.ALL, Keep.ALL]
    assert found.peak_bytes is not None and found.peak_bytes <= limit
    assert "2 layers keep all, 2 layers keep all but gate and up" in found.told


def test_at_last_inputs_go_to_the_hosts_memory(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    _, keeps, _ = fitted(bytes_of(samples, 1, Keep.OFFLOADED), samples, monkeypatch)
    assert set(keeps) == {Keep.OFFLOADED}


def test_layers_that_are_not_fused_keep_their_input(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(is_gradient_checkpointing=False)

    def enable(gradient_checkpointing_kwargs: dict[str, bool]) -> None:
        assert gradient_checkpointing_kwargs == {"use_reentrant": False}
        model.is_gradient_checkpointing = True

    model.gradient_checkpointing_enable = enable
    monkeypatch.setattr(memory, "rehearse", lambda model, *_: 10 if model.is_gradient_checkpointing else 1000)
    monkeypatch.setattr(memory, "memory_limit", lambda config, device: 500)
    precision = Precision(torch.device("cuda"), torch.bfloat16, torch.float32, loss_scaling=False)
    updater: Any = SimpleNamespace(precision=precision, parameters=TRAINED)
    found = memory.fit_memory(config_of(), model, Loader(samples, "padding", 64, 2), updater, Fused("", loss_sum))
    assert found.training.batch_rows == 1 and found.told.startswith("layers keep their input; batches cut into 2")


def test_what_cannot_fit_is_told_with_numbers(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HardwareError, match=r"rehearsal: one row of \d+ tokens takes .* are free; try --quantization"):
        fitted(STATIC, samples, monkeypatch)


@pytest.mark.parametrize(("flag", "keep"), [("keep", Keep.ALL), ("recompute", Keep.INPUT), ("offload", Keep.OFFLOADED)])
def test_layers_keep_what_the_flag_says(
    flag: str, keep: Keep, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, keeps, _ = fitted(bytes_of(samples, 1, Keep.ALL), samples, monkeypatch, activation_memory=flag)
    assert set(keeps) == {keep}


def test_a_size_is_a_budget_for_what_layers_keep(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = memory.largest_batch(Loader(samples, "padding", 64, batch_rows=4))
    size = batch.input_ids.numel() * SHAPE.layers * SHAPE.kept_bytes(Keep.WITHOUT_GATE_UP)
    kibibytes = -(-size // 1024)
    _, keeps, _ = fitted(10**9, samples, monkeypatch, activation_memory=f"{kibibytes}KiB")
    assert set(keeps) == {Keep.WITHOUT_GATE_UP}


def test_the_largest_batch_is_rehearsed(samples: list[Sample]) -> None:
    loader = Loader(samples, "padding", 64, batch_rows=3, seed=0)
    batches = [loader.batch(rows).input_ids.numel() for window in loader.window_rows(0) for rows in window]
    assert memory.largest_batch(loader).input_ids.numel() == max(batches)


def test_a_cpu_has_no_memory_to_fit(samples: list[Sample]) -> None:
    precision = Precision(torch.device("cpu"), torch.float32, torch.float32, loss_scaling=False)
    updater: Any = SimpleNamespace(precision=precision)
    loader = Loader(samples, "padding", 64, batch_rows=4)
    with pytest.raises(ConfigError, match="--fit is about a GPU"):
        memory.check_fit(config_of(fit="1GiB"), precision.device)
    with pytest.raises(ConfigError, match="--activation_memory offload needs the fused layers"):
        memory.fit_memory(config_of(activation_memory="offload"), None, loader, updater, Fused("", loss_sum))


@pytest.mark.parametrize(("key", "value"), [("fit", "24"), ("fit", "much"), ("activation_memory", "less")])
def test_a_size_that_is_none_is_told(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--{key}: expected"):
        config_of(**{key: value})
