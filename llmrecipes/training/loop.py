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
from llmrecipes.errors import DataError, TrainingError
from llmrecipes.precision import Precision, is_out_of_memory
from llmrecipes.training.lanes import in_lanes
from llmrecipes.training.loss import loss_sum
from llmrecipes.training.schedules import Progress
from llmrecipes.training.state import Place
from llmrecipes.training.updater import HostNumber, LossSum, Update, Updater

Record = dict[str, Any]


class Windows(Protocol):
    """What the loop needs of a loader."""

    def windows(self, epoch: int, start: int = 0) -> Iterable[Window]:
        """Yields the windows of an epoch from number `start` on."""
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
    save: Callable[[str, Place], None]
    """saves the weights as they are at a place, as `best` or as `last`"""
    checkpoint: Callable[[Place], None] = lambda place: None
    """saves all that a run needs to go on from here"""
    stop_requested: Callable[[], bool] = lambda: False
    save_requested: Callable[[], bool] = lambda: False
    window: Callable[[Window], None] = lambda window: None
    """told of each window before its step"""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step in numbers."""

    mean_loss: HostNumber
    supervised_tokens: int
    useful_tokens: int
    update: Update
    rows: tuple[int, ...] = ()
    """`Sample.row` of every sample in the window"""
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
    model: Any,
    training: Windows,
    validation: Windows | None,
    updater: Updater,
    plan: TrainPlan,
    hooks: Hooks,
    place: Place | None = None,
) -> TrainResult:
    """Trains in place and returns the outcome; the best weights by validation loss are saved as `best`.

    `place` is where the run begins, and is kept up to date.
    """
    place = place or Place()
    reports = Reports(hooks.report, plan, updater, place)
    stopped = False

    def validate() -> bool:
        """Validates; returns whether the run is to stop."""
        with reports.paused():
            assert validation is not None
            done = _validate(model, validation, updater, plan, hooks, place)
        return not done or (place.step < plan.steps and hooks.stop_requested())

    if validation is not None and 0 < place.step < plan.steps and place.evaluated_at != place.step:
        stopped = _due(place.step, plan.eval_steps) and validate()  # a signal had cut it off
    for epoch in range(place.epoch, plan.epochs):
        place.epoch = epoch
        for window in training.windows(epoch, place.window) if place.step < plan.steps and not stopped else ():
            hooks.window(window)
            _step(model, window, updater, plan, hooks, place, reports)
            stopped = hooks.stop_requested()
            if validation is not None and _due(place.step, plan.eval_steps) and not stopped:
                stopped = validate()
            if _due(place.step, plan.save_steps) or hooks.save_requested():
                with reports.paused():
                    hooks.checkpoint(place)
            if stopped or place.step == plan.steps:
                break
        at_end = place.step == plan.steps or plan.eval_steps == 0
        if validation is not None and at_end and place.evaluated_at != place.step and not stopped:
            stopped = validate()
        if stopped or place.step == plan.steps:
            break
        place.window = 0
    with reports.paused():
        updater.check_health(place.step)
    if stopped:
        hooks.checkpoint(place)
    if place.best_step != place.step:
        hooks.save("last", place)
    best = place.best_loss if place.best_step else None
    return TrainResult(place.step, place.tokens, place.last_loss, place.best_step, best, stopped)


def _step(
    model: Any, window: Window, updater: Updater, plan: TrainPlan, hooks: Hooks, place: Place, reports: "Reports"
) -> None:
    """Takes one optimizer step and moves `place` behind it; raises `TrainingError` where too many were skipped."""
    progress = Progress(place.step, plan.steps, plan.warmup_steps, place.epoch, plan.gamma)
    halvings = updater.halvings
    metrics = train_step(model, window, updater, progress, plan.lanes)
    place.step, place.window, place.tokens = place.step + 1, place.window + 1, place.tokens + metrics.useful_tokens
    if updater.halvings > halvings:
        hooks.report({"kind": "notice", "text": f"step {place.step}: {_cut_told(updater.halvings)}"})
    if plan.operations is not None:
        metrics = replace(metrics, operations=plan.operations(window))
    reports.add(metrics)
    try:
        updater.check_health(place.step)
    except TrainingError:
        reports.tell()
        raise


class Reports:
    """Tells of each step once its numbers are there: on a GPU (`delayed`) when the next step is under way.

    So the device never waits for the host to read a number. A step's time is that since the step before was told.
    """

    def __init__(self, report: Callable[[Record], None], plan: TrainPlan, updater: Updater, place: Place) -> None:
        self.report, self.plan, self.updater, self.place = report, plan, updater, place
        self.delayed = updater.precision.device.type == "cuda"
        self._waiting: tuple[int, int, StepMetrics] | None = None
        self._since = time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        """Takes a step that was just handed to the device."""
        self.tell()
        self._waiting = (self.place.step, self.place.epoch, metrics)
        if not self.delayed:
            self.tell()

    def tell(self) -> None:
        """Tells of the step that waits, if one does."""
        if self._waiting is None:
            return
        (step, epoch, metrics), self._waiting = self._waiting, None
        self.place.last_loss = metrics.loss
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        spikes, spike = self.updater.spikes, metrics.update.spike
        if not spikes.skip:
            spike = spikes.judge(metrics.loss, metrics.update.gradient_norm)
        odd = spike or metrics.update.skipped
        if step % self.plan.logging_steps == 0 or step == self.plan.steps or odd:
            record = step_record(step, epoch, metrics, seconds)
            self.report({**record, **({"rows": metrics.rows} if odd else {}), **({"spike": spike} if spike else {})})
        if odd:
            self.report({"kind": "notice", "text": odd_text(step, metrics, spike)})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Tells of all steps so far, and counts none of the time within."""
        self.tell()
        self.updater.settle()
        yield
        self._since = time.perf_counter()


