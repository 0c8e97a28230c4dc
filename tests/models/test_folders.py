"""Laws of names: what is meant as a path is never looked for on the hub, and the other way round."""

from pathlib import Path

import pytest

from llmrecipes.models.folders import is_local, local_path


@pytest.mark.parametrize("name", ["/a/b", "./a", "../a", "~/a", "~nobody-at-all/a", "a/b/c", "a\\b", "x.gguf", "a/"])
def test_spelled_as_a_path_it_is_one(name: str) -> None:
    assert is_local(name)


@pytest.mark.parametrize("name", ["gpt2", "org/name", "org/name-1.5_B"])
def test_a_hub_id_is_one_unless_such_a_folder_is_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local(name)
    (tmp_path / name).mkdir(parents=True)
    assert is_local(name)


def test_home_is_filled_in_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert local_path("~/a") == Path("/somewhere/a")
    assert local_path("~nobody-at-all/a") == Path("~nobody-at-all/a")
