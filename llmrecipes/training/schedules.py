"""Learning-rate schedules: the seam `(progress) -> factor` of the peak learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a run is, before optimizer step `step` (counted from 0)."""

    step: int
    steps: int
    warmup_steps: int
    epoch: int
    gamma: float

    @property
    def fraction(self) -> float:
        """Share of the steps behind warm-up that is done, 0 to 1."""
        return min(1.0, max(0, self.step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))


Schedule = Callable[[Progress], float]


def constant(progress: Progress) -> float:
    """The peak throughout."""
    return 1.0


def linear(progress: Progress) -> float:
    """Straight down to 0."""
    return 1.0 - progress.fraction


def cosine(progress: Progress) -> float:
    """Half a cosine down to 0 (Loshchilov and Hutter 2016, arXiv 1608.03983, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress.fraction))


def step(progress: Progress) -> float:
    """`gamma` to the number of epochs done: llama-recipes' StepLR."""
    return progress.gamma**progress.epoch


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine, "step": step}


def learning_rate_factor(schedule: Schedule, progress: Progress) -> float:
    """Returns the schedule's factor, rising linearly from 1/warmup_steps to 1 over the warm-up steps."""
    warm = min(1.0, (progress.step + 1) / progress.warmup_steps) if progress.warmup_steps else 1.0
    return warm * schedule(progress)


def warmup_steps(steps: int, warmup_steps: int, warmup_ratio: float) -> int:
    """Returns the warm-up's length in optimizer steps."""
    return warmup_steps or math.ceil(warmup_ratio * steps)
