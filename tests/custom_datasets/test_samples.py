"""Laws of every preprocessor that is shipped: what is masked, what is supervised, and that no split is another."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmrecipes.data.rows import BadRows, noted_in
from llmrecipes.errors import DataError
from llmrecipes.prompts import IGNORED_LABEL, encode_prompt

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"

Samples = list[dict[str, list[int]]]


def build_tokenizer(*, opens_with_bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens: every text there and back, `<s>` and `</s>` as control tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    corpus = ["Summarize this dialog: [INST] a question [/INST] an answer", "What is 12 plus 34? 12 + 34 = 46"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    if opens_with_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {opens: build_tokenizer(opens_with_bos=opens) for opens in (True, False)}


@pytest.fixture(params=[True, False], ids=["opens with <s>", "opens with nothing"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


class Case(NamedTuple):
    """One row of a shipped data set, and what the model is given and should say."""

    row: Callable[[str], dict[str, str]]
    """from a word that makes rows differ"""
    prompt: str
    answer: str
    answer_column: str


WORD = "w</s>{x}<s>"
"""What rows may hold: control tokens spelled out, and braces that `str.format` could trip over."""

CASES = {
    "samsum": Case(
        lambda word: {"id": "1", "dialogue": f"A: {word}\r\nB: no", "summary": f"A says {word}."},
        f"Summarize this dialog:\nA: {WORD}\r\nB: no\n---\nSummary:\n",
        f"A says {WORD}.",
        "summary",
    ),
    "alpaca": Case(
        lambda word: {"instruction": f"Repeat {word}", "input": "once", "output": word, "text": "x"},
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        f"### Instruction:\nRepeat {WORD}\n\n### Input:\nonce\n\n### Response:",
        WORD,
        "output",
    ),
    "grammar": Case(
        lambda word: {"input": f"he say {word}", "target": f"He says {word}."},
        f"Correct this to standard English: he say {WORD}\n---\nCorrected: ",
        f"He says {WORD}.",
        "target",
    ),
    "arithmetic": Case(
        lambda word: {"instruction": f"Add {word}.", "input": "1 + 2", "output": f"{word} = 3", "answer": "3"},
        f"Add {WORD}.\n1 + 2\n---\nAnswer:\n",
        f"{WORD} = 3",
        "output",
    ),
    "guanaco": Case(
        lambda word: {"text": f"### Human: Say {word}.### Assistant: {word} it is."},
        f"[INST] Say {WORD}. [/INST]",
        f"{WORD} it is.",
        "text",
    ),
}


def load_module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"shipped_{name}", ROOT / "custom_datasets" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def preprocessed(name: str, tokenizer: Any, split: str, data_path: Path | str = "", **more: str) -> Samples:
    config = SimpleNamespace(dataset=f"{name}_dataset", data_path=str(data_path), train_split="train", **more)
    return list(getattr(load_module(name), f"get_preprocessed_{name}")(config, tokenizer, split))


def save_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_splits(folder: Path, case: Case) -> None:
    for split in ("train", "validation", "test"):
        save_lines(folder / f"{split}.jsonl", [case.row(f"{split} {number}") for number in range(3)])


def said(tokenizer: Any, sample: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in sample["labels"] if label != IGNORED_LABEL])


def start(tokenizer: Any) -> list[int]:
    return tokenizer("")["input_ids"]


@pytest.mark.parametrize("name", CASES)
def test_the_prompt_is_masked_and_the_answer_with_its_end_is_supervised(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    case = CASES[name]
    save_lines(tmp_path / "train.jsonl", [case.row(WORD)])
    (sample,) = preprocessed(name, tokenizer, "train", tmp_path)
    plain = tokenizer(case.prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    prompt_length = len(start(tokenizer)) + len(plain)
    assert sample["input_ids"][:prompt_length] == start(tokenizer) + plain
    assert sample["labels"][:prompt_length] == [IGNORED_LABEL] * prompt_length
    assert sample["labels"][prompt_length:] == sample["input_ids"][prompt_length:]
    assert said(tokenizer, sample) == case.answer + "</s>"
    assert sample["attention_mask"] == [1] * len(sample["input_ids"])


@pytest.mark.parametrize("name", CASES)
def test_inference_sees_the_very_prompt_of_training(name: str, tokenizer: Any, tmp_path: Path) -> None:
    case = CASES[name]
    save_lines(tmp_path / "train.jsonl", [case.row("word")])
    (sample,) = preprocessed(name, tokenizer, "train", tmp_path)
    prompt = encode_prompt(tokenizer, case.prompt.replace(WORD, "word"))
    assert sample["input_ids"][: len(prompt)] == prompt
    assert sample["labels"][: len(prompt) + 1].count(IGNORED_LABEL) == len(prompt)


@pytest.mark.parametrize("name", CASES)
def test_there_is_one_start_and_one_end_whatever_the_text_spells_out(name: str, tokenizer: Any, tmp_path: Path) -> None:
    save_lines(tmp_path / "train.jsonl", [CASES[name].row(WORD)])
    (sample,) = preprocessed(name, tokenizer, "train", tmp_path)
    starts = [at for at, token in enumerate(sample["input_ids"]) if token == tokenizer.bos_token_id]
    ends = [at for at, token in enumerate(sample["input_ids"]) if token == tokenizer.eos_token_id]
    assert starts == [0] * len(start(tokenizer))
    assert ends == [len(sample["input_ids"]) - 1]


@pytest.mark.parametrize("name", CASES)
def test_no_split_is_another_or_shares_a_row_with_it(name: str, tokenizer: Any, tmp_path: Path) -> None:
    save_splits(tmp_path, CASES[name])
    splits = ["train", "validation"] if name == "alpaca" else ["train", "validation", "test"]
    for split in splits:
        samples = preprocessed(name, tokenizer, split, tmp_path)
        assert len(samples) == 3
        assert all(f"{split} {number}" in said(tokenizer, sample) for number, sample in enumerate(samples))


@pytest.mark.parametrize("name", CASES)
def test_a_split_that_is_not_there_is_refused(name: str, tokenizer: Any, tmp_path: Path) -> None:
    save_splits(tmp_path, CASES[name])
    with pytest.raises(DataError, match=r"no (file for the )?split 'dev'"):
        preprocessed(name, tokenizer, "dev", tmp_path)


@pytest.mark.parametrize("name", ["samsum", "grammar", "arithmetic"])
def test_a_blank_answer_is_named_by_file_and_line(name: str, tokenizer: Any, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "train.jsonl"
    save_lines(path, [case.row("a"), {**case.row("b"), case.answer_column: " \n"}])
    with pytest.raises(DataError, match=f"^{path}:2: column '{case.answer_column}' is blank"):
        preprocessed(name, tokenizer, "train", tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_an_answer_that_is_no_text_is_named_by_file_and_line(name: str, tokenizer: Any, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({**case.row("a"), case.answer_column: 5}))
    with pytest.raises(DataError, match=f"^{path}:1: column '{case.answer_column}' holds 5, expected text"):
        preprocessed(name, tokenizer, "train", tmp_path)


@pytest.mark.parametrize("name", ["samsum", "alpaca", "guanaco"])
def test_without_a_path_the_hub_is_asked_and_the_way_out_is_named(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=f"^hub data set [a-z/-]+, split train: .*--{name}_dataset.data_path"):
        preprocessed(name, tokenizer, "train")


# --- one by one -------------------------------------------------------------------------------------------------------


def test_samsum_leaves_out_blank_dialogues_and_says_so(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = CASES["samsum"].row
    save_lines(tmp_path / "train.jsonl", [row("a"), {**row("b"), "dialogue": " \n"}, row("c")])
    samples = preprocessed("samsum", tokenizer, "train", tmp_path)
    assert [said(tokenizer, sample) for sample in samples] == ["A says a.</s>", "A says c.</s>"]
    assert "left out 1 of 3 rows" in caplog.text


def test_samsum_reads_the_real_corpus(caplog: pytest.LogCaptureFixture) -> None:
    folder = SHARED / "data" / "samsum"
    if not folder.is_dir():
        pytest.skip(f"no SAMSum corpus at {folder}")
    counts = {split: len(preprocessed("samsum", TOKENIZERS[True], split, folder)) for split in ("validation", "test")}
    assert counts == {"validation": 818, "test": 819}
    assert not caplog.text


@pytest.mark.parametrize("blank", ["", " "])
def test_alpaca_has_another_prompt_where_there_is_no_input(tokenizer: Any, tmp_path: Path, blank: str) -> None:
    save_lines(tmp_path / "train.jsonl", [{"instruction": "Sing.", "input": blank, "output": "La."}])
    (sample,) = preprocessed("alpaca", tokenizer, "train", tmp_path)
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSing.\n\n### Response:"
    )
    prompt_ids = encode_prompt(tokenizer, prompt)
    assert sample["input_ids"][: len(prompt_ids)] == prompt_ids
    assert sample["labels"][: len(prompt_ids)] == [IGNORED_LABEL] * len(prompt_ids)
    assert said(tokenizer, sample) == "La.</s>"


def alpaca_rows(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"Repeat {n}", "input": "", "output": f"{n}."} for n in range(count)]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_alpaca_undivided_is_divided_without_a_shared_question(tokenizer: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "alpaca_data.json"
    path.write_text(json.dumps([*alpaca_rows(203), {**alpaca_rows(8)[7], "output": "seven, in other words"}]))
    held_out = [said(tokenizer, sample) for sample in preprocessed("alpaca", tokenizer, name, path)]
    train = [said(tokenizer, sample) for sample in preprocessed("alpaca", tokenizer, "train", path)]
    assert held_out == [f"{n}.</s>" for n in range(200)]
    assert train == ["200.</s>", "201.</s>", "202.</s>"]


def test_alpaca_refuses_a_set_too_small_to_divide_and_a_split_it_has_not(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "alpaca_data.json"
    path.write_text(json.dumps(alpaca_rows(200)))
    with pytest.raises(DataError, match="the first 200 rows are held out, and none is left to train on"):
        preprocessed("alpaca", tokenizer, "train", path)
    with pytest.raises(DataError, match="alpaca has no split 'test'"):
        preprocessed("alpaca", tokenizer, "test", path)


@pytest.mark.parametrize("place", [3, 202])
def test_alpacas_bad_rows_are_told_with_their_place_wherever_they_stand(
    tokenizer: Any, tmp_path: Path, place: int
) -> None:
    rows: list[Any] = alpaca_rows(205)
    rows[place]["instruction"] = ["no", "text"]
    path = tmp_path / "alpaca_data.json"
    path.write_text(json.dumps(rows, indent=0))
    with pytest.raises(DataError, match=r"alpaca_data.json:\d+: column 'instruction' holds \['no', 'text'\], expected"):
        preprocessed("alpaca", tokenizer, "train", path)
    with noted_in(BadRows(allowed=1)) as bad:
        train = preprocessed("alpaca", tokenizer, "train", path)
    assert bad.count == 1
    assert len(train) == (5 if place == 3 else 4)


def test_alpaca_leaves_out_rows_without_an_output_and_says_so(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_lines(tmp_path / "train.jsonl", [*alpaca_rows(2), {"instruction": "Draw.", "input": "", "output": " "}])
    assert len(preprocessed("alpaca", tokenizer, "train", tmp_path)) == 2
    assert "left out 1 of 3 rows" in caplog.text


def test_grammar_takes_a_path_for_a_split_as_llama_recipes_did(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gtrain_10k.csv").write_text("input,target\nhe go,He goes.\n")
    (tmp_path / "train.csv").write_text("input,target\nhe go,Not this.\n")
    (tmp_path / "elsewhere").mkdir()
    for split, data_path, current in (
        (str(tmp_path / "gtrain_10k.csv"), "", "elsewhere"),
        ("gtrain_10k.csv", "", "."),
        ("gtrain_10k.csv", tmp_path, "elsewhere"),
    ):
        monkeypatch.chdir(tmp_path / current)
        (sample,) = preprocessed("grammar", tokenizer, split, data_path)
        assert said(tokenizer, sample) == "He goes.</s>"
    with pytest.raises(DataError, match="no such file"):
        preprocessed("grammar", tokenizer, "gvalidation.csv", tmp_path)


def test_arithmetic_asks_without_an_empty_line_where_there_is_no_input(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("instruction,input,output,answer\nWhat is 1 + 2?,,3,3\n")
    (sample,) = preprocessed("arithmetic", tokenizer, "train", tmp_path)
    prompt = encode_prompt(tokenizer, "What is 1 + 2?\n---\nAnswer:\n")
    assert sample["input_ids"][: len(prompt)] == prompt


def test_arithmetic_without_a_path_reads_what_create_data_wrote(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="make it with `llmrecipes data create arithmetic`"):
        preprocessed("arithmetic", tokenizer, "train")
    module = load_module("arithmetic")
    module.create_data(module.ArithmeticData(train_rows=30, validation_rows=20, test_rows=10))
    counts = [len(preprocessed("arithmetic", tokenizer, split)) for split in ("train", "validation", "test")]
    assert counts == [30, 20, 10]


# --- guanaco ----------------------------------------------------------------------------------------------------------

RAW = "### Human: Which?### Assistant: This.### Human: Why?### Assistant: Because."
TEMPLATE = "<s>[INST] Which? [/INST] This. </s><s>[INST] Why? [/INST] Because. </s>"


def chat(tokenizer: Any, folder: Path, text: str) -> Samples:
    save_lines(folder / "train.jsonl", [{"text": text}])
    return preprocessed("guanaco", tokenizer, "train", folder)


def test_guanaco_supervises_every_answer_with_its_end_and_no_question(tokenizer: Any, tmp_path: Path) -> None:
    (sample,) = chat(tokenizer, tmp_path, RAW)
    assert said(tokenizer, sample) == "This.</s>Because.</s>"
    masked = [t for t, label in zip(sample["input_ids"], sample["labels"], strict=True) if label == IGNORED_LABEL]
    opening = "<s>" * len(start(tokenizer))
    assert tokenizer.decode(masked) == opening + "[INST] Which? [/INST][INST] Why? [/INST]"
    assert tokenizer.decode(sample["input_ids"]) == (
        opening + "[INST] Which? [/INST]This.</s>[INST] Why? [/INST]Because.</s>"
    )


def test_guanaco_gives_the_same_ids_in_both_layouts(tokenizer: Any, tmp_path: Path) -> None:
    assert chat(tokenizer, tmp_path, RAW) == chat(tokenizer, tmp_path, TEMPLATE)
    loose = RAW.replace("###", "\n### ", 1).replace("### Assistant: ", "\n\n### Assistant:\n")
    assert chat(tokenizer, tmp_path, loose.replace("###  ", "### ")) == chat(tokenizer, tmp_path, RAW)


@pytest.mark.parametrize(
    "text", [RAW + "### Human: And?", TEMPLATE + "<s>[INST] And? [/INST]", TEMPLATE + "<s>[INST] And? [/INST] </s>"]
)
def test_guanaco_leaves_out_a_question_without_an_answer_and_says_so(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    assert chat(tokenizer, tmp_path, text) == chat(tokenizer, tmp_path, RAW)
    assert "1 of 1 chats have a question at the end" in caplog.text


def test_guanaco_leaves_out_a_chat_of_one_question_but_not_all_of_them(tokenizer: Any, tmp_path: Path) -> None:
    save_lines(tmp_path / "train.jsonl", [{"text": RAW}, {"text": "### Human: Hello?"}])
    assert len(preprocessed("guanaco", tokenizer, "train", tmp_path)) == 1
    with pytest.raises(DataError, match="no row of 1 holds an answer"):
        chat(tokenizer, tmp_path, "### Human: Hello?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hello", "expected a text that begins with '### Human:' or '<s>\\[INST\\]': 'Hello'"),
        ("Well### Human: a### Assistant: b", "expected a text that begins"),
        ("### Human: a### Assistant: ", "turn 1 has a blank answer"),
        ("<s>[INST] a [/INST] </s>", "turn 1 has a blank answer"),
        ("### Human: a### Assistant: ### Human: b### Assistant: c", "turn 1 has a blank answer"),
        ("### Human: a### Assistant: b### Human: ### Assistant: c", "turn 2 has a blank question"),
        (" ", "column 'text' is blank"),
    ],
)
def test_guanaco_names_the_row_that_is_no_chat(tokenizer: Any, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path / 'train.jsonl'}:1: {message}"):
        chat(tokenizer, tmp_path, text)


def test_guanaco_on_the_real_tokenizer_has_one_start_and_llama_2_s_own_ids(tmp_path: Path) -> None:
    folder = SHARED / "tokenizers" / "llama2"
    if not folder.is_dir():
        pytest.skip(f"no Llama-2 tokenizer at {folder}")
    llama = AutoTokenizer.from_pretrained(folder)
    (sample,) = chat(llama, tmp_path, RAW)
    assert chat(llama, tmp_path, TEMPLATE) == [sample]
    official = "<s>[INST] Which? [/INST] This.</s>[INST] Why? [/INST] Because.</s>"
    assert sample["input_ids"] == llama(official, add_special_tokens=False)["input_ids"]
    assert sample["input_ids"].count(llama.bos_token_id) == 1
