"""Laws of faults: whatever happens to a run, one line says so, and nothing that was saved is lost."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults import (
    COMMON,
    appears,
    assert_equal,
    at_write,
    begun,
    count_writes,
    curve,
    disk_full,
    ended,
    failing,
    forked,
)
from safetensors.torch import load_file

from llmrecipes.command import guarded
from llmrecipes.errors import ConfigError, TrainingError
from llmrecipes.run.manifest import check_folder, checkpoints
from llmrecipes.run.status import RunLock

Command = Callable[..., int]
Records = Callable[..., list[dict[str, Any]]]

DROPOUT = {**COMMON, "lora_config.lora_dropout": 0.2}


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_some_writes_loses_nothing(
    finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "count").mkdir()
    writes = count_writes(finetune, tmp_path / "count" / "out", DROPOUT)
    for share in (0.02, 0.2, 0.4, 0.6, 0.8, 0.97):
        folder = tmp_path / str(share)

        def run(share: float = share, folder: Path = folder) -> int:
            at_write(round(writes * share), folder, disk_full, lasting=True)
            return guarded(lambda: finetune(folder, **DROPOUT))

        capfd.readouterr()
        assert forked(run) == 2
        errors = capfd.readouterr().err
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert str(folder) in line and "No space left on device" in line and "Traceback" not in errors
        for checkpoint in checkpoints(folder)[-2:] if folder.is_dir() else []:
            check_folder(checkpoint)
        assert forked(lambda folder=folder: finetune(folder, **DROPOUT)) == 0
        assert_equal(folder, undisturbed("lora with dropout"))


@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT, errno.EROFS], ids=["broken", "quota", "read-only"])
def test_a_disk_that_fails_from_some_write_on_loses_nothing(
    code: int, finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"

    def run() -> int:
        at_write(1, folder / ".tmp-step-000006" / "trainer.json", failing(code), lasting=True)
        return guarded(lambda: finetune(folder, **DROPOUT))

    assert forked(run) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}: it could not be written to ({os.strerror(code)})")
    assert line.endswith("what was saved before is whole: make room, and run it again")
    assert [path.name for path in checkpoints(folder)] == ["step-000004", "step-000002"]
    for checkpoint in checkpoints(folder):
        check_folder(checkpoint)
    assert forked(lambda: finetune(folder, **DROPOUT)) == 0
    assert_equal(folder, undisturbed("lora with dropout"))


def test_metrics_that_cannot_be_written_are_one_line(
    finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fill.py").write_text(
        "import os, resource\n"
        "def fill(record):\n"
        "    if record['kind'] == 'step' and record['step'] == 5:\n"
        "        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
    )
    flags = {**DROPOUT, "report_to": f"{tmp_path / 'fill.py'}:fill"}
    assert forked(lambda: guarded(lambda: finetune(tmp_path / "out", **flags))) == 2
    errors = capfd.readouterr().err
    assert errors.startswith(f"error: {tmp_path / 'out'}: it could not be written to (File too large)")
    assert len(errors.splitlines()) == 1
    assert forked(lambda: finetune(tmp_path / "out", **DROPOUT)) == 0
    assert_equal(tmp_path / "out", undisturbed("lora with dropout"))


def test_a_disk_too_small_for_a_checkpoint_is_told_before_the_training(
    finetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert guarded(lambda: finetune(tmp_path / "out", **DROPOUT)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "one checkpoint takes " in line and "are free; make room" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_deleted_under_a_run_costs_what_was_in_it_and_no_more(finetune: Command, tmp_path: Path) -> None:
    (tmp_path / "delete.py").write_text(
        "import shutil\n"
        "def delete(record):\n"
        "    if record['kind'] == 'step' and record['step'] == 5:\n"
        f"        shutil.rmtree({str(tmp_path / 'out')!r})\n"
    )
    assert forked(lambda: finetune(tmp_path / "out", report_to=f"{tmp_path / 'delete.py'}:delete", **DROPOUT)) == 0
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-000008", "step-000006"]
    check_folder(tmp_path / "out" / "step-000008")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")


# --- the numbers ------------------------------------------------------------------------------------------------------

POISON = '''
import torch
from llmrecipes.prompts import Piece, encode_sample, end_piece

forwards = []

def poison(model, arguments, output):
    """Makes the logits of some training forwards NaN."""
    if type(model).__name__ == "LlamaForCausalLM" and model.training:
        forwards.append(1)
        if len(forwards) in BAD:
            output.logits = output.logits * float("nan")
        return output

def sums(config, tokenizer, split):
    if split == "train":
        torch.nn.modules.module.register_module_forward_hook(poison)
    end = end_piece(tokenizer)
    return [encode_sample(tokenizer, [Piece(f"{n}="), Piece("x", supervised=True), end]) for n in range(12)]
'''


def poisoned(folder: Path, *bad: int) -> dict[str, str]:
    """A data set whose forwards of these numbers come to nothing."""
    (folder / "poison.py").write_text(POISON.replace("BAD", str(bad)))
    return {"custom_dataset.file": f"{folder / 'poison.py'}:sums", "leak_probe": "None"}


def test_a_loss_that_is_not_a_number_is_skipped_and_its_rows_are_told(
    finetune: Command, records: Records, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = {**DROPOUT, **poisoned(tmp_path, 3, 5), "run_validation": False}
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    steps = records(tmp_path / "out")
    assert [record["step"] for record in steps if record["skipped"]] == [3, 5]
    assert steps[2]["loss"] is None and len(steps[2]["rows"]) == 4 and "rows" not in steps[3]
    told = ", ".join(map(str, steps[2]["rows"]))
    assert f"step 3: skipped, the weights are as they were (loss or gradient is not finite); rows {told}" in " ".join(
        capfd.readouterr().out.split()
    )
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_three_in_a_row_end_the_run_with_a_checkpoint_and_a_black_box(
    finetune: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = {**DROPOUT, **poisoned(tmp_path, 5, 6, 7), "save_steps": 0}
    assert forked(lambda: guarded(lambda: finetune(tmp_path / "out", **flags))) == 3
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: step 7: loss or gradient was not finite 3 times in a row") and "--lr" in line
    assert line.endswith(f"the last samples and norms are in {tmp_path / 'out' / 'black-box'}")
    assert status(tmp_path / "out")["state"] == "unhealthy" and status(tmp_path / "out")["exit_code"] == 3
    assert check_folder(tmp_path / "out" / "step-000007")["step"] == 7
    saved = load_file(tmp_path / "out" / "last" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    box = tmp_path / "out" / "black-box"
    check_folder(box)
    samples = [json.loads(text) for text in (box / "batch.jsonl").read_text().splitlines()]
    assert len(samples) == 16 and {sample["steps_before_the_end"] for sample in samples} == {0, 1, 2, 3}
    assert samples[-1]["text"].endswith("=x</s>") and len(samples[-1]["ids"]) == len(samples[-1]["labels"])
    layers = json.loads((box / "layers.json").read_text())
    assert len(layers) == 8 and all(layer["type"] == "float32" and layer["norm"] >= 0 for layer in layers.values())
    assert all(isinstance(layer["gradient_norm"], str | float) for layer in layers.values())
    assert [json.loads(text)["step"] for text in (box / "metrics.jsonl").read_text().splitlines() if '"loss"' in text]
    # Behind the sick samples it goes on, as it would have with a larger --max_skipped_steps.
    flags |= poisoned(tmp_path)
    assert forked(lambda: finetune(tmp_path / "out", **{**flags, "resume_allow_changes": True})) == 0
    assert "the black-box of the run before is set aside" in capfd.readouterr().out
    assert not box.exists() and check_folder(tmp_path / "out" / "set-aside-black-box")
    flags |= poisoned(tmp_path, 5, 6, 7)
    assert forked(lambda: finetune(tmp_path / "patient", **{**flags, "max_skipped_steps": 4})) == 0
    assert curve(tmp_path / "out") == curve(tmp_path / "patient")


def test_a_full_disk_does_not_hide_sick_numbers(finetune: Command, tmp_path: Path) -> None:
    flags = {**DROPOUT, **poisoned(tmp_path, 1, 2, 3), "save_steps": 0, "run_validation": False}

    def run() -> int:
        seen = at_write(1, tmp_path / "out" / ".tmp-step-", disk_full, lasting=True)
        with pytest.raises(TrainingError, match="3 times in a row"):
            finetune(tmp_path / "out", **flags)
        assert any(".tmp-step-000003" in what for what in seen)
        return 0

    assert forked(run) == 0


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_loading_stops_at_once_with_nothing_to_save(
    kind: int, finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal\n"
        "def slow(config, tokenizer, split):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(kind)})\n"
        "    except Exception:\n"
        "        pass\n"
        "    raise AssertionError('it went on')\n"
    )
    before = signal.getsignal(kind)
    assert finetune(tmp_path / "out", **{"custom_dataset.file": f"{tmp_path / 'slow.py'}:slow"}) == 143
    name = signal.Signals(kind).name
    assert capsys.readouterr().err == f"error: stopped by {name} before the first step, so there was nothing to save\n"
    assert not (tmp_path / "out").exists() and signal.getsignal(kind) is before


def test_ctrl_c_while_loading_stops_at_once(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, signal\n"
        "def slow(config, tokenizer, split):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    raise AssertionError('it went on')\n"
    )
    flags = {"custom_dataset.file": f"{tmp_path / 'slow.py'}:slow"}
    assert guarded(lambda: finetune(tmp_path / "out", **flags)) == 130
    assert capsys.readouterr() == ("", "error: stopped by Ctrl-C\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_saving_ends_the_run_behind_a_whole_checkpoint(
    kind: int, finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        place = tmp_path / "out" / ".tmp-step-000006" / "trainer.json"
        at_write(1, place, lambda what: os.kill(os.getpid(), kind))
        return finetune(tmp_path / "out", **DROPOUT)

    assert forked(run) == 143
    assert capfd.readouterr().err == ""
    told = status(tmp_path / "out")
    assert (told["state"], told["signal"], told["checkpoint"]) == ("stopped", signal.Signals(kind).name, "step-000006")
    assert check_folder(tmp_path / "out" / "step-000006")["step"] == 6
    assert forked(lambda: finetune(tmp_path / "out", **DROPOUT)) == 0
    assert_equal(tmp_path / "out", undisturbed("lora with dropout"))


def long_run(finetune: Command, tmp_path: Path, **flags: Any) -> list[str]:
    """The command of a run that never ends."""
    finetune(tmp_path / "short", max_train_step=1)
    settings = {**yaml.safe_load((tmp_path / "short" / "run.yaml").read_text()), "num_epochs": 100_000, **flags}
    settings |= {"output_dir": str(tmp_path / "out"), "max_train_step": 0}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(settings))
    words = ["--config", str(tmp_path / "long.yaml"), "--allow_outside_plugins", "true"]
    return [sys.executable, "-m", "llmrecipes.finetuning", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def at_step(process: "subprocess.Popen[str]", step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    pytest.fail(f"it ended before step {step}")


def test_a_signal_to_the_whole_group_saves_though_there_are_workers_and_a_second_run_is_kept_out(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = long_run(finetune, tmp_path, num_workers_dataloader=2)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as process:
        at_step(process, 2)
        assert guarded(lambda: finetune(tmp_path / "out", resume="auto")) == 2
        assert f"process {process.pid} on " in capsys.readouterr().err
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "")
    (checkpoint,) = checkpoints(tmp_path / "out")
    assert status(tmp_path / "out")["checkpoint"] == checkpoint.name == f"step-{check_folder(checkpoint)['step']:06d}"
    assert not (tmp_path / "out" / "run.lock").exists()


def test_a_lock_frees_itself_when_its_process_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def hold() -> int:
        lock = RunLock()
        lock.acquire(tmp_path)
        if os.fork() == 0:  # a data worker, which lives a little longer
            time.sleep(2)
            os._exit(0)
        ready.touch()
        time.sleep(60)
        return 0

    child = os.fork()
    if child == 0:
        os._exit(hold())
    appears(ready)
    lock = RunLock()
    with pytest.raises(ConfigError, match=f"process {child} on .* is writing to it"):
        lock.acquire(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock.acquire(tmp_path)
    assert (tmp_path / "run.lock").read_text().startswith(f"{os.getpid()} on ")
    lock.release()
    assert not (tmp_path / "run.lock").exists()


def test_a_lock_that_its_holder_took_away_meanwhile_is_no_lock(tmp_path: Path) -> None:
    opened, released = tmp_path / "opened", tmp_path / "released"
    first = RunLock()
    first.acquire(tmp_path)

    def second() -> int:
        lockf = fcntl.lockf

        def late(file: int, kind: int) -> None:
            opened.touch()
            appears(released)
            lockf(file, kind)

        fcntl.lockf = late
        RunLock().acquire(tmp_path)
        (tmp_path / "second has it").touch()
        time.sleep(60)
        return 0

    child = begun(second)
    appears(opened)
    first.release()
    released.touch()
    appears(tmp_path / "second has it")

    def third() -> int:
        with pytest.raises(ConfigError, match=f"process {child} on .* is writing to it"):
            RunLock().acquire(tmp_path)
        return 0

    assert forked(third) == 0
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL


def test_a_run_in_a_new_folder_does_not_replace_one_that_was_faster(
    finetune: Command, warm: None, sums_file: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, go_on = tmp_path / "reading", tmp_path / "go-on"
    (tmp_path / "slow.py").write_text(
        Path(sums_file.rsplit(":", 1)[0]).read_text() + "\n\nimport time\nfrom pathlib import Path\n\n"
        "def slow(config, tokenizer, split):\n"
        f"    Path({str(reading)!r}).touch()\n"
        f"    while not Path({str(go_on)!r}).exists():\n        time.sleep(0.01)\n"
        "    return sums(config, tokenizer, split)\n"
    )
    slow = {"custom_dataset.file": f"{tmp_path / 'slow.py'}:slow"}
    child = begun(lambda: guarded(lambda: finetune(tmp_path / "out", **slow)))
    appears(reading)
    assert forked(lambda: finetune(tmp_path / "out", save_steps=2)) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capfd.readouterr()
    go_on.touch()
    assert ended(child) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "another run began in it after this one" in line and "--resume auto" in line
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
