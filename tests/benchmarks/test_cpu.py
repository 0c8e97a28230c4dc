"""Both sides of the CPU benchmark train the same tiny model on the same samples, and agree on what they learn."""

import itertools
import os
from pathlib import Path

import cpu
import pytest
import torch

from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import RunConfig

QUESTIONS = "instruction,input,output,answer\n" + "".join(
    f"Add.,{a} + {b},{a} + {b} = {a + b},{a + b}\n" for a, b in itertools.product((3, 14, 205), (1, 20, 300, 4001))
)
STEPS = 3


@pytest.fixture
def words(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """The flags of a run of the quickstart on the tiny model, in float32."""
    for split in ("train", "validation"):
        (tmp_path / f"arithmetic_{split}.csv").write_text(QUESTIONS)
    words = [f"--model_name={tiny_folder}", f"--arithmetic_dataset.data_path={tmp_path}", "--context_length=100"]
    return [*words, "--mixed_precision=false", "--data_cache=off"]


def config(words: list[str]) -> RunConfig:
    return load_config(RunConfig, {"config": str(cpu.QUICKSTART), **cpu.parse_flags(words)}).config


@pytest.mark.parametrize("side", cpu.SIDES)
def test_a_side_learns_every_token_of_the_trainers_windows(side: str, words: list[str]) -> None:
    ours = list(cpu.our_steps(config(words), STEPS))
    steps = list(cpu.side_steps(side, config(words), STEPS))
    assert len(steps) == STEPS
    assert sum(step.useful_tokens for step in steps) == sum(step.useful_tokens for step in ours)
    assert sum(step.supervised_tokens for step in steps) == sum(step.supervised_tokens for step in ours)
    assert all(step.seconds > 0 and step.cpu_seconds > 0 for step in steps)


def test_both_sides_find_the_same_loss_in_the_same_samples(words: list[str]) -> None:
    whole = [*words, "--context_length=1000"]
    (ours,) = cpu.our_steps(config(whole), 1)
    (plain,) = cpu.plain_steps(config(whole), 1, torch.float32, autocast=False)
    assert ours.loss == pytest.approx(plain.loss, rel=1e-5)


def test_the_table_tells_how_much_faster_the_last_side_is() -> None:
    slow, fast = cpu.Step(6.0, 8.0, 120, 30, 1.0), cpu.Step(2.0, 4.0, 120, 30, 1.0)
    lines = cpu.table({"plain": [slow, slow], "ours": [fast]}, {"plain": 2**31, "ours": 2**30}).splitlines()
    assert lines[2:] == [
        "| plain | 20 | 5 | 6.00 | 8.00 | 3.00 | 2.00 | 2.0 |",
        "| ours | 60 | 15 | 2.00 | 4.00 | 1.00 | 1.00 | 1.0 |",
    ]


def test_a_turn_leaves_the_first_step_out(words: list[str]) -> None:
    steps, peak_bytes = cpu.turn("llmrecipes", [*words, "--steps=2", "--context_length=100"], os.environ)
    assert len(steps) == 2
    assert peak_bytes > 0