def train_step(model: Any, window: Window, updater: Updater, progress: Progress, lanes: int = 1) -> StepMetrics:
    """Returns the metrics of one optimizer step: every supervised token of the window weighs the same.

    Where the memory does not suffice, the step is done again with batches of half as many rows, which is the same
    update (but for LoRA's dropout, which is drawn anew), and so are all steps from then on.
    """
    supervised, useful = sum(batch.supervised_tokens for batch in window), sum(batch.useful_tokens for batch in window)
    rows = tuple(row for batch in window for row in batch.sample_rows)
    if supervised == 0:
        raise DataError(f"step {progress.step + 1}: no supervised token in rows {[*rows[:5]]}; check get_data_collator")
    model.train()
    for _ in range(updater.halvings):
        window = _halved(window)
    while True:
        try:
            total = _add_gradients(model, window, updater, lanes)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error) or all(len(batch.input_ids) == 1 for batch in window):
                raise
            updater.forget()
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is no GPU
        updater.halvings += 1
        window = _halved(window)
    update = updater.step(progress, total)
    return StepMetrics(HostNumber(total), supervised, useful, update, rows=rows)


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
    model: Any,
    validation: Windows,
    precision: Precision,
    max_batches: int = 0,
    loss: LossSum = loss_sum,
    stop_requested: Callable[[], bool] = lambda: False,
) -> EvalMetrics | None:
    """Returns the mean loss over the supervised tokens of the split, or of its first `max_batches` batches.

    None where it was broken off. A batch for which the memory does not suffice is computed in halves.
    """
    was_training = model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64, device=precision.device), 0
    batches = (batch for window in validation.windows(0) for batch in window)
    for batch in itertools.islice(batches, max_batches or None):
        if stop_requested():
            break
        total += _loss_in_pieces(model, batch, precision, loss)
        tokens += batch.supervised_tokens
    model.train(was_training)
    if stop_requested():
        return None
    if tokens == 0:
        raise DataError("validation: no supervised token in its batches; check get_data_collator")
    return EvalMetrics(float(total) / tokens, tokens)


def _loss_in_pieces(model: Any, batch: Batch, precision: Precision, loss: LossSum) -> torch.Tensor:
    """Returns the summed loss of a batch, computed in halves, and their halves, where the memory does not suffice."""
    try:
        return loss(model, batch.to(precision.device), precision)
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(batch.input_ids) == 1:
            raise
    gc.collect()
    halves = (_loss_in_pieces(model, half, precision, loss) for half in _halved([batch]))
    return sum(halves, torch.zeros((), device=precision.device))


def odd_text(step: int, metrics: StepMetrics, spike: str | None) -> str:
    """Returns what is odd about a step, and its rows."""
    rows = ", ".join(map(str, metrics.rows[:10])) + (", ..." if len(metrics.rows) > 10 else "")
    done = "skipped, the weights are as they were" if metrics.update.skipped else "a spike"
    return f"step {step}: {done} ({spike or 'loss or gradient is not finite'}); rows {rows}"


def step_record(step: int, epoch: int, metrics: StepMetrics, seconds: float) -> Record:
    """Returns the record of a step, as trackers and the progress bar read it."""
    record = {
        "kind": "step",
        "step": step,
        "epoch": epoch,
        "loss": metrics.loss,
        "learning_rate": metrics.update.learning_rate,
        "gradient_norm": metrics.update.gradient_norm,
        **({"loss_scale": metrics.update.loss_scale} if metrics.update.loss_scale is not None else {}),
        "skipped": metrics.update.skipped,
        "supervised_tokens": metrics.supervised_tokens,
        "useful_tokens": metrics.useful_tokens,
        "seconds": seconds,
        "tokens_per_second": metrics.useful_tokens / seconds,
    }
    return record | ({"teraflops": metrics.operations / seconds / 1e12} if metrics.operations else {})


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _validate(model: Any, validation: Windows, updater: Updater, plan: TrainPlan, hooks: Hooks, place: Place) -> bool:
    """Evaluates, reports, saves as `best` what is best so far; returns whether it came to its end."""
    metrics = evaluate(model, validation, updater.precision, plan.max_eval_batches, updater.loss, hooks.stop_requested)
    if metrics is None:
        return False
    place.evaluated_at = place.step
    hooks.report(
        {
            "kind": "evaluation",
            "step": place.step,
            "eval_loss": metrics.loss,
            "eval_perplexity": metrics.perplexity,
            "eval_tokens": metrics.tokens,
        }
    )
    # The first validation always counts as the best so far: a loss that is not a number must not lose the run.
    if metrics.loss < place.best_loss or math.isnan(place.best_loss) or place.best_step == 0:
        place.best_loss, place.best_step = metrics.loss, place.step
        hooks.save("best", place)
    return True
