"""Laws of the metrics and of their intervals."""

import sys
import time
from math import sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrecipes.errors import ConfigError, DataError, PluginError
from llmrecipes.reports import metrics
from llmrecipes.reports.metrics import (
    METRICS,
    Metric,
    bootstrap_interval,
    exact_match,
    numeric_match,
    rouge,
    sample_values,
    score,
    scores_with_intervals,
    wilson_interval,
)

Z = 1.959963984540054


def is_right(prediction: str, reference: str) -> bool:
    return numeric_match([prediction], [reference])["numeric_match"] == 1.0


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_gives_one_to_its_reference_and_zero_to_nothing(name: str) -> None:
    references = ["the answer is 12", "3 cats sat"]
    assert set(METRICS[name](references, references).values()) == {1.0}
    assert set(METRICS[name](["", ""], references).values()) == {0.0}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_the_mean_of_its_samples(name: str) -> None:
    predictions, references = ["cats 12", "3 dogs sat", "7"], ["12", "3 cats sat", "7"]
    whole = METRICS[name](predictions, references)
    values = sample_values(METRICS[name], predictions, references)
    assert whole.keys() == values.keys()
    for key in whole:
        assert values[key].mean() == pytest.approx(whole[key])


def test_exact_match_forgives_white_space_around_only() -> None:
    assert exact_match([" 12\n", "1 2", "Yes"], ["12", "12", "yes"]) == {"exact_match": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("1,234", "1234"),
        ("so it is 1234.0.", "1,234"),
        ("7 + 5 = 12", "12"),
        ("x=-5", "-5"),
        ("\u22125", "-5"),
        ("-$5.50", "-5.5"),
        (".5", "0.50"),
        ("1e3", "1000"),
        ("between 3-4", "4"),
        ("12 remainder 3", "12 Remainder 3"),
        ("12 r 3", "12 remainder 3"),
        ("12 remainder 0", "12"),
        ("it is 3/4", "3/4"),
        ("1,234,567.25", "1234567.25"),
        ("-0", "0"),
        ("9" * 50, "9" * 50),
        ("-" + "9" * 50, "-" + "9" * 50),
    ],
)
def test_numbers_are_compared_by_value(prediction: str, reference: str) -> None:
    assert is_right(prediction, reference)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("5", "-5"),
        ("12", "12 remainder 3"),
        ("3", "12 remainder 3"),
        ("the remainder is 3", "12 remainder 3"),
        ("12/4", "3"),
        ("1/4", "3/4"),
        ("3/4", "3 remainder 4"),
        ("12 then 13", "12"),
        ("no idea", "0"),
        ("12.5", "12"),
        ("-" + "9" * 50, "-" + "9" * 49 + "8"),
        ("9" * 50, "9" * 49 + "8"),
    ],
)
def test_another_number_is_wrong(prediction: str, reference: str) -> None:
    assert not is_right(prediction, reference)


@given(st.integers(min_value=-(10**12), max_value=10**12), st.text(alphabet="abc .,:=", max_size=8))
def test_a_number_is_found_behind_any_words_and_with_thousands_marked(number: int, words: str) -> None:
    assert is_right(f"2 {words} {number:,}", str(number))
    assert not is_right(f"{number} {words} {number + 1}", str(number))


def test_a_reference_without_a_number_is_the_datas_fault() -> None:
    for score_them in (numeric_match, lambda p, r: scores_with_intervals(numeric_match, p, r)):
        with pytest.raises(DataError, match="'twelve' has no number"):
            score_them(["12"], ["twelve"])


@pytest.mark.parametrize("text", ["1" * 30000, "1,111" * 6000, "1 " * 20000, "1 " + " " * 30000, "1e" * 10000])
def test_a_long_text_takes_no_long_time(text: str) -> None:
    began = time.process_time()
    numeric_match([text], ["1"])
    assert time.process_time() - began < 2


