"""Rows are read one by one and anew each time; bad ones are counted through all stages, and never lost in silence."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmrecipes.data.files import load_rows, load_split
from llmrecipes.data.limits import SampleLimits
from llmrecipes.data.rows import KEPT_FAULTS, BadRows, Row, Rows, bad_rows, faults_text, noted_in, with_text
from llmrecipes.data.samples import load_samples
from llmrecipes.errors import DataError
from llmrecipes.plugins import Plugin
from llmrecipes.prompts import SAMPLES_AT_ONCE, encode_pairs

LIMITS = SampleLimits(context_length=64, max_positions=64, vocabulary_size=260)


def rows_of(*values: str) -> Rows[Row]:
    def read() -> Iterator[Row | DataError]:
        for number, value in enumerate(values, start=1):
            yield DataError(f"a.csv:{number}: broken") if value == "broken" else Row({"q": value}, f"a.csv:{number}")

    return Rows(read, "a.csv")


def test_rows_can_be_gone_through_any_number_of_times() -> None:
    rows = rows_of("a", "b")
    assert [row["q"] for row in rows] == [row["q"] for row in rows] == ["a", "b"]
    assert rows.first == {"q": "a"}
    with pytest.raises(DataError, match="a.csv: no usable row in it"):
        _ = rows_of().first


def test_a_row_is_made_only_when_it_is_asked_for() -> None:
    made: list[str] = []
    rows = rows_of("a", "b", "c").map(lambda row: made.append(row["q"]) or row["q"])
    assert made == []
    assert next(iter(rows)) == "a"
    assert made == ["a"]


def test_no_more_rows_are_held_than_are_tokenized_together(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "a", "a": "b"}\n' * (3 * SAMPLES_AT_ONCE))
    read: list[int] = []
    rows = load_rows(path).map(lambda row: read.append(1) or (row["q"], row["a"]))
    samples = iter(encode_pairs(byte_tokenizer, rows))
    for number in range(3 * SAMPLES_AT_ONCE):
        next(samples)
        assert len(read) - number <= SAMPLES_AT_ONCE


def test_a_bad_row_is_raised_with_its_place_unless_it_may_be_left_out() -> None:
    def make(row: Row) -> str:
        if row["q"] == "bad":
            raise DataError("it is bad")
        return str(row["q"])

    rows = rows_of("a", "bad", "broken", "b")
    with pytest.raises(DataError, match=r"^a.csv:2: it is bad$"):
        list(rows.map(make))
    with noted_in(BadRows(allowed=2)) as bad:
        assert list(rows.map(make)) == ["a", "b"]
        assert list(rows.map(make)) == ["a", "b"]
    assert bad.faults == ["a.csv:2: it is bad", "a.csv:3: broken"]  # each once, however often it was met
    assert bad_rows().allowed == 0


def test_far_too_many_bad_rows_end_the_reading() -> None:
    with noted_in(BadRows(allowed=1)), pytest.raises(DataError, match="and 997 more; skip_bad_rows allows 1"):
        list(rows_of(*["broken"] * (KEPT_FAULTS + 5)))
    assert faults_text(["a", "b"]) == "a; b"
    assert faults_text([*"abcdefg"]) == "a; b; c; d; e; and 2 more"


def test_rows_with_a_blank_column_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = with_text(rows_of("a", " ", "b"), "q", "mine, train")
    assert [row["q"] for row in rows] == ["a", "b"]
    assert "mine, train: left out 1 of 3 rows, their q is blank" in caplog.text


BROKEN_FILES = {
    "a.csv": ('q,a\n1,2\n3\n4,5\n6,7,8\n"9"x,1\n2,\0\n', {2: "1 field", 4: "3 fields", 5: "", 6: "NUL byte"}),
    "a.jsonl": ('{"q": "1", "a": "2"}\n{"q": }\n[]\n{"q": "1"}\n{"q": null, "a": "1"}\n{"q": "4", "a": "5"}\n',
                {1: "Expecting value", 2: "expected an object", 3: "no column 'a'", 4: "is null"}),
    "a.json": ('[{"q": "1", "a": "2"}, 5, {"q": "1"}, {"q": "4", "a": "5"}]', {1: "found 5", 2: "no column 'a'"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_reading_goes_on_behind_every_bad_row_of_a_file(name: str, tmp_path: Path) -> None:
    content, expected = BROKEN_FILES[name]
    path = tmp_path / name
    path.write_text(content)
    with noted_in(BadRows(allowed=9)) as bad:
        found = list(load_rows(path, ("q", "a")))
    assert found == [{"q": "1", "a": "2"}, {"q": "4", "a": "5"}]
    assert len(bad.faults) == len(expected)
    assert all(
        fault.startswith(f"{path}:") and told in fault
        for fault, told in zip(bad.faults, expected.values(), strict=True)
    )


def test_what_spoils_the_whole_file_is_no_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('q\n1\n"2\n3\n')
    with noted_in(BadRows(allowed=9)), pytest.raises(DataError, match="a.csv:3: a quote is opened"):
        list(load_rows(path))


def preprocess(dataset_config: Any, tokenizer: Any, split: str) -> Any:
    rows = load_split(dataset_config, split, ("q", "a"))
    samples = encode_pairs(tokenizer, rows.map(lambda row: (row["q"], row["a"])))
    for number, sample in enumerate(samples):
        yield {"input_ids": [], "labels": []} if number == 1 else sample


def test_skip_bad_rows_counts_those_of_the_file_and_those_of_the_preprocessor_together(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "train.csv"
    path.write_text("q,a\n1,2\n3\n4,5\n6,7\n")
    plugin = Plugin(Path("mine.py"), "preprocess", preprocess)

    def load(allowed: int) -> tuple[Any, list[str]]:
        config = SimpleNamespace(data_path=str(path), train_split="train", skip_bad_rows=allowed)
        return load_samples(plugin, config, byte_tokenizer, "train", LIMITS)

    samples, notices = load(2)
    assert [sample.row for sample in samples] == [0, 2]
    (notice,) = notices
    assert notice.startswith(f"mine.py:preprocess, split train: left out 2 bad rows: row 1: no tokens; {path}:3: 1 fie")
    with pytest.raises(DataError, match="; 2 bad rows, and skip_bad_rows allows 1$"):
        load(1)
    with pytest.raises(DataError, match=rf"^{path}:3: 1 field"):
        load(0)
