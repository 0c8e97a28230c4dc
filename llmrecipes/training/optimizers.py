"""Optimizers: the seam `(parameters, config) -> torch Optimizer`."""

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer

from llmrecipes.config.schema import TrainingOptions
from llmrecipes.errors import HardwareError

Parameters = Iterable[torch.nn.Parameter]
OptimizerFactory = Callable[[Parameters, TrainingOptions], Optimizer]


def adamw(parameters: Parameters, config: TrainingOptions) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), PyTorch's; on a GPU in one kernel over all parameters."""
    parameters = list(parameters)
    fused = all(parameter.is_cuda for parameter in parameters) or None
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def adamw_fused(parameters: Parameters, config: TrainingOptions) -> Optimizer:
    """AdamW in one kernel over all parameters."""
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def adamw_8bit(parameters: Parameters, config: TrainingOptions) -> Optimizer:
    """AdamW with its state in 8-bit blocks (Dettmers et al. 2021, arXiv 2110.02861)."""
    return _bitsandbytes("AdamW8bit", parameters, config)


def paged_adamw_32bit(parameters: Parameters, config: TrainingOptions) -> Optimizer:
    """AdamW whose state moves to main memory when the GPU runs full (QLoRA, arXiv 2305.14314)."""
    return _bitsandbytes("PagedAdamW32bit", parameters, config)


def paged_adamw_8bit(parameters: Parameters, config: TrainingOptions) -> Optimizer:
    """8-bit AdamW with paged state."""
    return _bitsandbytes("PagedAdamW8bit", parameters, config)


def adafactor(parameters: Parameters, config: TrainingOptions) -> Optimizer:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235), PyTorch's, at the given learning rate."""
    return torch.optim.Adafactor(parameters, lr=config.lr, weight_decay=config.weight_decay)


def sgd(parameters: Parameters, config: TrainingOptions) -> Optimizer:
    """Plain gradient descent."""
    return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)


OPTIMIZERS: dict[str, OptimizerFactory] = {
    "adamw": adamw,
    "adamw_fused": adamw_fused,
    "adamw_8bit": adamw_8bit,
    "paged_adamw_32bit": paged_adamw_32bit,
    "paged_adamw_8bit": paged_adamw_8bit,
    "adafactor": adafactor,
    "sgd": sgd,
}


STATE_BYTES = {"adamw_8bit": 2.0, "paged_adamw_32bit": 0.0, "paged_adamw_8bit": 0.0, "adafactor": 0.0, "sgd": 0.0}
"""Bytes of state for each number that trains, on the device that computes; two of the number's own size elsewhere."""


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the bytes of tensors; of parameters also those of a gradient of each."""
    return sum(each.numel() * each.element_size() for each in tensors)


def state_bytes(name: str, parameters: Iterable[torch.nn.Parameter]) -> int:
    """Returns how many bytes an optimizer's state will take beside the parameters."""
    return int(sum(each.numel() * STATE_BYTES.get(name, 2.0 * each.element_size()) for each in parameters))


def _bitsandbytes(kind: str, parameters: Parameters, config: TrainingOptions) -> Optimizer:
    import bitsandbytes

    parameters = list(parameters)
    if kind.startswith("Paged") and any(parameter.device.type != "cuda" for parameter in parameters):
        raise HardwareError(f"--optimizer {config.optimizer}: paging needs a GPU; use --optimizer adamw on the CPU")
    optimizer: Optimizer = getattr(bitsandbytes.optim, kind)(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return optimizer
