"""What an epoch comes to under some settings, before anything is trained: rows, steps, and how full they are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmrecipes.batch import Sample
from llmrecipes.data.loaders import Loader


@dataclass(frozen=True)
class BatchSettings:
    """How samples come to batches and steps."""

    strategy: str
    row_tokens: int
    batch_rows: int
    window_batches: int
    seed: int | None
    group_by_length: bool = False


@dataclass(frozen=True)
class BatchPlan:
    """One epoch under some settings."""

    name: str
    """packing, padding, or padding by length"""
    rows: int
    steps: int
    useful_share: float
    """of the tokens computed; the others are padding"""
    fill: float
    """tokens over rows of the context length"""


def batch_plans(lengths: Sequence[int], settings: BatchSettings) -> list[BatchPlan]:
    """Returns an epoch as set, then as the other ways to fill batches would have it; none without samples."""
    ways = {
        "packing": replace(settings, strategy="packing"),
        "padding": replace(settings, strategy="padding", group_by_length=False),
        "padding by length": replace(settings, strategy="padding", group_by_length=True),
    }
    chosen = settings.strategy + (" by length" if settings.strategy == "padding" and settings.group_by_length else "")
    names = [chosen, *(name for name in ways if name != chosen)]
    return [_plan(name, lengths, ways[name]) for name in names] if lengths else []


def padding_share(loader: Loader) -> float:
    """Returns which share of the tokens that a rank computes in an epoch is padding."""
    useful = computed = 0
    for window in loader.window_rows(0):
        for batch in window:
            tokens = [sum(loader.lengths[index] for index in row) for row in batch]
            useful += sum(tokens)
            computed += len(batch) * max(tokens, default=0)
    return 1 - useful / computed if computed else 0.0


def _plan(name: str, lengths: Sequence[int], settings: BatchSettings) -> BatchPlan:
    """Returns an epoch of samples of these lengths; what is in them makes no difference."""
    nothing = np.zeros(1, dtype=np.int32)
    outlines = [np.broadcast_to(nothing, (length,)) for length in lengths]
    loader = Loader(
        samples=[Sample(outline, outline, row) for row, outline in enumerate(outlines)],
        strategy=settings.strategy,
        row_tokens=settings.row_tokens,
        batch_rows=settings.batch_rows,
        window_batches=settings.window_batches,
        seed=settings.seed,
        group_by_length=settings.group_by_length,
    )
    rows, steps = len(loader.rows(0)), len(loader.window_rows(0))
    return BatchPlan(name, rows, steps, 1 - padding_share(loader), sum(lengths) / (rows * settings.row_tokens))