def test_rouge_is_the_f_measure_of_the_overlap() -> None:
    # Unigrams 3 of 4 and 3 of 3, bigrams 1 of 3 and 1 of 2, longest common subsequence 2 (Lin 2004).
    scores = rouge(["the cat dogs the"], ["the dog cats"])
    assert scores["rouge1"] == pytest.approx(2 * (3 / 4) * (3 / 3) / (3 / 4 + 3 / 3))  # stemmed: cat = cats
    assert scores["rouge2"] == pytest.approx(0.0)
    assert scores["rougeL"] == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    longer = rouge(["a b c d"], ["a b x"])
    assert longer["rouge2"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))


def test_rouge_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics._rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match="pip install rouge-score"):
        rouge(["a"], ["a"])


@given(st.integers(min_value=1, max_value=5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_bounds_are_the_shares_that_the_sample_just_does_not_reject(counts: tuple[int, int]) -> None:
    successes, samples = counts
    share = successes / samples
    low, high = wilson_interval(successes, samples)
    assert 0 <= low <= share <= high <= 1
    assert low < high
    for bound in (low, high):
        assert (share - bound) ** 2 == pytest.approx(Z**2 * bound * (1 - bound) / samples, rel=1e-6, abs=1e-12)


def test_the_bootstrap_agrees_with_the_normal_interval_for_many_samples() -> None:
    values = np.random.default_rng(1).exponential(size=2000)
    low, high = bootstrap_interval(values)
    half = Z * values.std() / sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=half * 0.08)
    assert high == pytest.approx(values.mean() + half, abs=half * 0.08)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(np.array([0.25])) == (0.25, 0.25)


@settings(max_examples=15)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20))
def test_a_score_lies_in_its_interval_and_the_interval_in_the_values(numbers: list[float]) -> None:
    values = np.array(numbers)
    one = score("x", values)
    assert one.samples == len(numbers)
    assert one.low <= one.high
    if not np.isin(values, (0, 1)).all():
        assert values.min() - 1e-9 <= one.low <= one.high <= values.max() + 1e-9


def test_shares_get_wilson_and_other_values_the_bootstrap() -> None:
    assert score("x", np.array([1.0, 0.0, 1.0])).low == pytest.approx(wilson_interval(2, 3)[0])
    halves = np.array([1.0, 0.0, 0.5])
    assert (score("x", halves).low, score("x", halves).high) == bootstrap_interval(halves)


def test_scores_come_in_the_metrics_order_with_its_means() -> None:
    scores = scores_with_intervals(rouge, ["a b", "c"], ["a x", "c"])
    assert [one.name for one in scores] == ["rouge1", "rouge2", "rougeL"]
    assert [one.mean for one in scores] == pytest.approx(list(rouge(["a b", "c"], ["a x", "c"]).values()))
    assert scores[0].samples == 2


def failing(predictions: list[str], references: list[str]) -> dict[str, float]:
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (failing, r"metric failing failed on sample 1: KeyError: 'gone' \(.*test_metrics.py, line \d+\)"),
        (lambda p, r: 0.5, "gives float 0.5; expected a dict"),
        (lambda p, r: {}, "expected a dict"),
        (lambda p, r: {"x": "high"}, "gives 'x': 'high' for sample 1; expected a finite number"),
        (lambda p, r: {"x": float("nan")}, "finite number"),
        (lambda p, r: {"x": None}, "finite number"),
        (lambda p, r: {p[0]: 1.0}, r"gives \['b'\] for sample 2 and \['a'\] for sample 1"),
    ],
)
def test_a_metric_that_breaks_the_contract_is_named(metric: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        scores_with_intervals(metric, ["a", "b"], ["a", "b"])


def test_a_users_metric_may_give_numpy_numbers_and_booleans() -> None:
    def mine(predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"length": np.float32(len(predictions[0])), "right": predictions == references}

    metric: Metric = mine
    length, right = scores_with_intervals(metric, ["abc", "a"], ["abc", "b"])
    assert (length.mean, right.mean) == (2.0, 0.5)


def test_no_samples_and_unequal_lists_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        scores_with_intervals(exact_match, [], [])
    with pytest.raises(ValueError, match="zip"):
        scores_with_intervals(exact_match, ["a"], ["a", "b"])
