"""Laws of the optimizer step: equal to plain PyTorch in float64, clipped, scaled, and deaf to what is not finite."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmrecipes.batch import Sample
from llmrecipes.data.loaders import Loader
from llmrecipes.errors import HardwareError, TrainingError
from llmrecipes.precision import Precision, resolve_precision
from llmrecipes.training.loop import train_step
from llmrecipes.training.optimizers import OPTIMIZERS
from llmrecipes.training.schedules import SCHEDULES, Progress
from llmrecipes.training.spikes import Spikes
from llmrecipes.training.updater import Updater

CPU = torch.device("cpu")
FP32 = resolve_precision("cpu", mixed_precision=False, use_fp16=False)
START = Progress(step=0, steps=10, warmup_steps=0, epoch=0, gamma=1.0)


def build_updater(model: Any, precision: Precision = FP32, clip: float | None = None, lr: float = 1e-2) -> Updater:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    return Updater(model, optimizer, SCHEDULES["constant"], precision, clip)


def test_a_step_equals_plain_pytorch_in_float64(tiny_model: Any, random_samples: Callable[..., list[Sample]]) -> None:
    samples = random_samples(6)
    precision = Precision(CPU, torch.float64, torch.float64, loss_scaling=False)
    model, plain = tiny_model().double(), tiny_model().double()
    (window,) = Loader(samples, "padding", 64, batch_rows=2, window_batches=3).windows(0)
    metrics = train_step(model, window, build_updater(model, precision, clip=0.5), START)

    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    losses, tokens = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        ids = torch.tensor(sample.input_ids.tolist())
        targets = torch.tensor(sample.labels.tolist())[1:]
        log_probabilities = F.log_softmax(plain(input_ids=ids[None]).logits[0, :-1], dim=-1)
        for place, target in enumerate(targets.tolist()):
            if target != -100:
                losses, tokens = losses - log_probabilities[place, target], tokens + 1
    loss = losses / tokens
    loss.backward()
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in plain.parameters()))
    for parameter in plain.parameters():
        parameter.grad *= min(1.0, 0.5 / norm)
    optimizer.step()

    assert metrics.loss == pytest.approx(loss.item(), rel=1e-6)
    assert metrics.update.gradient_norm == pytest.approx(norm, rel=1e-6)
    # transformers' norms and rotary angles are float32 whatever the weights are, hence not 1e-12.
    start = flat(tiny_model().double())
    assert (flat(model) - flat(plain)).norm() / (flat(plain) - start).norm() < 1e-5


def flat(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def one_parameter(precision: Precision = FP32) -> tuple[torch.nn.Linear, Updater]:
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    return model, build_updater(model, precision)


ONE = torch.ones(())
"""A loss that is a number."""


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(bad: float) -> None:
    model, updater = one_parameter()
    for step in range(3):
        updater.check_health(step)
        updater.backward(model.weight.sum() * bad)
        assert updater.step(START, ONE).skipped
    assert float(model.weight) == 1.0
    with pytest.raises(TrainingError, match="step 3: loss or gradient was not finite 3 times"):
        updater.check_health(3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scaling", [False, True])
def test_a_loss_that_is_not_finite_reaches_no_weight_though_its_gradient_is(bad: float, scaling: bool) -> None:
    precision = Precision(CPU, torch.float16, torch.float32, loss_scaling=True) if scaling else FP32
    model, updater = one_parameter(precision)
    updater.backward(model.weight.sum())
    update = updater.step(START, ONE * bad)
    assert update.skipped and not math.isfinite(update.gradient_norm)
    assert float(model.weight) == 1.0 and updater.skipped_in_a_row == 1


def test_a_finite_step_forgets_the_skipped_ones() -> None:
    model, updater = one_parameter()
    for bad in (math.nan, math.nan, 1.0) * 3:
        updater.backward(model.weight.sum() * bad)
        updater.step(START, ONE)
        updater.check_health(0)
    assert float(model.weight) < 1.0


def test_loss_scaling_skips_until_its_scale_fits() -> None:
    precision = Precision(CPU, torch.float16, torch.float32, loss_scaling=True)
    model, updater = one_parameter(precision)
    scale = updater.scaler.get_scale()
    updater.backward(model.weight.sum() * math.inf)
    update = updater.step(START, ONE)
    assert update.skipped and update.loss_scale == updater.scaler.get_scale() == scale / 2
    updater.backward(model.weight.sum())
    update = updater.step(START, ONE)
    assert not update.skipped and update.gradient_norm == pytest.approx(1.0)


def test_loss_scaling_may_skip_while_it_finds_its_scale() -> None:
    model, updater = one_parameter(Precision(CPU, torch.float16, torch.float32, loss_scaling=True))
    for _ in range(18):
        updater.backward(model.weight.sum() * math.inf)
        updater.step(START, ONE)
        updater.check_health(0)
    updater.backward(model.weight.sum() * math.inf)
    updater.step(START, ONE)
    with pytest.raises(TrainingError, match="19 times"):
        updater.check_health(0)


def test_what_a_run_has_learned_of_itself_goes_on_with_it() -> None:
    model, updater = one_parameter(Precision(CPU, torch.float16, torch.float32, loss_scaling=True))
    updater.halvings = 2
    updater.backward(model.weight.sum() * math.inf)
    updater.step(START, ONE)
    _, other = one_parameter(Precision(CPU, torch.float16, torch.float32, loss_scaling=True))
    updater.spikes, other.spikes = Spikes(6.0), Spikes(6.0)
    for step in range(70):
        updater.spikes.judge(2.0 + step % 3, 1.0)
    assert other.plain() != updater.plain()
    other.restore(json.loads(json.dumps(updater.plain())))
    assert other.plain() == updater.plain()
    assert (other.halvings, other.skipped_in_a_row) == (2, 1)
    assert other.spikes.judge(50.0, 1.0) == updater.spikes.judge(50.0, 1.0) is not None


def test_clipping_bounds_the_step() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    updater = Updater(model, torch.optim.SGD(model.parameters(), lr=1.0), SCHEDULES["constant"], FP32, clip_norm=0.25)
    updater.backward(model.weight.sum() * 100)
    assert updater.step(START, ONE).gradient_norm == pytest.approx(100)
    assert float(model.weight) == pytest.approx(0.75, abs=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    config: Any = SimpleNamespace(lr=0.05, weight_decay=0.0, optimizer=name)
    weight = torch.nn.Parameter(torch.ones(64, 64))
    if name.startswith("paged"):
        with pytest.raises(HardwareError, match="GPU"):
            OPTIMIZERS[name]([weight], config)
        return
    optimizer = OPTIMIZERS[name]([weight], config)
    for _ in range(5):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert float(weight.detach().square().mean()) < 1.0
