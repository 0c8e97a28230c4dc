"""Laws of the comparison report: the figures are right, and what a model wrote cannot act."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from llmrecipes.errors import DataError
from llmrecipes.reports.comparison import Comparison, Example, cell, compare, comparison_markdown
from llmrecipes.reports.metrics import Score, bootstrap_interval, exact_match, rouge, scores_with_intervals

REFERENCES = [str(number) for number in range(40)]
BASE = ["0"] * 40
TUNED = [str(number) if number % 4 else "no" for number in range(40)]


def rendered(markdown: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)


def test_the_difference_is_paired() -> None:
    (row,) = compare([exact_match], REFERENCES, [BASE, TUNED])
    assert row.scores == tuple(scores_with_intervals(exact_match, texts, REFERENCES)[0] for texts in (BASE, TUNED))
    gaps = np.array([float(t == r) - float(b == r) for b, t, r in zip(BASE, TUNED, REFERENCES, strict=True)])
    assert row.difference is not None
    assert row.difference.mean == pytest.approx(gaps.mean())
    assert (row.difference.low, row.difference.high) == bootstrap_interval(gaps)


def test_a_model_does_not_differ_from_itself() -> None:
    for row in compare([exact_match, rouge], REFERENCES, [TUNED, TUNED]):
        assert row.difference is not None
        assert (row.difference.mean, row.difference.low, row.difference.high) == (0, 0, 0)


def test_the_table_shows_percent_with_one_decimal() -> None:
    text = comparison_markdown(["base", "tuned"], compare([exact_match, rouge], REFERENCES, [BASE, TUNED]))
    assert "| metric | base | tuned | difference |\n|---|---|---|---|\n" in text
    assert re.search(r"^\| exact_match \| 2\.5 % \[0\.4, 12\.9\] \| 75\.0 % \[59\.8, 85\.8\] \| ", text, re.MULTILINE)
    assert re.search(r"\| \+72\.5 points \[\+\d\d\.\d, \+\d\d\.\d\] \|", text)
    assert [line.split(" ")[1] for line in text.splitlines() if line.startswith("| rouge")] == [
        "rouge1",
        "rouge2",
        "rougeL",
    ]
    assert "40 samples" in text
    assert "Examples" not in text


def test_values_beyond_a_share_are_shown_as_they_are() -> None:
    (row,) = compare([lambda p, r: {"characters": float(len(p[0]))}], REFERENCES, [["abc"] * 40, ["ab"] * 40])
    assert not row.is_share
    (below,) = compare([lambda p, r: {"gain": -0.5}], REFERENCES, [BASE])
    assert not below.is_share
    text = comparison_markdown(["base", "tuned"], [row])
    assert "| characters | 3.000 [3.000, 3.000] | 2.000 [2.000, 2.000] | -1.000 [-1.000, -1.000] |" in text
    assert "%" not in text.split("\n\n")[1]


def test_one_model_works_alone() -> None:
    comparisons = compare([exact_match], REFERENCES, [TUNED])
    assert comparisons[0].difference is None
    text = comparison_markdown(["tuned"], comparisons, [Example("1 + 1 =", "2", ("3",))])
    assert "| metric | tuned |\n|---|---|\n" in text
    assert "difference" not in text
    assert "| end of the prompt | reference | tuned |\n|---|---|---|\n| 1 + 1 = | 2 | 3 |" in text


def test_none_and_three_models_are_refused_and_so_are_no_samples() -> None:
    for answers in ([], [BASE, BASE, BASE]):
        with pytest.raises(ValueError, match="one or two"):
            compare([exact_match], REFERENCES, answers)
    with pytest.raises(DataError, match="no samples"):
        compare([exact_match], [], [[], []])


def test_of_a_prompt_the_end_and_of_an_answer_the_start_is_shown() -> None:
    example = Example("start" + "x" * 500 + "END", "2", ("BEGIN" + "y" * 5000 + "stop",))
    text = comparison_markdown(["tuned"], compare([exact_match], REFERENCES, [TUNED]), [example])
    assert "…xxx" in text and "xEND |" in text and "start" not in text
    assert "| BEGINyyy" in text and "y… |" in text and "stop" not in text


HOSTILE = [
    "<script>alert(1)</script>",
    "a | b \\| c \\",
    "![x](http://tracker/p.png) [y](javascript:z)",
    "**bold** _it_ __it__ `code` ``x| ``",
    "&lt;b&gt; &#124;",
    "\x1b[31mred\x07\x7f\x9b\u202e",
    "<https://x.y>",
    "a\\",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_wrote_reads_as_it_stands_and_does_nothing(text: str) -> None:
    page = rendered(f"| a | b |\n|---|---|\n| {cell(text)} | end |\n")
    body = page[page.index("<tbody>") :]
    assert re.sub(r"<[^>]*>", "@", body).count("@") == len(re.findall(r"</?(?:table|tbody|tr|td)>", body))
    assert body.count("<td>") == 2
    shown = body.split("<td>")[1].split("</td>")[0]
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        shown = shown.replace(entity, character)
    pictures = {"\x1b": "␛", "\x07": "␇", "\x7f": "␡", "\x9b": "\ufffd", "\u202e": "\ufffd"}
    assert shown == "".join(pictures.get(character, character) for character in text)


@given(st.text(alphabet="a|\\`*_<>&[]()!\n\t\r\x1b\u2028 -", max_size=16))
def test_any_text_is_one_cell_of_one_line(text: str) -> None:
    one = cell(text)
    assert len(one.splitlines()) <= 1
    page = rendered(f"| a | b |\n|---|---|\n| {one} | end |\n")
    body = page[page.index("<tbody>") :]
    assert body.count("<tr>") == 1
    assert body.count("<td>") == 2
    assert set(re.findall(r"<(\w+)", body)) <= {"tbody", "tr", "td", "br"}


def test_the_report_escapes_what_everyone_wrote() -> None:
    comparisons = compare([exact_match], REFERENCES, [TUNED])
    for prompt, reference, answer in (("<i>\x1b|", "r", "a"), ("p", "<i>\x1b|", "a"), ("p", "r", "<i>\x1b|")):
        text = comparison_markdown(["tuned"], comparisons, [Example(prompt, reference, (answer,))])
        assert text.count("&lt;i&gt;␛\\|") == 1
        assert "<i>" not in text and "\x1b" not in text


def test_no_difference_has_no_sign_of_its_own() -> None:
    nearly = Score("x", mean=-0.0001, low=-0.0002, high=0.0, samples=9)
    base = Score("x", mean=0.5, low=0.4, high=0.6, samples=9)
    text = comparison_markdown(["base", "tuned"], [Comparison("x", (base, base), nearly, is_share=True)])
    assert "| +0.0 points [+0.0, +0.0] |" in text


def test_names_of_models_and_metrics_are_escaped_too() -> None:
    comparisons = compare([lambda p, r: {"a|b": 1.0}], REFERENCES, [TUNED])
    text = comparison_markdown(["x|y"], comparisons, [Example("p", "r", ("a",))])
    assert "a\\|b" in text and text.count("x\\|y") == 2
