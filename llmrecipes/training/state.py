"""Everything of a run that changes while it trains, as tensors and plain JSON: no pickle, and no bit lost.

What is kept of a parameter is its own name, so that it finds its way back however the model was put together.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from llmrecipes.errors import PluginError
from llmrecipes.training.updater import Updater

Tensors = dict[str, torch.Tensor]


PAGED = ("state1", "state2")
"""What a paged optimizer of bitsandbytes keeps in paged memory, of parameters large enough."""


@dataclass
class Place:
    """How far a run is, besides its weights, its optimizer and its random generators."""

    step: int = 0
    """optimizer steps done"""
    epoch: int = 0
    window: int = 0
    """windows of this epoch that are done"""
    tokens: int = 0
    """useful ones"""
    last_loss: float = math.nan
    best_loss: float = math.inf
    """lowest validation loss"""
    best_step: int = 0
    """0: no validation yet"""
    evaluated_at: int = 0

    def forget_best(self) -> None:
        """Has the next validation be the best so far."""
        self.best_loss, self.best_step = Place.best_loss, 0

    def plain(self) -> dict[str, Any]:
        """Returns it for JSON, every bit of a number kept and infinity too."""
        return {name: value.hex() if isinstance(value, float) else value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Place":
        """Returns what `plain` was made of; raises where it cannot have been made so."""
        numbers: dict[str, Any] = {}
        for item in fields(cls):
            value = plain[item.name]
            if item.type is int and (type(value) is not int or value < 0):
                raise ValueError(f"{item.name} is {value!r}")
            numbers[item.name] = value if item.type is int else float.fromhex(value)
        return cls(**numbers)


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Returns what trains, by name, in the order of `Updater.parameters`."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def mutable_state(model: Any, updater: Updater) -> tuple[Tensors, dict[str, Any]]:
    """Returns optimizer, loss scale, counters and random generators as (tensors by name, JSON)."""
    tensors: Tensors = {}
    device = updater.precision.device
    optimizer = updater.optimizer
    state = {name: optimizer.state.get(item, {}) for name, item in trained_parameters(model).items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        kept = {
            "optimizer": packed(state, "optimizer", tensors, device),
            "groups": packed(groups, "groups", tensors, device),
            "random": packed(generators(device), "random", tensors, device),
        }
    except TypeError as error:
        name = type(optimizer).__name__
        raise PluginError(f"--optimizer: {name} cannot be saved to go on from ({error})") from None
    return tensors, {**kept, "updater": updater.plain()}


def restore_state(model: Any, updater: Updater, tensors: Tensors, plain: Mapping[str, Any]) -> None:
    """Puts everything back that `mutable_state` returned; of the learning rate and weight decay the run's own hold."""
    device = updater.precision.device
    optimizer = updater.optimizer
    state = unpacked(plain["optimizer"], tensors, device)
    parameters = trained_parameters(model)
    if state.keys() != parameters.keys():
        raise KeyError(f"optimizer state of {len(state)} parameters, {len(parameters)} train")
    for name, parameter in parameters.items():
        if state[name]:
            optimizer.state[parameter] = _paged(optimizer, parameter, state[name])
        else:
            optimizer.state.pop(parameter, None)
    for group, kept in zip(optimizer.param_groups, unpacked(plain["groups"], tensors, device), strict=True):
        group.update({key: value for key, value in kept.items() if key not in ("lr", "weight_decay", "initial_lr")})
    updater.restore(plain["updater"])
    restore_generators(unpacked(plain["random"], tensors, torch.device("cpu")), device)


def _paged(optimizer: Any, parameter: torch.nn.Parameter, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a parameter's state, in memory that moves between host and GPU where bitsandbytes keeps it there.

    What it was read into is a copy, which the next step would move to the GPU for good (optim/optimizer.py, `to_gpu`).
    """
    if not getattr(optimizer, "is_paged", False):
        return state
    moved = {key: state[key] for key in PAGED if key in state}
    buffers = {key: optimizer.get_state_buffer(parameter, dtype=value.dtype) for key, value in moved.items()}
    return {**state, **{key: buffer.copy_(moved[key]) for key, buffer in buffers.items()}}


def generators(device: torch.device) -> dict[str, Any]:
    """Returns the state of every random generator that a run may draw from."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Sets every generator to a state that `generators` returned; one of a GPU only where there is one."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def packed(value: Any, path: str, tensors: Tensors, home: torch.device) -> Any:
    """Returns a value as JSON, its tensors put into `tensors`; raises `TypeError` for what is none of Python's own.

    A tensor elsewhere than on the run's device (AdamW's step counts) is marked, and goes back to the host.
    """
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path, "host": value.device.type != home.type}
    if isinstance(value, Mapping):
        items = [[key, packed(item, f"{path}/{key}", tensors, home)] for key, item in value.items()]
        if any(not isinstance(key, str | int) for key, _ in items):
            raise TypeError("its state has keys that are neither text nor numbers")
        return {"map": items}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [packed(item, f"{path}/{place}", tensors, home) for place, item in enumerate(value)]}
    if isinstance(value, float):
        return {"float": value.hex()}
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"its state holds a {type(value).__name__}")


def unpacked(plain: Any, tensors: Mapping[str, torch.Tensor], home: torch.device) -> Any:
    """Returns what `packed` was given, tensors on the device `home` where they were on the run's."""
    if not isinstance(plain, dict):
        return plain
    (kind,) = plain.keys() - {"host"}
    content = plain[kind]
    if kind == "tensor":
        tensor = tensors[content]
        return tensor.clone() if plain["host"] else tensor.to(home, copy=True)
    if kind == "float":
        return float.fromhex(content)
    if kind == "map":
        return {key: unpacked(item, tensors, home) for key, item in content}
    items = [unpacked(item, tensors, home) for item in content]
    return tuple(items) if kind == "tuple" else items
