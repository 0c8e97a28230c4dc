"""Every question is solved again here from its words alone; no expression is in two files."""

import csv
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrecipes.config.loading import load_config
from llmrecipes.errors import ConfigError, DataError

FILE = Path(__file__).parents[2] / "custom_datasets" / "arithmetic.py"
SPEC = importlib.util.spec_from_file_location("shipped_arithmetic", FILE)
assert SPEC is not None
assert SPEC.loader is not None
arithmetic: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(arithmetic)

ALL = ["addition", "subtraction", "multiplication", "division"]
SPLITS = ("train", "validation", "test")
Rows = list[dict[str, str]]

SAYS = {
    "+": r"\b(add|added|sum|plus|go up|together)\b",
    "-": r"\b(subtract|subtracted|difference|minus|take away|go down|colder)\b",
    "*": r"\b(multiply|multiplied|product|times|groups|rows)\b",
    "/": r"\b(divide|divided|quotient|go into|share|among)\b",
}
SAYS_THE_SECOND_NUMBER_FIRST = r"subtracted from|go into|children share"


def create(folder: Path, **settings: Any) -> dict[str, Rows]:
    arithmetic.create_data(arithmetic.ArithmeticData(output_dir=str(folder), **settings))
    return {split: load(folder / f"arithmetic_{split}.csv") for split in SPLITS}


