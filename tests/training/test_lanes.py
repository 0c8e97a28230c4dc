"""Batches side by side come to what they come to one after the other, in the same order, run for run to the bit."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llmrecipes.batch import Sample
from llmrecipes.data.loaders import Loader
from llmrecipes.kernels.attention import apply_document_attention
from llmrecipes.precision import Precision, resolve_precision
from llmrecipes.training.lanes import in_lanes, lane_count
from llmrecipes.training.loop import train_step
from llmrecipes.training.schedules import SCHEDULES, Progress
from llmrecipes.training.updater import Updater

FP32 = resolve_precision("cpu", mixed_precision=False, use_fp16=False)
BF16 = resolve_precision("cpu", mixed_precision=True, use_fp16=False)


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def step(
    model: Any, samples: list[Sample], lanes: int, precision: Precision = FP32
) -> tuple[float, float, torch.Tensor]:
    """Returns (loss, gradient norm, weights behind it) of one step over all samples, in batches of one row."""
    assert apply_document_attention(model) == 2
    updater = Updater(model, torch.optim.SGD(model.parameters(), lr=1.0), SCHEDULES["constant"], precision)
    (window,) = Loader(samples, "packing", 64, batch_rows=1, window_batches=100, seed=0).windows(0)
    assert len(window) > 4
    metrics = train_step(model, window, updater, Progress(0, 1, 0, 0, 1.0), lanes)
    return metrics.loss, metrics.update.gradient_norm, torch.cat([weight.flatten() for weight in model.parameters()])


@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_lanes_change_nothing(lanes: int, tiny_model: Any, random_samples: Callable[..., list[Sample]]) -> None:
    samples = random_samples(20)
    loss, norm, weights = step(tiny_model(), samples, 1)
    loss_in_lanes, norm_in_lanes, weights_in_lanes = step(tiny_model(), samples, lanes)
    assert loss_in_lanes == pytest.approx(loss, rel=1e-6)
    assert norm_in_lanes == pytest.approx(norm, rel=1e-5)
    start = torch.cat([weight.detach().flatten() for weight in tiny_model().parameters()])
    assert (weights_in_lanes - weights).norm() / (weights - start).norm() < 1e-5


@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda precision: precision.name)
def test_the_same_step_comes_to_the_same_bits(
    precision: Precision, tiny_model: Any, random_samples: Callable[..., list[Sample]]
) -> None:
    samples = random_samples(20)
    first = step(tiny_model(), samples, 3, precision)
    for _ in range(5):
        again = step(tiny_model(), samples, 3, precision)
        assert again[:2] == first[:2]
        assert torch.equal(again[2], first[2])


def test_a_parameter_without_a_part_in_the_loss_gets_no_gradient(
    tiny_model: Any, random_samples: Callable[..., list[Sample]]
) -> None:
    model = tiny_model()
    model.idle = torch.nn.Parameter(torch.ones(3))
    step(model, random_samples(20), 2)
    assert torch.equal(model.idle, torch.ones(3))


def test_as_many_run_at_once_as_there_are_lanes_and_results_keep_their_order() -> None:
    together = threading.Barrier(3, timeout=20)

    def wait(number: int) -> int:
        together.wait()
        return number

    assert list(in_lanes(wait, range(6), 3)) == list(range(6))


@pytest.mark.parametrize(("items", "lanes", "each"), [(8, 2, 2), (8, 3, 1), (8, 8, 1), (1, 4, 4)])
def test_threads_are_shared_out_and_given_back(items: int, lanes: int, each: int) -> None:
    torch.ones(1000, 1000).sum()  # the pool of this thread is there already
    assert set(in_lanes(lambda _: torch.get_num_threads(), range(items), lanes)) == {each}
    assert torch.get_num_threads() == 4


def test_what_one_raises_is_raised_and_threads_are_given_back() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_lanes(lambda number: 1 // number, [1, 0, 1], 2))
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("rows", "threads", "lanes"), [(1, 8, 1), (2, 2, 2), (4, 2, 2), (4, 64, 4), (3, 2, 1), (6, 4, 3), (7, 4, 1)]
)
def test_a_batch_is_cut_into_lanes_of_one_size(rows: int, threads: int, lanes: int) -> None:
    assert lane_count(rows, threads) == lanes
