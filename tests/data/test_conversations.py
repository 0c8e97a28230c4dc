"""Rows of every common layout become the same turns, or one line says what is wrong with which row."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmrecipes.data.conversations import (
    Conversation,
    encode_conversations,
    layout_of,
    marks_pattern,
    read_conversation,
)
from llmrecipes.data.rows import BadRows, Row, noted_in
from llmrecipes.data.templates import template_of
from llmrecipes.data.turns import Turn, learned
from llmrecipes.errors import DataError
from llmrecipes.prompts import IGNORED_LABEL

USER, ASSISTANT, SYSTEM = (
    Turn("user", "Which?"),
    Turn("assistant", "This.", supervised=True),
    Turn("system", "Be kind."),
)
TALK = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
PARTS = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "ich?"}]
SHAREGPT = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]


def read(values: dict[str, Any]) -> tuple[Turn, ...]:
    row = Row(values, "a.jsonl:1")
    return read_conversation(row, layout_of(row)).turns


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"messages": SHAREGPT},
        {"conversations": SHAREGPT, "id": "7", "text": "unread"},
        {"conversations": TALK},
        {"conversation": [{"from": "USER", "value": "Which?"}, {"from": "chatgpt", "value": "This."}]},
        {"messages": json.dumps(TALK)},
        {"messages": [{"role": "user", "content": PARTS}, TALK[1]]},
        {"messages": [{**TALK[0], "from": None, "tool_calls": None}, {**TALK[1], "weight": 1}]},
        {"messages": [{**turn, "role": None, "content": None} for turn in SHAREGPT]},
        {"messages": TALK, "system": None, "tools": [], "history": None},
        {"instruction": "Which?", "input": "", "output": "This.", "text": "Below is an instruction ..."},
        {"instruction": "Which?", "input": None, "output": "This."},
        {"instruction": "Which?", "output": "This.", "history": []},
        {"instruction": "Which?", "context": "", "response": "This.", "category": "qa"},
        {"prompt": "Which?", "completion": "This."},
        {"prompt": "Which?", "response": "This."},
        {"question": "Which?", "answer": "This."},
        {"input": "Which?", "output": "This."},
    ],
)  # fmt: skip
def test_a_layout_is_known_by_its_columns(row: dict[str, Any]) -> None:
    assert read(row) == (USER, ASSISTANT)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "Be kind."}, *TALK]},
        {"messages": [{"role": "developer", "content": "Be kind."}, *TALK]},
        {"messages": TALK, "system": "Be kind."},
        {"conversations": [{"from": "system", "value": "Be kind."}, *SHAREGPT]},
        {"system_prompt": "Be kind.", "question": "Which?", "response": "This."},
        {"instruction": "Which?", "output": "This.", "system": "Be kind."},
    ],
)
def test_a_system_prompt_may_be_a_turn_or_a_column(row: dict[str, Any]) -> None:
    assert read(row) == (SYSTEM, USER, ASSISTANT)
    blank = json.loads(json.dumps(row).replace("Be kind.", " "))
    assert read(blank) == (USER, ASSISTANT)


def test_an_input_stands_apart_from_its_instruction() -> None:
    expected = (Turn("user", "Name it.", input="cat"), Turn("assistant", "Tom", supervised=True))
    assert read({"instruction": "Name it.", "input": "cat", "output": "Tom"}) == expected
    assert read({"instruction": "Name it.", "context": "cat", "response": "Tom"}) == expected


def test_text_stays_as_it_is_blanks_and_all() -> None:
    assert read({"prompt": " Which?\n", "completion": "\tThis. "}) == (
        Turn("user", " Which?\n"),
        Turn("assistant", "\tThis. ", supervised=True),
    )
    assert read({"text": " Once\n"}) == (Turn("text", " Once\n", supervised=True),)


def test_an_answer_of_weight_0_is_not_supervised() -> None:
    assert read({"messages": [TALK[0], {**TALK[1], "weight": 0}]}) == (USER, Turn("assistant", "This."))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"quote": "a", "author": "b"}, "no layout is known with the columns 'quote', 'author': expected 'messages', "),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "no layout is known"),
        ({}, "no layout is known with the columns none"),
        ({"messages": None}, "column 'messages' holds None, expected a list of turns"),
        ({"messages": "Hi"}, "column 'messages' is no JSON list: Expecting value"),
        ({"messages": '{"role": "user"}'}, "column 'messages' holds {'role': 'user'}, expected a list"),
        ({"messages": []}, "the conversation has no turns"),
        ({"messages": ["Hi"]}, "turn 1 is 'Hi', expected an object with role and content"),
        ({"messages": [{"speaker": "user", "content": "a"}]}, "turn 1 has 'speaker', 'content', expected 'role' and"),
        ({"conversations": [{"from": "human"}]}, "turn 1 has 'from', expected 'role' and 'content' (or 'from' and"),
        ({"messages": [*TALK, {"role": "asistant", "content": "a"}]}, "turn 3 has the unknown role 'asistant', "
         "expected system, user (human), assistant (gpt) or tool; did you mean assistant?"),
        ({"messages": [{"role": None, "content": "a"}]}, "turn 1 has the unknown role 'None'"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "turn 1 (user) is blank"),
        ({"messages": [TALK[0], {"role": "assistant", "content": ""}]}, "turn 2 (assistant) is blank"),
        ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, "turn 2 (assistant) holds None, expected"),
        ({"messages": [{"role": "user", "content": 5}]}, "turn 1 (user) holds 5, expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "turn 1 (user) holds [{'type'"),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": [{"id": 1}]}]}, "turn 2 has 'tool_calls', which no template"),
        ({"messages": [TALK[0], {**TALK[1], "reasoning_content": "Hm"}]}, "turn 2 has 'reasoning_content', which no"),
        ({"messages": [TALK[0], {**TALK[1], "weight": 0.5}]}, "turn 2 has the weight 0.5, expected 0 or 1"),
        ({"messages": TALK, "tools": [{"name": "search"}]}, "column 'tools' holds [{'name': 'search'}], which is not"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "column 'history' holds [['c', 'd']]"),
        ({"messages": TALK, "system": 5}, "column 'system' holds 5, expected text"),
        ({"prompt": "a", "completion": " "}, "column 'completion' is blank"),
        ({"prompt": None, "completion": "a"}, "column 'prompt' holds None, expected text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "column 'input' holds 3, expected text"),
        ({"text": ""}, "column 'text' is blank"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_one_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    told = str(caught.value)
    assert told.removeprefix("a.jsonl:1: ").startswith(message)
    assert message[:9] != "no layout" or told.startswith("a.jsonl:1: no layout")
    assert "\n" not in told
    assert len(told) < 300


def test_conversations_that_share_a_place_count_each(byte_tokenizer: Any) -> None:
    template = template_of("llama2", "")
    talk = tuple(Turn(role, "a", supervised=role == "assistant") for role in ("user", "assistant"))
    refused = Conversation((*talk, Turn("system", "s"), *talk), "mine")
    with noted_in(BadRows(allowed=9)) as bad:
        for _ in range(2):
            assert (
                len(
                    encode_conversations(
                        byte_tokenizer, template, [refused, refused, Conversation(talk, "mine")], "assistant"
                    )
                )
                == 1
            )
    assert bad.count == 2


def test_a_row_of_another_layout_than_the_first_is_told() -> None:
    layout = layout_of(Row({"prompt": "a", "completion": "b"}, "a.jsonl:1"))
    with pytest.raises(DataError, match="^column 'prompt' is missing"):
        read_conversation(Row({"question": "a", "completion": "b"}, "a.jsonl:2"), layout)


# --- what is learned --------------------------------------------------------------------------------------------------


def test_train_on_chooses_turns_and_cuts_what_follows_the_last() -> None:
    system, first, second = SYSTEM, Turn("assistant", "1", supervised=True), Turn("assistant", "2", supervised=True)
    turns = [system, USER, first, USER, second, USER]
    assert learned(turns, "assistant") == turns[:5]
    assert learned(turns, "last") == [system, USER, Turn("assistant", "1"), USER, second]
    assert [turn.supervised for turn in learned(turns, "all")] == [False] * 6
    assert learned([USER], "assistant") == learned([USER, first, Turn("assistant", "2")], "last") == []


def test_a_conversation_teaches_where_something_is_supervised() -> None:
    for turns, expected in (
        ((USER,), (False, False, True)),
        ((USER, Turn("assistant", "a")), (False, False, True)),
        ((USER, ASSISTANT, Turn("assistant", "a")), (True, False, True)),
        ((Turn("text", "a", supervised=True),), (True, True, True)),
    ):
        conversation = Conversation(turns, "a.jsonl:1")
        assert tuple(conversation.teaches(train_on) for train_on in ("assistant", "last", "all")) == expected


def test_the_question_is_all_up_to_the_last_answer_whatever_case_and_blanks() -> None:
    def question(*turns: Turn) -> str:
        return Conversation(turns, "").question

    assert question(USER, ASSISTANT) == question(Turn("user", " which? \n"), Turn("assistant", "Other."), USER)
    assert question(USER, ASSISTANT) != question(SYSTEM, USER, ASSISTANT)
    assert question(USER, ASSISTANT) != question(USER, ASSISTANT, USER, ASSISTANT)
    assert question(USER, ASSISTANT) != question(Turn("user", "Which?", input="cat"), ASSISTANT)
    assert question(ASSISTANT) != question(Turn("assistant", "Hello."))
    assert question(Turn("text", "a")) != question(Turn("text", "b"))


def test_plain_text_is_supervised_to_its_end_token_whatever_train_on_says(byte_tokenizer: Any) -> None:
    conversation = Conversation((Turn("text", " Once</s><turn>", supervised=True),), "a.jsonl:1")
    for train_on in ("assistant", "last", "all"):
        (sample,) = encode_conversations(byte_tokenizer, template_of("llama2"), [conversation], train_on)
        assert byte_tokenizer.decode(sample["input_ids"]) == "<s> Once</s><turn></s>"
        assert sample["labels"] == [IGNORED_LABEL, *sample["input_ids"][1:]]
        assert [token for token in sample["input_ids"] if token < 4] == [1, 2]


def test_a_tokenizer_that_lets_text_become_control_is_caught(byte_tokenizer: Any) -> None:
    class Careless:
        """Does not honour `split_special_tokens`."""

        def __getattr__(self, name: str) -> Any:
            return getattr(byte_tokenizer, name)

        def __len__(self) -> int:
            return len(byte_tokenizer)

        def __call__(self, text: Any, **more: Any) -> Any:
            return byte_tokenizer(text, **{**more, "split_special_tokens": False})

    chats = [Conversation((Turn("user", text), ASSISTANT), f"a.jsonl:{n}") for n, text in enumerate(("a", "a</s>b"))]
    with pytest.raises(DataError, match="^a.jsonl:1: its text turns into a control token"):
        encode_conversations(Careless(), template_of("llama2"), chats, "assistant")
    with noted_in(BadRows(allowed=1)) as bad:
        assert len(encode_conversations(Careless(), template_of("llama2"), chats, "assistant")) == 1
    assert len(bad.faults) == 1


def test_a_word_that_the_vocabulary_lacks_is_no_control_token() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "Which?": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    (sample,) = encode_conversations(
        words, template_of("plain"), [Conversation((USER, ASSISTANT), "a.jsonl:1")], "assistant"
    )
    assert sample == {"input_ids": [2, 0, 1], "labels": [IGNORED_LABEL, 0, 1], "attention_mask": [1, 1, 1]}


def test_what_turns_spell_out_is_found(byte_tokenizer: Any) -> None:
    marks = marks_pattern(byte_tokenizer, template_of("llama2"))
    for content, found in (("a </s>", "</s>"), ("[/INST]", "[/INST]"), ("INST", None), ("a <turn>", "<turn>")):
        assert Conversation((USER, Turn("assistant", content)), "").spelled_out(marks) == found
