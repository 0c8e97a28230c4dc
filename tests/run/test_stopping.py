"""Laws of stopping: a signal ends a run after the step at hand, with everything saved; a second Ctrl-C at once."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llmrecipes.command import guarded
from llmrecipes.run.stopping import StopRequest

Command = Callable[..., int]


def tracker(folder: Path, kinds: str) -> str:
    """A tracker that sends signals to this process at the second step, or at an evaluation."""
    (folder / "signals.py").write_text(
        "import os, signal\n"
        "def at_step(record):\n"
        "    if record['kind'] == 'step' and record['step'] == 2:\n"
        f"        for kind in {kinds}:\n            os.kill(os.getpid(), kind)\n"
        "def at_evaluation(record):\n"
        "    if record['kind'] == 'evaluation':\n"
        f"        for kind in {kinds}:\n            os.kill(os.getpid(), kind)\n"
    )
    return f"{folder}/signals.py"


@pytest.mark.parametrize("kind", ["signal.SIGINT", "signal.SIGTERM"])
def test_a_signal_ends_the_run_after_the_step_at_hand(
    kind: str, finetune: Command, records: Callable[..., list[dict[str, Any]]], model_folder: Path, tmp_path: Path
) -> None:
    flags = {"report_to": f"{tracker(tmp_path, f'[{kind}]')}:at_step", "num_epochs": 50, "run_validation": True}
    before = signal.getsignal(signal.SIGTERM)
    assert finetune(tmp_path / "out", **flags) == 143
    assert [record["step"] for record in records(tmp_path / "out")] == [1, 2]
    assert not records(tmp_path / "out", "evaluation")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_during_a_validation_ends_the_run_behind_it(
    finetune: Command, records: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    place = f"{tracker(tmp_path, '[signal.SIGTERM]')}:at_evaluation"
    for name, steps in (("epochs", 0), ("steps", 2)):
        assert finetune(tmp_path / name, report_to=place, num_epochs=50, run_validation=True, eval_steps=steps) == 143
        assert len(records(tmp_path / name)) == (steps or 3)
        assert (tmp_path / name / "adapter_model.safetensors").is_file()


def test_a_signal_at_the_very_end_finds_a_run_that_is_done(finetune: Command, tmp_path: Path) -> None:
    place = f"{tracker(tmp_path, '[signal.SIGTERM]')}:at_evaluation"
    assert finetune(tmp_path / "out", report_to=place, num_epochs=1, run_validation=True) == 0


def test_a_second_ctrl_c_stops_at_once(finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"{tracker(tmp_path, '[signal.SIGINT, signal.SIGINT]')}:at_step"
    assert guarded(lambda: finetune(tmp_path / "out", report_to=place)) == 130
    assert capsys.readouterr().err == "error: stopped by Ctrl-C\n"


def test_a_thread_can_train_too_and_leaves_the_signals_alone() -> None:
    seen: list[bool] = []

    def run() -> None:
        with StopRequest() as stop:
            seen.append(stop())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]


def test_sigterm_to_the_real_command(finetune: Command, model_folder: Path, tmp_path: Path) -> None:
    finetune(tmp_path / "short", num_epochs=1)
    settings = {**yaml.safe_load((tmp_path / "short" / "run.yaml").read_text()), "num_epochs": 100_000}
    settings["output_dir"] = str(tmp_path / "out")
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "llmrecipes.finetuning", "--config", str(tmp_path / "long.yaml")]
    command += ["--allow_outside_plugins", "true"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        shown, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == ""
    assert "To go on:" in shown
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "out")


def test_ctrl_c_while_the_process_leaves_is_quiet() -> None:
    program = (
        "import atexit, os, signal, time\n"
        "from llmrecipes.run.stopping import StopRequest\n"
        "def close():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.01)\n    print('closed')\n"
        "atexit.register(close)\n"  # as libraries do, to clear up
        "for _ in range(2):\n    with StopRequest() as stop:\n        stop.begin()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")
