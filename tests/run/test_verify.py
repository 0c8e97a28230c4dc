"""Laws of verifying: every changed byte is found, and nothing else is complained of."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrecipes import verify
from llmrecipes.run.manifest import MANIFEST, ManifestError, check_folder, seal

Command = Callable[..., int]


@pytest.fixture(scope="module")
def run_folder(finetune: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified") / "out"
    assert finetune(folder, save_steps=2) == 0
    return folder


def test_a_run_and_each_of_its_checkpoints_is_whole(
    run_folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(run_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        str(run_folder), str(run_folder / "step-000004"), str(run_folder / "step-000006")
    ]  # fmt: skip
    assert all(": whole, " in line for line in lines)
    assert verify.main([str(model_folder)]) == 0
    assert "no manifest.json; its weight file has its full size, and no bytes were compared" in capsys.readouterr().out


def test_a_result_is_sealed_file_by_file(run_folder: Path) -> None:
    named = check_folder(run_folder)["files"]
    assert set(named) == {
        "adapter_config.json", "adapter_model.safetensors", "base.json", "prompt.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


def spoil(folder: Path, draw: random.Random) -> str:
    """Changes one thing in a folder: a bit, the length, the name or the being there of a file."""
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "cut", "grow", "rename", "remove", "empty", "link"])
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind in ("cut", "grow", "empty"):
        lengths = {"cut": draw.randrange(len(content)), "grow": len(content) + 1, "empty": 0}
        path.write_bytes((bytes(content) + b"\0")[: lengths[kind]])
    elif kind == "rename":
        path.rename(path.with_name(path.name + "x"))
    elif kind == "link":
        path.rename(folder.parent / "elsewhere")
        path.symlink_to(folder.parent / "elsewhere")
    else:
        path.unlink()
    return f"{kind} {path.name}"


def test_every_change_is_found(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    for _ in range(40):
        shutil.rmtree(tmp_path)
        shutil.copytree(run_folder / "step-000004", tmp_path / "step-000004")
        before = (tmp_path / "step-000004" / MANIFEST).read_text()
        told = spoil(tmp_path / "step-000004", draw)
        path = tmp_path / "step-000004" / MANIFEST
        if path.is_file() and json_of(path) == json.loads(before):
            continue  # white space of the manifest, or a digit's last bit in what no one reads
        harmless = path.is_file() and same_files(path, before)
        code = verify.main([str(tmp_path / "step-000004")])
        errors = capsys.readouterr().err
        assert (code == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1) or harmless, told


def json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def same_files(path: Path, before: str) -> bool:
    """Whether a changed manifest still names the same files: a version's digit may change, and nothing hangs on it."""
    now = json_of(path)
    return isinstance(now, dict) and now.get("files") == json.loads(before)["files"]


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "above": ({"files": {"../secret": {"bytes": 1, "sha256": "x"}}}, "names '../secret', which is not within"),
    "absolute": ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "x"}}}, "which is not within"),
    "windows": ({"files": {"..\\x": {"bytes": 1, "sha256": "x"}}}, "which is not within"),
    "format": ({"format": 99}, "of no format known here"),
    "no files": ({"files": None}, "of no format known here"),
    "no size": ({"files": {"a": {"sha256": "x"}}}, "of no format known here"),
    "missing": ({"files": {"a": {"bytes": 1, "sha256": "x"}}}, "a is missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_manifest_cannot_point_outside(name: str, tmp_path: Path) -> None:
    changes, message = HOSTILE[name]
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "weights").write_text("x")
    seal(folder, {"kind": "checkpoint"})
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ManifestError, match=message):
        check_folder(folder)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights").write_text("x")
    seal(tmp_path / "folder", {})
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(ManifestError, match="a symbolic link"):
        check_folder(tmp_path / "link")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "verify: no folder given; usage"),
        (["--deep", "x"], "verify: --deep is not a flag"),
        (["/nowhere"], "verify /nowhere: no such folder"),
    ],
)
def test_what_cannot_be_verified_is_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_file_is_told_to_be_none_of_the_folders(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.gguf").write_text("GGUF")
    weights = model_folder / "model.safetensors"
    assert verify.main([str(weights), str(tmp_path / "x.gguf")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(f"a file; folders are verified, give the one that holds it: {model_folder}")
    assert "x.gguf: a file; folders are verified, and of a .gguf nothing" in second


def damage(checkpoint: Path) -> None:
    path = checkpoint / "trainer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_all_folders_are_looked_at_and_every_bad_one_is_told(
    run_folder: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    damage(run / "step-000006")
    assert verify.main(["/nowhere", str(run), str(model_folder)]) == 2
    told = capsys.readouterr()
    assert [line.split(":")[0] for line in told.out.splitlines()] == [
        str(run), str(run / "step-000004"), str(model_folder)
    ]  # fmt: skip
    missing, damaged = told.err.splitlines()
    assert missing == "error: verify /nowhere: no such folder"
    assert damaged.startswith(f"error: {run / 'step-000006'}: trainer.safetensors has")
    assert damaged.endswith(
        "; step-000004 beside it is whole, go on from there with the run's command and --resume auto"
    )
    damage(run / "step-000004")
    assert verify.main([str(run)]) == 2
    assert [line.rpartition("; ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "fetch or write it again"
    ] * 2


def test_weights_cut_short_are_found_without_a_manifest(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    content = path.read_bytes()
    for spoiled in (content[:-1], content + b"x", b"", b"12345678", b"\xff" * 100):
        path.write_bytes(spoiled)
        assert verify.main([str(tmp_path / "model")]) == 2
        assert "error: " in capsys.readouterr().err
