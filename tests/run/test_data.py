"""`data view`, `check` and `doctor` as the user runs them: what they print, what they leave with."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrecipes.config.data_schema import DataCheckConfig, DataDoctorConfig, DataViewConfig, dataset_flags
from llmrecipes.config.loading import load_config
from llmrecipes.data.files import save_rows
from llmrecipes.errors import ConfigError, DataError
from llmrecipes.reports.tokens import ANSWER, PROMPT, REST
from llmrecipes.run.data import check, doctor, token_texts, tokens_of, view

SAMSUM = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "samsum"
LLAMA2 = Path(__file__).resolve().parents[2].parent / "shared" / "tokenizers" / "llama2"
COMMANDS: dict[str, tuple[type, Callable[..., int]]] = {
    "view": (DataViewConfig, view),
    "check": (DataCheckConfig, check),
    "doctor": (DataDoctorConfig, doctor),
}
WORDINGS = ("{a} - {b}", "What is {a} minus {b}?", "{b} subtracted from {a}", "Start at {a} and go down by {b}.")

PREPROCESSOR = '''
"""Counts; the split decides from where."""

from llmrecipes.prompts import Piece, encode_sample, end_piece


def counts(dataset_config, tokenizer, split):
    first = {"train": 0, "validation": 100, "test": 200, "hostile": 300}[split]
    return [
        encode_sample(tokenizer, [Piece(ask(split, count)), Piece(f" {count}", supervised=True), end_piece(tokenizer)])
        for count in range(first, first + 12)
    ]


def ask(split, number):
    return f"After {number - 1}?" if split != "hostile" else f"<script>alert({number})</script>\\x1b[2J"


def same(dataset_config, tokenizer, split):
    return counts(dataset_config, tokenizer, "train")


def silent(dataset_config, tokenizer, split):
    return [{**row, "labels": [-100] * len(row["labels"])} for row in counts(dataset_config, tokenizer, split)]


def two_splits(dataset_config, tokenizer, split):
    return counts(dataset_config, tokenizer, {"train": "train", "validation": "validation"}[split])
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plugin") / "counts.py"
    path.write_text(PREPROCESSOR)
    return str(path)


@pytest.fixture
def run(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs one command; returns the exit code and what it printed."""

    def command(name: str, word: str, **flags: str) -> tuple[int, str]:
        schema, function = COMMANDS[name]
        given = {"tokenizer_name": str(tiny_folder), **dataset_flags(word), **flags}
        loaded: Any = load_config(schema, given)
        code = function(loaded, None)
        return code, capsys.readouterr().out

    return command


def tutorial(folder: Path, worded: bool, seed: int = 0) -> dict[str, list[tuple[int, int]]]:
    """Writes CSV files as the tutorial does: draws with replacement, cut by head and tail, test a copy of validation.

    Returns the numbers asked for in each split.
    """
    generator = random.Random(seed)
    pairs = [(generator.randint(0, 100), generator.randint(0, 100)) for _ in range(10_000)]
    splits = {"train": pairs[:9500], "validation": pairs[-500:]}
    for name, drawn in splits.items():
        wordings = [generator.choice(WORDINGS) if worded else WORDINGS[0] for _ in drawn]
        rows = [
            {"instruction": "Calculate.", "input": wording.format(a=a, b=b), "output": str(a - b)}
            for wording, (a, b) in zip(wordings, drawn, strict=True)
        ]
        save_rows({folder / f"arithmetic_{name}.csv": rows})
    shutil.copy(folder / "arithmetic_validation.csv", folder / "arithmetic_test.csv")
    return splits


@pytest.mark.parametrize("worded", [False, True])
def test_the_doctor_sees_what_is_wrong_with_the_tutorials_arithmetic(worded: bool, run: Any, tmp_path: Path) -> None:
    splits = tutorial(tmp_path, worded)
    strict = "true" if worded else "false"
    code, text = run("doctor", "arithmetic", strict=strict, **{"arithmetic_dataset.data_path": str(tmp_path)})
    train = set(splits["train"])
    known = sum(pair in train for pair in splits["validation"])
    assert 0.57 < known / 500 < 0.66  # 1 - exp(-9500 / 10201) is 61 %
    found = re.search(r"same numbers in the question and the same answer, (\d+) of 500 rows .* of validation", text)
    assert found is not None
    assert int(found[1]) == known
    assert "test and validation hold the very same rows" in text
    assert "verdict: fit to train on" in text
    assert code == (2 if worded else 0)


def test_the_doctor_finds_no_expression_twice_where_there_is_none(run: Any, tmp_path: Path) -> None:
    generator = random.Random(0)
    pairs = [(a, b) for a in range(60) for b in range(40)]
    generator.shuffle(pairs)
    for name, drawn in (("train", pairs[:2000]), ("validation", pairs[2000:2200]), ("test", pairs[2200:])):
        rows = [
            {"instruction": "Calculate.", "input": generator.choice(WORDINGS).format(a=a, b=b), "output": str(a - b)}
            for a, b in drawn
        ]
        save_rows({tmp_path / f"{name}.csv": rows})
    code, text = run("doctor", "arithmetic", **{"arithmetic_dataset.data_path": str(tmp_path), "strict": "true"})
    assert "verdict: healthy" in text
    assert code == 0


