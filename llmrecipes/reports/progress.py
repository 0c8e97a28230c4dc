"""What the user sees while a run trains: a bar on a terminal, else one quiet line for each record.

Fed with the records that trackers get (see `trackers`). Draws when it is called; no thread runs beside the training.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from llmrecipes.reports.format import count, duration, gib, printable

WINDOW_RECORDS = 20
"""Speed and time left are taken over this many step records, so that they follow what the run does now."""
REDRAW_SECONDS = 0.1


class Speed:
    """How fast the last steps were, by their records: useful tokens, so padding earns nothing."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW_RECORDS)

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes in the record of one step; one without tokens or seconds is left out."""
        useful, seconds = record.get("useful_tokens"), record.get("seconds")
        if useful is not None and seconds is not None:
            self._steps.append((float(useful), float(seconds)))

    @property
    def tokens_per_second(self) -> float | None:
        """Useful tokens a second, or None before the first record."""
        seconds = sum(seconds for _, seconds in self._steps)
        return sum(useful for useful, _ in self._steps) / seconds if seconds > 0 else None

    def seconds_left(self, steps_left: int) -> float | None:
        """Returns the time that `steps_left` more steps take at this speed, or None before the first record."""
        if not self._steps:
            return None
        return sum(seconds for _, seconds in self._steps) / len(self._steps) * steps_left


class TrainingProgress:
    """Shows a run: `with TrainingProgress() as progress: ... progress(record)`.

    `quiet_every` thins the lines where the output is no terminal: one for every so many steps, and the last.
    """

    def __init__(self, console: Console | None = None, quiet_every: int = 1) -> None:
        self._console = console or Console(highlight=False)
        self._quiet_every = quiet_every
        self._speed = Speed()
        self._total_steps = 0
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._drawn_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Shows one record; kinds that it does not know pass."""
        show: Callable[[Mapping[str, Any]], None] | None = {
            "start": self._start,
            "step": self._step,
            "evaluation": self._evaluation,
            "notice": lambda record: self.notice(str(record["text"])),
            "end": lambda _: self._stop(),
        }.get(record["kind"])
        if show is not None:
            show(record)

    def notice(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def _start(self, record: Mapping[str, Any]) -> None:
        self._stop()
        self._total_steps = int(record["total_steps"])
        self._speed = Speed()
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            return
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = RichProgress(*columns, console=self._console, auto_refresh=False)
        self._task = self._bar.add_task("training", total=self._total_steps, figures="")
        self._bar.start()

    def _step(self, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        self._speed.add(record)
        last = step >= self._total_steps
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, figures="  ".join(self._figures(record)))
            now = time.monotonic()
            if last or now - self._drawn_at >= REDRAW_SECONDS:
                self._bar.refresh()
                self._drawn_at = now
        elif last or step % self._quiet_every == 0:
            self.notice("  ".join([f"step {step}/{self._total_steps}", *self._figures(record)]))

    def _evaluation(self, record: Mapping[str, Any]) -> None:
        parts = [f"step {record['step']}/{self._total_steps}"]
        for key, label in (("eval_loss", "validation loss"), ("eval_perplexity", "perplexity")):
            if record.get(key) is not None:
                parts.append(f"{label} {float(record[key]):.4g}")
        if record.get("eval_tokens") is not None:
            parts.append(f"{count(record['eval_tokens'])} tokens")
        self.notice("  ".join(parts))

    def _figures(self, record: Mapping[str, Any]) -> list[str]:
        """Returns what is known of `loss 1.234`, `lr 1.0e-03`, `812 tok/s`, `1.9 GiB`, `4m10s left`, in this order.

        With them `550 TFLOP/s (82 %)` where operations are counted.
        """
        speed = self._speed.tokens_per_second or record.get("tokens_per_second")
        steps_left = self._total_steps - int(record["step"])
        left = self._speed.seconds_left(steps_left) if steps_left > 0 else None
        names = ("loss", "learning_rate", "memory_bytes", "teraflops")
        loss, rate, memory, teraflops = (record.get(name) for name in names)
        return [
            *([f"loss {float(loss):.3f}"] if loss is not None else []),
            *([f"lr {float(rate):.1e}"] if rate is not None else []),
            *([f"{count(speed)} tok/s"] if speed is not None else []),
            *([f"{teraflops:.3g} TFLOP/s ({record.get('ceiling_share', 0):.0%})"] if teraflops else []),
            *([gib(memory)] if memory else []),
            *([f"{duration(left)} left"] if left is not None else []),
        ]

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()
        self._bar = None


@contextmanager
def counted(label: str, total: int, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Gives a function to be told how many of `total` are done: a bar on a terminal, else one line at the end."""
    console = console or Console(stderr=True, highlight=False)
    started = time.monotonic()
    columns = (TextColumn(printable(label)), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with RichProgress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
    if not console.is_terminal:
        console.print(printable(f"{label}: {total} in {duration(time.monotonic() - started)}"), soft_wrap=True)


@contextmanager
def reading(label: str, console: Console | None = None) -> Iterator[Callable[[int, int], None] | None]:
    """Gives a function to be told (rows read, about how many there are), or None where no terminal would show it.

    The bar stands there only while it is read: what is read in a moment leaves no trace.
    """
    console = console or Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(printable(label)), BarColumn(), TextColumn("{task.fields[rows]}"))
    with RichProgress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None, rows="")
        yield lambda done, total: bar.update(
            task, completed=done, total=max(done, total) if total else None, rows=f"{count(done)} rows"
        )
