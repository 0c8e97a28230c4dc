"""Laws of a run's state: what was taken down is put back as it was, and where it was."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrecipes.precision import Precision, resolve_precision
from llmrecipes.training.optimizers import OPTIMIZERS
from llmrecipes.training.schedules import SCHEDULES, Progress
from llmrecipes.training.state import mutable_state, restore_state
from llmrecipes.training.updater import Updater


class Paged(torch.optim.Adam):
    """As a paged optimizer of bitsandbytes: the state of large parameters lies in memory that carries a mark."""

    is_paged = True

    def get_state_buffer(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.zeros_like(parameter, dtype=dtype)
        buffer.is_paged = True  # type: ignore[attr-defined]
        return buffer

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state.update(step=0, state1=self.get_state_buffer(parameter, torch.float32))
            state["step"] += 1
            state["state1"].add_(parameter.grad)
            parameter.data.sub_(state["state1"], alpha=0.1)


def updater_of(name: str, precision: Precision) -> tuple[torch.nn.Module, Updater]:
    """A model of one large parameter and one small one, and what trains it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(400, 400).to(precision.device)
    build = {**OPTIMIZERS, "paged": lambda parameters, config: Paged(parameters, lr=config.lr)}[name]
    config: Any = SimpleNamespace(lr=0.01, weight_decay=0.0, optimizer=name)
    return model, Updater(model, build(model.parameters(), config), SCHEDULES["constant"], precision)


def stepped(model: torch.nn.Module, updater: Updater) -> list[torch.Tensor]:
    """Takes a step; returns the weights behind it."""
    loss = model(torch.ones(2, 400, device=updater.precision.device)).square().mean()
    updater.backward(loss)
    updater.step(Progress(0, 10, 0, 0, 1.0), loss)
    return [parameter.detach().cpu().clone() for parameter in model.parameters()]


GPU_ONLY = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize(
    ("name", "device"),
    [("paged", "cpu"), *(pytest.param(name, "cuda", marks=GPU_ONLY) for name in OPTIMIZERS if "paged" in name)],
)
def test_paged_state_is_paged_when_it_is_put_back(name: str, device: str) -> None:
    precision = resolve_precision(device, False, False)
    model, updater = updater_of(name, precision)
    stepped(model, updater)
    tensors, plain = mutable_state(model, updater)
    tensors = {key: value.clone() for key, value in tensors.items()}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    expected = stepped(model, updater)
    again, resumed = updater_of(name, precision)
    again.load_state_dict(weights)
    restore_state(again, resumed, tensors, plain)
    state1 = [resumed.optimizer.state[parameter]["state1"] for parameter in again.parameters()]
    assert getattr(state1[0], "is_paged", False)
    assert all(map(torch.equal, stepped(again, resumed), expected))
    assert getattr(resumed.optimizer.state[next(again.parameters())]["state1"], "is_paged", False)