@pytest.mark.skipif(not (SAMSUM.is_dir() and LLAMA2.is_dir()), reason="SAMSum is not to be had here")
def test_the_doctor_counts_the_dialogues_that_samsums_splits_share(run: Any) -> None:
    def dialogues(split: str) -> set[str]:
        lines = (SAMSUM / f"{split}.json").read_text(encoding="utf-8").splitlines()
        return {json.loads(line)["dialogue"] for line in lines if line} - {""}

    _, text = run(
        "doctor", "samsum", tokenizer_name=str(LLAMA2), splits="validation,test",
        **{"samsum_dataset.data_path": str(SAMSUM)},
    )  # fmt: skip
    shared = len(dialogues("validation") & dialogues("test"))
    assert shared == 4
    assert f"{shared} of 819 rows (0.5 %) of test ask what validation asks ({shared} token by token, 0 with" in text


def test_a_healthy_plug_in_passes_all_three(run: Any, plugin: str) -> None:
    for name, last in (("check", "the contract is kept"), ("doctor", "verdict: healthy")):
        code, text = run(name, f"{plugin}:counts")
        assert (code, text.splitlines()[-1]) == (0, last)
    code, text = run("view", f"{plugin}:counts")
    assert code == 0
    assert "lint" not in text


@pytest.mark.parametrize(
    ("function", "said"),
    [("same", "train and validation hold the very same rows"), ("silent", "all labels behind the first are -100")],
)
def test_check_leaves_with_2_where_a_promise_is_broken(function: str, said: str, run: Any, plugin: str) -> None:
    code, text = run("check", f"{plugin}:{function}")
    assert code == 2
    assert said in text
    assert re.search(r"\d of \d+ promises broken", text)


def test_the_doctor_goes_on_where_training_would_stop(run: Any, plugin: str) -> None:
    code, text = run("doctor", f"{plugin}:silent", splits="train")
    assert code == 0
    assert "problem  train: 12 of 12 rows (100.0 %): nothing supervised" in text
    assert "verdict: not fit to train on: 1 problem" in text
    assert run("doctor", f"{plugin}:silent", splits="train", strict="true")[0] == 2


def test_the_doctor_looks_at_a_split_test_only_where_there_is_one(run: Any, plugin: str) -> None:
    assert re.search(r"^test +12 ", run("doctor", f"{plugin}:counts")[1], re.MULTILINE)
    code, text = run("doctor", f"{plugin}:two_splits", strict="true")
    assert code == 0
    assert "note  no split test was looked at" in text
    assert "test" not in run("doctor", f"{plugin}:counts", splits="train,validation")[1]
    with pytest.raises(DataError, match="no file for the split 'gone'"):
        folder = Path(plugin).parent / "rows"
        save_rows({folder / "train.csv": [{"instruction": "a", "input": "b", "output": "c"}]})
        run("doctor", "arithmetic", splits="gone", **{"arithmetic_dataset.data_path": str(folder)})


def test_the_doctors_figures_follow_the_settings(run: Any, plugin: str) -> None:
    _, text = run("doctor", f"{plugin}:counts", context_length="30", batch_size_training="2", overlong="drop")
    lengths = [len(f"<After {number - 1}? {number}>") for number in range(12)]
    assert f"an epoch of train: 12 samples, {sum(lengths)} tokens" in text
    assert re.search(r"packing \(as set\) +6 +3 ", text)  # two samples of 12 to 14 tokens, and not three, fill a row
    _, text = run("doctor", f"{plugin}:counts", batching_strategy="padding", batch_size_training="5")
    assert re.search(r"padding \(as set\) +12 +3 ", text)


def test_view_shows_the_samples_asked_for_in_their_order(run: Any, plugin: str) -> None:
    _, text = run("view", f"{plugin}:counts", rows="11,3", listed_tokens="0")
    assert re.findall(r"^train, sample (\d+)", text, re.MULTILINE) == ["11", "3"]
    assert "<s>After 2?⟦ 3</s>⟧" in text
    table = [line.split() for line in text.split("sample 3")[1].splitlines() if re.match(r" +1 +\d", line)]
    assert [row[1] for row in table] == [str(place) for place in range(12)]
    assert [row[4] for row in table] == ["-"] * 9 + ["yes"] * 3
    assert [row[3] for row in table] == ["prompt"] * 9 + ["answer"] * 3
    assert "".join(row[5] for row in table) == "<s>After␣2?␣3</s>"


