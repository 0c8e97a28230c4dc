"""Laws of going on: a run that is killed anywhere and resumed comes to the very bits of one that was not."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import COMMON, RUNS, assert_equal, at_write, count_writes, curve, forked, killed, weights

from llmrecipes.command import guarded
from llmrecipes.config.loading import leaves_of
from llmrecipes.config.schema import RunConfig
from llmrecipes.errors import ConfigError
from llmrecipes.run.manifest import ManifestError, check_folder, checkpoints, seal
from llmrecipes.run.resuming import FREE, read_trainer
from llmrecipes.training.state import Place

Command = Callable[..., int]
Records = Callable[..., list[dict[str, Any]]]


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_some_writes_and_resumed_a_run_is_equal_to_the_bit(
    name: str, finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = {**COMMON, **RUNS[name]}
    expected = undisturbed(name)
    writes = count_writes(finetune, tmp_path / "count" / "out", flags) if (tmp_path / "count").mkdir() is None else 0
    points = [round(writes * share) for share in (0.15, 0.35, 0.5, 0.65, 0.8, 0.95)]
    for point in points:
        folder = tmp_path / str(point)

        def run(point: int = point, folder: Path = folder) -> int:
            at_write(point, folder, killed)
            return finetune(folder, **flags)

        assert forked(run) == -signal.SIGKILL
        assert forked(lambda folder=folder: finetune(folder, **flags)) == 0
        assert_equal(folder, expected)


# --- where a run ends and goes on -------------------------------------------------------------------------------------

DROPOUT = {**COMMON, "lora_config.lora_dropout": 0.2}

SIGNALS = """
import os, random, signal
def at(step, kind="SIGTERM"):
    def tracker(record):
        if record["kind"] == "step" and record["step"] == step:
            os.kill(os.getpid(), getattr(signal, kind))
    return tracker
at_4, at_9, usr1_at_4, usr2_at_3 = at(4), at(9), at(4, "SIGUSR1"), at(3, "SIGUSR2")
def in_evaluation(record):
    if record["kind"] == "step" and record["step"] == 6:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
def drawing(record):
    random.random() if record["kind"] == "start" else None
