"""Laws of what the commands share: what ends an answer, in which type it is computed, what is left open and becomes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrecipes.command import run_command
from llmrecipes.prompt_contract import load_contract
from llmrecipes.run import evaluate as evaluation
from llmrecipes.run import infer as inference
from llmrecipes.run.preparing import set_seeds, stop_token_ids

Command = Callable[..., int]


@pytest.mark.parametrize(("own", "expected"), [(7, (2, 7)), ([7, 2, 9], (2, 7, 9)), (None, (2,))])
def test_an_answer_ends_at_the_tokenizers_end_and_at_the_models_own(
    own: object, expected: tuple[int, ...], byte_tokenizer: Any
) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert stop_token_ids(model, byte_tokenizer, None) == expected


def test_an_answer_also_ends_at_what_ended_the_training_answers(tuned: Path, byte_tokenizer: Any) -> None:
    from dataclasses import replace

    contract = load_contract(tuned)
    assert contract is not None and contract.stop_token_ids == (2,)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    assert stop_token_ids(model, byte_tokenizer, replace(contract, stop_token_ids=(3, 2))) == (2, 3)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"mixed_precision": "true"}, torch.bfloat16),
        ({"mixed_precision": "none", "use_fp16": "true"}, torch.float16),
        ({"mixed_precision": "false"}, None),
    ],
)
def test_answers_are_computed_in_the_type_that_training_computes_in(
    flags: dict[str, str], dtype: torch.dtype | None, infer: Command, evaluate: Command, tuned: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[torch.dtype | None] = []
    for module, name in ((inference, "stream_text"), (evaluation, "generate_texts")):
        real = getattr(module, name)

        def spy(*given: Any, real: Any = real) -> Any:
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return real(*given)

        monkeypatch.setattr(module, name, spy)
    infer("9+3=", peft_model=str(tuned), **flags)
    evaluate(peft_model=str(tuned), **flags)
    assert seen == [dtype] * 3


def test_what_is_left_open_is_told_as_what_it_becomes(
    model_folder: Path, sums_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"model_name": str(model_folder), "output_dir": "out", "device": "cpu", "pure_bf16": "true"}
    data = {"dataset": "custom_dataset", "custom_dataset.file": sums_file}
    assert run_command("finetuning", {**flags, **data, "print_config": "true"}) == 0
    shown = capsys.readouterr().out
    assert f"tokenizer_name: {model_folder}  # auto" in shown
    assert "mixed_precision: true  # auto" in shown
    assert "device: cpu  # --device" in shown


def test_one_seed_is_one_stream_of_numbers() -> None:
    drawn = []
    for seed in (1, 1, 2):
        set_seeds(seed)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
