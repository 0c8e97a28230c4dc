"""The optimizer step: all the mutable state of a run besides the model and its place in the data."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from llmrecipes.batch import Batch
from llmrecipes.errors import TrainingError
from llmrecipes.precision import Precision
from llmrecipes.training.loss import loss_sum
from llmrecipes.training.schedules import Progress, Schedule, learning_rate_factor

MAX_SKIPPED_STEPS = 3
"""Steps in a row whose gradient is not finite after which a run stops."""

LossSum = Callable[[Any, Batch, Precision], torch.Tensor]
"""The loss of a batch, summed over its supervised tokens: `loss.loss_sum`, or what a kernel has in its place."""


class HostNumber:
    """A number on its way from the device: reading it waits for what it depends on, and for nothing behind that."""

    def __init__(self, number: torch.Tensor) -> None:
        self._ready = None
        self._number = number.detach()
        if number.is_cuda:
            self._number = torch.empty_like(number, device="cpu", pin_memory=True)
            self._number.copy_(number.detach(), non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def __float__(self) -> float:
        if self._ready is not None:
            self._ready.synchronize()
        return float(self._number)


Gradients = Sequence[torch.Tensor | None]
"""One for each parameter that trains, None where it has no part in the loss."""


class Update:
    """What one optimizer step did."""

    def __init__(self, step: int, learning_rate: float, norm: torch.Tensor) -> None:
        self.step, self.learning_rate, self._norm = step, learning_rate, HostNumber(norm)

    @property
    def gradient_norm(self) -> float:
        """Norm before clipping; not finite where the step was skipped."""
        return float(self._norm)

    @property
    def skipped(self) -> bool:
        """Whether the gradient was not finite, so that the weights are as they were."""
        return not math.isfinite(self.gradient_norm)


class Updater:
    """Scales losses, clips gradients, sets the learning rate, steps the optimizer, skips what is not finite."""

    def __init__(
        self,
        model: Any,
        optimizer: Optimizer,
        schedule: Schedule,
        precision: Precision,
        clip_norm: float | None = None,
        loss: LossSum = loss_sum,
    ) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer
        self.schedule = schedule
        self.precision = precision
        self.clip_norm = clip_norm
        self.loss = loss
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.loss_scaling)
        self.peak_rates = [group["lr"] for group in optimizer.param_groups]
        self.skipped_in_a_row = 0
        self.halvings = 0
        """how often batches are cut in half before they are computed: the memory did not suffice for more"""
        self._unseen: Update | None = None

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

    def forget(self) -> None:
        """Drops the gradient gathered so far."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, progress: Progress) -> Update:
        """Applies the gathered gradient and forgets it; raises `TrainingError` after too many skipped steps.

        On a GPU the host does not wait for the step: that it was skipped is noticed with the next one, or by `settle`.
        """
        factor = learning_rate_factor(self.schedule, progress)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        self._apply(norm)
        self.forget()
        self.settle()
        self._unseen = update = Update(progress.step, self.peak_rates[0] * factor, norm)
        if not norm.is_cuda:
            self.settle()
        return update

    def settle(self) -> None:
        """Counts the last step if it was skipped; raises `TrainingError` where that makes too many in a row."""
        update, self._unseen = self._unseen, None
        if update is None:
            return
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update.skipped else 0
        # Loss scaling starts too high by design and finds its scale by skipping: 2**16 down to 1 are 16 halvings.
        allowed = MAX_SKIPPED_STEPS + (16 if self.precision.loss_scaling else 0)
        if self.skipped_in_a_row > allowed:
            raise TrainingError(
                f"step {update.step + 1}: the gradient was not finite {self.skipped_in_a_row} times in a row (such "
                "steps never reach the weights); try a smaller --lr, --gradient_clipping, or bf16 instead of --use_fp16"
            )

    def _apply(self, norm: torch.Tensor) -> None:
        """Steps the optimizer unless the norm is not finite; a fused one looks at that itself, on the device."""
        if self.precision.loss_scaling:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif norm.is_cuda and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            optimizer: Any = self.optimizer
            optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
            optimizer.step()
        elif math.isfinite(norm):
            self.optimizer.step()
        # Fused optimizers change parameters behind PyTorch's back; fused layers copy them anew where it tells of it.
        torch.autograd.graph.increment_version(self.parameters)
