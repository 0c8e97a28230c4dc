"""What stands in a file comes out as it stands, or one error says where it is wrong."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrecipes.data.files import load_hub, load_rows, load_split, save_rows
from llmrecipes.data.rows import BadRows, Row, noted_in, text
from llmrecipes.errors import DataError

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
ROWS = st.lists(st.fixed_dictionaries({"question": TEXTS, "answer": TEXTS}), min_size=1, max_size=5)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def refusal(path: Path, columns: tuple[str, ...] = ()) -> str:
    with pytest.raises(DataError) as caught:
        list(load_rows(path, columns))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def test_values_of_a_csv_file_stay_the_text_they_are(tmp_path: Path) -> None:
    values = ["001", "1.10", "NA", "None", "null", "nan", "", " x ", "1e3", "true"]
    path = write(tmp_path, "data.csv", "n,value\n" + "".join(f"{n},{value}\n" for n, value in enumerate(values)))
    assert [row["value"] for row in load_rows(path)] == values


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, suffix=st.sampled_from(["csv", "jsonl"]))
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], suffix: str
) -> None:
    path = tmp_path_factory.mktemp("round") / f"rows.{suffix}"
    save_rows({path: rows})
    assert list(load_rows(path, ("question", "answer"))) == rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", '\ufeffq,a,more\r\n"one\r\ntwo",2,x\r\n\r\n3,4,y\r\n'),
        ("a.json", '[{"q": "one\\r\\ntwo",\n "a": "2", "more": null},\n\n {"q": "3", "a": "4"}]\n'),
        ("a.json", '\n{"q": "one\\r\\ntwo", "a": "2", "more": [1]}\n{"q": "3", "a": "4"}'),
        ("a.JSONL", '{"q": "one\\r\\ntwo", "a": "2"}\r\n\r\n{"q": "3", "a": "4"}\r\n'),
    ],
)
def test_every_text_format_gives_the_same_rows_cut_to_the_columns_asked_for(
    tmp_path: Path, name: str, content: str
) -> None:
    assert list(load_rows(write(tmp_path, name, content), ("q", "a"))) == [
        {"q": "one\r\ntwo", "a": "2"},
        {"q": "3", "a": "4"},
    ]


def test_a_row_knows_its_first_line(tmp_path: Path) -> None:
    table = write(tmp_path, "a.csv", 'q,a\n"1\n2",x\n3,y\n')
    assert [row.place for row in load_rows(table)] == [f"{table}:2", f"{table}:4"]
    objects = write(tmp_path, "a.json", '[{"q":\n "1"},\n\n {"q": "2"}]')
    assert [row.place for row in load_rows(objects)] == [f"{objects}:1", f"{objects}:4"]


@pytest.mark.parametrize("ending", ["\r", "\r\n", "\n", "\n\r"])
def test_a_fault_is_seen_behind_whatever_ends_lines(tmp_path: Path, ending: str) -> None:
    rows = ["q,a", "one,two\rthree,four", "five,\0", "six,caf\u00e9"]
    path = write(tmp_path, "a.csv", (ending.join(rows) + ending).encode("latin-1"))
    with noted_in(BadRows(allowed=9)) as bad:
        assert list(load_rows(path)) == [{"q": "one", "a": "two"}, {"q": "three", "a": "four"}]
    line = 4 if ending != "\n\r" else 6
    told = [(places, told.partition(" is a ")[0].partition(" (")[0]) for told, places in bad.faults.items()]
    content = path.read_bytes()
    assert told == [
        ([f"{path}:{line}"], f"byte {content.index(0)}"),
        ([f"{path}:{line + (2 if line > 4 else 1)}"], f"byte {content.index(0xE9)}"),
    ]


def test_a_fault_on_the_last_line_is_seen(tmp_path: Path) -> None:
    for tail in (b"x,\0", b"x,\xe9", b"\0", b"x,y\r\xe9,z", b"\r\r\0\r"):
        assert ": byte " in refusal(write(tmp_path, "a.csv", b"q,a\r1,2\n3,4\n" + tail))


def test_a_field_may_be_longer_than_the_csv_module_s_own_limit(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "q,a\n" + "x" * 200_000 + ",y\n")
    assert len(load_rows(path).first["q"]) == 200_000


def test_parquet_keeps_types_and_names_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"q": ["001", "NA"], "n": [1, None]}), path)
    assert list(load_rows(path)) == [{"q": "001", "n": 1}, {"q": "NA", "n": None}]
    assert list(load_rows(path, ("q",))) == [{"q": "001"}, {"q": "NA"}]
    assert refusal(path, ("n",)).startswith(": row 2: column 'n' is null")
    assert "no column 'qq', it has 'q', 'n'; did you mean q?" in refusal(path, ("qq",))
    assert "no readable parquet" in refusal(write(tmp_path, "b.parquet", b"PAR1 not really"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", ": the file is empty: write rows into it, or give another file"),
        ("a.csv", "\r\n \r\n", ": the file is empty: write rows into it, or give another file"),
        ("a.csv", "q,answer\n", ":1: a header and no rows: write rows below it, or give another file"),
        ("a.csv", "q;answer\n1;2\n", ":1: the columns are separated by ';', commas are expected: save the file with"),
        ("a.csv", '"q";"answer"\n1;2\n', ":1: the columns are separated by ';', commas are expected: save the file"),
        ("a.csv", "answer\tq, x\n1\t2\n", ":1: the columns are separated by tabs, commas are expected"),
        ("a.csv", "q; answer,b\n1,2\n", ":1: no column 'answer', it has 'q; answer', 'b'"),
        ("a.csv", "q,answer\n1,2\n1,2,3\n", ":3: 3 fields, header has 2"),
        ("a.csv", 'q,answer\n"1\n2",x\n3\n', ":4: 1 field, header has 2"),
        ("a.csv", 'q,answer\n1,2\n3,"4\n5,6\n' + "7,8\n" * 9_000, ":3: a quote is opened in this row and never closed"),
        ("a.csv", 'q,answer\n"1"2,3\n', ":2: ',' expected after '\"': quotes within a cell are doubled (\"\")"),
        ("a.csv", "q,a,q\n1,2,3\n", ":1: two columns are named 'q'"),
        ("a.csv", "q,anser\n1,2\n", ":1: no column 'answer', it has 'q', 'anser'; did you mean anser?"),
        ("a.csv", "q,answer\n1,2\ncaf\u00e9,2\n".encode("latin-1"), ":3: byte 16 (0xe9): no UTF-8"),
        ("a.csv", "q,answer\n1,2\n".encode("utf-16"), ":1: byte 0 (0xff): the file is UTF-16: iconv -f UTF-16 -t"),
        ("a.csv", "q,answer\n1,2\n".encode("utf-32"), ":1: byte 0 (0xff): the file is UTF-32: iconv -f UTF-32 -t"),
        ("a.csv", "q,answer\n1,2\n".encode("utf-16-le"), ":1: byte 1 (0x00): a NUL byte, the file looks like UTF-16LE"),
        ("a.csv", "q,answer\n1,\0\n", ":2: byte 11 is a NUL byte"),
        ("a.jsonl", "", ": the file is empty"),
        ("a.jsonl", '{"answer": "1"}\n{"answer": "2"]\n', ":2:15: Expecting ',' delimiter"),
        ("a.jsonl", '{"answer": "1"}\n\n{"answer": "2"} {}\n', ":3:17: something follows the object"),
        ("a.jsonl", '{"answer": "1"}\n["2"]\n', ":2: expected an object with named columns, found [\"2\"]"),
        ("a.jsonl", '{"answer": "1"}\n{"Answer": "2"}\n', ":2: no column 'answer', it has 'Answer'; did you mean"),
        ("a.jsonl", '{"answer": "1"}\n{"answer": null}\n', ":2: column 'answer' is null"),
        ("a.jsonl", '{"answer": "1"}\n{"answer": "2", "answer": "3"}\n', ":2: the key 'answer' stands there twice"),
        ("a.jsonl", '{"answer": "1"}\n{"answer": "\\ud83d"}\n', ":2: \\ud83d is half a character"),
        ("a.jsonl", '{"answer": ' + "[" * 100_000, ":1: "),
        ("a.jsonl", '[{"answer": "1"}]', ":1: expected an object with named columns"),
        ("a.json", "[]", ": the file holds no rows"),
        ("a.json", '[{"answer": "1"},\n {"answer": }]', ":2:13: Expecting value"),
        ("a.json", '[{"answer": "1"}\n {"answer": "2"}]', ":2:2: expected ',' or the ']' that closes the list"),
        ("a.json", '[{"answer": "1"},\n', ":2:1: Expecting value"),
        ("a.json", '[{"answer": "1"}]\n[]', ":2:1: something follows the list"),
        ("a.json", '[{"answer": "1"},\n\n 2]', ":3: expected an object with named columns, found 2"),
        ("a.json", '{\n "answer": "1"}', ":1:2: Expecting property name"),
        ("a.txt", "answer", ": the suffix '.txt' is not one of .csv, .json, .jsonl, .parquet"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_that_says_where(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    found = refusal(write(tmp_path, name, content), ("answer",))
    assert found.startswith(message)
    assert len(found) < 300


def test_the_iconv_hint_mends_the_file(tmp_path: Path) -> None:
    if shutil.which("iconv") is None:
        pytest.skip("this machine has no iconv")
    for codec in ("latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        path = write(tmp_path, f"my {codec} file.csv", "q,a\ncaf\u00e9,2\n".encode(codec))
        command = refusal(path).partition("iconv")
        subprocess.run("".join(command[1:]), shell=True, check=True, cwd=tmp_path)
        assert list(load_rows(tmp_path / "utf8.csv")) == [{"q": "caf\u00e9", "a": "2"}]


def test_a_pair_of_surrogates_is_one_character(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path, "a.jsonl", '{"q": "\\ud83d\\ude00"}')).first["q"] == "\U0001f600"


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.csv") == ": no such file"
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be read" in refusal(tmp_path / "folder.csv")


def test_text_refuses_what_is_no_text_or_blank() -> None:
    row = Row({"n": 5, "blank": " \n", "full": "x"}, "data.jsonl:3")
    assert text(row, "full") == "x"
    assert text(row, "blank", blank_allowed=True) == " \n"
    with pytest.raises(DataError, match=r"^data.jsonl:3: column 'n' holds 5, expected text"):
        text(row, "n")
    with pytest.raises(DataError, match=r"^data.jsonl:3: column 'blank' is blank"):
        text(row, "blank")


# --- where a split stands ---------------------------------------------------------------------------------------------


def config(path: Path | str = "", **more: str) -> SimpleNamespace:
    return SimpleNamespace(dataset="my_dataset", data_path=str(path), train_split="train", **more)


def split_refusal(*arguments: object, **more: str) -> str:
    with pytest.raises(DataError) as caught:
        list(load_split(*arguments, **more))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["validation.csv", "sums_validation.csv", "sums-validation.csv"])
def test_a_folder_gives_the_one_file_of_the_split(tmp_path: Path, name: str) -> None:
    write(tmp_path, "train.csv", "q\n1\n")
    write(tmp_path, name, "q\n2\n")
    write(tmp_path, "validation.md", "q\n3\n")
    write(tmp_path, f".{name}", "q\n4\n")
    assert list(load_split(config(tmp_path), "validation")) == [{"q": "2"}]


@pytest.mark.parametrize("asked", ["val", "valid", "eval", "dev", "test", "alidation", ""])
def test_another_split_s_file_never_stands_in(tmp_path: Path, asked: str) -> None:
    write(tmp_path, "train.csv", "q\n1\n")
    write(tmp_path, "validation.csv", "q\n2\n")
    message = split_refusal(config(tmp_path), asked)
    assert f"no file for the split {asked!r}" in message
    assert "it holds train.csv, validation.csv" in message


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train.csv", "old_train.jsonl"):
        write(tmp_path, name, "q\n1\n")
    assert "2 files for the split 'train': old_train.jsonl, train.csv" in split_refusal(config(tmp_path), "train")


def test_a_single_file_is_the_train_split_and_no_other(tmp_path: Path) -> None:
    path = write(tmp_path, "all.csv", "q\n1\n")
    assert list(load_split(config(path), "train")) == [{"q": "1"}]
    message = split_refusal(config(path), "validation")
    assert "--my_dataset.data_path a folder with one file per split, or --run_validation false" in message
    assert list(load_split(SimpleNamespace(data_path=str(path), train_split="all"), "all")) == [{"q": "1"}]


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "train.csv", "q\n1\n")
    assert list(load_split(config("~"), "train")) == [{"q": "1"}]
    assert "~nobody-of-that-name" in split_refusal(config("~nobody-of-that-name/x"), "train")


def test_data_that_are_nowhere_are_refused_with_the_way_out(tmp_path: Path) -> None:
    assert "give --my_dataset.data_path a folder" in split_refusal(config(), "train")
    assert "give --custom_dataset.data_path a folder" in split_refusal(SimpleNamespace(), "train")
    assert "no such file or folder; --my_dataset.data_path" in split_refusal(config(tmp_path / "none"), "train")
    missing = str(tmp_path / "sums")
    message = split_refusal(config(), "train", default_path=missing)
    assert "make it with `llmrecipes data create sums`, or give --my_dataset.data_path FOLDER" in message


def test_the_default_folder_serves_where_none_is_named(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", "q\n1\n")
    assert list(load_split(config(), "train", default_path=str(tmp_path))) == [{"q": "1"}]
    (tmp_path / "named").mkdir()
    write(tmp_path / "named", "train.csv", "q\n2\n")
    assert list(load_split(config(tmp_path / "named"), "train", default_path=str(tmp_path))) == [{"q": "2"}]


def test_a_hub_out_of_reach_is_one_line_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = split_refusal(config(), "train", hub_name="nobody/nothing-of-that-name")
    assert "hub data set nobody/nothing-of-that-name, split train: " in message
    assert message.endswith("for data on this machine give --my_dataset.data_path FOLDER")


def test_a_hub_data_set_s_rows_know_their_place_and_a_missing_split_is_told(tmp_path: Path) -> None:
    write(tmp_path, "train.csv", "q,a\nx,y\n")  # `datasets` reads a local folder by the same call as a hub's name
    rows = list(load_hub(str(tmp_path), "train", ("q",), way_out="--x FOLDER"))
    assert rows == [{"q": "x"}]
    assert rows[0].place == f"hub data set {tmp_path}, split train: row 1"
    with pytest.raises(DataError, match="Unknown split"):
        load_hub(str(tmp_path), "validation", ("q",), way_out="--x FOLDER")


def test_no_file_is_replaced_before_all_are_written(tmp_path: Path) -> None:
    old = write(tmp_path, "a.csv", "old")
    blocked = write(tmp_path, "file", "") / "b.csv"
    with pytest.raises(DataError, match="cannot be written"):
        save_rows({old: [{"q": "new"}], blocked: [{"q": "new"}]})
    assert old.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "file"]


def test_saved_json_lines_keep_their_letters(tmp_path: Path) -> None:
    save_rows({tmp_path / "a.jsonl": [{"q": "\u00e9\u4f60"}]})
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"q": "\u00e9\u4f60"}\n'
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8")) == {"q": "\u00e9\u4f60"}
