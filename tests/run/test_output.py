"""Laws of the output folder: nothing that is not ours is ever touched, nothing is lost by a run that cannot be done."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmrecipes.errors import ConfigError, LlmRecipesError
from llmrecipes.run.output import (
    check_output_dir,
    check_output_file,
    claim_output_dir,
    is_whole,
    write_folder,
    write_into,
)

Command = Callable[..., int]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_run(folder: Path) -> Path:
    """A folder as a fine-tuning leaves it."""
    for name in ("run.yaml", "adapter_model.safetensors", "metrics.jsonl", "tokenizer.json", "last/prompt.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Places by name, and the current folder within."""
    (tmp_path / "here" / "within").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("x")
    make_run(tmp_path / "run")
    make_run(tmp_path / "run with notes")
    (tmp_path / "run with notes" / "step-by-step.md").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here" / "within")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    names = ("file", "notes", "model", "run", "run with notes", "link")
    return {"root": "/", "home": "~", "cwd": ".", "parent": "..", **{name: str(tmp_path / name) for name in names}}


REFUSED = {
    "root": "this folder holds other things",
    "home": "this folder holds other things",
    "cwd": "this folder holds other things",
    "parent": "this folder holds other things",
    "link": "this folder holds other things",
    "file": "this is a file",
    "notes": r"holds files that no run wrote \(thesis.txt\)",
    "model": r"holds files that no run wrote \(config.json\)",
    "run with notes": r"holds files that no run wrote \(step-by-step.md\)",
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_place_that_holds_something_else_is_refused_and_left_alone(
    name: str, overwrite: bool, places: dict[str, str], tmp_path: Path
) -> None:
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"--output_dir {places[name]}: {REFUSED[name]}"):
        check_output_dir(places[name], overwrite)
    assert contents(tmp_path) == before


def test_a_run_is_replaced_only_when_told(places: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"holds a run already \(adapter_model.safetensors\).*--overwrite_output_dir"):
        check_output_dir(places["run"], overwrite=False)
    folder = check_output_dir(places["run"], overwrite=True)
    assert len(contents(folder)) == 5  # looked at only
    claim_output_dir(folder, "run.yaml", "lr: 1")
    assert contents(folder) == {"run.yaml": b"lr: 1"}


def test_what_a_broken_off_run_left_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("x")
    (tmp_path / "run" / ".tmp-123").mkdir()
    claim_output_dir(check_output_dir(str(tmp_path / "run"), overwrite=False), "run.yaml", "y")
    assert contents(tmp_path) == {"run/run.yaml": b"y"}


def test_a_folder_that_the_run_reads_is_not_written_to(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for source in (run, run / "last"):
        with pytest.raises(ConfigError, match=f"this run reads {source} in it"):
            check_output_dir(str(run), overwrite=True, inputs=["org/name", None, str(source)])
    assert check_output_dir(str(run / "next"), overwrite=False, inputs=[str(run)]) == run / "next"


def test_a_new_place_is_checked_and_not_yet_made(tmp_path: Path) -> None:
    assert check_output_dir(str(tmp_path / "a" / "b"), overwrite=False) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="file cannot be written to"):
        check_output_dir(str(tmp_path / "file" / "b"), overwrite=False)
    if Path("/proc").is_dir():
        with pytest.raises(ConfigError, match="cannot be written to"):
            claim_output_dir(check_output_dir("/proc/llmrecipes", overwrite=False), "run.yaml", "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_output_dir(str(tmp_path / "a"), overwrite=False)
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_output_file(str(tmp_path / "a"), "output_file")


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    def good(folder: Path) -> None:
        (folder / "weights").write_text("new")

    def bad(folder: Path) -> None:
        (folder / "weights").write_text("torn")
        raise OSError(28, "No space left on device")

    write_folder(tmp_path / "last", good)
    write_into(tmp_path / "last", good)
    for write in (write_folder, write_into):
        with pytest.raises(ConfigError, match="could not be written to .No space left on device"):
            write(tmp_path / "last", bad)
        assert sorted(contents(tmp_path)) == ["last/manifest.json", "last/weights"]
        assert contents(tmp_path)["last/weights"] == b"new" and is_whole(tmp_path / "last")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_has_the_mode_that_the_umask_gives(
    umask: int, mode: int, finetune: Command, merge: Command, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        finetune(tmp_path / "out", save_steps=3)
        merge(tmp_path / "out", tmp_path / "merged")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"adapter_model.safetensors", "trainer.safetensors", "model.safetensors"} <= {path.name for path in files}
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: mode for path in files}


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """A machine whose files cannot grow beyond a size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_no_half_of_an_adapter(finetune: Command, tmp_path: Path) -> None:
    with files_at_most(20_000), pytest.raises(ConfigError, match="it could not be written to"):
        finetune(tmp_path / "out", **{"lora_config.target_modules": "all-linear", "lora_config.r": 16})
    assert set(contents(tmp_path / "out")) == {"run.yaml", "metrics.jsonl", "status.json"}


# --- the commands -----------------------------------------------------------------------------------------------------

FAILING: dict[str, dict[str, str]] = {
    "modules that are not there": {"lora_config.target_modules": "q_proj,nothing"},
    "model that is not there": {"model_name": "/nowhere/model"},
    "data": {"custom_dataset.train_split": "nope"},
    "optimizer": {"optimizer": "paged_adamw_8bit"},
    "context": {"context_length": "3"},
    "flag": {"lr": "abc"},
}


@pytest.mark.parametrize("name", FAILING)
def test_a_run_that_cannot_be_done_loses_nothing_of_the_one_it_would_replace(
    name: str, finetune: Command, tmp_path: Path
) -> None:
    finetune(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(LlmRecipesError):
        finetune(tmp_path / "out", overwrite_output_dir=True, **FAILING[name])
    assert contents(tmp_path) == before


def test_a_run_replaces_another_one_and_its_best_last_and_steps(finetune: Command, tmp_path: Path) -> None:
    finetune(tmp_path / "out", save_steps=2, report_to="tensorboard")
    assert sorted(path.name for path in (tmp_path / "out").glob("step-*")) == ["step-000004", "step-000006"]
    finetune(tmp_path / "out", overwrite_output_dir=True, num_epochs=1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "base.json", "manifest.json", "metrics.jsonl",
        "prompt.json", "run.yaml", "status.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_whole_model_is_not_written_over_the_one_it_was_made_from(finetune: Command, tmp_path: Path) -> None:
    full = {"use_peft": None, "lora_config.lora_dropout": None, "num_epochs": 1, "overwrite_output_dir": True}
    finetune(tmp_path / "out", **full)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="this run reads"):
        finetune(tmp_path / "out", model_name=tmp_path / "out", **full)
    assert contents(tmp_path) == before