"""


@pytest.fixture
def trackers(tmp_path: Path) -> str:
    """A file of trackers that send signals to their own process."""
    path = tmp_path / "trackers.py"
    path.write_text(SIGNALS)
    return str(path)


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


@pytest.mark.parametrize("function", ["at_4", "usr1_at_4", "in_evaluation"])
def test_stopped_by_a_signal_and_resumed_it_is_equal_to_the_bit(
    function: str, finetune: Command, undisturbed: Callable[[str], Path], trackers: str, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = {**DROPOUT, "save_steps": 0}
    step = 6 if function == "in_evaluation" else 4
    assert forked(lambda: finetune(tmp_path / "out", report_to=f"{trackers}:{function}", **flags)) == 143
    assert "go on with the same command and --resume auto" in capfd.readouterr().out
    told = status(tmp_path / "out")
    assert (told["state"], told["step"], told["checkpoint"]) == ("stopped", step, f"step-{step:06d}")
    assert check_folder(tmp_path / "out" / f"step-{step:06d}")["step"] == step
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    assert status(tmp_path / "out")["state"] == "done"
    found, expected = tmp_path / "out", undisturbed("lora with dropout")
    assert curve(found) == curve(expected)
    assert weights(found)["adapter_model.safetensors"] == weights(expected)["adapter_model.safetensors"]


def test_a_run_that_is_done_is_left_alone(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(tmp_path / "out", **DROPOUT) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert finetune(tmp_path / "out", **DROPOUT) == 0
    assert capsys.readouterr().out == f"the run in {tmp_path / 'out'} is done (9 steps); nothing to go on with\n"
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_run_is_not_done_where_its_data_or_program_is_another(
    finetune: Command, sums_file: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, program = tmp_path / "data.txt", tmp_path / "mine.py"
    data.write_text("7")
    program.write_text(
        Path(sums_file.rsplit(":", 1)[0])
        .read_text()
        .replace("for a, b in pairs", "for a, b in [*pairs, (7, answer())]")
        + f"\n\ndef answer():\n    return int(open({str(data)!r}).read())\n"
    )
    flags = {**DROPOUT, "custom_dataset.file": f"{program}:sums"}
    again = lambda: forked(lambda: guarded(lambda: finetune(tmp_path / "out", **flags)))  # noqa: E731
    assert again() == 0 and again() == 0
    assert "nothing to go on with" in capfd.readouterr().out
    edits = {data: ("8", "other training data"), program: (program.read_text() + "#", "the plug-in mine.py was edited")}
    for file, (content, told) in edits.items():
        before = file.read_text()
        file.write_text(content)
        assert again() == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "this is another run: " in line and told in line
        file.write_text(before)
    assert again() == 0


def test_a_run_whose_result_is_lost_is_not_done(
    finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed("lora with dropout"), tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    assert forked(lambda: finetune(tmp_path / "out", **DROPOUT)) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "the result of the run before is written anew: adapter_model.safetensors is missing" in shown
    assert_equal(tmp_path / "out", undisturbed("lora with dropout"))


def test_a_run_that_saved_nothing_is_not_done_where_its_result_is_wanted(
    finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = {**DROPOUT, "save_steps": None}
    assert forked(lambda: finetune(tmp_path / "out", **flags, save_model=False)) == 0
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    assert_equal(tmp_path / "out", undisturbed("lora with dropout"))


UNKNOWN: dict[str, Callable[[dict[str, Any]], str]] = {
    "deep": lambda told: "[" * 100_000,
    "no run's": lambda told: '{"state": "done"}',
    "plug-ins": lambda told: json.dumps({**told, "plugins": ["mine.py"]}),
    "step": lambda told: json.dumps({**told, "step": "\x1b[2J"}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_status_that_no_run_wrote_tells_of_no_run_that_is_done(
    name: str, finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed("lora with dropout"), tmp_path / "out")
    (tmp_path / "out" / "status.json").write_text(UNKNOWN[name](status(tmp_path / "out")))
    assert forked(lambda: finetune(tmp_path / "out", **DROPOUT)) == 0
    assert "nothing to go on with" not in capfd.readouterr().out
    assert_equal(tmp_path / "out", undisturbed("lora with dropout"))


def test_a_run_goes_on_in_another_folder_from_a_checkpoint_that_is_named(
    finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = undisturbed("lora with dropout")
    (checkpoint,) = [path for path in checkpoints(expected) if path.name == "step-000006"]
    for name, place in (("step", checkpoint), ("folder", expected)):
        flags = {**DROPOUT, "resume": place}
        assert forked(lambda name=name, flags=flags: finetune(tmp_path / name, **flags)) == 0
    steps = [line for line in curve(expected) if line[0] == "step"]
    assert [line for line in curve(tmp_path / "step") if line[0] == "step"] == steps[6:]
    assert [line for line in curve(tmp_path / "folder") if line[0] == "step"] == steps[8:]


def test_going_back_sets_newer_checkpoints_aside(
    finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed("lora with dropout"), tmp_path / "out")
    flags = {**DROPOUT, "resume": tmp_path / "out" / "step-000006"}
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    assert (tmp_path / "out" / "set-aside-step-000008").is_dir()
    assert curve(tmp_path / "out") == curve(undisturbed("lora with dropout"))


@pytest.mark.parametrize("way", ["back", "anew"])
def test_killed_while_it_replaces_a_run_it_leaves_none_that_seems_done(
    way: str, finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = undisturbed("lora with dropout")
    for point in range(1, 13) if way == "back" else range(1, 41, 3):
        folder = tmp_path / str(point)
        shutil.copytree(expected, folder)
        flags = {"resume": folder / "step-000006"} if way == "back" else {"resume": "never"}

        def run(point: int = point, folder: Path = folder, flags: dict[str, Any] = flags) -> int:
            at_write(point, folder, killed)
            return finetune(folder, overwrite_output_dir=way == "anew", **{**DROPOUT, **flags})

        assert forked(run) == -signal.SIGKILL
        assert forked(lambda folder=folder: finetune(folder, **DROPOUT)) == 0
        assert_equal(folder, expected)


@pytest.mark.parametrize("eval_steps", [0, 2])
def test_going_back_leaves_no_result_of_a_future_that_never_came(
    eval_steps: int, finetune: Command, tmp_path: Path, records: Records
) -> None:
    flags = {**DROPOUT, "eval_steps": eval_steps, "save_steps": 4, "lr": 0.05}
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    result = lambda: json.loads((tmp_path / "out" / "manifest.json").read_text())  # noqa: E731
    losses = lambda: {one["step"]: one["eval_loss"] for one in records(tmp_path / "out", "evaluation")}  # noqa: E731
    assert (result()["step"], result()["eval_loss"]) == (9, losses()[9])
    flags |= {"resume": tmp_path / "out" / "step-000008", "resume_allow_changes": True}
    flags |= {"lr": 1e6, "lr_scheduler": "constant", "warmup_steps": 0}
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    assert min(losses(), key=losses().get) == (8 if eval_steps else 6)  # then all went wrong
    assert result()["eval_loss"] == losses()[result()["step"]]
    if eval_steps:
        best = tmp_path / "out" / "step-000008" / "adapter_model.safetensors"
        assert result()["step"] == 8 and weights(tmp_path / "out")["adapter_model.safetensors"] == best.read_bytes()
    else:  # the weights of step 6 are in no checkpoint
        assert result()["step"] == 9


def test_checkpoints_are_pruned_but_not_the_one_gone_on_from(finetune: Command, tmp_path: Path) -> None:
    flags = {**DROPOUT, "save_steps": 1, "run_validation": False, "lr_scheduler": "constant"}
    names = lambda: [path.name for path in checkpoints(tmp_path / "out")]  # noqa: E731
    assert finetune(tmp_path / "out", max_train_step=5, **flags) == 0
    assert names() == ["step-000005", "step-000004"]
    flags |= {
        "resume": tmp_path / "out" / "step-000004",
        "resume_allow_changes": True,
        "keep_last": 1,
        "warmup_steps": 0,
    }
    assert finetune(tmp_path / "out", max_train_step=9, **flags) == 0
    assert names() == ["step-000009", "step-000004"]
    assert finetune(tmp_path / "all", max_train_step=5, **{**flags, "resume": "auto", "keep_last": 0}) == 0
    assert len(checkpoints(tmp_path / "all")) == 5


@pytest.mark.parametrize("on", ["save-now", "signal"])
def test_a_checkpoint_on_demand(on: str, finetune: Command, trackers: str, tmp_path: Path) -> None:
    flags = {**DROPOUT, "save_steps": 0, "save_on": on}
    if on == "signal":
        flags["report_to"] = f"{trackers}:usr2_at_3"
    else:
        (tmp_path / "touch.py").write_text(
            "from pathlib import Path\n"
            "def touch(record):\n"
            "    if record.get('step') == 3 and record['kind'] == 'step':\n"
            f"        Path({str(tmp_path / 'out' / on)!r}).touch()\n"
        )
        flags["report_to"] = f"{tmp_path / 'touch.py'}:touch"
    assert finetune(tmp_path / "out", **flags) == 0
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step-000003"]
    assert not (tmp_path / "out" / "save-now").exists()


def test_what_a_tracker_draws_at_its_start_changes_nothing(
    finetune: Command, undisturbed: Callable[[str], Path], trackers: str, tmp_path: Path
) -> None:
    (tmp_path / "draw.py").write_text("import torch\ndef draw(record):\n    torch.rand(1)\n")
    flags = {**DROPOUT, "report_to": f"{tmp_path / 'draw.py'}:draw"}
    assert forked(lambda: finetune(tmp_path / "whole", **flags)) == 0
    assert (
        forked(lambda: finetune(tmp_path / "out", **{**flags, "report_to": f"{trackers}:at_4,{flags['report_to']}"}))
        == 143
    )
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    assert curve(tmp_path / "out") == curve(tmp_path / "whole") != curve(undisturbed("lora with dropout"))


# --- another run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(finetune: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped behind its fourth step."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "trackers.py").write_text(SIGNALS)
    flags = {**DROPOUT, "report_to": f"{folder / 'trackers.py'}:at_4"}
    assert forked(lambda: finetune(folder / "out", **flags)) == 143
    return folder / "out"


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": 0.02}, "lr 0.01 -> 0.02"),
    "two": ({"lr": 0.02, "warmup_steps": 3}, "lr 0.01 -> 0.02; warmup_steps 2 -> 3"),
    "epochs": ({"num_epochs": 4}, "num_epochs 3 -> 4"),
    "seed": ({"seed": 1}, "seed 42 -> 1"),
    "rank": ({"lora_config.r": 4}, "lora_config.r 8 -> 4"),
    "batch": ({"batch_size_training": 2}, "other samples in a step (--batch_size_training times"),
    "data": ({"custom_dataset.train_split": "wrong"}, "other training data"),
    "fewer data": ({"custom_dataset.train_split": "validation"}, "other training data"),
    "validation": ({"custom_dataset.test_split": "wrong"}, "other validation data"),
}
LONGER: dict[str, tuple[dict[str, Any], bool]] = {
    "num_epochs 3 -> 4": ({"num_epochs": 4}, True),
    "max_train_step 0 -> 6": ({"max_train_step": 6}, False),
    "num_epochs 3 -> 2": ({"num_epochs": 2}, False),
    "max_train_step 0 -> 6; num_epochs 3 -> 4": ({"num_epochs": 4, "max_train_step": 6}, False),
    "lr 0.01 -> 0.02; num_epochs 3 -> 4": ({"num_epochs": 4, "lr": 0.02}, False),
}
"""What is told of a run of other length -> its flags, and whether it is nothing but longer."""

REORDERING = ("seed", "batch", "fewer data")
"""What leaves no place in the epoch to go on from."""


@pytest.mark.parametrize("name", OTHER)
def test_changes_are_listed_and_refused(
    name: str, finetune: Command, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = OTHER[name]
    shutil.copytree(stopped, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert guarded(lambda: finetune(tmp_path / "out", **{**DROPOUT, **flags})) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --resume {tmp_path / 'out' / 'step-000004'}: this is another run: ")
    checkpoint = tmp_path / "out" / "step-000004"
    way = f"(--from_peft_checkpoint {checkpoint})" if name in REORDERING else "with --resume_allow_changes"
    assert message in line and line.endswith(way)
    if name in REORDERING:
        assert guarded(lambda: finetune(tmp_path / "out", **{**DROPOUT, **flags, "resume_allow_changes": True})) == 2
        assert capsys.readouterr().err == f"{line}\n"
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


@pytest.mark.parametrize("told", LONGER)
def test_a_run_that_is_nothing_but_longer_is_told_how_it_goes_on(
    told: str, finetune: Command, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, longer = LONGER[told]
    shutil.copytree(stopped, tmp_path / "out")
    assert guarded(lambda: finetune(tmp_path / "out", **{**DROPOUT, **flags})) == 2
    way = "it is longer and nothing else changed, so it goes on" if longer else "set them back, or go on with them"
    assert capsys.readouterr().err.endswith(f": this is another run: {told}; {way} with --resume_allow_changes\n")


def test_changes_are_gone_on_with_where_that_is_said(
    finetune: Command, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], records: Records
) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    flags = {**DROPOUT, "lr": 0.02, "num_epochs": 4, "resume_allow_changes": True}
    assert finetune(tmp_path / "out", **flags) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "changed since the checkpoint: lr 0.01 -> 0.02; num_epochs 3 -> 4" in shown
    assert [record["step"] for record in records(tmp_path / "out")] == list(range(1, 13))


def test_a_best_loss_on_other_validation_data_does_not_count(
    finetune: Command, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    flags = {**DROPOUT, "custom_dataset.test_split": "wrong", "lr": 1e-9, "resume_allow_changes": True}
    assert finetune(tmp_path / "out", **flags) == 0
    assert int(capsys.readouterr().out.split("at best at step ")[1].split()[0]) > 4


def test_what_may_change_are_keys_of_a_run() -> None:
    keys = [leaf.key for leaf in leaves_of(RunConfig)]
    for free in FREE:
        assert any(key == free or (free.endswith(".") and key.startswith(free)) for key in keys), free


def test_an_adapter_of_another_shape_does_not_fit(
    finetune: Command, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    flags = {**DROPOUT, "resume_allow_changes": True, "lora_config.r": 4}
    assert guarded(lambda: finetune(tmp_path / "out", **flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "what it holds does not fit this run (ValueError: " in line and "has the shape" in line


def test_another_cut_of_the_same_step_goes_on_with_the_same_samples(
    finetune: Command, stopped: Path, undisturbed: Callable[[str], Path], records: Records, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    flags = {**DROPOUT, "batch_size_training": 2, "gradient_accumulation_steps": 2}
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    found, expected = (records(folder) for folder in (tmp_path / "out", undisturbed("lora with dropout")))
    for name in ("step", "epoch", "useful_tokens", "supervised_tokens", "learning_rate"):
        assert [step[name] for step in found] == [step[name] for step in expected]


def test_an_edited_plugin_is_told(finetune: Command, sums_file: str, trackers: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(Path(sums_file.rsplit(":", 1)[0]).read_text())
    flags = {**DROPOUT, "custom_dataset.file": f"{path}:sums"}
    assert forked(lambda: finetune(tmp_path / "out", report_to=f"{trackers}:at_4", **flags)) == 143
    path.write_text(path.read_text() + "# a remark\n")

    def refused() -> int:
        with pytest.raises(ConfigError, match="the plug-in mine.py was edited"):
            finetune(tmp_path / "out", **flags)
        return 0

    assert forked(refused) == 0


def test_an_adapter_of_other_settings_is_another_run_whatever_its_name(
    finetune: Command, tuned: Path, trackers: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "same", "other"):
        shutil.copytree(tuned, tmp_path / name / "adapter")
    path = tmp_path / "other" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 1}))
    flags = {**COMMON, "lora_config.lora_dropout": None}

    def run(name: str, **more: Any) -> int:
        given = {**flags, "from_peft_checkpoint": tmp_path / name / "adapter", **more}
        return forked(lambda: guarded(lambda: finetune(tmp_path / "out", **given)))

    assert run("one", report_to=f"{trackers}:at_4") == 143
    assert run("other") == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "this is another run: from_peft_checkpoint adapter (" in line
    assert run("same") == 0


def test_plugins_of_one_name_are_told_apart(
    finetune: Command, sums_file: str, trackers: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, rate = tmp_path / "data" / "mine.py", tmp_path / "rate" / "mine.py"
    data.parent.mkdir()
    rate.parent.mkdir()
    data.write_text(Path(sums_file.rsplit(":", 1)[0]).read_text())
    rate.write_text("def constant(progress):\n    return 1.0\n")
    flags = {**DROPOUT, "custom_dataset.file": f"{data}:sums", "lr_scheduler": f"{rate}:constant"}
    assert forked(lambda: finetune(tmp_path / "out", report_to=f"{trackers}:at_4", **flags)) == 143
    for path, told in ((data, "the plug-in mine.py was edited"), (rate, "the plug-in mine.py (2) was edited")):
        before = path.read_text()
        path.write_text(before + "# a remark\n")
        assert forked(lambda: guarded(lambda: finetune(tmp_path / "out", **flags))) == 2
        assert told in capfd.readouterr().err
        path.write_text(before)
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0


# --- checkpoints that are not whole -----------------------------------------------------------------------------------


def flipped(folder: Path) -> None:
    path = folder / "trainer.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def unwritten(folder: Path) -> None:
    trainer = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps({**trainer, "metrics_bytes": "many"}))
    (folder / "manifest.json").unlink()
    seal(folder, {"kind": "checkpoint"})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flipped, "trainer.safetensors is not what was written (its SHA-256 differs)"),
    "cut": (cut, "were written"),
    "empty": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        "no manifest.json, so it was never finished",
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
    "trainer.json": (unwritten, "its trainer.json cannot be gone on by (TypeError: metrics_bytes is no int)"),
    "no file": (lambda folder: (folder / "trainer.json").unlink(), "trainer.json is missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_skipped_with_the_reason(
    name: str, finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = BROKEN[name]
    shutil.copytree(undisturbed("lora with dropout"), tmp_path / "out")
    (tmp_path / "out" / "status.json").unlink()
    (tmp_path / "out" / ".tmp-step-000009").mkdir()
    (tmp_path / "out" / "slurm-1.out").write_text("foreign")
    spoil(tmp_path / "out" / "step-000008")
    assert forked(lambda: finetune(tmp_path / "out", **DROPOUT)) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "goes on from" in shown and "step-000006, behind step 6" in shown
    assert "skipped step-000008: " in shown and reason in shown
    assert_equal(tmp_path / "out", undisturbed("lora with dropout"))
    assert (tmp_path / "out" / "slurm-1.out").read_text() == "foreign"


def test_where_no_checkpoint_is_whole_nothing_is_touched(
    finetune: Command, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path / "out")
    for folder in checkpoints(tmp_path / "out"):
        flipped(folder)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert guarded(lambda: finetune(tmp_path / "out", **DROPOUT)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "none of the checkpoints" in line and "step-000004: " in line and "step-000002: " in line
    assert guarded(lambda: finetune(tmp_path / "new", **{**DROPOUT, "resume": tmp_path / "out" / "step-000004"})) == 2
    assert "its SHA-256 differs" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def place(**changes: Any) -> dict[str, Any]:
    return {"place": {**Place().plain(), "step": 8, **changes}}


def state(**changes: Any) -> dict[str, Any]:
    kept = {"updater": {"skipped_in_a_row": 0, "halvings": 0}, "optimizer": {"map": []}, "groups": {"list": []}}
    return {"state": {**kept, "random": {"map": []}, **changes}}


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "bytes": ({"metrics_bytes": "many"}, "metrics_bytes is no int"),
    "truth": ({"metrics_bytes": True}, "metrics_bytes is no int"),
    "settings": ({"settings": []}, "settings is no dict"),
    "order": ({"order": None}, "order is no str"),
    "no place": ({"place": {}}, "KeyError: 'step'"),
    "another step": (place(step=6), "it is of step 6"),
    "step": (place(step="0x1p3"), "step is '0x1p3'"),
    "window": (place(window=-1), "window is -1"),
    "epoch": (place(epoch=None), "epoch is None"),
    "loss": (place(best_loss="low"), "invalid hexadecimal"),
    "great loss": (place(best_loss="0x1p99999"), "hexadecimal value too large"),
    "state": (state(updater=[]), "TypeError"),
    "halvings": (state(updater={"skipped_in_a_row": 0, "halvings": "1"}), "halvings is no int"),
    "tensor": (state(optimizer={"tensor": "optimizer/none", "host": False}), "KeyError: 'optimizer/none'"),
    "kind": (state(random={"map": [], "list": []}), "ValueError"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_trainer_file_that_no_run_wrote_is_no_checkpoint(name: str, stopped: Path, tmp_path: Path) -> None:
    changes, reason = MALFORMED[name]
    shutil.copytree(stopped / "step-000004", tmp_path / "step-000008")
    path = tmp_path / "step-000008" / "trainer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **place(), **changes}))
    with pytest.raises(ManifestError) as caught:
        read_trainer(tmp_path / "step-000008")
    assert str(caught.value).startswith("its trainer.json cannot be gone on by (") and reason in str(caught.value)


def test_a_hostile_checkpoint_runs_nothing(
    finetune: Command, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {
        "deep": ("trainer.json", b"[" * 100_000),
        "kinds": ("trainer.json", json.dumps({"place": {"__class__": "x"}}).encode()),
        "header": ("trainer.safetensors", (10 << 30).to_bytes(8, "little") + b"{}"),
    }
    for name, (file, content) in contents.items():
        shutil.copytree(stopped, tmp_path / name)
        for folder in checkpoints(tmp_path / name):
            (folder / file).write_bytes(content)
            (folder / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "evil").encode() + b"'\ntR.")
            (folder / "manifest.json").unlink()
            seal(folder, {"kind": "checkpoint"})
        assert guarded(lambda name=name: finetune(tmp_path / name, **DROPOUT)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --resume auto: none of the checkpoints in ") and len(line) < 700
    assert not (tmp_path / "evil").exists()


def test_a_resume_that_names_nothing(
    finetune: Command, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(lambda: finetune(tmp_path / "out", **{**DROPOUT, "resume": "/nowhere"})) == 2
    assert "--resume /nowhere: no such folder; expected auto, never, or a checkpoint" in capsys.readouterr().err
    assert guarded(lambda: finetune(stopped, **{**DROPOUT, "resume": "never"})) == 2
    assert "go on with it (fine-tuning: --resume auto)" in capsys.readouterr().err


def test_auto_begins_at_the_beginning_where_nothing_is(finetune: Command, tmp_path: Path, records: Records) -> None:
    flags = {**DROPOUT, "save_steps": 0, "run_validation": False}

    def early() -> int:
        at_write(8, tmp_path / "out", killed)
        return finetune(tmp_path / "out", **flags)

    assert forked(early) == -signal.SIGKILL
    assert (tmp_path / "out").is_dir()
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    assert [record["step"] for record in records(tmp_path / "out")] == list(range(1, 10))


def test_a_validation_that_a_signal_cut_off_is_made_up(
    finetune: Command, trackers: str, records: Records, tmp_path: Path
) -> None:
    flags = {**DROPOUT, "save_steps": 0, "eval_steps": 2}
    assert forked(lambda: finetune(tmp_path / "whole", **flags)) == 0
    assert forked(lambda: finetune(tmp_path / "out", report_to=f"{trackers}:at_4", **flags)) == 143
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    steps = [[record["step"] for record in records(tmp_path / name, "evaluation")] for name in ("whole", "out")]
    assert steps[0] == steps[1] == [2, 4, 6, 8, 9]
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")
    assert (
        weights(tmp_path / "out")["adapter_model.safetensors"]
        == weights(tmp_path / "whole")["adapter_model.safetensors"]
    )
    assert (tmp_path / "out" / "last").is_dir() == (tmp_path / "whole" / "last").is_dir()


def test_a_checkpoint_of_another_folder_does_not_replace_a_run(
    finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed("lora with dropout"), tmp_path / "out")
    before = weights(tmp_path / "out")
    checkpoint = undisturbed("lora with dropout") / "step-000006"
    with pytest.raises(ConfigError, match="holds a run already"):
        finetune(tmp_path / "out", **{**DROPOUT, "resume": checkpoint})
    assert weights(tmp_path / "out") == before


def test_going_back_twice_leaves_no_newer_checkpoint_in_place(
    finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed("lora with dropout"), tmp_path / "out")
    for name in ("set-aside-step-000008", "set-aside-step-000008-2"):
        flags = {**DROPOUT, "resume": tmp_path / "out" / "step-000006"}
        assert forked(lambda flags=flags: finetune(tmp_path / "out", **flags)) == 0
        assert (tmp_path / "out" / name).is_dir()
    assert curve(tmp_path / "out") == curve(undisturbed("lora with dropout"))


def test_what_was_set_aside_is_gone_on_with_in_another_folder_only(
    finetune: Command, undisturbed: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed("lora with dropout"), tmp_path / "out")
    back = {**DROPOUT, "resume": tmp_path / "out" / "step-000006"}
    assert forked(lambda: finetune(tmp_path / "out", **back)) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capfd.readouterr()
    aside = {**DROPOUT, "resume": tmp_path / "out" / "set-aside-step-000008"}
    assert forked(lambda: guarded(lambda: finetune(tmp_path / "out", **aside))) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: --resume {aside['resume']}: ") and "in a new --output_dir" in line
    assert forked(lambda: finetune(tmp_path / "new", **aside)) == 0
    assert curve(tmp_path / "new")[0] == next(one for one in curve(tmp_path / "out") if one[:2] == ("step", 9))
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_lost_run_yaml_does_not_keep_a_run_from_going_on(
    finetune: Command, undisturbed: Callable[[str], Path], trackers: str, tmp_path: Path
) -> None:
    flags = {**DROPOUT, "save_steps": 2}
    assert forked(lambda: finetune(tmp_path / "out", report_to=f"{trackers}:at_4", **flags)) == 143
    (tmp_path / "out" / "run.yaml").unlink()
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    assert curve(tmp_path / "out") == curve(undisturbed("lora with dropout"))


def test_a_collator_that_draws_in_data_workers_goes_on_to_the_bit(
    finetune: Command, warm: None, sums_file: str, trackers: str, tmp_path: Path
) -> None:
    (tmp_path / "noisy.py").write_text(
        Path(sums_file.rsplit(":", 1)[0]).read_text() + "\n\nimport random, torch\n\n"
        "def get_data_collator(tokenizer):\n"
        "    def collate(rows):\n"
        "        width = max(len(row['input_ids']) for row in rows)\n"
        "        fill = {'input_ids': 0, 'labels': -100, 'attention_mask': 0}\n"
        "        made = {key: [row[key] + [fill[key]] * (width - len(row[key])) for row in rows] for key in fill}\n"
        "        made['input_ids'] = [[random.choice(ids), *ids[1:]] for ids in made['input_ids']]\n"
        "        return made\n"
        "    return collate\n"
    )
    flags = {**DROPOUT, "custom_dataset.file": f"{tmp_path / 'noisy.py'}:sums", "num_workers_dataloader": 2}
    assert forked(lambda: finetune(tmp_path / "whole", **flags)) == 0
    assert forked(lambda: finetune(tmp_path / "out", report_to=f"{trackers}:at_4", **flags)) == 143
    assert forked(lambda: finetune(tmp_path / "out", **{**flags, "num_workers_dataloader": 1})) == 0
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")
