"""Laws of the trackers, read back with what the user would read them with."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmrecipes.errors import ConfigError
from llmrecipes.reports.trackers import (
    TRACKERS,
    JsonLinesTracker,
    TensorBoardTracker,
    WandbTracker,
    check_tracker,
    redacted,
)

STEP = {"kind": "step", "step": 3, "epoch": 1, "loss": 1.5, "learning_rate": 1e-4, "gradient_norm": None}
EVALUATION = {"kind": "evaluation", "step": 3, "eval_loss": 1.25, "eval_perplexity": 3.5, "eval_tokens": 900}
CANARY = "hf_" + "A1b2C3d4E5" * 3


def start(folder: Path, **config: Any) -> dict[str, Any]:
    return {"kind": "start", "output_dir": folder, "config": config, "total_steps": 10}


def strict_lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


class FakeRun(SimpleNamespace):
    """What `wandb.init` gives back, written by hand: it remembers."""

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs begun with a stand-in for the package wandb, which is not installed for tests."""
    runs: list[FakeRun] = []

    def init(**choices: Any) -> FakeRun:
        runs.append(FakeRun(choices=choices, logged=[], finished=0))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=SimpleNamespace(name="wandb")))
    return runs


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.usefixtures("wandb_runs")
def test_every_tracker_takes_a_whole_run_and_then_another(name: str, tmp_path: Path) -> None:
    for run in ("one", "two"):
        for record in (start(tmp_path / run), STEP, EVALUATION, {"kind": "news"}, {"kind": "end"}, {"kind": "end"}):
            TRACKERS[name](record)


@pytest.mark.parametrize("build", [JsonLinesTracker, TensorBoardTracker, WandbTracker])
def test_a_record_outside_a_run_is_refused(build: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="expected a record of kind start first"):
        build()(STEP)


def test_a_line_is_readable_before_the_next_record(tmp_path: Path) -> None:
    tracker = JsonLinesTracker()
    tracker(start(tmp_path / "new" / "folder"))
    for expected in (1, 2, 3):
        tracker({**STEP, "step": expected})
        lines = strict_lines(tmp_path / "new" / "folder")
        assert len(lines) == expected
    assert lines[0] == {"kind": "step", "step": 1, "epoch": 1, "loss": 1.5, "learning_rate": 1e-4}


def test_lines_are_strict_json_whatever_the_numbers(tmp_path: Path) -> None:
    tracker = JsonLinesTracker()
    tracker(start(tmp_path))
    numbers = {"a": math.nan, "b": np.float32("inf"), "c": torch.tensor(2.5), "d": np.int64(4), "e": [math.inf, 1]}
    tracker({"kind": "step", "step": 1, **numbers, "f": Path("x"), "g": "a\n\u2028\ud800", "h": True})
    (line,) = strict_lines(tmp_path)
    assert line == {"kind": "step", "step": 1, "a": None, "b": None, "c": 2.5, "d": 4, "e": [None, 1]} | {
        "f": "x",
        "g": "a\n\u2028\ud800",
        "h": True,
    }


def test_a_resumed_run_appends_and_a_torn_line_spoils_no_other(tmp_path: Path) -> None:
    tracker = JsonLinesTracker()
    for _ in range(2):
        tracker(start(tmp_path))
        tracker(STEP)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    tracker(start(tmp_path))
    tracker(EVALUATION)
    tracker({"kind": "end"})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert lines[2] == '{"kind": "st'
    assert json.loads(lines[3]) == EVALUATION


def test_tensorboard_reads_back_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    tracker = TensorBoardTracker()
    for record in (start(tmp_path), STEP, {**STEP, "step": 4, "loss": torch.tensor(0.5)}, EVALUATION, {"kind": "end"}):
        tracker(record)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {"train/loss", "train/epoch", "train/learning_rate", "eval/loss", "eval/perplexity", "eval/tokens"}
    assert set(events.Tags()["scalars"]) == names
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.5), (4, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("eval/perplexity")] == [(3, 3.5)]


def test_wandb_gets_the_choices_the_numbers_and_no_secret(tmp_path: Path, wandb_runs: list[FakeRun]) -> None:
    sections = {"wandb_config.project": "p", "wandb_config.entity": None, "wandb_config.tags": ["a"]}
    config = {"lr": 1e-4, "hub_token": "x" * 9, "model_name": f"https://u:{CANARY}@h/m", "tokenizer_name": "t"}
    tracker = WandbTracker()
    for record in (start(tmp_path, **sections, **config), STEP, EVALUATION, {"kind": "end"}):
        tracker(record)
    (run,) = wandb_runs
    shown = {"lr": 1e-4, "hub_token": "(redacted)", "model_name": "https://u:(redacted)@h/m", "tokenizer_name": "t"}
    assert run.choices == {"project": "p", "tags": ["a"], "config": shown, "dir": str(tmp_path)}
    assert run.logged == [
        (3, {"train/epoch": 1, "train/loss": 1.5, "train/learning_rate": 1e-4}),
        (3, {"eval/loss": 1.25, "eval/perplexity": 3.5, "eval/tokens": 900}),
    ]
    assert run.finished == 1
    assert CANARY not in repr(run)


def test_redaction_goes_into_lists_and_sections_and_spares_the_rest() -> None:
    config = {"a": [CANARY, 1], "b": {"api_key": "k", "n": None}, "wandb.api_key": "k", "secret": None, "c": "sk-x"}
    assert redacted(config) == {
        "a": ["(redacted)", 1],
        "b": {"api_key": "(redacted)", "n": None},
        "wandb.api_key": "(redacted)",
        "secret": None,
        "c": "sk-x",
    }
    plain = {"max_new_tokens": 5, "pad_token": "<pad>", "tokenizer_name": "t", "lora_config.r": 8, "token_count": 1}
    assert redacted(plain) == plain


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_told_before_training(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("llmrecipes.reports.trackers.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"tracker {name} needs the package {name}; run: pip install {name}"):
        check_tracker(name)
    with pytest.raises(ConfigError, match="pip install"):
        TRACKERS[name](start(tmp_path))


def test_trackers_that_need_nothing_pass_the_check() -> None:
    check_tracker("jsonl")
    check_tracker("tensorboard")
    check_tracker("mine.py:tracker")
