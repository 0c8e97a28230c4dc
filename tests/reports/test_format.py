"""Laws of how numbers and text are shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrecipes.reports.format import count, duration, gib, percent, printable


@pytest.mark.parametrize(
    ("byte_count", "shown"),
    [(2 * 2**30, "2.0 GiB"), (2**30, "1.0 GiB"), (2**30 - 1, "1024 MiB"), (52 * 2**20, "52 MiB"), (0, "0 MiB")],
)
def test_bytes(byte_count: int, shown: str) -> None:
    assert gib(byte_count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0.0s"),
        (3.42, "3.4s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (250, "4m10s"),
        (3599.7, "1h00m"),
        (3720, "1h02m"),
        (3 * 86400 + 4 * 3600, "3d04h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (9500, "9,500"),
        (812.4, "812"),
        (949_999, "949,999"),
        (1_234_567, "1.2 M"),
        (6_738_415_616, "6.7 B"),
        (999_960_000, "1.0 B"),
        (2e12, "2.0 T"),
    ],
)
def test_counts(number: float, shown: str) -> None:
    assert count(number) == shown


def test_percent() -> None:
    assert percent(0.1234) == "12.3 %"


def test_printable_takes_what_acts_on_a_terminal_and_no_more() -> None:
    assert printable("\x1b[31mred\x1b[0m\x07\x9b2J\r\x00") == "[31mred[0m2J"
    assert printable("user\u202etxt.exe\u2066") == "usertxt.exe"
    assert printable("a\ud800b") == "ab"
    kept = "line\n\tétude 字 👩\u200d🚀 עברית\u200f"
    assert printable(kept) == kept


@given(st.text(alphabet="a\x1b[3m\n\x9b\u202e字", max_size=20), st.integers(min_value=0, max_value=20))
def test_a_stream_may_be_cleaned_piece_by_piece(text: str, cut: int) -> None:
    assert printable(text[:cut]) + printable(text[cut:]) == printable(text)
    assert printable(printable(text)) == printable(text)
