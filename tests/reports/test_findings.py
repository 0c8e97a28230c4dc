"""Tables, bars and findings hold the figures they are given, aligned and harmless."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrecipes.reports.findings import (
    BARS,
    checks_text,
    findings_text,
    length_bars,
    lengths_text,
    round_step,
    share_text,
    table_text,
    verdict,
)


def range_of(label: str) -> tuple[int, int]:
    if label.endswith("+"):
        return int(label[:-1]), 10**9
    first, _, last = label.partition("-")
    return int(first), int(last or first)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300))
def test_every_length_stands_in_exactly_one_bar(lengths: list[int]) -> None:
    bars = length_bars(lengths)
    ranges = [range_of(label) for label, _ in bars]
    assert all(before[1] + 1 == after[0] for before, after in pairwise(ranges))
    assert [number for _, number in bars] == [sum(low <= length <= high for length in lengths) for low, high in ranges]
    assert sum(number for _, number in bars) == len(lengths)
    assert len(bars) <= BARS + 2


def test_the_first_length_beyond_the_bars_is_not_in_the_last_of_them() -> None:
    assert length_bars([1] * 500 + [2, 50]) == [("1", 500), ("2+", 2)]


@given(st.floats(0, 10**6))
def test_a_step_is_round_and_no_smaller_than_asked(least: float) -> None:
    step = round_step(least)
    assert step >= least
    assert str(step).rstrip("0") in ("1", "2", "5")


def test_lengths_are_told_with_bars() -> None:
    assert lengths_text([3, 3, 3, 4, 5]).splitlines() == [
        "tokens a sample: median 3, 95 % up to 4, longest 5",
        "3          3  ████████████████████████████████████████",
        "4          1  █████████████",
        "5          1  █████████████",
    ]
    assert lengths_text([]) == ""


def test_a_table_is_aligned() -> None:
    assert table_text(["split", "rows"], [["train", "14,731"], ["a", "1"]]).splitlines() == [
        "split    rows",
        "train  14,731",
        "a           1",
    ]


def test_findings_and_checks_are_one_line_each_and_harmless() -> None:
    assert findings_text([("note", "a\nb"), ("problem", "\x1b[2Jc")]) == "note     a b\nproblem  [2Jc"
    assert findings_text([]) == "nothing found"
    assert checks_text([("pass", "p", ""), ("FAIL", "q", "x\ny\x1b")]) == "pass  p\nFAIL  q\n      x y"
    assert table_text(["a\x1b"], []) == "a"


@pytest.mark.parametrize(
    ("problems", "findings", "text"),
    [
        (0, 0, "verdict: healthy"),
        (0, 1, "verdict: fit to train on, 1 finding"),
        (2, 1, "verdict: not fit to train on: 2 problems, 1 finding"),
    ],
)
def test_the_verdict_follows_from_the_counts(problems: int, findings: int, text: str) -> None:
    assert verdict(problems, findings) == text


def test_shares_divide_nothing_by_zero() -> None:
    assert share_text(47, 818) == "47 (5.7 %)"
    assert share_text(0, 0) == "0"
