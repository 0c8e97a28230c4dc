"""Laws of the comparison: it sees what was learned, each side is the model it says, what is wrong is told early."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrecipes.errors import ConfigError, DataError, PluginError

Command = Callable[..., int]
Printed = pytest.CaptureFixture[str]


def row(text: str, metric: str = "exact_match") -> list[str]:
    """The cells of a metric's row."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {metric.replace('_', chr(95))} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def answers(text: str) -> list[list[str]]:
    """The rows of the table of examples."""
    table = text.split("## Examples")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("| ")][1:]


def test_after_tuning_every_answer_is_exact_and_before_none_was(
    evaluate: Command, tuned: Path, capsys: Printed, tmp_path: Path
) -> None:
    evaluate(peft_model=str(tuned), metric="exact_match,numeric_match", output_file=str(tmp_path / "new" / "r.md"))
    shown = capsys.readouterr()
    base, after, difference = row(shown.out)
    assert base.startswith("0.0 %") and after.startswith("100.0 %") and difference.startswith("+100.0 points")
    assert row(shown.out, "numeric_match")[1].startswith("100.0 %")
    assert [cells[1] == cells[3] for cells in answers(shown.out)] == [True] * 5
    assert (tmp_path / "new" / "r.md").read_text() == shown.out
    assert "base model answers: 12" in shown.err and "12 samples" in shown.out


def test_the_end_token_ends_the_answer(evaluate: Command, tuned: Path, capsys: Printed) -> None:
    # Exact match could not be 100 % with more tokens than the answer has, were the end not generated.
    evaluate(peft_model=str(tuned), max_new_tokens="40", compare_base="false")
    (after,) = row(capsys.readouterr().out)
    assert after.startswith("100.0 %")


@pytest.mark.parametrize("flags", [{}, {"batch_size": "1"}, {"batch_size": "5"}, {"use_cache": "false"}])
def test_batches_do_not_change_the_answers(
    flags: dict[str, str], evaluate: Command, tuned: Path, capsys: Printed
) -> None:
    evaluate(peft_model=str(tuned), examples="12")
    expected = answers(capsys.readouterr().out)
    evaluate(peft_model=str(tuned), examples="12", **flags)
    assert answers(capsys.readouterr().out) == expected


def test_one_side_alone(evaluate: Command, tuned: Path, capsys: Printed) -> None:
    evaluate(max_samples="3")
    base = capsys.readouterr().out
    assert "| metric | base |" in base and "3 samples" in base
    evaluate(peft_model=str(tuned), compare_base="false", examples="0")
    after = capsys.readouterr().out
    assert "| metric | tuned |" in after and "## Examples" not in after


@pytest.mark.parametrize("bias", ["none", "all"])
def test_the_base_side_is_the_base_also_where_the_adapter_changed_its_biases(
    bias: str, finetune: Command, evaluate: Command, biased_folder: Path, tmp_path: Path, capsys: Printed
) -> None:
    learn = {"lora_config.bias": bias, "lora_config.target_modules": "all-linear", "num_epochs": 15}
    finetune(tmp_path / "out", model_name=biased_folder, **learn)
    capsys.readouterr()
    evaluate(model_name=str(biased_folder), examples="12")
    alone = [cells[2] for cells in answers(capsys.readouterr().out)]
    evaluate(model_name=str(biased_folder), examples="12", peft_model=str(tmp_path / "out"))
    both = answers(capsys.readouterr().out)
    assert [cells[2] for cells in both] == alone
    assert [cells[3] for cells in both] != alone


@pytest.mark.parametrize("flags", [*({"quantization": kind} for kind in ("8bit", "4bit", "fp8")), {"use_fp16": "true"}])
def test_a_quantized_or_half_precision_base_is_compared_as_well(
    flags: dict[str, str], finetune: Command, evaluate: Command, thorough: dict[str, str], tmp_path: Path,
    capsys: Printed,
) -> None:  # fmt: skip
    flags = {**flags, **({"mixed_precision": "None"} if "use_fp16" in flags else {})}
    finetune(tmp_path / "out", **thorough, **flags)
    capsys.readouterr()
    evaluate(peft_model=str(tmp_path / "out"), **flags)
    base, after, _ = row(capsys.readouterr().out)
    assert float(base.split()[0]) < 20 and after.startswith("100.0 %")


# --- bad input --------------------------------------------------------------------------------------------------------

LONG = """
from llmrecipes.prompts import Piece, encode_sample, end_piece


def rows(config, tokenizer, split):
    texts = ["a" * 5, "b" * {longest}]
    answer = [Piece("c", supervised=True), end_piece(tokenizer)]
    return [encode_sample(tokenizer, [Piece(text), *answer]) for text in texts]
"""

FAULTS: dict[str, tuple[dict[str, str], type[Exception], str]] = {
    "split": ({"split": "nope"}, PluginError, "KeyError: 'nope'"),
    "metric": ({"metric": "exactmatch"}, ConfigError, "exact_match"),
    "report in a file": ({"output_file": "{tmp}/file/r.md"}, ConfigError, "--output_file .*file cannot be written to"),
    "report is a folder": ({"output_file": "{tmp}"}, ConfigError, "--output_file .* this is a folder"),
    "adapter": ({"peft_model": "{tmp}"}, Exception, "--peft_model .* no adapter_config.json"),
    "no room": ({"max_new_tokens": "126"}, DataError, "--max_new_tokens 123 or less"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_told_before_the_model_loads(
    name: str, evaluate: Command, tmp_path: Path, no_model_loads: None
) -> None:
    flags, kind, message = FAULTS[name]
    (tmp_path / "file").write_text("")
    with pytest.raises(kind, match=message):
        evaluate(**{key: value.replace("{tmp}", str(tmp_path)) for key, value in flags.items()})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_sample_longer_than_the_context_is_an_error_or_is_dropped(
    evaluate: Command, tmp_path: Path, capsys: Printed
) -> None:
    (tmp_path / "long.py").write_text(LONG.replace("{longest}", "60"))
    data: dict[str, Any] = {"custom_dataset.file": f"{tmp_path}/long.py:rows", "max_new_tokens": "5"}
    with pytest.raises(DataError, match="row 1: longer than --context_length 50"):
        evaluate(**data, context_length="50")
    evaluate(**data, context_length="50", overlong="drop")
    shown = capsys.readouterr()
    assert "1 samples" in shown.out and "dropped row 1" in shown.err
    evaluate(**{**data, "max_new_tokens": "80"}, overlong="drop")
    shown = capsys.readouterr()
    assert "1 samples" in shown.out and "dropped 1 samples whose prompt leaves no room" in shown.err
    with pytest.raises(DataError, match="no prompt leaves room"):
        evaluate(**{**data, "max_new_tokens": "125"}, overlong="drop")
