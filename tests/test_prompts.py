"""Laws of text and ids: training and inference see the same ids, and no text becomes a control token by itself."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmrecipes.errors import DataError
from llmrecipes.prompts import (
    IGNORED_LABEL,
    EncodedSamples,
    Lasting,
    Piece,
    control_id,
    encode_pairs,
    encode_prompt,
    encode_sample,
    encode_samples,
    end_piece,
    start_ids,
)

LLAMA = Path(__file__).parents[2] / "shared" / "tokenizers" / "llama2"

TEXTS = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40)
SPELT = ["<s>", "</s>", "<turn>", "<unk>", "<s></s>", "a</s> b", " <turn>\n"]
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@cache
def llama_tokenizer() -> Any:
    if not LLAMA.is_dir():
        pytest.skip(f"no Llama-2 tokenizer at {LLAMA}")
    return AutoTokenizer.from_pretrained(LLAMA)


@pytest.fixture
def startless(byte_tokenizer: Any) -> PreTrainedTokenizerFast:
    """The byte tokenizer, but it opens no text with `<s>`, as GPT-2's, Qwen's and SmolLM's open none."""
    core = type(byte_tokenizer.backend_tokenizer).from_str(byte_tokenizer.backend_tokenizer.to_str())
    core.post_processor = type(core.post_processor)(single="$A", special_tokens=[])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(params=["bytes", "bytes without a start", "Llama-2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "Llama-2":
        return llama_tokenizer()
    return request.getfixturevalue("byte_tokenizer" if request.param == "bytes" else "startless")


def spells_nothing(text: str) -> bool:
    return "<" not in text


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of plain text; a control token spelled out in it stays text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


# --- the law ----------------------------------------------------------------------------------------------------------


@quick
@given(prompt=TEXTS.filter(spells_nothing), answer=TEXTS)
def test_a_typed_prompt_has_the_ids_it_had_in_training(tokenizer: Any, prompt: str, answer: str) -> None:
    pieces = [Piece(prompt), Piece(answer, supervised=True), end_piece(tokenizer)]
    sample = encode_sample(tokenizer, pieces)
    typed = encode_prompt(tokenizer, prompt)
    assert sample["input_ids"][: len(typed)] == typed
    assert sample["labels"][: len(typed)] == [IGNORED_LABEL] * len(typed)
    assert sample["labels"][len(typed) :] == sample["input_ids"][len(typed) :]
    assert sample["input_ids"][len(typed) :] == [*text_ids(tokenizer, answer), tokenizer.eos_token_id]


@quick
@given(parts=st.lists(TEXTS, min_size=1, max_size=4))
def test_where_a_prompt_is_cut_into_pieces_does_not_show(tokenizer: Any, parts: list[str]) -> None:
    answer = Piece("so", supervised=True)
    whole = encode_sample(tokenizer, [Piece("".join(parts)), answer])
    assert encode_sample(tokenizer, [*map(Piece, parts), answer]) == whole


@quick
@given(prompt=TEXTS)
def test_a_sample_opens_with_one_start_token_or_none(tokenizer: Any, prompt: str) -> None:
    start = start_ids(tokenizer)
    assert len(start) <= 1
    control = [Piece(token, control=True) for token in ["<s>"] * len(start)]
    for pieces in ([Piece(prompt)], [*control, Piece(prompt)]):
        ids = encode_sample(tokenizer, [*pieces, end_piece(tokenizer)])["input_ids"]
        assert ids[: len(start)] == start
        assert ids.count(tokenizer.bos_token_id) == len(start)


@quick
@given(pieces=st.lists(st.builds(Piece, TEXTS, st.booleans()), min_size=1, max_size=5))
def test_the_three_lists_agree_and_the_mask_follows_the_pieces(tokenizer: Any, pieces: list[Piece]) -> None:
    sample = encode_sample(tokenizer, pieces)
    ids, labels = sample["input_ids"], sample["labels"]
    assert len(ids) == len(labels) == len(sample["attention_mask"])
    assert set(sample["attention_mask"]) <= {1}
    assert all(label in (token, IGNORED_LABEL) for token, label in zip(ids, labels, strict=True))
    supervised = "".join(piece.text for piece in pieces if piece.supervised)
    if not any(piece.text for piece in pieces if not piece.supervised):
        assert [label for label in labels if label != IGNORED_LABEL] == text_ids(tokenizer, supervised)
    if not supervised:
        assert set(labels) <= {IGNORED_LABEL}


# --- control tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelt", SPELT)
def test_a_control_token_spelt_out_in_text_stays_text(tokenizer: Any, spelt: str) -> None:
    ids = text_ids(tokenizer, spelt)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == spelt.strip()
    sample = encode_sample(tokenizer, [Piece(spelt), Piece(spelt, supervised=True), end_piece(tokenizer)])
    control = [token for token in sample["input_ids"] if token in tokenizer.all_special_ids]
    assert control == [*start_ids(tokenizer), tokenizer.eos_token_id]


def test_only_a_control_piece_is_a_control_token(byte_tokenizer: Any) -> None:
    sample = encode_sample(
        byte_tokenizer, [Piece("<turn>", control=True), Piece("a"), Piece("</s>", supervised=True, control=True)]
    )
    assert sample["input_ids"] == [1, 3, *text_ids(byte_tokenizer, "a"), 2]
    assert sample["labels"] == [IGNORED_LABEL] * 3 + [2]


def test_control_tokens_are_supervised_or_not_each_by_itself(byte_tokenizer: Any) -> None:
    pieces = [
        Piece("<turn>", control=True),
        Piece("</s>", supervised=True, control=True),
        Piece("<turn>", control=True),
    ]
    sample = encode_sample(byte_tokenizer, pieces)
    assert (sample["input_ids"], sample["labels"]) == ([1, 3, 2, 3], [-100, -100, 2, -100])


def test_whoever_types_a_prompt_may_write_control_tokens(tokenizer: Any) -> None:
    start, a = start_ids(tokenizer), text_ids(tokenizer, "a")
    assert encode_prompt(tokenizer, "a</s>") == [*start, *a, tokenizer.eos_token_id]
    assert encode_prompt(tokenizer, "<s>a") == [tokenizer.bos_token_id, *a]
    assert encode_prompt(tokenizer, "") == start


def test_a_prompt_of_several_turns_has_its_ids_of_training(tokenizer: Any) -> None:
    turns = [Piece("Which?"), Piece("This.", supervised=True), end_piece(tokenizer), Piece("Why?")]
    sample = encode_sample(tokenizer, [*turns, Piece("So.", supervised=True), end_piece(tokenizer)])
    typed = encode_prompt(tokenizer, "Which?") + encode_prompt(tokenizer, "This.</s>Why?")[len(start_ids(tokenizer)) :]
    assert sample["input_ids"][: len(typed)] == typed


def test_a_token_that_the_vocabulary_lacks_is_named(tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"the tokenizer has no token '<\|im_start\|>', which the prompt template needs"
    ):
        encode_sample(tokenizer, [Piece("<|im_start|>", control=True)])
    assert control_id(tokenizer, "<unk>") == tokenizer.unk_token_id


def test_without_an_end_token_nothing_can_learn_to_stop(startless: PreTrainedTokenizerFast) -> None:
    startless.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        end_piece(startless)


# --- many at once -----------------------------------------------------------------------------------------------------

PAIRS = [(f"{number}?", f"{number}.") for number in range(5)]


def test_what_is_given_as_anything_else_than_rows_is_encoded_at_once(tokenizer: Any, tmp_path: Path) -> None:
    end = end_piece(tokenizer)
    pieces = [[Piece(question), Piece(answer, supervised=True), end] for question, answer in PAIRS]
    expected = [encode_sample(tokenizer, each) for each in pieces]
    for made in (encode_pairs(tokenizer, PAIRS), encode_samples(tokenizer, pieces)):
        assert isinstance(made, list) and made == expected
        assert len(made) == 5 and made[1:3] == expected[1:3] and made[-1] == expected[-1]
    path = tmp_path / "pairs.txt"
    path.write_text("".join(f"{question}\t{answer}\n" for question, answer in PAIRS))
    with path.open() as file:
        from_file = encode_pairs(tokenizer, (tuple(line.rstrip("\n").split("\t")) for line in file))  # type: ignore[misc]
    assert list(from_file) == list(from_file) == expected
    assert list(encode_samples(tokenizer, iter(pieces))) == expected


def test_rows_that_last_are_encoded_when_they_are_gone_through_and_each_time_anew(byte_tokenizer: Any) -> None:
    class Pairs(Lasting):
        times = 0

        def __iter__(self) -> Iterator[tuple[str, str]]:
            self.times += 1
            return iter(PAIRS)

    pairs = Pairs()
    made = encode_pairs(byte_tokenizer, pairs)
    assert isinstance(made, EncodedSamples) and pairs.times == 0
    assert list(made) == list(made) == encode_pairs(byte_tokenizer, PAIRS)
    assert pairs.times == 2


# --- the start token --------------------------------------------------------------------------------------------------


def test_a_start_token_counts_only_where_the_tokenizer_uses_it(byte_tokenizer: Any, startless: Any) -> None:
    assert start_ids(byte_tokenizer) == [1]
    assert startless.bos_token_id == 1 and start_ids(startless) == []
    startless.bos_token = None
    assert start_ids(startless) == []


def test_a_start_token_of_id_0_counts(byte_tokenizer: Any) -> None:
    core = type(byte_tokenizer.backend_tokenizer).from_str(byte_tokenizer.backend_tokenizer.to_str())
    core.post_processor = type(core.post_processor)(single="<unk> $A", special_tokens=[("<unk>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<unk>", eos_token="</s>")
    assert start_ids(tokenizer) == [0]
    assert encode_prompt(tokenizer, "a") == [0, *text_ids(tokenizer, "a")]


# --- Llama-2's own ids ------------------------------------------------------------------------------------------------


def test_llama_2_gets_the_ids_that_meta_gives_it() -> None:
    llama = llama_tokenizer()
    assert encode_prompt(llama, "[INST] Hello [/INST]") == [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962]
    assert encode_prompt(llama, "<s>[INST] Hello [/INST]") == encode_prompt(llama, "[INST] Hello [/INST]")
    assert text_ids(llama, "</s>") == [1533, 29879, 29958]
    sample = encode_sample(llama, [Piece("Answer:\n"), Piece("7", supervised=True), end_piece(llama)])
    assert sample["input_ids"] == [1, 673, 29901, 13, 29871, 29955, 2]
    assert sample["labels"] == [-100, -100, -100, -100, 29871, 29955, 2]
