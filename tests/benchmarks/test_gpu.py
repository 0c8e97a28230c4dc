"""The GPU benchmark's rows, in small on the CPU: all of them run, and what trains is near to knowing nothing."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
from peers import Work


@pytest.mark.parametrize("side", [gpu.OURS, "plain"])
@pytest.mark.parametrize("name", gpu.ROWS)
def test_a_row_is_measured(name: str, side: str, small_work: Callable[[str], Work]) -> None:
    *steps, end = gpu.SIDES[side].steps(small_work(name))
    assert len(steps) == 1 and end["warm"] > 0
    assert 9 < steps[0]["loss"] < 12  # near ln 32000: nothing is known yet
    line = gpu.line(side, name, {"steps": steps, "end": end, "ceiling": 1e12})
    assert gpu.ROWS[name].told in line and gpu.SIDES[side].told in line


def test_a_side_is_measured_in_a_process_that_tells_what_stopped_it() -> None:
    found = gpu.measured("plain", "samsum-bf16", 1, ["--no_such_flag=1"])
    assert found["error"].startswith("error: --no_such_flag")
    assert "| transformers + peft | error: --no_such_flag" in gpu.line("plain", "samsum-bf16", found)


def test_what_changes_other_libraries_is_imported_before_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "patcher.py").write_text("import sys\nsys.exit('late' if 'transformers' in sys.modules else 'in time')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(gpu.SIDES, "plain", replace(gpu.SIDES["plain"], packages=("patcher",)))
    assert gpu.measured("plain", "samsum-bf16", 1, []) == {"error": "in time"}


def test_samples_have_the_lengths_of_samsum() -> None:
    samples = gpu.samples_of(gpu.ROWS["samsum-bf16"], 400_000)
    mean = sum(len(sample.input_ids) for sample in samples) / len(samples)
    supervised = sum(sample.supervised_tokens for sample in samples) / len(samples)
    assert mean == pytest.approx(215.7, rel=0.05) and supervised == pytest.approx(30.0, rel=0.05)
