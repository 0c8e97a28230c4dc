"""What a run measures of itself when it is asked to: floating-point operations and a profile."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from llmrecipes.batch import Window
from llmrecipes.config.schema import RunConfig
from llmrecipes.data.loaders import Loader
from llmrecipes.errors import ConfigError
from llmrecipes.kernels.layers import UnknownLayerError
from llmrecipes.precision import Precision
from llmrecipes.run.speed import known_shape

PROFILED = (1, 2, 3)
"""Steps before the profile, steps that only warm it up, and steps that are in it."""


def operation_counter(model: Any, config: RunConfig, precision: Precision) -> Callable[[Window], int] | None:
    """Returns what counts a step's floating-point operations, None where `--flop_counter` does not ask for it."""
    if not config.flop_counter:
        return None
    try:
        shape = known_shape(model, config, precision)
    except UnknownLayerError as error:
        raise ConfigError(f"--flop_counter: this model's operations are not known ({error}); leave it out") from None

    def count(window: Window) -> int:
        tokens, supervised = sum(batch.useful_tokens for batch in window), sum(b.supervised_tokens for b in window)
        pairs = sum(batch.attention_pairs for batch in window)
        return shape.operations(tokens, supervised, pairs, trains_all=not config.use_peft)

    return count


def ceiling(precision: Precision) -> float:
    """Returns the operations a second that a large matmul reaches on the run's device: the median of 10."""
    size = 8192 if precision.device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, dtype=precision.compute, device=precision.device) for _ in range(2))

    def seconds() -> float:
        begin = time.perf_counter()
        for _ in range(5):
            made = one @ other
        made[0, 0].item()  # waits for it
        return (time.perf_counter() - begin) / 5

    return 2 * size**3 / statistics.median(seconds() for _ in range(10))


@dataclass(frozen=True)
class ProfiledWindows:
    """A loader's windows, with the steps between them profiled into a folder."""

    loader: Loader
    folder: Path

    def windows(self, epoch: int, start: int = 0) -> Iterator[Window]:
        """Yields the windows of an epoch from number `start` on; the first epoch is profiled."""
        if epoch:
            yield from self.loader.windows(epoch, start)
            return
        wait, warmup, active = PROFILED
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        plan = schedule(wait=wait, warmup=warmup, active=active, repeat=1)
        with profile(activities=activities, schedule=plan, on_trace_ready=self._write) as profiler:
            for window in self.loader.windows(epoch, start):
                yield window
                profiler.step()

    def _write(self, profiler: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=40)
        (self.folder / "kernels.txt").write_text(table, encoding="utf-8")


def profiled(config: RunConfig, loader: Loader, steps: int) -> Loader | ProfiledWindows:
    """Returns the loader, its steps profiled where `--use_profiler` asks for it; raises `ConfigError`."""
    if not config.use_profiler:
        return loader
    steps = min(steps, len(loader.window_rows(0)))
    if steps < sum(PROFILED):
        raise ConfigError(
            f"--use_profiler: it profiles steps 4 to {sum(PROFILED)} of the first epoch, which has {steps}"
        )
    return ProfiledWindows(loader, Path(config.profiler_dir or f"{config.output_dir}/profile"))
