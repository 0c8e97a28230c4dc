"""Laws of what a run measures of itself: operations, and a profile."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrecipes.errors import ConfigError

Command = Callable[..., int]
Records = Callable[..., list[dict[str, Any]]]


def test_operations_are_told_from_their_step_on(
    finetune: Command, records: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(tmp_path / "out", flop_counter=True, flop_counter_start=4)
    found = records(tmp_path / "out")
    assert ["teraflops" in record for record in found] == [False, False, False, True, True, True]
    for record in found[3:]:
        assert record["teraflops"] > 0 and 0 < record["ceiling_share"] < 1
    assert "TFLOP/s (" in capsys.readouterr().out


def test_a_profile_is_written_and_changes_nothing(
    finetune: Command, losses: Callable[[Path], list[float]], tmp_path: Path
) -> None:
    finetune(tmp_path / "without", batch_size_training=2)
    finetune(tmp_path / "with", use_profiler=True, batch_size_training=2)
    events = json.loads((tmp_path / "with" / "profile" / "trace.json").read_text())["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events)
    assert "aten::mm" in (tmp_path / "with" / "profile" / "kernels.txt").read_text()
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_a_run_too_short_for_a_profile_is_told_so(finetune: Command, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--use_profiler: it profiles steps 4 to 6 of the first epoch, which has 1"):
        finetune(tmp_path / "out", use_profiler=True, batch_size_training=12)
