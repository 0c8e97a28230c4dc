"""The training loop.

for each epoch, for each window: one optimizer step; now and then a validation or a saved copy.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmrecipes.batch import Batch, Window
from llmrecipes.errors import DataError
from llmrecipes.precision import Precision
from llmrecipes.training.lanes import in_lanes
from llmrecipes.training.loss import loss_sum
from llmrecipes.training.schedules import Progress
from llmrecipes.training.updater import Update, Updater

Record = dict[str, Any]


class Windows(Protocol):
    """What the loop needs of a loader."""

    def windows(self, epoch: int) -> Iterable[Window]:
        """Yields the windows of an epoch."""
        ...


@dataclass(frozen=True)
class TrainPlan:
    """How long to train, and how often to look up."""

    epochs: int
    steps: int
    warmup_steps: int = 0
    gamma: float = 1.0
    eval_steps: int = 0
    """0: after each epoch"""
    save_steps: int = 0
    logging_steps: int = 1
    max_eval_batches: int = 0
    lanes: int = 1
    """batches of a window that are computed side by side, on a CPU"""


@dataclass(frozen=True)
class Hooks:
    """What the loop tells and asks of the run around it."""

    report: Callable[[Record], None]
    save: Callable[[str], None]
    """saves the weights as they are now, under a name: best, last (unless it is the best) or step-000100"""
    stop_requested: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step in numbers."""

    loss: float
    """mean over the window's supervised tokens"""
    supervised_tokens: int
    useful_tokens: int
    update: Update


@dataclass(frozen=True)
class EvalMetrics:
    """One validation: the mean over all supervised tokens seen."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    steps: int
    useful_tokens: int
    last_loss: float
    best_step: int
    best_loss: float | None
    """lowest validation loss; None without validation"""
    stopped: bool
    """True where a signal ended the run early"""


def train(
    model: Any, training: Windows, validation: Windows | None, updater: Updater, plan: TrainPlan, hooks: Hooks
) -> TrainResult:
    """Trains in place and returns the outcome; the best weights by validation loss are saved as `best`."""
    step, tokens, last_loss, best = 0, 0, math.nan, (math.inf, 0)
    evaluated_at, stopped = 0, False
    for epoch in range(plan.epochs):
        for window in training.windows(epoch):
            started = time.perf_counter()
            progress = Progress(step, plan.steps, plan.warmup_steps, epoch, plan.gamma)
            metrics = train_step(model, window, updater, progress, plan.lanes)
            step, tokens, last_loss = step + 1, tokens + metrics.useful_tokens, metrics.loss
            if step % plan.logging_steps == 0 or step == plan.steps or metrics.update.skipped:
                hooks.report(step_record(step, epoch, metrics, time.perf_counter() - started))
            stopped = hooks.stop_requested()
            if validation is not None and _due(step, plan.eval_steps) and not stopped:
                best = _validate(model, validation, updater.precision, plan, hooks, step, best)
                evaluated_at, stopped = step, step < plan.steps and hooks.stop_requested()
            if _due(step, plan.save_steps):
                hooks.save(f"step-{step:06d}")
            if stopped or step == plan.steps:
                break
        at_end = step == plan.steps or plan.eval_steps == 0
        if validation is not None and at_end and evaluated_at != step and not stopped:
            best = _validate(model, validation, updater.precision, plan, hooks, step, best)
            evaluated_at, stopped = step, step < plan.steps and hooks.stop_requested()
        if stopped or step == plan.steps:
            break
    best_loss, best_step = best
    if best_step != step:
        hooks.save("last")
    return TrainResult(step, tokens, last_loss, best_step, best_loss if best_step else None, stopped)


def train_step(model: Any, window: Window, updater: Updater, progress: Progress, lanes: int = 1) -> StepMetrics:
    """Returns the metrics of one optimizer step: every supervised token of the window weighs the same."""
    supervised_tokens = sum(batch.supervised_tokens for batch in window)
    if supervised_tokens == 0:
        rows = [row for batch in window for row in batch.sample_rows]
        raise DataError(f"step {progress.step + 1}: no supervised token in rows {rows[:5]}; check get_data_collator")
    total = torch.zeros((), device=updater.precision.device)
    model.train()

    def share(batch: Batch) -> torch.Tensor:
        return loss_sum(model, batch.to(updater.precision.device), updater.precision) / supervised_tokens

    if lanes == 1:
        for batch in window:
            loss = share(batch)
            updater.backward(loss)
            total += loss.detach().float()
    else:  # added in the window's order, so that the same run comes to the same bits
        for loss, gradients in in_lanes(lambda batch: updater.gradients(share(batch)), window, lanes):
            updater.add(gradients)
            total += loss.float()
    update = updater.step(progress)
    return StepMetrics(float(total), supervised_tokens, sum(batch.useful_tokens for batch in window), update)


@torch.no_grad()
def evaluate(model: Any, validation: Windows, precision: Precision, max_batches: int = 0) -> EvalMetrics:
    """Returns the mean loss over the supervised tokens of the split, or of its first `max_batches` batches."""
    was_training = model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    batches = (batch for window in validation.windows(0) for batch in window)
    for batch in itertools.islice(batches, max_batches or None):
        total += loss_sum(model, batch.to(precision.device), precision).cpu()
        tokens += batch.supervised_tokens
    model.train(was_training)
    if tokens == 0:
        raise DataError("validation: no supervised token in its batches; check get_data_collator")
    return EvalMetrics(float(total) / tokens, tokens)


def step_record(step: int, epoch: int, metrics: StepMetrics, seconds: float) -> Record:
    """Returns the record of a step, as trackers and the progress bar read it."""
    return {
        "kind": "step",
        "step": step,
        "epoch": epoch,
        "loss": metrics.loss,
        "learning_rate": metrics.update.learning_rate,
        "gradient_norm": metrics.update.gradient_norm,
        "skipped": metrics.update.skipped,
        "supervised_tokens": metrics.supervised_tokens,
        "useful_tokens": metrics.useful_tokens,
        "seconds": seconds,
        "tokens_per_second": metrics.useful_tokens / seconds,
    }


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _validate(
    model: Any,
    validation: Windows,
    precision: Precision,
    plan: TrainPlan,
    hooks: Hooks,
    step: int,
    best: tuple[float, int],
) -> tuple[float, int]:
    """Evaluates, reports, saves as `best` what is best so far; returns (best loss, its step)."""
    metrics = evaluate(model, validation, precision, plan.max_eval_batches)
    hooks.report(
        {
            "kind": "evaluation",
            "step": step,
            "eval_loss": metrics.loss,
            "eval_perplexity": metrics.perplexity,
            "eval_tokens": metrics.tokens,
        }
    )
    # The first validation always counts as the best so far: a loss that is not a number must not lose the run.
    if metrics.loss < best[0] or math.isnan(best[0]) or best[1] == 0:
        hooks.save("best")
        return metrics.loss, step
    return best
