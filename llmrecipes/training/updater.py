"""The optimizer step: all the mutable state of a run besides the model and its place in the data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from llmrecipes.errors import TrainingError
from llmrecipes.precision import Precision
from llmrecipes.training.schedules import Progress, Schedule, learning_rate_factor

MAX_SKIPPED_STEPS = 3
"""Steps in a row whose gradient is not finite after which a run stops."""


Gradients = Sequence[torch.Tensor | None]
"""One for each parameter that trains, None where it has no part in the loss."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    learning_rate: float
    gradient_norm: float
    """before clipping; not finite where the step was skipped"""
    skipped: bool


class Updater:
    """Scales losses, clips gradients, sets the learning rate, steps the optimizer, skips what is not finite."""

    def __init__(
        self,
        model: Any,
        optimizer: Optimizer,
        schedule: Schedule,
        precision: Precision,
        clip_norm: float | None = None,
    ) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer
        self.schedule = schedule
        self.precision = precision
        self.clip_norm = clip_norm
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.loss_scaling)
        self.peak_rates = [group["lr"] for group in optimizer.param_groups]
        self.skipped_in_a_row = 0

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a share of the window's loss."""
        self.scaler.scale(loss).backward()

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
        """Returns the detached loss and its gradient, to `add` later: several threads may do so at once."""
        gradients = torch.autograd.grad(self.scaler.scale(loss), self.parameters, allow_unused=True)
        return loss.detach(), gradients

    def add(self, gradients: Gradients) -> None:
        """Adds the gradient of a share of the window's loss."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def step(self, progress: Progress) -> Update:
        """Applies the gathered gradient and forgets it; raises `TrainingError` after too many skipped steps."""
        factor = learning_rate_factor(self.schedule, progress)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = math.isfinite(norm)
        if finite and self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        if finite or self.precision.loss_scaling:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._count_skipped(finite, progress)
        return Update(self.peak_rates[0] * factor, float(norm), skipped=not finite)

    def _count_skipped(self, finite: bool, progress: Progress) -> None:
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        # Loss scaling starts too high by design and finds its scale by skipping: 2**16 down to 1 are 16 halvings.
        allowed = MAX_SKIPPED_STEPS + (16 if self.precision.loss_scaling else 0)
        if self.skipped_in_a_row > allowed:
            raise TrainingError(
                f"step {progress.step + 1}: the gradient was not finite {self.skipped_in_a_row} times in a row (such "
                "steps never reach the weights); try a smaller --lr, --gradient_clipping, or bf16 instead of --use_fp16"
            )
