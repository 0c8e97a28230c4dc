"""Laws of secrets: what is in the environment is in no file and on no screen, whatever a run does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from faults import COMMON, forked

from llmrecipes.command import guarded, run_command
from llmrecipes.run.verify import verify

Command = Callable[..., int]

CANARIES = {
    "HF_TOKEN": "hf_" + "Canary0123456789Canary",
    "WANDB_API_KEY": "canary9876543210canary9876543210canary00",
    "AWS_SECRET_ACCESS_KEY": "CanarySecretAccessKey/0123456789/abcdefg",
}


def test_no_secret_of_the_environment_is_written_or_shown(
    finetune: Command, warm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "crash.py").write_text(
        "import os\nfrom llmrecipes.errors import TrainingError\n"
        f"def told(): return ' '.join(os.environ[name] for name in {list(CANARIES)})\n"
        "def crash(record):\n    if record.get('step') == 4:\n        raise RuntimeError('a bug of mine: ' + told())\n"
        "def sick(record):\n    if record.get('step') == 4:\n        raise TrainingError('sick: ' + told())\n"
    )
    (tmp_path / "bad.yaml").write_text("output_dir: ${oc.env:HF_TOKEN}\nlr: ${oc.env:WANDB_API_KEY}\n")
    flags = {**COMMON, "report_to": "tensorboard"}
    assert forked(lambda: guarded(lambda: finetune(tmp_path / "good", **flags))) == 0
    assert forked(lambda: guarded(lambda: finetune(tmp_path / "bad", report_to=f"{tmp_path / 'crash.py'}:crash"))) == 2
    assert forked(lambda: guarded(lambda: finetune(tmp_path / "sick", report_to=f"{tmp_path / 'crash.py'}:sick"))) == 3
    assert forked(lambda: guarded(lambda: finetune(tmp_path / "config", config=tmp_path / "bad.yaml"))) == 2
    shown = "".join(capfd.readouterr())
    assert "a bug of mine: (redacted)" in shown and "step 9/9" in shown
    for told in ("bad/status.json", "sick/status.json", "sick/black-box/error.txt"):
        assert "(redacted)" in (tmp_path / told).read_text(), told
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for name, value in CANARIES.items():
        assert value not in shown, name
        assert value.encode() not in written, name


def test_no_command_shows_a_secret_of_the_environment(
    finetune: Command, infer: Command, evaluate: Command, merge: Command, tuned: Path, model_folder: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    adapter, tokenizer = str(tuned), {"tokenizer_name": str(model_folder)}
    data = {"dataset": "custom_dataset", "custom_dataset.file": f"{tmp_path / 'crash.py'}:crash", **tokenizer}
    (tmp_path / "crash.py").write_text("import os\ndef crash(*given):\n    raise OSError(2, 'nothing', 'x.csv')\n")
    commands: dict[str, tuple[Callable[[], int], int]] = {
        "print_config": (lambda: finetune(tmp_path / "none", print_config="true"), 0),
        "inference": (lambda: infer("9+3=", peft_model=adapter), 0),
        "evaluation": (lambda: evaluate(peft_model=adapter, output_file=str(tmp_path / "report.md")), 0),
        "merging": (lambda: merge(tuned, tmp_path / "merged"), 0),
        "verify": (lambda: verify([str(tuned), str(tmp_path / "merged")]), 0),
        "a crash": (lambda: run_command("data check", data), 2),
        "no model": (lambda: infer("9+3=", model_name="org/${oc.env:HF_TOKEN}"), 2),
    }
    for name, (run, code) in commands.items():
        assert guarded(run) == code, name
    shown = "".join(capfd.readouterr())
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "12" in shown and "x.csv" in shown
    for name, value in CANARIES.items():
        assert value not in shown, name
        assert value.encode() not in written, name


def test_a_secret_in_a_setting_is_hidden_in_what_a_checkpoint_keeps(
    finetune: Command, warm: None, tmp_path: Path
) -> None:
    flags = {**COMMON, "use_wandb": None, "save_on": CANARIES["HF_TOKEN"]}
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.name != "run.yaml":
            assert CANARIES["HF_TOKEN"].encode() not in path.read_bytes(), path


@pytest.mark.parametrize("revision", [None, "main", "a" * 39])
def test_code_from_the_hub_needs_a_pinned_revision(
    revision: str | None, finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"model_name": "org/name", "trust_remote_code": True, "model_revision": revision}
    assert guarded(lambda: finetune(tmp_path / "out", **flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pin it with --model_revision (a commit of 40 digits), or give a local folder" in line


def test_a_plugin_is_shown_with_its_hash(
    finetune: Command, sums_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hashlib import sha256

    assert finetune(tmp_path / "out", max_train_step=1) == 0
    path = Path(sums_file.rsplit(":", 1)[0])
    assert f"runs {path}, SHA-256 {sha256(path.read_bytes()).hexdigest()}" in capsys.readouterr().out
