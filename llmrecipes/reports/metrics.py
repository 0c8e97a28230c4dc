"""How good answers are: the metric seam, its built-in entries, and means with 95 % intervals.

A metric is `(predictions, references) -> {name: value}` over two lists of texts. A new one is a function in any file:
`--metric my_metrics.py:my_metric`. Metrics are called one sample at a time, which gives the interval its spread; the
mean over samples is what is shown.
"""

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from math import isfinite, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrecipes.errors import ConfigError, DataError, LlmRecipesError, PluginError

Metric = Callable[[list[str], list[str]], Mapping[str, float]]
Values = npt.NDArray[np.float64]

RESAMPLES = 2000
_SEED = 0

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = rf"(?:{_DIGITS})(?:[eE][+-]?[0-9]{{1,3}}(?![0-9]))?"
_NUMBERS = re.compile(
    rf"(?P<sign>(?<![\w.)\]])[-\u2212]\$?)?(?P<first>{_NUMBER})"
    rf"(?:\s*(?P<joint>remainder|rem\.?|r|/)\s*(?P<second>{_NUMBER}))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Score:
    """The mean of one number over all samples with its 95 % interval."""

    name: str
    mean: float
    low: float
    high: float
    samples: int


def exact_match(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Returns the share of predictions that are their reference, white space around both aside."""
    return {"exact_match": _mean([p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)])}


def numeric_match(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Returns the share of predictions whose last number is the last number of their reference.

    Compared by value: `1,234` is `1234.0`. English notation; a minus counts where no letter, digit or bracket stands
    directly before it. `12 remainder 3` (also `rem`, `r`) and `3/4` are one answer of two numbers, and both must
    agree: `12`, `3` and an expression repeated without its result are wrong. `12 remainder 0` is `12`. A prediction
    without a number is wrong; a reference without one is a `DataError`.
    """
    return {"numeric_match": _mean([_same_number(p, r) for p, r in zip(predictions, references, strict=True)])}


def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Returns the F-measures `rouge1`, `rouge2`, `rougeL`, of 1 (Lin 2004, ROUGE, sections 2 and 3).

    The package `rouge-score` with Porter's stemmer, as the SAMSum papers score summaries; rougeL takes the text as
    one sentence. It reads the letters a to z and digits only, so text in other scripts scores 0.
    """
    pairs = zip(predictions, references, strict=True)
    scores = [_rouge_scorer().score(target=reference, prediction=prediction) for prediction, reference in pairs]
    return {name: _mean([score[name].fmeasure for score in scores]) for name in ("rouge1", "rouge2", "rougeL")}


METRICS: dict[str, Metric] = {"exact_match": exact_match, "numeric_match": numeric_match, "rouge": rouge}


def scores_with_intervals(metric: Metric, predictions: Sequence[str], references: Sequence[str]) -> list[Score]:
    """Returns a score for each number that the metric gives, in its order.

    Raises `DataError` without samples and `PluginError` for a metric that fails or breaks the contract.
    """
    return [score(name, values) for name, values in sample_values(metric, predictions, references).items()]


def sample_values(metric: Metric, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Values]:
    """Returns the metric's numbers by name, each float64 [samples]. Raises as `scores_with_intervals` does."""
    if not references:
        raise DataError("there are no samples to score; expected at least one")
    pairs = list(zip(predictions, references, strict=True))
    rows = [_checked_values(metric, pair, number) for number, pair in enumerate(pairs, start=1)]
    for number, row in enumerate(rows, start=1):
        if row.keys() != rows[0].keys():
            raise PluginError(
                f"the metric {_name(metric)} gives {sorted(row)} for sample {number} and {sorted(rows[0])} for "
                "sample 1; expected the same names for every sample"
            )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def score(name: str, values: Values) -> Score:
    """Returns the score of values [samples]: Wilson's interval where all are 0 or 1, else the bootstrap's."""
    if np.isin(values, (0.0, 1.0)).all():
        low, high = wilson_interval(int(values.sum()), len(values))
    else:
        low, high = bootstrap_interval(values)
    return Score(name=name, mean=float(values.mean()), low=low, high=high, samples=len(values))


def wilson_interval(successes: int, samples: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share (Wilson 1927, JASA 22(158), p. 209-212; no continuity correction)."""
    z = NormalDist().inv_cdf(0.975)
    share, shrink = successes / samples, 1 + z * z / samples
    center = (share + z * z / (2 * samples)) / shrink
    half = z / shrink * sqrt(share * (1 - share) / samples + (z / (2 * samples)) ** 2)
    return max(0.0, min(center - half, share)), min(1.0, max(center + half, share))


def bootstrap_interval(values: Values) -> tuple[float, float]:
    """Returns the 2.5 and 97.5 percentiles of the mean of `RESAMPLES` resamples of values [samples].

    Efron 1979, Annals of Statistics 7(1); percentile method. Always the same for the same values. Values that are
    all alike (a single one too) give an interval of no width.
    """
    random = np.random.default_rng(_SEED)
    means = [values[random.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _checked_values(metric: Metric, pair: tuple[str, str], number: int) -> dict[str, float]:
    """Returns the metric's numbers for one (prediction, reference), or raises `PluginError`."""
    name = _name(metric)
    try:
        values: Any = metric([pair[0]], [pair[1]])
    except LlmRecipesError:
        raise
    except Exception as problem:
        place = traceback.extract_tb(problem.__traceback__)[-1]
        raise PluginError(
            f"the metric {name} failed on sample {number}: {type(problem).__name__}: {problem} "
            f"({place.filename}, line {place.lineno})"
        ) from problem
    if not isinstance(values, Mapping) or not values:
        raise PluginError(
            f"the metric {name} gives {type(values).__name__} {values!r:.60}; expected a dict of names and numbers"
        )
    for key, value in values.items():
        if not isinstance(key, str) or not _is_finite_number(value):
            raise PluginError(
                f"the metric {name} gives {key!r}: {value!r:.60} for sample {number}; expected a finite number"
            )
    return {key: float(value) for key, value in values.items()}


def _is_finite_number(value: Any) -> bool:
    try:
        return isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _name(metric: Metric) -> str:
    return str(getattr(metric, "__name__", metric))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _same_number(prediction: str, reference: str) -> bool:
    expected = last_number(reference)
    if expected is None:
        raise DataError(
            f"numeric_match: the reference {reference!r:.80} has no number; choose another metric or mend the data"
        )
    return last_number(prediction) == expected


def last_number(text: str) -> tuple[Decimal, str, Decimal] | None:
    """Returns the last number of a text as (number, `remainder` or `/`, second number), or None.

    A number that stands alone has the remainder 0.
    """
    numbers = list(_NUMBERS.finditer(text))
    if not numbers:
        return None
    found = numbers[-1]
    first = Decimal(found["first"].replace(",", ""))
    second = Decimal((found["second"] or "0").replace(",", ""))
    joint = "/" if found["joint"] == "/" else "remainder"
    return (first.copy_negate() if found["sign"] else first, joint, second)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as problem:
        raise ConfigError("the metric rouge needs the package rouge-score; run: pip install rouge-score") from problem
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
