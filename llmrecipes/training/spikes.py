"""Spikes: losses and gradient norms far above those of the steps before."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, pstdev
from typing import Any

REMEMBERED_STEPS = 128
FEWEST_STEPS = 32
"""Below these steps nothing is called a spike: what is usual is not known yet."""


class Spikes:
    """Judges each step by the last ones (as OLMo-core's SkipStepOptimizer does, with 6 sigma over 128 steps)."""

    def __init__(self, sigma: float, skip: bool = False) -> None:
        self.sigma, self.skip = sigma, skip
        self._losses: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._norms: deque[float] = deque(maxlen=REMEMBERED_STEPS)

    def judge(self, loss: float, norm: float) -> str | None:
        """Returns what is a spike in a step, in words, or None; a usual one is remembered, a spike is not."""
        if self.sigma == 0 or not (math.isfinite(loss) and math.isfinite(norm)):
            return None
        found = self._beyond("loss", loss, self._losses) or self._beyond("gradient norm", norm, self._norms)
        if found is None:
            self._losses.append(loss)
            self._norms.append(norm)
        return found

    def _beyond(self, name: str, value: float, usual: deque[float]) -> str | None:
        if len(usual) < FEWEST_STEPS:
            return None
        mean, spread = fmean(usual), pstdev(usual)
        if value <= mean + self.sigma * spread or spread == 0:
            return None
        return f"{name} {value:.4g}, {(value - mean) / spread:.1f} sigma above the mean {mean:.4g}"

    def plain(self) -> dict[str, Any]:
        """Returns what is remembered, for JSON, no bit lost."""
        return {"losses": [value.hex() for value in self._losses], "norms": [value.hex() for value in self._norms]}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Remembers what `plain` returned."""
        self._losses.clear()
        self._norms.clear()
        self._losses.extend(map(float.fromhex, plain["losses"]))
        self._norms.extend(map(float.fromhex, plain["norms"]))
