"""Rows are read one by one and anew each time; bad ones are counted through all stages, and never lost in silence."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmrecipes.data.files import load_rows, load_split
from llmrecipes.data.limits import SampleLimits
from llmrecipes.data.rows import (
    KEPT_FAULTS,
    TOLD_CHARACTERS,
    BadRowError,
    BadRows,
    Row,
    Rows,
    bad_rows,
    faults_text,
    noted_in,
    text,
    with_text,
)
from llmrecipes.data.samples import load_samples
from llmrecipes.errors import DataError
from llmrecipes.plugins import Plugin
from llmrecipes.prompts import SAMPLES_AT_ONCE, encode_pairs

LIMITS = SampleLimits(context_length=64, max_positions=64, vocabulary_size=260)


def rows_of(*values: str) -> Rows[Row]:
    def read() -> Iterator[Row | DataError]:
        for number, value in enumerate(values, start=1):
            yield (
                BadRowError(f"a.csv:{number}", "broken") if value == "broken" else Row({"q": value}, f"a.csv:{number}")
            )

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
    assert bad.faults == {"it is bad": ["a.csv:2"], "broken": ["a.csv:3"]}  # each once, however often it was met
    assert bad.count == 2
    assert bad_rows().allowed == 0


def test_a_place_is_carried_through_all_that_is_made_of_a_row() -> None:
    def refuse(value: str) -> str:
        if value.startswith("b"):
            raise DataError("it begins with b")
        return value

    made = rows_of("a", "b1", "b2", "c").map(lambda row: row["q"]).map(refuse).map(str.upper)
    with pytest.raises(DataError, match=r"^a.csv:2: it begins with b$"):
        list(made)
    with noted_in(BadRows(allowed=2)) as bad:
        assert list(made) == list(made) == ["A", "C"]
    assert bad.faults == {"it begins with b": ["a.csv:2", "a.csv:3"]}


def test_a_row_that_has_become_a_plain_dict_is_told_with_its_place() -> None:
    with pytest.raises(DataError, match=r"^a.csv:2: column 'q' is blank: "):
        list(rows_of("a", " ").map(lambda row: {**row}).map(lambda row: text(row, "q")))


@pytest.mark.parametrize("placed", [True, False])
def test_rows_that_share_a_place_or_have_none_count_each(placed: bool) -> None:
    def refuse(row: object) -> None:
        raise DataError("no good")

    rows = Rows(lambda: iter([Row({}, "mine") if placed else {} for _ in range(4)]), "mine")
    with noted_in(BadRows(allowed=9)) as bad:
        assert list(rows.map(refuse)) == list(rows.map(refuse)) == []
    assert bad.count == 4 and bad.faults == {"no good": ["mine"] * 4}


def test_a_part_gone_through_again_counts_no_row_twice() -> None:
    rows = rows_of("broken", "a", "broken", "broken", "b").map(lambda row: row["q"])
    with noted_in(BadRows(allowed=9)) as bad:
        assert rows.first == "a"
        assert list(rows) == ["a", "b"]
        assert rows.first == "a"
    assert bad.count == 3


def test_far_too_many_bad_rows_end_the_reading() -> None:
    read: list[int] = []

    def endless() -> Iterator[Row | DataError]:
        for number in range(10 * KEPT_FAULTS):
            read.append(number)
            yield BadRowError(f"a.csv:{number}", "broken")

    with noted_in(BadRows(allowed=2)), pytest.raises(DataError) as caught:
        list(Rows(endless, "a.csv"))
    assert len(read) == KEPT_FAULTS + 3
    places = ", ".join(f"a.csv:{number}" for number in range(5))
    assert str(caught.value) == f"{places} and {KEPT_FAULTS - 2} more: broken; skip_bad_rows allows 2"


def test_faults_are_grouped_by_what_they_say_and_kept_short() -> None:
    assert faults_text({}) == ""
    assert faults_text({"broken": ["a:1", "a:3"], "blank": ["a:2"]}) == "a:1, a:3: broken; a:2: blank"
    assert faults_text({"broken": [*"abcdefg"]}) == "a, b, c, d, e and 2 more: broken"
    many = {f"fault {number}": ["a", "b"] for number in range(7)}
    assert faults_text(many).endswith("; a, b: fault 4; and 4 rows with 2 other faults")
    assert len(faults_text({"x" * 10_000: ["a:1"]})) == TOLD_CHARACTERS + 5
    assert faults_text({"x" * 10_000: ["a:1"]}).endswith("x...")


def test_rows_with_a_blank_column_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = with_text(rows_of("a", " ", "b"), "q", "mine, train")
    assert [row["q"] for row in rows] == ["a", "b"]
    assert "mine, train: left out 1 of 3 rows, their q is blank" in caplog.text


def colors(content: str, path: Path, make: Any = None) -> Any:
    path.write_text(content)
    rows = load_split(SimpleNamespace(data_path=str(path), train_split="train"), "train", ("thing", "color"))
    return rows.map(make or (lambda row: (f"What color is {row['thing']}?\n", row["color"])))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "thing,color\nsky,\ngrass,green\n", "2: column 'color', the answer, is blank: fill it in or take"),
        ("a.csv", 'thing,color\nsky," "\ngrass,green\n', "2: column 'color', the answer, is blank: fill it in or take"),
        ("a.jsonl", '{"thing": "sky", "color": 1}\n{"thing": "grass", "color": "green"}\n',
         "1: column 'color', the answer, holds 1, expected text: write it in quotes"),
        ("a.jsonl", '{"thing": "sky", "color": ["a"]}\n{"thing": "grass", "color": "green"}\n',
         "1: column 'color', the answer, holds ['a'], expected text"),
    ],
)  # fmt: skip
def test_a_pair_that_is_blank_or_no_text_is_a_bad_row(
    name: str, content: str, told: str, byte_tokenizer: Any, tmp_path: Path
) -> None:
    samples = encode_pairs(byte_tokenizer, colors(content, tmp_path / name))
    with pytest.raises(DataError) as caught:
        list(samples)
    assert str(caught.value).startswith(f"{tmp_path / name}:{told}")
    with noted_in(BadRows(allowed=1)) as bad:
        assert len(list(samples)) == len(list(samples)) == 1
    assert bad.count == 1


def test_a_blank_pair_that_no_column_holds_is_told_with_its_place(byte_tokenizer: Any, tmp_path: Path) -> None:
    pairs = colors("thing,color\nsky,\n", tmp_path / "a.csv", lambda row: (row["color"] + " ", row["thing"]))
    with pytest.raises(DataError, match=r"a.csv:2: the prompt is blank: fill it in or take the row out$"):
        list(encode_pairs(byte_tokenizer, pairs))


def test_a_blank_column_within_a_prompt_is_said_unless_it_is_meant(
    byte_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, content = tmp_path / "a.csv", "thing,color\nsky,blue\n,green\n,red\n"
    assert len(list(encode_pairs(byte_tokenizer, colors(content, path)))) == 3
    assert f"{path}: column 'thing' is blank in 2 of 3 rows that are learned (first: {path}:3): fill" in caplog.text
    caplog.clear()

    def meant(row: Row) -> tuple[str, str]:
        return f"What color is {text(row, 'thing', blank_allowed=True)}?", row["color"]

    assert len(list(encode_pairs(byte_tokenizer, colors(content, path, meant)))) == 3
    assert not caplog.text


def test_a_column_that_should_be_blank_or_text_and_is_neither_is_a_bad_row() -> None:
    rows = Rows(lambda: iter([Row({"q": 5}, "a.json:1"), Row({"q": "b"}, "a.json:2")]), "a.json")
    with pytest.raises(DataError, match="^a.json:1: column 'q' holds 5, expected text"):
        list(with_text(rows, "q", "mine"))
    with noted_in(BadRows(allowed=1)) as bad:
        assert list(with_text(rows, "q", "mine").map(lambda row: text(row, "q"))) == ["b"]
    assert bad.count == 1


BROKEN_FILES = {
    "a.csv": ('q,a\n1,2\n3\n4,5\n6,7,8\n"9"x,1\n2,\0\n', {3: "1 field", 5: "3 fields", 6: "", 7: "NUL byte"}),
    "a.jsonl": ('{"q": "1", "a": "2"}\n{"q": }\n[]\n{"q": "1"}\n{"q": null, "a": "1"}\n{"q": "4", "a": "5"}\n',
                {2: "Expecting value", 3: "expected an object", 4: "no column 'a'", 5: "is null"}),
    "a.json": ('[{"q": "1", "a": "2"}, 5, {"q": "1"}, {"q": "4", "a": "5"}]',
               {"1:24": "found 5", "1:27": "no column 'a'"}),
}  # fmt: skip


def test_rows_of_one_line_are_rows_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"q": ""}] * 3 + [{"q": "x"}]) + "\n")
    with noted_in(BadRows(allowed=9)) as bad:
        assert list(load_rows(path).map(lambda row: text(row, "q"))) == ["x"]
    assert list(bad.faults.values()) == [[f"{path}:1", f"{path}:1:13", f"{path}:1:24"]]


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_reading_goes_on_behind_every_bad_row_of_a_file(name: str, tmp_path: Path) -> None:
    content, expected = BROKEN_FILES[name]
    path = tmp_path / name
    path.write_text(content)
    with noted_in(BadRows(allowed=9)) as bad:
        found = list(load_rows(path, ("q", "a")))
    assert found == [{"q": "1", "a": "2"}, {"q": "4", "a": "5"}]
    assert bad.count == len(bad.faults) == len(expected)
    for (told, places), (line, part) in zip(bad.faults.items(), expected.items(), strict=True):
        assert part in told and places[0].startswith(f"{path}:{line}")


STRAY = "".join(f"{number},x\n" for number in range(3000))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'q,a\n1,2\n3,"4\n{STRAY}5,"6\n', ":3: a quote that is opened in this row goes on to line 3004: "),
        (f'q,a\n1,2\n3,"4\n{STRAY}5,6"7\n', ":3: a quote that is opened in this row goes on to line 3004: "),
        (f'q,a\n1,2\n3,"4\n{STRAY}5,6",7\n', ":3, "),
        (f'q,a\n1,2\n3,"4\n{STRAY}5,6\n', ":3: a quote is opened in this row and never closed"),
    ],
)
def test_a_stray_quote_that_swallows_rows_is_never_one_bad_row(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with noted_in(BadRows(allowed=9)), pytest.raises(DataError) as caught:
        list(load_rows(path, ("q",)))
    assert str(caught.value).startswith(f"{path}{message}") and len(str(caught.value)) < 1000


def test_a_bad_record_of_several_lines_counts_them_all_and_a_bad_letter_in_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'q,a\n"1\n2\n3",x,y\n"4\n\xe9\n5",x\n6,7\n')
    with noted_in(BadRows(allowed=9)) as bad:
        assert list(load_rows(path)) == [{"q": "6", "a": "7"}]
    assert [len(places) for places in bad.faults.values()] == [3, 1]
    assert next(iter(bad.faults)) == "3 fields in lines 2 to 4, header has 2: is a quote missing?"
    path.write_bytes(b'q,a\n"1\n\xe9\n3",x,y\n6,7\n')
    with noted_in(BadRows(allowed=9)) as bad:
        assert list(load_rows(path)) == [{"q": "6", "a": "7"}]
    assert bad.count == 3


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
