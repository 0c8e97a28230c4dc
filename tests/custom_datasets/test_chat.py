"""The chat data set: files of any layout to samples, parts held out, sources mixed, and what is left out is said."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llmrecipes.data.rows import BadRows, noted_in
from llmrecipes.errors import ConfigError, DataError
from llmrecipes.prompts import IGNORED_LABEL

ROOT = Path(__file__).parents[2]

Samples = list[dict[str, list[int]]]


def load_module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"shipped_{name}", ROOT / "custom_datasets" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHAT, GUANACO, ALPACA = (load_module(name) for name in ("chat", "guanaco", "alpaca"))


def config(data_path: Path | str, **changes: Any) -> SimpleNamespace:
    defaults = {
        "dataset": "chat_dataset",
        "train_split": "train",
        "test_split": "validation",
        "template": "llama2",
        "train_on": "assistant",
        "prompt_format": "{prompt}\n\n",
        "validation_rows": 0,
        "skip_bad_rows": 0,
        "seed": 42,
    }
    return SimpleNamespace(data_path=str(data_path), **{**defaults, **changes})


def preprocessed(tokenizer: Any, data_path: Path | str, split: str = "train", **changes: Any) -> Samples:
    return list(CHAT.get_preprocessed_chat(config(data_path, **changes), tokenizer, split))


def said(tokenizer: Any, samples: Samples) -> list[str]:
    return [tokenizer.decode([label for label in sample["labels"] if label != IGNORED_LABEL]) for sample in samples]


def pair(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count: int, letter: str = "q") -> list[dict[str, Any]]:
    return [pair(f"{letter}{number}?", f"{letter}{number}.") for number in range(count)]


def test_every_format_and_layout_gives_the_same_samples(byte_tokenizer: Any, tmp_path: Path) -> None:
    talk = [pair("Which, then?", "This."), pair("Why?", 'So "there".')]
    flat = [{"prompt": row["messages"][0]["content"], "response": row["messages"][1]["content"]} for row in talk]
    expected = preprocessed(byte_tokenizer, save(tmp_path / "a.jsonl", talk))
    (tmp_path / "b.json").write_text(json.dumps(flat))
    (tmp_path / "c.csv").write_text('prompt,response\n"Which, then?",This.\nWhy?,"So ""there""."\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(talk), tmp_path / "d.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), tmp_path / "e.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    save(folder / "train.jsonl", talk)
    for place in ("b.json", "c.csv", "d.parquet", "e.parquet", "folder"):
        assert preprocessed(byte_tokenizer, tmp_path / place) == expected
    assert said(byte_tokenizer, expected) == ["This.</s>", 'So "there".</s>']


def test_llama_2_gives_guanaco_s_own_ids(byte_tokenizer: Any, tmp_path: Path) -> None:
    chats = [[("Which?", "This."), ("Why?", "Because.")], [("Say [INST] </s>", "no\n\nno")]]
    text = ["".join(f"### Human: {q}### Assistant: {a}" for q, a in chat) for chat in chats]
    theirs = save(tmp_path / "guanaco.jsonl", [{"text": chat} for chat in text])
    messages = [{"messages": [turn for q, a in chat for turn in pair(q, a)["messages"]]} for chat in chats]
    ours = save(tmp_path / "ours.jsonl", messages)
    expected = list(GUANACO.get_preprocessed_guanaco(config(theirs), byte_tokenizer, "train"))
    assert preprocessed(byte_tokenizer, ours) == expected


def test_alpaca_gives_alpaca_s_own_ids(byte_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": f"Do {n}", "input": "x" * (n % 2), "output": f"{n}."} for n in range(202)]
    path = save(tmp_path / "alpaca.jsonl", rows)
    expected = list(ALPACA.get_preprocessed_alpaca(config(path), byte_tokenizer, "train"))
    assert preprocessed(byte_tokenizer, path, template="alpaca")[200:] == expected


def test_plain_text_is_continued_pretraining_and_is_called_so(
    byte_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "a.jsonl", [{"text": "Once </s> upon."}])
    assert not byte_tokenizer.chat_template
    samples = preprocessed(byte_tokenizer, path, template="tokenizer")
    assert said(byte_tokenizer, samples) == ["Once </s> upon.</s>"]
    assert "every token is supervised, without a template (continued pretraining)" in caplog.text
    assert "stay text: '</s>' in 1" in caplog.text


def test_a_template_that_no_row_is_laid_out_with_is_refused(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", [{"text": "Once."}])
    with pytest.raises(ConfigError, match=rf"--chat_dataset.template llama2 would have no effect: {path} is plain"):
        preprocessed(byte_tokenizer, path, template="llama2")
    chats = save(tmp_path / "b.jsonl", numbered(2))
    with pytest.raises(ConfigError, match="brings no chat template"):
        preprocessed(byte_tokenizer, f"{path},{chats}", template="tokenizer")
    assert len(preprocessed(byte_tokenizer, f"{path},{chats}", template="llama2")) == 3


def test_what_has_no_answer_is_left_out_and_counted(
    byte_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    question = {"role": "user", "content": "And?"}
    rows = [*numbered(2), {"messages": [question]}, {"messages": [*pair("a", "b")["messages"], question, question]}]
    path = save(tmp_path / "a.jsonl", rows)
    samples = preprocessed(byte_tokenizer, path)
    assert said(byte_tokenizer, samples) == ["q0.</s>", "q1.</s>", "b</s>"]
    assert samples[2] == preprocessed(byte_tokenizer, save(tmp_path / "b.jsonl", [pair("a", "b")]))[0]
    assert "left out 1 chats without an answer and the turns behind the last answer of 1 chats" in caplog.text
    assert "in 1 chats, turns of one role in a row are joined by a blank line" in caplog.text
    assert len(preprocessed(byte_tokenizer, path, train_on="all")) == 4
    with pytest.raises(DataError, match="no row of 1 holds an answer to learn"):
        preprocessed(byte_tokenizer, save(tmp_path / "c.jsonl", rows[2:3]))


def test_bad_rows_stop_the_run_unless_so_many_may_be_left_out(byte_tokenizer: Any, tmp_path: Path) -> None:
    late_system = {
        "messages": [*pair("a", "b")["messages"], {"role": "system", "content": "s"}, *pair("a", "b")["messages"]]
    }
    path = save(tmp_path / "a.jsonl", [*numbered(2), pair("", "x"), late_system, pair("c", "d")])
    with path.open("a") as file:
        file.write('{"messages": [}\n')
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:3: turn 1 \(user\) is blank$"):
        preprocessed(byte_tokenizer, path)
    with noted_in(BadRows(allowed=3)) as bad:
        assert len(preprocessed(byte_tokenizer, path)) == 3
    expected = {"turn 1 (user) is blank": "3", "Expecting value": "6:15", "a system turn behind": "4"}
    assert bad.count == 3
    for (told, places), (start, line) in zip(bad.faults.items(), expected.items(), strict=True):
        assert told.startswith(start) and places == [f"{path}:{line}"]


def test_a_layout_that_is_not_known_is_told_with_its_row(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", [{"quote": "a", "author": "b"}])
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:1: no layout is known with the columns 'quote'"):
        preprocessed(byte_tokenizer, path)


# --- held out ---------------------------------------------------------------------------------------------------------


def test_a_part_of_one_file_is_held_out_and_asked_nowhere_in_train(
    byte_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = numbered(20) + [pair(f" Q{n}? ", "again") for n in range(20)]
    path = save(tmp_path / "a.jsonl", rows)
    splits = {split: preprocessed(byte_tokenizer, path, split, validation_rows=5) for split in ("train", "validation")}
    assert splits["validation"] == preprocessed(byte_tokenizer, path, "validation", validation_rows=5)
    assert len(splits["validation"]) == 5
    assert len(splits["train"]) == 30
    asked = {
        split: {re.findall(r"q\d+", byte_tokenizer.decode(sample["input_ids"]).lower())[0] for sample in samples}
        for split, samples in splits.items()
    }
    assert not asked["train"] & asked["validation"]
    assert "held out 5 chats; left out 5 more that ask the same as one of them" in caplog.text
    other = preprocessed(byte_tokenizer, path, "validation", validation_rows=5, seed=1)
    assert other != splits["validation"]


def test_what_cannot_be_held_out_of_is_refused_with_the_way_out(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "train.jsonl", numbered(3))
    with pytest.raises(DataError, match="holds 'train' only: hold some of it out with --chat_dataset.validation_rows"):
        preprocessed(byte_tokenizer, path, "validation")
    with pytest.raises(DataError, match="3 conversations ask 3 different things, so none would be left"):
        preprocessed(byte_tokenizer, path, validation_rows=3)
    with pytest.raises(ConfigError, match="is a folder with one file per split; name the file"):
        preprocessed(byte_tokenizer, tmp_path, validation_rows=1)
    with pytest.raises(ConfigError, match="train_split and test_split are both 'train'"):
        preprocessed(byte_tokenizer, path, validation_rows=1, test_split="train")
    with pytest.raises(DataError, match="'test' was asked for"):
        preprocessed(byte_tokenizer, path, "test", validation_rows=1)


# --- mixed ------------------------------------------------------------------------------------------------------------


def test_sources_are_mixed_by_weight_and_what_is_drawn_is_said(
    byte_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = (
        save(tmp_path / "a.jsonl", numbered(60, "a")),
        save(tmp_path / "b.jsonl", [{"text": f"b{n}"} for n in range(20)]),
    )
    told = said(byte_tokenizer, preprocessed(byte_tokenizer, f"{a}=0.25,{b}=0.75"))
    assert [sum(text.startswith(letter) for text in told) for letter in "ab"] == [20, 60]
    assert all(told.count(text) == 3 for text in told if text.startswith("b"))
    assert f"{a}: 20 samples drawn of 60 (40 not used)" in caplog.text
    assert f"{b}: 60 samples drawn of 20 (each 3 times)" in caplog.text
    every = said(byte_tokenizer, preprocessed(byte_tokenizer, f"{a},{b}"))
    assert len(every) == len(set(every)) == 80


def test_weights_are_those_of_the_chats_that_can_be_used(
    byte_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    talk = pair("x", "y")["messages"]
    refused = {"messages": [*talk, {"role": "system", "content": "s"}, *talk]}  # which the template has no place for
    mixed = [row for row in numbered(20, "a") for row in (row, refused)]
    a, b = save(tmp_path / "a.jsonl", [*mixed, pair("", "x")]), save(tmp_path / "b.jsonl", numbered(20, "b"))
    with noted_in(BadRows(allowed=40)) as bad:
        told = said(byte_tokenizer, preprocessed(byte_tokenizer, f"{a}=3,{b}=1"))
    assert bad.count == 21
    assert [sum(text.startswith(letter) for text in told) for letter in "ab"] == [30, 10]
    counts = [told.count(f"a{number}.</s>") for number in range(20)]
    assert set(counts) == {1, 2} and max(told.count(f"b{number}.</s>") for number in range(20)) == 1
    assert f"{a}: 30 samples drawn of 20 (each 1 or 2 times)" in caplog.text
    clean = save(tmp_path / "c.jsonl", numbered(20, "a"))
    assert said(byte_tokenizer, preprocessed(byte_tokenizer, f"{clean}=3,{b}=1")) == told


def test_held_out_rows_of_one_source_are_in_no_other_and_are_not_weighted(byte_tokenizer: Any, tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.jsonl", numbered(30)), save(tmp_path / "b.jsonl", numbered(15))
    train, validation = (
        said(byte_tokenizer, preprocessed(byte_tokenizer, f"{a}=1,{b}=1", split, validation_rows=6))
        for split in ("train", "validation")
    )
    assert len(validation) == len(set(validation)) == 6
    assert not set(train) & set(validation)


# --- what cannot go together ------------------------------------------------------------------------------------------


def test_a_template_that_does_not_fit_is_told_before_any_row_is_read(byte_tokenizer: Any, tmp_path: Path) -> None:
    for name, message in (("chatml", "no token '<|im_start|>'"), ("tokenizer", "brings no chat template")):
        with pytest.raises(ConfigError, match=re.escape(message)):
            preprocessed(byte_tokenizer, tmp_path / "none.jsonl", template=name)
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        preprocessed(byte_tokenizer, tmp_path / "none.jsonl")
