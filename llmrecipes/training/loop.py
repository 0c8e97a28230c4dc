"""The training loop.

for each epoch, for each window: one optimizer step; now and then a validation or a saved copy.
"""

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from llmrecipes.batch import Batch, Window, halved
from llmrecipes.errors import DataError
from llmrecipes.precision import Precision
from llmrecipes.training.lanes import in_lanes
from llmrecipes.training.loss import loss_sum
from llmrecipes.training.schedules import Progress
from llmrecipes.training.updater import HostNumber, LossSum, Update, Updater

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
    operations: Callable[[Window], int] | None = None
    """counts the floating-point operations of a step, where they are wanted"""
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

    mean_loss: HostNumber
    supervised_tokens: int
    useful_tokens: int
    update: Update
    operations: int = 0
    """floating-point operations, 0 where they are not counted"""

    @property
    def loss(self) -> float:
        """Mean over the window's supervised tokens; reading it waits for the step."""
        return float(self.mean_loss)


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
    step, tokens, best = 0, 0, (math.inf, 0)
    evaluated_at, stopped = 0, False
    reports = Reports(hooks.report, plan, delayed=updater.precision.device.type == "cuda")

    def validate() -> tuple[float, int]:
        with reports.paused():
            assert validation is not None
            return _validate(model, validation, updater, plan, hooks, step, best)

    for epoch in range(plan.epochs):
        for window in training.windows(epoch):
            progress = Progress(step, plan.steps, plan.warmup_steps, epoch, plan.gamma)
            halvings = updater.halvings
            metrics = train_step(model, window, updater, progress, plan.lanes)
            if updater.halvings > halvings:
                hooks.report({"kind": "notice", "text": f"step {step + 1}: {_cut_told(updater.halvings)}"})
            if plan.operations is not None:
                metrics = replace(metrics, operations=plan.operations(window))
            step, tokens = step + 1, tokens + metrics.useful_tokens
            reports.add(step, epoch, metrics)
            stopped = hooks.stop_requested()
            if validation is not None and _due(step, plan.eval_steps) and not stopped:
                best = validate()
                evaluated_at, stopped = step, step < plan.steps and hooks.stop_requested()
            if _due(step, plan.save_steps):
                with reports.paused():
                    hooks.save(f"step-{step:06d}")
            if stopped or step == plan.steps:
                break
        at_end = step == plan.steps or plan.eval_steps == 0
        if validation is not None and at_end and evaluated_at != step and not stopped:
            best = validate()
            evaluated_at, stopped = step, step < plan.steps and hooks.stop_requested()
        if stopped or step == plan.steps:
            break
    reports.tell()
    updater.settle()
    best_loss, best_step = best
    if best_step != step:
        hooks.save("last")
    return TrainResult(step, tokens, reports.last_loss, best_step, best_loss if best_step else None, stopped)


class Reports:
    """Tells of each step once its numbers are there: on a GPU (`delayed`) when the next step is under way.

    So the device never waits for the host to read a number. A step's time is that since the step before was told.
    """

    def __init__(self, report: Callable[[Record], None], plan: TrainPlan, delayed: bool) -> None:
        self.report, self.plan, self.delayed = report, plan, delayed
        self.last_loss = math.nan
        self._waiting: tuple[int, int, StepMetrics] | None = None
        self._since = time.perf_counter()

    def add(self, step: int, epoch: int, metrics: StepMetrics) -> None:
        """Takes a step that was just handed to the device."""
        self.tell()
        self._waiting = (step, epoch, metrics)
        if not self.delayed:
            self.tell()

    def tell(self) -> None:
        """Tells of the step that waits, if one does."""
        if self._waiting is None:
            return
        (step, epoch, metrics), self._waiting = self._waiting, None
        self.last_loss = metrics.loss
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        if step % self.plan.logging_steps == 0 or step == self.plan.steps or metrics.update.skipped:
            self.report(step_record(step, epoch, metrics, seconds))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Tells of all steps so far, and counts none of the time within."""
        self.tell()
        yield
        self._since = time.perf_counter()


def train_step(model: Any, window: Window, updater: Updater, progress: Progress, lanes: int = 1) -> StepMetrics:
    """Returns the metrics of one optimizer step: every supervised token of the window weighs the same.

    Where the memory does not suffice, the step is done again with batches of half as many rows, which is the same
    update (but for LoRA's dropout, which is drawn anew), and so are all steps from then on.
    """
    supervised, useful = sum(batch.supervised_tokens for batch in window), sum(batch.useful_tokens for batch in window)
    if supervised == 0:
        rows = [row for batch in window for row in batch.sample_rows]
        raise DataError(f"step {progress.step + 1}: no supervised token in rows {rows[:5]}; check get_data_collator")
    model.train()
    for _ in range(updater.halvings):
        window = _halved(window)
    while True:
        try:
            total = _add_gradients(model, window, updater, lanes)
            break
        except torch.OutOfMemoryError:
            updater.forget()
            if all(len(batch.input_ids) == 1 for batch in window):
                raise
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is no GPU
        updater.halvings += 1
        window = _halved(window)
    update = updater.step(progress)
    return StepMetrics(HostNumber(total), supervised, useful, update)


def _cut_told(halvings: int) -> str:
    return f"the memory did not suffice; batches are cut into {2**halvings} from now on, with the same update"


def _halved(window: Window) -> Window:
    return [half for batch in window for half in halved(batch) if half.supervised_tokens]


def _add_gradients(model: Any, window: Window, updater: Updater, lanes: int) -> torch.Tensor:
    """Adds up the gradient of the window's mean loss, and returns that loss."""
    supervised_tokens = sum(batch.supervised_tokens for batch in window)
    total = torch.zeros((), device=updater.precision.device)

    def share(batch: Batch) -> torch.Tensor:
        return updater.loss(model, batch.to(updater.precision.device), updater.precision) / supervised_tokens

    if lanes == 1:
        for batch in window:
            loss = share(batch)
            updater.backward(loss)
            total += loss.detach().float()
    else:  # added in the window's order, so that the same run comes to the same bits
        for loss, gradients in in_lanes(lambda batch: updater.gradients(share(batch)), window, lanes):
            updater.add(gradients)
            total += loss.float()
    return total


@torch.no_grad()
def evaluate(
    model: Any, validation: Windows, precision: Precision, max_batches: int = 0, loss: LossSum = loss_sum
) -> EvalMetrics:
    """Returns the mean loss over the supervised tokens of the split, or of its first `max_batches` batches."""
    was_training = model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64, device=precision.device), 0
    batches = (batch for window in validation.windows(0) for batch in window)
    for batch in itertools.islice(batches, max_batches or None):
        total += loss(model, batch.to(precision.device), precision)
        tokens += batch.supervised_tokens
    model.train(was_training)
    if tokens == 0:
        raise DataError("validation: no supervised token in its batches; check get_data_collator")
    return EvalMetrics(float(total) / tokens, tokens)


def step_record(step: int, epoch: int, metrics: StepMetrics, seconds: float) -> Record:
    """Returns the record of a step, as trackers and the progress bar read it."""
    record = {
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
    return record | ({"teraflops": metrics.operations / seconds / 1e12} if metrics.operations else {})


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _validate(
    model: Any,
    validation: Windows,
    updater: Updater,
    plan: TrainPlan,
    hooks: Hooks,
    step: int,
    best: tuple[float, int],
) -> tuple[float, int]:
    """Evaluates, reports, saves as `best` what is best so far; returns (best loss, its step)."""
    metrics = evaluate(model, validation, updater.precision, plan.max_eval_batches, updater.loss)
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
