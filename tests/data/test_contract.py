"""A preprocessor that breaks one promise is told so, by that promise and no other."""

import copy
import itertools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmrecipes.data import contract
from llmrecipes.data.contract import FAIL, HABITS, NOTE, PASS, PROMISES, SKIP, Check, check_contract, read_samples
from llmrecipes.data.rows import BadRowError, BadRows, Rows
from llmrecipes.errors import DataError, PluginError
from llmrecipes.plugins import Plugin
from llmrecipes.prompts import Piece, encode_sample, end_piece

Row = dict[str, Any]
Change = Callable[[Row], Any]
COUNTER = itertools.count()


def good_rows(tokenizer: Any, split: str) -> list[Row]:
    return [
        encode_sample(
            tokenizer, [Piece(f"{split} {number}?"), Piece(f"is {number}", supervised=True), end_piece(tokenizer)]
        )
        for number in range(4)
    ]


def checks(
    function: Callable[[Any, Any, str], Any],
    tokenizer: Any,
    splits: tuple[str, ...] = ("train", "test"),
    **settings: int,
) -> Any:
    plugin = Plugin(Path(__file__), "made", function)
    found = check_contract(plugin, SimpleNamespace(**settings), tokenizer, splits, len(tokenizer))
    return {check.promise: check for check in found}


def changed(change: Change) -> Callable[[Any, Any, str], Any]:
    """A preprocessor whose row 2 of the split test is not as it should be."""

    def made(config: Any, tokenizer: Any, split: str) -> list[Any]:
        rows: list[Any] = good_rows(tokenizer, split)
        if split == "test":
            rows[2] = change(rows[2])
        return rows

    return made


def whole(make: Callable[[Any, str], Any]) -> Callable[[Any, Any, str], Any]:
    return lambda config, tokenizer, split: make(tokenizer, split)


def raising(config: Any, tokenizer: Any, split: str) -> list[Row]:
    if split == "test":
        raise KeyError("answer")
    return good_rows(tokenizer, split)


def with_list(row: Row, name: str, change: Callable[[list[int]], Any]) -> Row:
    return {**row, name: change(list(row[name]))}


def listed(name: str, change: Callable[[list[int]], Any]) -> Callable[[Any, Any, str], Any]:
    return changed(lambda row: with_list(row, name, change))


def with_second(row: Row, number: int) -> Row:
    return with_list(row, "input_ids", lambda ids: [ids[0], number, *ids[2:]])


def zero_masked(row: Row) -> Row:
    return with_list(row, "labels", lambda ids: [0 if label == -100 else label for label in ids])


def counted(tokenizer: Any, split: str) -> list[Row]:
    return good_rows(tokenizer, f"{split}{next(COUNTER)}")


def shuffled(tokenizer: Any, split: str) -> list[Row]:
    return random.sample(good_rows(tokenizer, split) * 4, 16)


def not_apart(tokenizer: Any, split: str) -> list[Row]:
    return [*good_rows(tokenizer, split), *good_rows(tokenizer, "any")]


def without_start(row: Row) -> Row:
    return {name: values[1:] for name, values in row.items()}


def doubled_start(row: Row) -> Row:
    return {"input_ids": [1, *row["input_ids"]], "labels": [-100, *row["labels"]]}


def shorter(row: Row) -> Row:
    return {name: values[:-1] for name, values in row.items()}


def shifted(row: Row) -> Row:
    return {**row, "labels": [*row["labels"][1:], -100]}


def meddling(tokenizer: Any, split: str) -> list[Row]:
    tokenizer.padding_side = "left"
    return good_rows(tokenizer, split)