def load(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_from_the_words(row: dict[str, str]) -> tuple[str, int, int]:
    """Returns sign, first and second number as a reader understands the question."""
    words = f"{row['instruction']} {row['input']}".lower()
    signs = [sign for sign, pattern in SAYS.items() if re.search(pattern, words)]
    assert len(signs) == 1, words
    first, second = (int(number) for number in re.findall(r"\d+", words))
    return (signs[0], second, first) if re.search(SAYS_THE_SECOND_NUMBER_FIRST, words) else (signs[0], first, second)


def solved(sign: str, first: int, second: int) -> str:
    if sign == "/":
        quotient = next(n for n in range(first + 1) if (n + 1) * second > first)
        return f"{quotient} remainder {first - quotient * second}"
    return str({"+": first + second, "-": first - second, "*": sum([first] * second)}[sign])


def expression(row: dict[str, str]) -> tuple[str, tuple[int, ...]]:
    sign, first, second = read_from_the_words(row)
    return sign, tuple(sorted((first, second))) if sign in "+*" else (first, second)


def check(splits: dict[str, Rows]) -> None:
    for rows in splits.values():
        for row in rows:
            assert row["answer"] == solved(*read_from_the_words(row)), row
            equation, _, result = row["output"].partition(" = ")
            assert result == row["answer"]
            sign, first, second = read_from_the_words(row)
            numbers = (first, second) if sign in "-/" else sorted((first, second))
            left, written_sign, right = equation.split()
            assert written_sign == sign
            assert list(numbers) == ([int(left), int(right)] if sign in "-/" else sorted((int(left), int(right))))
    expressions = {split: {expression(row) for row in rows} for split, rows in splits.items()}
    assert not expressions["train"] & expressions["validation"]
    assert not expressions["train"] & expressions["test"]
    assert not expressions["validation"] & expressions["test"]
    for split in ("validation", "test"):
        assert len(expressions[split]) == len(splits[split])
    questions = [(row["instruction"], row["input"]) for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)


@pytest.fixture(scope="module")
def default_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default")
    create(folder)
    return folder


def test_by_default_it_is_addition_and_subtraction_within_a_hundred(default_folder: Path) -> None:
    splits = {split: load(default_folder / f"arithmetic_{split}.csv") for split in SPLITS}
    assert [len(splits[split]) for split in SPLITS] == [9500, 500, 500]
    check(splits)
    for rows in splits.values():
        signs = [read_from_the_words(row)[0] for row in rows]
        assert signs.count("+") == signs.count("-") == len(rows) / 2
        numbers = [int(number) for row in rows for number in re.findall(r"-?\d+", row["output"].replace(" - ", " "))]
        assert min(numbers) >= 0
        assert max(numbers) == 100


def test_all_four_operations_are_right_and_come_in_equal_shares(tmp_path: Path) -> None:
    splits = create(tmp_path, operations=ALL, train_rows=1001, validation_rows=102, test_rows=103)
    check(splits)
    for rows in splits.values():
        signs = [read_from_the_words(row)[0] for row in rows]
        counts = [signs.count(sign) for sign in "+-*/"]
        assert max(counts) - min(counts) <= 1


@settings(max_examples=25, deadline=None)
@given(
    operations=st.lists(st.sampled_from(ALL), min_size=1, unique=True),
    smallest=st.integers(0, 5),
    width=st.integers(0, 20),
    rows=st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40)),
    negative=st.booleans(),
    seed=st.integers(0, 3),
)
def test_the_laws_hold_for_any_settings_or_they_are_refused(
    tmp_path_factory: pytest.TempPathFactory,
    operations: list[str],
    smallest: int,
    width: int,
    rows: tuple[int, int, int],
    negative: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    counts = dict(zip(("train_rows", "validation_rows", "test_rows"), rows, strict=True))
    largest = smallest + width
    try:
        splits = create(
            folder, operations=operations, smallest=smallest, largest=largest, negative_results=negative, seed=seed,
            **counts,
        )  # fmt: skip
    except ConfigError:
        assert list(folder.iterdir()) == []
        return
    assert tuple(len(splits[split]) for split in SPLITS) == rows
    check(splits)
    for row in [row for split in SPLITS for row in splits[split]]:
        sign, first, second = read_from_the_words(row)
        assert smallest <= min(first, second)
        assert max(first, second) <= largest
        assert sign != "+" or first + second <= largest
        assert sign != "-" or negative or first >= second


def test_every_wording_can_come(tmp_path: Path) -> None:
    splits = create(tmp_path, operations=ALL, train_rows=2000)
    instructions = {row["instruction"] for row in splits["train"]}
    assert instructions == {instruction for ways in arithmetic.WORDINGS.values() for instruction, _ in ways}


def test_one_prompt_has_one_answer_over_all_operations() -> None:
    answers: dict[tuple[str, str], set[str]] = {}
    for operation in ALL:
        for first in range(1, 8):
            for second in range(1, 8):
                for wording in arithmetic.WORDINGS[operation]:
                    row = arithmetic.Question(operation, first, second, wording).row()
                    answers.setdefault((row["instruction"], row["input"]), set()).add(row["answer"])
    assert {len(found) for found in answers.values()} == {1}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(default_folder: Path, tmp_path: Path) -> None:
    create(tmp_path / "same")
    create(tmp_path / "other", seed=43)
    for split in SPLITS:
        name = f"arithmetic_{split}.csv"
        assert (tmp_path / "same" / name).read_bytes() == (default_folder / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (default_folder / name).read_bytes()


def test_a_small_range_repeats_expressions_in_train_evenly_and_in_other_words(tmp_path: Path) -> None:
    splits = create(tmp_path, operations=["subtraction"], largest=10, train_rows=120, validation_rows=5, test_rows=5)
    check(splits)
    expressions = [expression(row) for row in splits["train"]]
    times = {expressions.count(one) for one in expressions}
    assert len(set(expressions)) == 66 - 10
    assert times == {2, 3}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"largest": 20}, "addition with numbers from 0 to 20 has 121 different expressions.*ask for 500.*--largest"),
        ({"smallest": 9, "largest": 8}, "has 0 different expressions"),
        ({"largest": 10, "validation_rows": 9, "test_rows": 9}, "for train, which asks for 4750: .*--train_rows"),
        ({"operations": []}, "--operations is empty"),
    ],
)
def test_too_few_expressions_are_refused_and_what_stood_there_stays(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    (tmp_path / "arithmetic_train.csv").write_text("old")
    with pytest.raises(ConfigError, match=message):
        create(tmp_path, **more)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        create(tmp_path / "file")


def test_the_summary_counts_rows_and_different_expressions(tmp_path: Path) -> None:
    config = arithmetic.ArithmeticData(
        output_dir=str(tmp_path), largest=10, operations=["addition"], train_rows=99, validation_rows=5, test_rows=6
    )
    assert arithmetic.create_data(config) == (
        f"Wrote addition to {tmp_path}/arithmetic_*.csv: train 99 rows of {36 - 5 - 6} different expressions, "
        "validation 5 rows of 5 different expressions, test 6 rows of 6 different expressions; expressions in two "
        "splits: 0."
    )


@pytest.mark.parametrize(
    ("flags", "operations"),
    [({}, ["addition", "subtraction"]), ({"operations": "multiplication,division"}, ["multiplication", "division"])],
)
def test_the_command_line_gives_its_settings(flags: dict[str, object], operations: list[str]) -> None:
    assert load_config(arithmetic.ArithmeticData, flags).config.operations == operations


def test_the_command_line_refuses_what_is_out_of_range() -> None:
    for flags in ({"operations": "adition"}, {"train_rows": "0"}, {"largest": "100000"}):
        with pytest.raises(ConfigError):
            load_config(arithmetic.ArithmeticData, flags)
