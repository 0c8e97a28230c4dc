"""Laws of what the commands share: what ends an answer, in which type it is computed, what is left open and becomes."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrecipes.command import run_command
from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import RunConfig
from llmrecipes.errors import ConfigError, HardwareError
from llmrecipes.plugins import load_plugin
from llmrecipes.prompt_contract import load_contract
from llmrecipes.run import evaluate as evaluation
from llmrecipes.run import infer as inference
from llmrecipes.run.preparing import data_cache_folder, determinism_told, load_split, set_seeds, stop_token_ids

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


DRAWING = """
import random

from llmrecipes.data.files import load_split
from llmrecipes.prompts import encode_pairs


def drawn(dataset_config, tokenizer, split):
    pairs = [(row["q"], row["a"]) for row in load_split(dataset_config, split, ("q", "a"))]
    random.shuffle(pairs)
    return encode_pairs(tokenizer, pairs)
"""


@pytest.fixture
def drawing(tiny_folder: Path, tmp_path: Path, byte_tokenizer: Any) -> Callable[..., tuple[list[str], float, float]]:
    """Reads twenty rows in an order drawn at random; returns texts and the numbers that are drawn next."""
    (tmp_path / "drawing.py").write_text(DRAWING)
    (tmp_path / "train.csv").write_text("q,a\n" + "".join(f"{n},{n}\n" for n in range(20)))
    plugin = load_plugin(str(tmp_path / "drawing.py:drawn"), "custom_dataset.file", "", [])

    def read(**flags: str) -> tuple[list[str], float, float]:
        given = {"model_name": str(tiny_folder), "output_dir": "out", "dataset": "custom_dataset"}
        data = {"custom_dataset.file": "drawing.py", "custom_dataset.data_path": str(tmp_path), "context_length": "64"}
        config = load_config(RunConfig, {**given, **data, "data_cache": str(tmp_path / "cache"), **flags}).config
        samples, _ = load_split(config, byte_tokenizer, plugin, "train", str(tiny_folder))
        return [byte_tokenizer.decode(each.input_ids) for each in samples], random.random(), torch.rand(1).item()

    return read


def test_what_is_drawn_neither_depends_on_what_was_read_before_nor_on_the_cache(drawing: Any, tmp_path: Path) -> None:
    cold = drawing(seed="7")
    assert len(list((tmp_path / "cache" / "tokenized").iterdir())) == 1
    random.random()
    warm = drawing(seed="7")
    off = drawing(seed="7", data_cache="off")
    assert cold == warm == off
    assert drawing(seed="8")[0] != cold[0]
    set_seeds(7)
    assert cold[1:] == (random.random(), torch.rand(1).item())


def test_without_a_home_folder_the_automatic_cache_is_done_without(
    drawing: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for value in (str(tmp_path / "train.csv"), "~nobody-of-that-name/x"):
        monkeypatch.setenv("LLMRECIPES_CACHE", value)
        assert len(drawing(data_cache="auto")[0]) == 20
    monkeypatch.setenv("LLMRECIPES_CACHE", str(tmp_path / "usual"))
    assert data_cache_folder("auto") == tmp_path / "usual" / "data"
    assert data_cache_folder("off") is None and data_cache_folder("x/y") == Path("x/y")
    monkeypatch.setenv("LLMRECIPES_CACHE", "~nobody-of-that-name/x")
    assert data_cache_folder("auto") is None


def test_a_folder_that_the_user_named_and_that_cannot_be_written_to_is_refused(drawing: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data_cache .*train.csv cannot be written to"):
        drawing(data_cache=str(tmp_path / "train.csv"))


# --- determinism ------------------------------------------------------------------------------------------------------


def test_a_deterministic_run_is_the_same_run_and_the_next_one_is_free_again(
    finetune: Command, losses: Callable[[Path], list[float]], tmp_path: Path
) -> None:
    flags = {"lora_config.lora_dropout": 0.1}
    assert finetune(tmp_path / "strict", deterministic=True, **flags) == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert finetune(tmp_path / "free", **flags) == 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert losses(tmp_path / "strict") == losses(tmp_path / "free")


def test_an_operation_that_cannot_be_deterministic_is_one_line() -> None:
    message = r"--deterministic: .*upsample does not have .*; leave the flag out"
    with pytest.raises(HardwareError, match=message), determinism_told():
        raise RuntimeError("upsample does not have a deterministic implementation")
    with pytest.raises(RuntimeError, match="another"), determinism_told():
        raise RuntimeError("another")