BROKEN: list[tuple[str, Callable[[Any, Any, str], Any], str]] = [
    (contract.RETURNS, raising, "KeyError"),
    (contract.RETURNS, whole(lambda tokenizer, split: None), "NoneType|None"),
    (contract.RETURNS, whole(lambda tokenizer, split: {"input_ids": [[1]], "labels": [[1]]}), "dict"),
    (contract.RETURNS, whole(lambda tokenizer, split: []), "no rows"),
    (contract.LASTING, whole(lambda tokenizer, split: iter(good_rows(tokenizer, split))), "return a list"),
    (contract.KEYS, changed(lambda row: list(row)), "row 2: expected a mapping with input_ids and labels, got list"),
    (contract.KEYS, changed(lambda row: {"input_ids": row["input_ids"]}), "no labels, only input_ids"),
    (contract.NUMBERS, listed("labels", lambda ids: [str(i) for i in ids]), "labels must be a flat list"),
    (contract.NUMBERS, listed("input_ids", lambda ids: [float(i) for i in ids]), "float64"),
    (contract.NUMBERS, listed("input_ids", lambda ids: [ids, ids]), r"\[2, "),
    (contract.LENGTHS, listed("labels", lambda ids: ids[:-1]), "labels for"),
    (contract.LENGTHS, listed("attention_mask", lambda ids: [*ids, 1]), "attention_mask for"),
    (contract.LENGTHS, changed(lambda row: {"input_ids": [], "labels": []}), "no tokens"),
    (contract.MASK, listed("attention_mask", lambda ids: [1, 0, *ids[2:]]), "0 for padding at the ends only"),
    (contract.VOCABULARY, changed(lambda row: with_second(row, 260)), "id 260"),
    (contract.VOCABULARY, changed(lambda row: with_second(row, 2**40)), "no token has"),
    (contract.LABELS, changed(zero_masked), "-100 is"),
    (contract.LABELS, changed(shifted), "the trainer does the shift"),
    (contract.LABELS, listed("labels", lambda ids: [*ids[:-1], 7]), "another id"),
    (contract.SUPERVISED, listed("labels", lambda ids: [-100] * len(ids)), "all labels"),
    (contract.END, changed(shorter), "does not end with an end token"),
    (contract.END, listed("labels", lambda ids: [*ids[:-1], -100]), "its label is -100"),
    (contract.START, changed(without_start), "no start token"),
    (contract.START, changed(doubled_start), "two start tokens"),
    (contract.PROMPTS, changed(lambda row: {**row, "labels": row["input_ids"]}), "every token is supervised"),
    (contract.DIFFER, whole(lambda tokenizer, split: good_rows(tokenizer, "any")), "train and test hold the very same"),
    (contract.APART, whole(not_apart), "4 of 8 rows"),
    (contract.AGAIN, whole(counted), "the rows differ"),
    (contract.AGAIN, whole(shuffled), "the order differs"),
    (contract.TOKENIZER, whole(meddling), "padding_side was"),
]  # fmt: skip


def test_every_promise_has_a_breaker() -> None:
    assert {promise for promise, _, _ in BROKEN} == set(PROMISES)


def test_a_good_preprocessor_passes_every_check(byte_tokenizer: Any) -> None:
    found = checks(whole(good_rows), byte_tokenizer)
    assert [check for check in found.values() if check.outcome != PASS] == []
    assert tuple(found) == PROMISES


@pytest.mark.parametrize(("promise", "function", "said"), BROKEN)
def test_a_broken_promise_is_told_alone(promise: str, function: Any, said: str, byte_tokenizer: Any) -> None:
    found = checks(function, copy.deepcopy(byte_tokenizer))
    expected = NOTE if promise in (*HABITS, contract.TOKENIZER) else FAIL
    assert found[promise].outcome == expected
    assert re.search(said, found[promise].detail), found[promise].detail
    assert "\n" not in found[promise].detail
    others = {check.promise for check in found.values() if check.outcome in (FAIL, NOTE)} - {promise}
    assert others == set()


class Endless:
    """Rows that can be gone through again and again, of a number that they do not tell."""

    def __init__(self, tokenizer: Any, split: str) -> None:
        self.rows = good_rows(tokenizer, split)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def test_rows_need_no_length(byte_tokenizer: Any) -> None:
    assert {check.outcome for check in checks(whole(Endless), byte_tokenizer).values()} == {PASS}


@pytest.mark.parametrize(
    "form",
    [
        lambda row: {name: torch.tensor(values) for name, values in row.items()},
        lambda row: {name: torch.tensor([values]) for name, values in row.items()},
        lambda row: {name: np.array(values) for name, values in row.items()},
        lambda row: {name: row[name] for name in ("input_ids", "labels")},
        lambda row: {
            "input_ids": [0, 0, *row["input_ids"], 0],
            "labels": [-100, -100, *row["labels"], -100],
            "attention_mask": [0, 0, *row["attention_mask"], 0],
        },
    ],
)
def test_every_form_of_a_good_row_passes(form: Change, byte_tokenizer: Any) -> None:
    found = checks(whole(lambda tokenizer, split: [form(row) for row in good_rows(tokenizer, split)]), byte_tokenizer)
    assert {check.outcome for check in found.values()} == {PASS}


def test_one_split_alone_cannot_overlap(byte_tokenizer: Any) -> None:
    found = checks(whole(good_rows), byte_tokenizer, ("train",))
    assert found[contract.DIFFER].outcome == found[contract.APART].outcome == SKIP
    assert FAIL not in {check.outcome for check in found.values()}


def test_what_cannot_be_known_is_skipped_and_never_passed(byte_tokenizer: Any) -> None:
    found = checks(whole(lambda tokenizer, split: [{"text": "a"}]), byte_tokenizer)
    assert found[contract.KEYS].outcome == FAIL
    assert {
        found[promise].outcome
        for promise in (contract.NUMBERS, contract.LABELS, contract.END, contract.DIFFER, contract.AGAIN)
    } == {SKIP}


def test_without_rows_nothing_is_said_of_rows(byte_tokenizer: Any) -> None:
    found = checks(whole(lambda tokenizer, split: []), byte_tokenizer)
    assert {promise: check.outcome for promise, check in found.items()} == {
        **dict.fromkeys(PROMISES, SKIP), contract.RETURNS: FAIL, contract.TOKENIZER: PASS
    }  # fmt: skip