def test_all_three_do_without_as_many_bad_rows_as_training_would(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split, first in (("train", 0), ("validation", 100)):
        lines = [f"Add.,{n} + 1,{n + 1}" for n in range(first, first + 12)]
        lines[3:3] = ["Add.,5", "6"]
        (tmp_path / f"{split}.csv").write_text("\n".join(["instruction,input,output", *lines]) + "\n")
    place = {"arithmetic_dataset.data_path": str(tmp_path)}
    for allowed in ("1", "2"):
        flags = {**place, "arithmetic_dataset.skip_bad_rows": allowed}
        code, text = run("check", "arithmetic", **flags)
        assert (code, "2 bad rows, and skip_bad_rows allows 1" in text) == ((2, True) if allowed == "1" else (0, False))
        code, text = run("doctor", "arithmetic", strict="true", splits="train", **flags)
        assert code == 2
        more = " (2 with those below), and skip_bad_rows allows 1" if allowed == "1" else " left out"
        level = "problem" if allowed == "1" else "finding"
        assert f"{level}  train: 2 bad rows{more}: {tmp_path}/train.csv:5: " in text
        caplog.clear()
        _, text = run("view", "arithmetic", rows="11", **flags)
        assert "train, sample 11" in text and "arithmetic, split train: left out 2 bad rows: " in caplog.text
        assert ("so training would refuse them" in caplog.text) == (allowed == "1")
    with pytest.raises(DataError, match="train.csv:5: 2 fields, header has 3"):
        run("view", "arithmetic", rows="11", **place)


def test_view_shows_rows_as_training_packs_them(run: Any, plugin: str) -> None:
    _, text = run("view", f"{plugin}:counts", packed="true", context_length="30", samples="1", listed_tokens="0")
    assert "2 documents" in text
    assert "⟦" in text
    table = [line.split() for line in text.splitlines() if re.match(r" +\d +\d+ +\d+ ", line)]
    restarts = [int(row[0]) for row in table if row[1] == "0"]
    assert restarts == [1, 2]
    assert [row[5] for row in table if row[1] == "0"] == ["<s>", "<s>"]


def test_view_writes_a_page_in_which_data_cannot_act(run: Any, plugin: str, tmp_path: Path) -> None:
    code, text = run("view", f"{plugin}:counts", split="hostile", html=str(tmp_path / "a.html"))
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert code == 0
    assert "<script" not in page and "&lt;" in page
    assert "\x1b" not in page + text
    with pytest.raises(ConfigError, match="--html .*cannot be written"):
        run("view", f"{plugin}:counts", html=str(tmp_path / "none" / "a.html"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"rows": "3,x"}, "--rows x: expected whole numbers"),
        ({"rows": "3,12"}, "--rows 3,12: the split train has fewer samples; 1 of those asked for are there"),
        ({"rows": "99", "packed": "true"}, "fewer packed rows"),
        ({"tokenizer_name": "none"}, "--tokenizer_name or --model_name is required"),
    ],
)
def test_what_cannot_be_shown_is_refused(flags: dict[str, str], said: str, run: Any, plugin: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run("view", f"{plugin}:counts", **flags)


def test_a_model_brings_its_own_limits(run: Any, plugin: str, tiny_folder: Path) -> None:
    code, text = run("doctor", f"{plugin}:counts", model_name=str(tiny_folder), tokenizer_name="none")
    assert code == 0
    assert "longer than the model's 128 positions" in text


def test_segments_are_before_within_and_behind_what_is_learned(byte_tokenizer: Any) -> None:
    def shown(labels: list[int], documents: list[int]) -> list[tuple[int, int, str, bool]]:
        ids = np.arange(10, 10 + len(labels))
        tokens = tokens_of(byte_tokenizer, ids, np.array(labels), np.array(documents))
        return [(token.document, token.position, token.segment, token.supervised) for token in tokens]

    assert shown([-100, 11, -100, 13, -100], [1] * 5) == [
        (1, 0, PROMPT, False), (1, 1, ANSWER, True), (1, 2, PROMPT, False), (1, 3, ANSWER, True), (1, 4, REST, False),
    ]  # fmt: skip
    assert shown([-100, 11, -100, -100, -100], [1, 1, 2, 2, 0]) == [
        (1, 0, PROMPT, False), (1, 1, ANSWER, True), (2, 0, PROMPT, False), (2, 1, PROMPT, False),
    ]  # fmt: skip
    assert shown([10, 11], [1, 1])[0] == (1, 0, ANSWER, False)  # nothing stands before a first token to predict it from


def test_the_texts_of_tokens_are_what_they_add_to_a_text(byte_tokenizer: Any) -> None:
    ids = byte_tokenizer("<s>a bé", add_special_tokens=False)["input_ids"]
    control = set(byte_tokenizer.all_special_ids)
    assert token_texts(byte_tokenizer, ids, control) == ["<s>", "a", " ", "b", "Ã", "©"]
    assert token_texts(byte_tokenizer, [999], control) == ["(no token: 999)"]
