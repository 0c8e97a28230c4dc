"""A chat reads the same in either layout, and the smaller set has no question in two splits."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llmrecipes.data.files import Row
from llmrecipes.errors import ConfigError

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "data" / "guanaco" / "sample.jsonl"
SPEC = importlib.util.spec_from_file_location("shipped_guanaco", ROOT / "custom_datasets" / "guanaco.py")
assert SPEC is not None
assert SPEC.loader is not None
guanaco: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(guanaco)

Chat = list[tuple[str, str]]

PARTS = [
    "a",
    "C#",
    "#",
    "\n",
    "\n\n",
    " ",
    "### Step 1",
    "## ",
    "Human:",
    "Assistant:",
    "Human",
    "<b>",
    "[x]",
    "\u4f60",
]
SAID = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join).map(str.strip)
CHATS = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=4)


def turns(text: str) -> Chat:
    return [(turn.question, turn.answer) for turn in guanaco.turns_of(Row({"text": text}, "chats.jsonl:1"))]


def marked(chat: Chat, glue: str) -> str:
    return glue.join(f"### Human: {question}{glue}### Assistant: {answer}" for question, answer in chat)


def in_template(chat: Chat) -> str:
    return "".join(f"<s>[INST] {question} [/INST] {answer} </s>" for question, answer in chat)


@given(chat=CHATS, glue=st.sampled_from(["", " ", "\n", "\n\n"]))
def test_both_layouts_read_back_any_chat(chat: Chat, glue: str) -> None:
    for said in (said for turn in chat for said in turn):
        assume(said)
        assume("### Human:" not in said and "###Human:" not in said)
        assume("### Assistant:" not in said and "###Assistant:" not in said)
        assume(glue or said.splitlines()[-1].strip("#"))  # a lone `#` glued to the mark would make it a heading
    assert turns(marked(chat, glue)) == chat
    assert turns(in_template(chat)) == chat


@pytest.mark.parametrize(
    "answer",
    [
        "# Plan\n## Human: a name\n### Foo\n#### Human: a species\n##### Assistant: a job\n###### Human: x",
        "Human: is a word, and so is Assistant:",
        "You write it as `### Assistant: hello`, I think",
        "A regex: ^### (.*)",
    ],
)
def test_headings_and_the_words_of_the_marks_are_content(answer: str) -> None:
    assert turns(f"### Human: q### Assistant: {answer}### Human: r### Assistant: s") == [("q", answer), ("r", "s")]
    assert turns(in_template([("q", answer), ("r", "s")])) == [("q", answer), ("r", "s")]


def test_a_mark_glued_to_a_sharp_is_still_a_mark() -> None:
    assert turns("### Human: Is it C#### Assistant: No, F#### Human: Ah### Assistant: Yes") == [
        ("Is it C#", "No, F#"),
        ("Ah", "Yes"),
    ]


def test_control_words_inside_a_turn_are_content_in_both_layouts() -> None:
    chat = [("What is </s>?", "An end, as <s> is a start [/INST] and so on")]
    assert turns(marked(chat, "")) == chat
    assert turns(in_template(chat)) == chat


def test_a_chat_may_lack_its_first_and_last_control_word() -> None:
    assert turns("[INST] a [/INST] b") == [("a", "b")]
    assert turns(" <s> [INST] a [/INST] b </s> <s> [INST] c [/INST] d") == [("a", "b"), ("c", "d")]
    assert turns("<s>[INST] a [/INST] b </s>[INST] c [/INST] d </s>") == [("a", "b"), ("c", "d")]


def test_every_row_of_the_real_sample_is_read_in_full() -> None:
    if not SAMPLE.is_file():
        pytest.skip(f"no Guanaco sample at {SAMPLE}")
    for line in SAMPLE.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        found = turns(text)
        assert marked(found, " ").split() == text.split()
        assert turns(in_template(found)) == found


# --- create_data ------------------------------------------------------------------------------------------------------


def save_source(folder: Path, chats: list[Chat]) -> Path:
    path = folder / "source.jsonl"
    path.write_text("".join(json.dumps({"text": marked(chat, "")}) + "\n" for chat in chats))
    return path


def create(source: Path, folder: Path, **more: Any) -> dict[str, list[Chat]]:
    guanaco.create_data(guanaco.GuanacoData(source=str(source), output_dir=str(folder), **more))
    splits = {}
    for split in ("train", "validation", "test"):
        lines = (folder / f"guanaco_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        splits[split] = [turns(json.loads(line)["text"]) for line in lines]
    return splits


def test_the_smaller_set_shares_no_opening_question_between_splits(tmp_path: Path) -> None:
    chats = [[(f"q{n % 40}", f"a{n}"), ("and?", "so.")] for n in range(100)]
    splits = create(save_source(tmp_path, chats), tmp_path / "out", train_rows=50, validation_rows=12, test_rows=13)
    assert {split: len(found) for split, found in splits.items()} == {"train": 50, "validation": 12, "test": 13}
    openings = {split: {chat[0][0] for chat in found} for split, found in splits.items()}
    assert not openings["train"] & openings["validation"]
    assert not openings["train"] & openings["test"]
    assert not openings["validation"] & openings["test"]
    assert all(chat in chats for found in splits.values() for chat in found)


def test_the_same_seed_chooses_the_same_chats_whatever_the_order_of_the_source(tmp_path: Path) -> None:
    chats = [[(f"q{n % 25}", f"a{n}")] for n in range(60)]
    rows = {"train_rows": 20, "validation_rows": 5, "test_rows": 5}
    first = create(save_source(tmp_path, chats), tmp_path / "a", **rows)
    assert create(save_source(tmp_path, chats[::-1]), tmp_path / "b", **rows) == first
    assert create(save_source(tmp_path, chats), tmp_path / "c", seed=43, **rows) != first


def test_rows_that_come_twice_or_cannot_be_written_in_the_template_are_left_out(tmp_path: Path) -> None:
    chats = [[("a", "b")], [("a", "b")], [("What is [/INST]?", "c")], [("d", "e")], [("f", "g")]]
    splits = create(save_source(tmp_path, chats), tmp_path / "out", train_rows=1, validation_rows=1, test_rows=1)
    assert sorted(chat for found in splits.values() for chat in found) == [[("a", "b")], [("d", "e")], [("f", "g")]]
    with pytest.raises(ConfigError, match="the source has 3 different chats"):
        create(tmp_path / "source.jsonl", tmp_path / "out", train_rows=2, validation_rows=1, test_rows=1)


def test_a_source_too_small_is_refused(tmp_path: Path) -> None:
    source = save_source(tmp_path, [[("a", "b")], [("c", "d")]])
    with pytest.raises(ConfigError, match=r"the source has 2 different chats .* too few for --validation_rows 100"):
        create(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
