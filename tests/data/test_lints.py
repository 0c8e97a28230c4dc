"""Each lint finds its own fault, in the row that has it, and no other."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmrecipes.batch import Sample
from llmrecipes.data.lints import (
    ALL_SUPERVISED,
    END_IGNORED,
    LINTS,
    NO_END,
    NO_START,
    NOTHING_SUPERVISED,
    TWO_STARTS,
    answer_opening,
    lint_flags,
    marks_of,
    sample_lints,
    spelled_fault,
    template_fault,
)
from llmrecipes.prompts import Piece, encode_sample, end_piece

BOS, EOS = 1, 2

CHATML = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def sample(ids: list[int], labels: list[int], row: int = 0) -> Sample:
    return Sample(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), row)


FAULTY = {
    NO_START: sample([10, 11, 12, EOS], [-100, -100, 12, EOS]),
    TWO_STARTS: sample([BOS, BOS, 12, EOS], [-100, -100, 12, EOS]),
    NO_END: sample([BOS, 11, 12, 13], [-100, -100, 12, 13]),
    END_IGNORED: sample([BOS, 11, 12, EOS], [-100, -100, 12, -100]),
    ALL_SUPERVISED: sample([BOS, 11, 12, EOS], [BOS, 11, 12, EOS]),
    NOTHING_SUPERVISED: sample([BOS, 11, 12, EOS], [BOS, -100, -100, -100]),
}
HEALTHY = sample([BOS, 11, 12, EOS], [-100, -100, 12, EOS])


def told(samples: list[Sample], tokenizer: Any) -> list[set[str]]:
    flags = lint_flags(samples, marks_of(tokenizer))
    return [{name for name, found in flags.items() if found[place]} for place in range(len(samples))]


def test_every_lint_has_a_faulty_sample_here() -> None:
    assert set(FAULTY) == set(LINTS)


@pytest.mark.parametrize("lint", LINTS)
def test_a_lint_finds_its_fault_alone_and_in_its_row(lint: str, byte_tokenizer: Any) -> None:
    rows = [HEALTHY, FAULTY[lint], HEALTHY]
    rows = [replace(one, row=row) for row, one in enumerate(rows)]
    assert told(rows, byte_tokenizer) == [set(), {lint}, set()]


def test_samples_are_linted_together_as_they_are_alone(byte_tokenizer: Any, random_samples: Any) -> None:
    short = sample([BOS, 11], [-100, 11], row=200)  # behind one that ends as it should
    faulty = [replace(one, row=100 + place) for place, one in enumerate(FAULTY.values())]
    rows = [*random_samples(30), *faulty, replace(HEALTHY, row=199), short]
    assert told(rows, byte_tokenizer) == [told([one], byte_tokenizer)[0] for one in rows]


def test_a_template_may_break_the_line_after_its_end_token(byte_tokenizer: Any) -> None:
    assert told([sample([BOS, 11, 12, EOS, 30], [-100, -100, 12, EOS, 30])], byte_tokenizer) == [set()]


def test_an_end_token_in_the_middle_closes_nothing(byte_tokenizer: Any) -> None:
    assert told([sample([BOS, 11, EOS, 12, 13], [-100, -100, -100, 12, 13])], byte_tokenizer) == [{NO_END}]


def test_pieces_of_one_row_need_one_start_and_one_end(byte_tokenizer: Any) -> None:
    pieces = [
        sample([BOS, 11, 12, 13], [-100, -100, 12, 13], row=7),
        sample([14, 15, 16], [14, 15, 16], row=7),
        sample([17, EOS], [17, EOS], row=7),
    ]
    assert not {NO_START, NO_END} & set.union(*told(pieces, byte_tokenizer))


def test_any_control_token_but_start_padding_and_unknown_may_close_an_answer(byte_tokenizer: Any) -> None:
    turn = byte_tokenizer.convert_tokens_to_ids("<turn>")
    assert set(marks_of(byte_tokenizer).ends) == {EOS, turn}
    assert told([sample([BOS, 11, 12, turn], [-100, -100, 12, turn])], byte_tokenizer) == [set()]


def test_an_encoded_sample_is_healthy(byte_tokenizer: Any) -> None:
    pieces = [Piece("ask"), Piece("answer", supervised=True), end_piece(byte_tokenizer)]
    row = encode_sample(byte_tokenizer, pieces)
    assert sample_lints(sample(row["input_ids"], row["labels"]), byte_tokenizer, marks_of(byte_tokenizer)) == []


@pytest.fixture
def chat_tokenizer(byte_tokenizer: Any) -> Any:
    byte_tokenizer.chat_template = CHATML
    yield byte_tokenizer
    byte_tokenizer.chat_template = None


def chat(tokenizer: Any, *pieces: Piece) -> Sample:
    row = encode_sample(tokenizer, [*pieces, Piece("hi", supervised=True), end_piece(tokenizer)])
    return sample(row["input_ids"], row["labels"])


def test_a_prompt_at_odds_with_the_tokenizers_own_template_is_told(chat_tokenizer: Any) -> None:
    assert answer_opening(chat_tokenizer) == "</s>\n<turn>assistant"
    turn, end = Piece("<turn>", control=True), Piece("</s>", control=True)
    like = chat(chat_tokenizer, turn, Piece("user\nask"), end, Piece("\n"), turn, Piece("assistant\n"))
    assert template_fault(like, chat_tokenizer) is None
    assert "<turn>assistant" in str(template_fault(chat(chat_tokenizer, Piece("ask\nAnswer:")), chat_tokenizer))


def test_without_a_template_of_its_own_there_is_nothing_to_be_at_odds_with(byte_tokenizer: Any) -> None:
    assert answer_opening(byte_tokenizer) == ""
    assert template_fault(chat(byte_tokenizer, Piece("ask")), byte_tokenizer) is None


def test_a_template_that_cannot_be_rendered_is_no_measure(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert answer_opening(chat_tokenizer) == ""


def test_a_control_token_in_plain_letters_is_told(byte_tokenizer: Any) -> None:
    assert "<|im_start|>" in str(spelled_fault(chat(byte_tokenizer, Piece("<|im_start|>user")), byte_tokenizer))
    assert "</s>" in str(spelled_fault(chat(byte_tokenizer, Piece("a</s>b")), byte_tokenizer))
    assert spelled_fault(chat(byte_tokenizer, Piece("</s>", control=True)), byte_tokenizer) is None
