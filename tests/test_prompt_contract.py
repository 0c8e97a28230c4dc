"""Laws of the prompt contract: found in the samples, kept beside the weights, and a warning where inference differs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from llmrecipes.batch import Sample
from llmrecipes.errors import ModelError
from llmrecipes.prompt_contract import EXAMINED_SAMPLES, FILE_NAME, PromptContract, load_contract, prompt_contract
from llmrecipes.prompts import Piece, encode_sample, end_piece

TEMPLATE = "Question: {}\n---\nAnswer:\n"
CONTRACT = PromptContract(
    prefix="Question: ",
    suffix="\n---\nAnswer:\n",
    example="Question: a\n---\nAnswer:\n",
    start_token="<s>",
    stop_token_ids=(2,),
    stop_tokens=("</s>",),
    ends_supervised=True,
)
Made = Callable[..., PromptContract]


@pytest.fixture
def contract_of(byte_tokenizer: Any) -> Made:
    """Makes the contract of samples with these prompts; the answers end with `end`."""

    def make(
        prompts: Sequence[str], end: Sequence[Piece] | None = None, tokenizer: Any = byte_tokenizer
    ) -> PromptContract:
        ending = [end_piece(tokenizer)] if end is None else end
        samples = []
        for row, prompt in enumerate(prompts):
            encoded = encode_sample(tokenizer, [Piece(prompt), Piece(f"answer {row}", supervised=True), *ending])
            samples.append(Sample(np.array(encoded["input_ids"]), np.array(encoded["labels"]), row))
        return prompt_contract(tokenizer, samples)

    return make


# --- what is found ----------------------------------------------------------------------------------------------------


def test_what_all_prompts_share_is_the_template(contract_of: Made) -> None:
    contract = contract_of([TEMPLATE.format(word) for word in ("a", "bb", "c d")])
    assert contract == CONTRACT


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    prefix=st.text(max_size=5),
    suffix=st.text(max_size=5),
    words=st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=6),
)
def test_every_training_prompt_keeps_the_contract(
    contract_of: Made, prefix: str, suffix: str, words: list[str]
) -> None:
    prompts = [prefix + word + suffix for word in words]
    contract = contract_of(prompts)
    assert all(contract.mismatch(prompt) is None for prompt in prompts)
    if len(set(words)) > 1:
        assert contract.prefix.startswith(prefix) and contract.suffix.endswith(suffix)


def test_prompts_that_are_all_alike_tell_no_template(contract_of: Made) -> None:
    contract = contract_of(["Write a poem:\n"] * 3)
    assert (contract.prefix, contract.suffix, contract.example) == ("", "", "Write a poem:\n")
    assert contract.mismatch("anything") is None


def test_the_whole_split_is_looked_at(contract_of: Made) -> None:
    count = 5 * EXAMINED_SAMPLES
    prompts = [f"{'A' if row < count // 2 else 'B'} {row}:" for row in range(count)]
    assert (contract_of(prompts).prefix, contract_of(prompts[: count // 2]).prefix) == ("", "A ")


def test_a_tokenizer_without_a_start_gives_none(contract_of: Made, byte_tokenizer: Any) -> None:
    core = type(byte_tokenizer.backend_tokenizer).from_str(byte_tokenizer.backend_tokenizer.to_str())
    core.post_processor = type(core.post_processor)(single="$A", special_tokens=[])
    startless = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    contract = contract_of(["Q: a", "Q: b"], tokenizer=startless)
    assert (contract.start_token, contract.prefix) == ("", "Q: ")


def test_in_a_chat_the_last_turn_is_the_prompt_and_all_before_it(byte_tokenizer: Any) -> None:
    samples = []
    for row, word in enumerate("ab"):
        turns = [Piece(f"[{word}]"), Piece("x", supervised=True), end_piece(byte_tokenizer)]
        encoded = encode_sample(byte_tokenizer, [*turns, *turns])
        samples.append(Sample(np.array(encoded["input_ids"]), np.array(encoded["labels"]), row))
    contract = prompt_contract(byte_tokenizer, samples)
    assert (contract.prefix, contract.suffix, contract.example) == ("[", "]", "[a]x</s>[a]")


# --- how answers end --------------------------------------------------------------------------------------------------


def test_answers_that_end_with_another_control_token_stop_there_too(contract_of: Made) -> None:
    contract = contract_of(["a", "b"], end=[Piece("<turn>", supervised=True, control=True)])
    assert (contract.stop_token_ids, contract.stop_tokens) == ((2, 3), ("</s>", "<turn>"))
    assert contract.ends_supervised


def test_a_control_token_that_only_the_tokenizers_file_knows_of_counts(contract_of: Made, byte_tokenizer: Any) -> None:
    core = type(byte_tokenizer.backend_tokenizer).from_str(byte_tokenizer.backend_tokenizer.to_str())
    core.add_special_tokens([AddedToken("<eot>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    contract = contract_of(["a", "b"], end=[Piece("<eot>", supervised=True, control=True)], tokenizer=tokenizer)
    assert contract.stop_tokens == ("</s>", "<eot>")


def test_answers_without_an_end_are_told(contract_of: Made) -> None:
    contract = contract_of(["a", "b"], end=[])
    assert not contract.ends_supervised
    assert contract.stop_tokens == ("</s>",)


def test_an_end_token_that_is_not_supervised_is_none(contract_of: Made) -> None:
    assert not contract_of(["a", "b"], end=[Piece("</s>", control=True)]).ends_supervised


def test_one_answer_that_was_cut_off_does_not_take_the_end_from_the_others(byte_tokenizer: Any) -> None:
    encoded = encode_sample(byte_tokenizer, [Piece("a"), Piece("b", supervised=True), end_piece(byte_tokenizer)])
    ids, labels = np.array(encoded["input_ids"]), np.array(encoded["labels"])
    assert prompt_contract(byte_tokenizer, [Sample(ids, labels, 0), Sample(ids[:-1], labels[:-1], 1)]).ends_supervised


def test_an_unknown_character_ends_nothing(byte_tokenizer: Any) -> None:
    ids = np.array([1, 10, 0])
    contract = prompt_contract(byte_tokenizer, [Sample(ids, np.array([-100, 10, 0]), 0)])
    assert contract.stop_tokens == ("</s>",) and not contract.ends_supervised


# --- a prompt at inference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Question: x\n---\nAnswer:\n", "<s>Question: \n---\nAnswer:\n"])
def test_a_prompt_of_the_same_form_is_no_mismatch(prompt: str) -> None:
    assert CONTRACT.mismatch(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("Question: x\n---\nAnswer:", r"training prompts end with '\n---\nAnswer:\n', this one ends with "),
        ("Question: x\n---\nAnswer:\n\n", r"training prompts end with '\n---\nAnswer:\n', this one ends with "),
        ("What is x?\n---\nAnswer:\n", "training prompts begin with 'Question: ', this one begins with 'What is x?'"),
        ("", r"training prompts end with '\n---\nAnswer:\n', this one ends with ''"),
    ],
)
def test_a_prompt_of_another_form_is_told(prompt: str, told: str) -> None:
    message = CONTRACT.mismatch(prompt)
    assert message is not None and message.startswith(told)
    assert "\n" not in message


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    contract = replace(
        CONTRACT, prefix="问题：\u2028", suffix='"\\', stop_token_ids=(2, 5), stop_tokens=("</s>", "<|é|>")
    )
    contract.save(tmp_path)
    assert load_contract(tmp_path) == contract
    assert "问题" in (tmp_path / FILE_NAME).read_text(encoding="utf-8")


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert load_contract(tmp_path) is None
    assert load_contract(tmp_path / "nowhere") is None


def test_keys_of_a_later_version_are_left_alone(tmp_path: Path) -> None:
    CONTRACT.save(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    assert load_contract(tmp_path) == CONTRACT


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stop_token_ids": None}, "mend or remove it"),
        ({"suffix": None}, "suffix is no text"),
        ({"stop_token_ids": ["2"]}, "stop_token_ids is no list of int"),
        ({"stop_tokens": [2]}, "stop_tokens is no list of str"),
        ({"prefix": 5}, "prefix is no text"),
    ],
)
def test_a_key_of_another_kind_is_told(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    CONTRACT.save(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert_refused(tmp_path, told)


@pytest.mark.parametrize("name", [item.name for item in fields(PromptContract)])
def test_a_missing_key_is_named(tmp_path: Path, name: str) -> None:
    CONTRACT.save(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))
    assert_refused(tmp_path, f"no '{name}'")


@pytest.mark.parametrize("content", [b"text", b"", b"[]", b"null", b"{", b"\xff\xfe{}"])
def test_a_file_that_is_no_contract_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    assert_refused(tmp_path, "mend or remove it")


def assert_refused(folder: Path, told: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_contract(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / FILE_NAME}: not the prompt.json that fine-tuning writes (")
    assert told in message and "\n" not in message