def test_a_map_style_data_set_is_read_by_index(byte_tokenizer: Any) -> None:
    class Indexed:
        def __init__(self, rows: list[Row]) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> Row:
            return {**self.rows[index]} if index < 4 else {}["beyond its length"]

    found = checks(whole(lambda tokenizer, split: Indexed(good_rows(tokenizer, split))), byte_tokenizer)
    assert {check.outcome for check in found.values()} == {PASS}


def test_data_that_cannot_be_read_is_told_in_one_check(byte_tokenizer: Any) -> None:
    def made(config: Any, tokenizer: Any, split: str) -> list[Row]:
        raise DataError("a.csv:3: 3 fields, header has 2")

    assert checks(made, byte_tokenizer)[contract.RETURNS] == Check(
        FAIL,
        contract.RETURNS,
        "; ".join(f"split {split}: a.csv:3: 3 fields, header has 2" for split in ("train", "test")),
    )


def read(function: Any, tokenizer: Any, bad: BadRows | None = None) -> list[Any]:
    return list(read_samples(Plugin(Path(__file__), "made", function), None, tokenizer, "test", bad or BadRows()))


def test_reading_keeps_unsupervised_rows_and_names_what_is_no_row(byte_tokenizer: Any) -> None:
    samples = read(listed("labels", lambda ids: [-100] * len(ids)), byte_tokenizer)
    assert [sample.supervised_tokens > 0 for sample in samples] == [True, True, False, True]
    assert [sample.row for sample in samples] == [0, 1, 2, 3]
    broken = listed("labels", lambda ids: ids[:-1])
    with pytest.raises(PluginError, match=r"test_contract.py:made, split test, row 2: \d+ labels for \d+ input_ids"):
        read(broken, byte_tokenizer)
    bad = BadRows(allowed=1)
    assert [sample.row for sample in read(broken, byte_tokenizer, bad)] == [0, 1, 3]
    assert list(bad.faults.values()) == [["row 2"]]


def test_bad_rows_are_noted_where_they_belong_whoever_else_reads_meanwhile(byte_tokenizer: Any) -> None:
    rows = Rows(lambda: iter([BadRowError("a:1", "broken"), *good_rows(byte_tokenizer, "a")]), "a")
    plugin = Plugin(Path(__file__), "made", whole(lambda tokenizer, split: rows))
    first, second = BadRows(allowed=1), BadRows(allowed=1)
    one, two = (read_samples(plugin, None, byte_tokenizer, "test", bad) for bad in (first, second))
    next(one)
    with pytest.raises(DataError, match="^a:1: broken$"):
        list(rows)
    next(two)
    one.close()
    assert len(list(two)) == 3
    assert (first.count, second.count) == (1, 1)


class Spent:
    """Rows that look as if they could be gone through again, and cannot."""

    def __init__(self, tokenizer: Any, split: str) -> None:
        self.rows = iter(good_rows(tokenizer, split))

    def __iter__(self) -> Iterator[Row]:
        return self.rows


def test_what_can_be_gone_through_again_is_gone_through_again(byte_tokenizer: Any) -> None:
    assert checks(whole(Spent), byte_tokenizer)[contract.LASTING].outcome == FAIL
    lasting = whole(lambda tokenizer, split: Rows(lambda: iter(good_rows(tokenizer, split)), "a"))
    assert checks(lasting, byte_tokenizer)[contract.LASTING].outcome == PASS


def with_bad_rows(config: Any, tokenizer: Any, split: str) -> Any:
    """Two rows of the file that cannot be used, and one of the preprocessor's."""
    rows = [*good_rows(tokenizer, split), {"input_ids": [1, len(split)], "labels": [-100, -100]}]
    faults = [BadRowError("a.csv:3", "1 field"), BadRowError("a.csv:5", "1 field")]
    return Rows(lambda: iter([*faults, *rows]), "a.csv")


@pytest.mark.parametrize("allowed", [0, 1, 2, 3, 4])
def test_the_check_allows_for_as_many_bad_rows_as_training_would(allowed: int, byte_tokenizer: Any) -> None:
    found = checks(with_bad_rows, byte_tokenizer, skip_bad_rows=allowed)
    returns, supervised = found[contract.RETURNS], found[contract.SUPERVISED]
    if allowed == 0:
        assert returns.outcome == FAIL and "split train: a.csv:3: 1 field; split test" in returns.detail
    elif allowed < 3:
        told = f"3 bad rows, and skip_bad_rows allows {allowed}: a.csv:3, a.csv:5: 1 field"
        assert returns == Check(FAIL, contract.RETURNS, f"split train: {told}; split test: {told}")
        assert supervised.outcome == FAIL
    else:
        assert FAIL not in {check.outcome for check in found.values()}
        assert supervised.outcome == NOTE and "row 4: all labels" in supervised.detail
