"""The optimizer step: all the mutable state of a run besides the model and its place in the data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from llmrecipes.batch import Batch
from llmrecipes.errors import TrainingError
from llmrecipes.precision import Precision
from llmrecipes.training.loss import loss_sum
from llmrecipes.training.schedules import Progress, Schedule, learning_rate_factor
from llmrecipes.training.spikes import Spikes

SCALE_SEARCH = 16
"""Further steps that loss scaling may skip: it starts at 2**16 by design and finds its scale by halving it."""


@dataclass(frozen=True)
class Health:
    """What a run puts up with."""

    max_skipped_steps: int = 3
    """skipped in a row, after which it stops"""
    spike_sigma: float = 0.0
    """0: nothing is called a spike"""
    skip_spikes: bool = False


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

    spike: str | None = None
    """why the step was skipped though it is finite"""

    def __init__(self, step: int, learning_rate: float, norm: torch.Tensor, loss_scale: float | None = None) -> None:
        self.step, self.learning_rate, self._norm, self.loss_scale = step, learning_rate, HostNumber(norm), loss_scale

    @property
    def gradient_norm(self) -> float:
        """Norm before clipping; not finite where the gradient or the loss was not."""
        return float(self._norm)

    @property
    def skipped(self) -> bool:
        """Whether the gradient or loss was not finite, or a spike, so that the weights are as they were."""
        return self.spike is not None or not math.isfinite(self.gradient_norm)


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
        health: Health | None = None,
    ) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer
        self.schedule = schedule
        self.precision = precision
        self.clip_norm = clip_norm
        self.loss = loss
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.loss_scaling)
        self.peak_rates = [group["lr"] for group in optimizer.param_groups]
        self.health = health or Health()
        self.spikes = Spikes(self.health.spike_sigma, self.health.skip_spikes)
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

    def step(self, progress: Progress, loss: torch.Tensor) -> Update:
        """Applies the gathered gradient, that of `loss`, unless one of them is not finite, and forgets it.

        On a GPU the host does not wait for the step: that it was skipped is noticed with the next one, or by `settle`.
        """
        factor = learning_rate_factor(self.schedule, progress)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm + 0.0 * loss.detach().to(norm)  # NaN where the loss is not finite
        spike = self.spikes.judge(float(loss), float(norm)) if self.spikes.skip else None
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        if spike is None:
            self._apply(norm)
        self.forget()
        self.settle()
        scale = self.scaler.get_scale() if self.precision.loss_scaling else None
        self._unseen = update = Update(progress.step, self.peak_rates[0] * factor, norm, scale)
        update.spike = spike
        if not norm.is_cuda:
            self.settle()
        return update

    def settle(self) -> None:
        """Counts the last step if it was skipped."""
        update, self._unseen = self._unseen, None
        if update is not None:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if update.skipped else 0

    def check_health(self, step: int) -> None:
        """Raises `TrainingError` where too many steps in a row were skipped, the last one at `step` at the latest."""
        allowed = self.health.max_skipped_steps + (SCALE_SEARCH if self.precision.loss_scaling else 0)
        if self.skipped_in_a_row >= allowed:
            self.settle()  # of the last step, which may have been a good one
        if self.skipped_in_a_row >= allowed:
            raise TrainingError(
                f"step {step}: loss or gradient was not finite {self.skipped_in_a_row} times in a row (such steps "
                "never reach the weights); try a smaller --lr, --gradient_clipping, or bf16 instead of --use_fp16"
            )

    def plain(self) -> dict[str, Any]:
        """Returns counters, loss scale and what is known of spikes, for JSON."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "halvings": self.halvings,
            "scaler": self.scaler.state_dict(),
            "spikes": self.spikes.plain(),
        }

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Puts back what `plain` returned."""
        self.skipped_in_a_row, self.halvings = int(plain["skipped_in_a_row"]), int(plain["halvings"])
        if plain["scaler"] and self.precision.loss_scaling:
            self.scaler.load_state_dict(plain["scaler"])
        self.spikes.restore(plain["spikes"])

    def _apply(self, norm: torch.Tensor) -> None:
        """Steps the optimizer unless the norm is not finite; a fused one looks at that itself, on the device."""
        if self.precision.loss_scaling:
            if math.isfinite(norm):  # a gradient that is not would be skipped by the scaler as well; a loss would not
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
