"""What a reader reads is noted as it was when it was first met, and told again by the same questions."""

import json
import os
from pathlib import Path

import pytest

from llmrecipes.data.files import load_rows, load_split, save_rows
from llmrecipes.data.inputs import Inputs, is_as_told, note_content, note_place, note_unknown, watched
from llmrecipes.data.mixing import sources_of


def told_again(inputs: Inputs) -> bool:
    """Returns whether all is as it was, after a journey through a file."""
    told = json.loads(json.dumps([[kind, path, told] for (kind, path), told in inputs.told.items()]))
    return all(is_as_told(*found) for found in told)


def test_only_what_is_read_within_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("q\n1\n")
    list(load_rows(path))
    with watched() as inputs:
        rows = load_rows(path)
        assert inputs.told == {}
        list(rows)
        list(rows)
    list(load_rows(tmp_path / "a.csv"))
    assert list(inputs.told) == [("content", str(path))]
    assert inputs.changed is None and told_again(inputs)
    note_unknown("nobody listens")


@pytest.mark.parametrize("kind", ["content", "place"])
def test_what_is_missed_is_noted_too(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with watched() as inputs:
        (note_content if kind == "content" else note_place)(path)
    assert told_again(inputs)
    path.write_text("q\n1\n")
    assert inputs.changed == str(path) and not told_again(inputs)


def test_a_folder_is_known_by_its_data_files(tmp_path: Path) -> None:
    with watched() as inputs:
        note_place(tmp_path)
    for name in ("a.txt", ".hidden.csv"):
        (tmp_path / name).touch()
    (tmp_path / "folder.csv").mkdir()
    assert told_again(inputs)
    (tmp_path / "a.csv").touch()
    assert not told_again(inputs)


def test_the_first_look_counts_and_a_file_that_is_gone_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("q\n1\n")
    with watched() as inputs:
        list(load_rows(path))
        path.write_text("q\n2\n")
        list(load_rows(path))
    assert inputs.changed == str(path)
    path.write_text("q\n1\n")
    assert inputs.changed is None
    path.unlink()
    assert not told_again(inputs)


def test_paths_are_absolute_and_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "train.csv").write_text("q\n1\n")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    with watched() as inputs:
        list(load_rows(Path("link/train.csv")))
    assert list(inputs.told) == [("content", str(tmp_path / "link" / "train.csv"))]


def test_every_place_that_is_looked_at_is_noted(tmp_path: Path) -> None:
    from types import SimpleNamespace

    (tmp_path / "train.csv").write_text("q\n1\n")
    with watched() as inputs:
        list(load_split(SimpleNamespace(), "train", default_path=str(tmp_path)))
        sources_of(f"{tmp_path}/a=1,{tmp_path}/b=2")
    places = [path for kind, path in inputs.told if kind == "place"]
    assert places == [str(tmp_path), f"{tmp_path}/a=1,{tmp_path}/b=2", f"{tmp_path}/a=1", f"{tmp_path}/b=2"]


def test_an_estimate_is_of_a_file_that_is_noted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q\n1\n")
    with watched() as inputs:
        load_rows(tmp_path / "a.csv").estimate()
    assert list(inputs.told) == [("content", str(tmp_path / "a.csv"))]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_cannot_be_told_again_and_writing_neither(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with watched() as inputs:
        note_content(tmp_path / "pipe.csv")
    assert inputs.unknown == f"{tmp_path}/pipe.csv is no plain file"
    with watched() as inputs:
        save_rows({tmp_path / "a.csv": [{"q": "1"}]})
    assert inputs.unknown == "it writes files"
