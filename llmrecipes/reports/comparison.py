"""The report of an evaluation: one or two models on the same samples, as Markdown that is safe to open anywhere."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmrecipes.reports.format import is_unsafe
from llmrecipes.reports.metrics import Metric, Score, Values, bootstrap_interval, sample_values, score

PROMPT_CHARACTERS = 200
ANSWER_CHARACTERS = 600

_ACTIVE = re.compile(r"[\\|`*\[\]~$&<>\n\t\u2028\u2029]|(?<![^\W_])_|_(?![^\W_])")
"""What GitHub's Markdown acts on in a cell; an underscore within a word does nothing."""
_SPELLED = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": "<br>", "\u2028": "<br>", "\u2029": "<br>", "\t": " "}
_DELETE = 0x7F


@dataclass(frozen=True)
class Comparison:
    """One number of one metric, for each model, and how far the second model is from the first."""

    name: str
    scores: tuple[Score, ...]
    difference: Score | None
    """Second minus first, sample by sample, with the paired bootstrap interval; None for a single model."""
    is_share: bool
    """All values lie in 0 to 1, so they are shown in percent."""


@dataclass(frozen=True)
class Example:
    """One sample to look at: the answers are in the order of the models."""

    prompt: str
    reference: str
    answers: tuple[str, ...]


def compare(metrics: Sequence[Metric], references: Sequence[str], answers: Sequence[Sequence[str]]) -> list[Comparison]:
    """Returns a comparison for each number of each metric; `answers` holds one list of texts a model, one or two.

    Raises `DataError` without samples and `PluginError` for a metric that breaks its contract.
    """
    if len(answers) not in (1, 2):
        raise ValueError(f"{len(answers)} models to compare; expected one or two")
    rows = []
    for metric in metrics:
        values = [sample_values(metric, texts, references) for texts in answers]
        rows += [_comparison(name, [model[name] for model in values]) for name in values[0]]
    return rows


def comparison_markdown(
    models: Sequence[str], comparisons: Sequence[Comparison], examples: Sequence[Example] = ()
) -> str:
    """Returns the report: a table with a row for each comparison, then a table of the examples.

    Of a prompt only its end is shown. Whatever the models wrote is shown as text: Markdown, HTML and control
    characters in it do nothing.
    """
    names = [cell(model) for model in models]
    header = ["metric", *names, *(["difference"] if len(models) == 2 else [])]
    lines = ["## Scores", "", *_table(header, [_row(comparison) for comparison in comparisons]), ""]
    samples = comparisons[0].scores[0].samples if comparisons else 0
    lines += [
        f"{samples:,} samples. In brackets the 95 % interval of the mean: Wilson's for right-or-wrong metrics, else a "
        "bootstrap over samples" + ("; the difference is paired, sample by sample." if len(models) == 2 else "."),
        "",
    ]
    if examples:
        rows = [[_end(example.prompt), *map(_start, (example.reference, *example.answers))] for example in examples]
        rows = [[cell(text) for text in row] for row in rows]
        lines += ["## Examples", "", *_table(["end of the prompt", "reference", *names], rows), ""]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Returns a text as one cell of a Markdown table, in which it reads as it stands and has no other effect.

    A line feed becomes `<br>`, a control character its picture (ESC as \u241b), other unsafe characters \ufffd.
    """
    quiet = "".join(_picture(character) if is_unsafe(character) else character for character in text.strip())
    return _ACTIVE.sub(lambda found: _SPELLED.get(found[0], "\\" + found[0]), quiet)


def _comparison(name: str, values: Sequence[Values]) -> Comparison:
    difference = None
    if len(values) == 2:
        gaps = values[1] - values[0]
        low, high = bootstrap_interval(gaps)
        difference = Score(name=name, mean=float(gaps.mean()), low=low, high=high, samples=len(gaps))
    is_share = all(bool(((model >= 0) & (model <= 1)).all()) for model in values)
    return Comparison(name, tuple(score(name, model) for model in values), difference, is_share)


def _row(comparison: Comparison) -> list[str]:
    """Returns the cells of one comparison: `12.0 % [8.1, 17.4]`, `+83.0 points [+78.0, +88.0]`."""
    factor, digits, unit, points = (100, 1, " %", " points") if comparison.is_share else (1, 3, "", "")
    cells = [cell(comparison.name)]
    for one in comparison.scores:
        mean, low, high = (f"{value * factor:.{digits}f}" for value in (one.mean, one.low, one.high))
        cells.append(f"{mean}{unit} [{low}, {high}]")
    if comparison.difference is not None:
        one = comparison.difference
        mean, low, high = (f"{value * factor:+z.{digits}f}" for value in (one.mean, one.low, one.high))
        cells.append(f"{mean}{points} [{low}, {high}]")
    return cells


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table of cells that are escaped already."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _end(text: str) -> str:
    text = text.rstrip()
    return text if len(text) <= PROMPT_CHARACTERS else "…" + text[-PROMPT_CHARACTERS:]


def _start(text: str) -> str:
    text = text.strip()
    return text if len(text) <= ANSWER_CHARACTERS else text[:ANSWER_CHARACTERS] + "…"


def _picture(character: str) -> str:
    """Returns a visible stand-in for an unsafe character."""
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == _DELETE else "\ufffd"
