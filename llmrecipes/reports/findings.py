"""Findings, checks, tables and bars of the data commands as plain text, safe on any terminal."""

from collections.abc import Sequence

import numpy as np

from llmrecipes.reports.format import count, percent, printable

BARS = 12
"""Bars of a length histogram, at most and beside one for what is longer."""

BAR_CHARACTERS = 40


def findings_text(findings: Sequence[tuple[str, str]]) -> str:
    """Returns (level, text) findings one a line, the level in front; `nothing found` for none."""
    if not findings:
        return "nothing found"
    width = max(len(level) for level, _ in findings)
    return "\n".join(f"{level:<{width}}  {one_line(text)}" for level, text in findings)


def checks_text(checks: Sequence[tuple[str, str, str]]) -> str:
    """Returns (outcome, promise, detail) checks one a line; the detail stands below its promise."""
    lines = []
    for outcome, promise, detail in checks:
        lines.append(f"{outcome:4}  {one_line(promise)}")
        lines += [f"      {one_line(detail)}"] if detail else []
    return "\n".join(lines)


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of aligned columns: the first to the left, the others, figures, to the right."""
    cells = [[one_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        figures = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *figures]).rstrip())
    return "\n".join(lines)


def lengths_text(lengths: Sequence[int]) -> str:
    """Returns the tokens of samples as their median and bars; "" for no samples."""
    if not lengths:
        return ""
    middle, most = (int(value) for value in np.percentile(lengths, (50, 95), method="lower"))
    told = f"median {count(middle)}, 95 % up to {count(most)}, longest {count(max(lengths))}"
    bars = length_bars(lengths)
    tallest = max(number for _, number in bars)
    width = max(len(label) for label, _ in bars)
    lines = [f"{label:>{width}}  {number:>9,}  {_bar(number, tallest)}".rstrip() for label, number in bars]
    return "\n".join([f"tokens a sample: {told}", *lines])


def length_bars(lengths: Sequence[int]) -> list[tuple[str, int]]:
    """Returns (range, samples in it): round ranges of one width up to the 99th percentile, and one for the rest."""
    found = np.asarray(lengths)
    low, usual = int(found.min()), int(np.percentile(found, 99, method="higher"))
    step = round_step((usual - low + 1) / BARS)
    starts = list(range(low // step * step, usual + 1, step))
    end = starts[-1] + step
    *counts, beyond = np.histogram(found, bins=[*starts, end, int(found.max()) + end])[0].tolist()
    labels = [f"{first}-{first + step - 1}" if step > 1 else f"{first}" for first in starts]
    bars = list(zip(labels, counts, strict=True))
    return [*bars, (f"{end}+", beyond)] if beyond else bars


def round_step(least: float) -> int:
    """Returns the smallest of 1, 2, 5, 10, 20, 50, ... that is not below `least`."""
    size = 1
    while True:
        for factor in (1, 2, 5):
            if factor * size >= least:
                return factor * size
        size *= 10


def verdict(problems: int, findings: int) -> str:
    """Returns the last line of a doctor's report."""
    if problems:
        return f"verdict: not fit to train on: {_plural(problems, 'problem')}, {_plural(findings, 'finding')}"
    return f"verdict: fit to train on, {_plural(findings, 'finding')}" if findings else "verdict: healthy"


def one_line(text: str) -> str:
    """Returns text on one line that does nothing to a terminal."""
    return printable(" ".join(text.split()))


def share_text(part: int, whole: int) -> str:
    """Returns `47 (5.7 %)`."""
    return f"{part:,} ({percent(part / whole)})" if whole else f"{part:,}"


def _bar(number: int, tallest: int) -> str:
    return "█" * max(round(BAR_CHARACTERS * number / tallest), number > 0)


def _plural(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"
