"""A split that is kept is used where all that it was made of is the same, and nowhere else."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmrecipes.data import cache as module
from llmrecipes.data.limits import SampleLimits
from llmrecipes.data.samples import Reading, load_samples
from llmrecipes.errors import ConfigError, DataError
from llmrecipes.plugins import load_plugin

LIMITS = SampleLimits(context_length=64, max_positions=64, vocabulary_size=300)

PLUGIN = """
import logging
import random
from pathlib import Path

from {helper} import SUFFIX
from llmrecipes.data.files import load_split
from llmrecipes.prompts import encode_pairs

CALLS = []


def rows(dataset_config, tokenizer, split):
    CALLS.append(split)
    logging.getLogger("llmrecipes").warning("a word on %s", split)
    found = load_split(dataset_config, split, ("q", "a"))
    return encode_pairs(tokenizer, found.map(lambda row: (row["q"] + SUFFIX, row["a"])))


def templated(dataset_config, tokenizer, split):
    CALLS.append(split)
    with open(Path(dataset_config.data_path) / "template.txt") as file:
        template = file.read()
    found = load_split(dataset_config, split, ("q", "a"))
    return encode_pairs(tokenizer, found.map(lambda row: (template + row["q"], row["a"])))


def shuffled(dataset_config, tokenizer, split):
    pairs = [(row["q"], row["a"]) for row in load_split(dataset_config, split, ("q", "a"))]
    CALLS.append(split)
    random.shuffle(pairs)
    return encode_pairs(tokenizer, pairs)


def networked(dataset_config, tokenizer, split):
    import socket

    CALLS.append(split)
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=0.1)
    except OSError:
        pass
    return rows(dataset_config, tokenizer, split)


def from_nowhere(dataset_config, tokenizer, split):
    CALLS.append(split)
    return encode_pairs(tokenizer, [("a", "b")])
"""


class Case:
    """A plug-in with its helper, data of two splits, and how often the plug-in was called."""

    count = 0

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        Case.count += 1
        self.folder, self.tokenizer, self.cache = folder, tokenizer, folder / "cache"
        self.helper = folder / f"helper_{Case.count}.py"
        self.helper.write_text("SUFFIX = '?'\n")
        self.plugin = folder / f"mine_{Case.count}.py"
        self.plugin.write_text(PLUGIN.replace("{helper}", self.helper.stem))
        self.data = folder / "data"
        self.data.mkdir()
        for split in ("train", "test"):
            (self.data / f"{split}.csv").write_text("q,a\n" + "".join(f"{split}{n},{n}\n" for n in range(5)))
        (self.data / "template.txt").write_text("say ")
        self.settings: dict[str, Any] = {"data_path": str(self.data), "train_split": "train"}

    def add_row(self) -> None:
        with (self.data / "train.csv").open("a") as file:
            file.write("x,y\n")

    def load(self, function: str = "rows", split: str = "train", seed: int = 1, **settings: Any) -> tuple[Any, ...]:
        """Returns (ids of all samples, notices, whether the plug-in was called)."""
        plugin = load_plugin(f"{self.plugin}:{function}", "custom_dataset.file", "", [])
        calls = plugin.function.__globals__["CALLS"]
        before = len(calls)
        config = SimpleNamespace(**{**self.settings, **settings})
        samples, notices = load_samples(plugin, config, self.tokenizer, split, LIMITS, Reading(self.cache, seed))
        texts = [self.tokenizer.decode(sample.input_ids) for sample in samples]
        return texts, notices, len(calls) > before


@pytest.fixture
def case(tmp_path: Path, byte_tokenizer: Any) -> Case:
    return Case(tmp_path, byte_tokenizer)


def test_the_second_reading_is_the_first_one_kept(case: Case) -> None:
    texts, notices, called = case.load()
    assert called and texts[0] == "<s>train0?0</s>" and notices == ["a word on train"]
    assert case.load() == (texts, notices, False)
    assert case.load(split="test")[2] and not case.load(split="test")[2]
    assert not case.load()[2]


def edited(path: Path, old: str, new: str) -> None:
    """Changes a file and leaves its size and its times as they were: nobody can tell but by reading it."""
    times = path.stat()
    assert len(old) == len(new) and old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES: dict[str, tuple[str, Callable[[Case], Any]]] = {
    "the data": ("rows", lambda case: edited(case.data / "train.csv", "train0", "trail0")),
    "a row more": ("rows", Case.add_row),
    "the plug-in": ("rows", lambda case: edited(case.plugin, "a word on %s", "a wort on %s")),
    "a module beside it": ("rows", lambda case: edited(case.helper, "'?'", "'!'")),
    "a file that it opens by itself": ("templated", lambda case: edited(case.data / "template.txt", "say", "ask")),
    "a setting": ("rows", lambda case: case.settings.update(more=1)),
    "the tokenizer": ("rows", lambda case: setattr(case, "tokenizer", with_a_token_more(case.tokenizer))),
    "the folder": ("rows", lambda case: os.chdir(case.folder)),
}  # fmt: skip


def with_a_token_more(tokenizer: Any) -> Any:
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["train1"])
    return changed


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_made_of_something_else_is_not_used(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    function, change = CHANGES[name]
    monkeypatch.chdir(case.folder.parent)
    assert case.load(function)[2] and not case.load(function)[2]
    change(case)
    assert case.load(function)[2]
    assert not case.load(function)[2]


def test_times_of_files_count_for_nothing(case: Case) -> None:
    case.load()
    for path in case.folder.rglob("*"):
        os.utime(path, (time.time() + 9, time.time() + 9))
    assert not case.load()[2]


def test_the_seed_counts_where_rows_are_drawn_and_only_there(case: Case) -> None:
    assert case.load("shuffled", seed=1)[2] and not case.load("shuffled", seed=1)[2]
    assert case.load("shuffled", seed=2)[2]
    assert case.load("rows", seed=1)[2] and not case.load("rows", seed=2)[2]


@pytest.mark.parametrize("function", ["networked", "from_nowhere"])
def test_what_no_file_tells_of_is_never_kept(function: str, case: Case) -> None:
    assert case.load(function)[2] and case.load(function)[2]
    assert not list(case.cache.glob("*"))


def test_a_plug_in_that_reads_unseen_is_never_kept(case: Case) -> None:
    case.plugin.write_text("import pyarrow.parquet\n" + case.plugin.read_text())
    assert case.load()[2] and case.load()[2]


def test_a_kept_split_that_is_broken_is_made_anew(case: Case) -> None:
    texts = case.load()[0]
    (entry,) = case.cache.iterdir()
    for name in ("ids.bin", "ends.bin", "manifest.json"):
        data = bytearray((entry / name).read_bytes())
        data[len(data) // 2] ^= 1
        (entry / name).write_bytes(data)
        assert case.load()[::2] == (texts, True)
    (entry / "rows.bin").unlink()
    assert case.load()[::2] == (texts, True)
    (entry / "manifest.json").write_text(json.dumps({"seed": None}))
    assert case.load()[::2] == (texts, True)
    assert case.load()[::2] == (texts, False)


def test_a_refused_split_is_not_kept_and_bad_rows_are_told_again(case: Case) -> None:
    with (case.data / "train.csv").open("a") as file:
        file.write("x\n")
    with pytest.raises(DataError, match="7: 1 field"):
        case.load()
    assert not list(case.cache.glob("[!.]*"))
    first = case.load(skip_bad_rows=1)
    assert "left out 1 bad rows" in first[1][1]
    assert case.load(skip_bad_rows=1)[:2] == first[:2]


def test_the_entries_used_last_are_those_that_stay(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        case.load(more=number)
        for entry in case.cache.iterdir():
            os.utime(entry, (entry.stat().st_atime - 100, entry.stat().st_mtime - 100))
    assert not case.load(more=0)[2]  # used now, so it stays
    size = sum(file.stat().st_size for file in next(case.cache.iterdir()).iterdir())
    monkeypatch.setattr(module, "KEPT_BYTES", int(2.5 * size))
    case.load(more=3)
    assert len(list(case.cache.iterdir())) == 2
    assert not case.load(more=0)[2] and not case.load(more=3)[2] and case.load(more=1)[2]


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(case: Case) -> None:
    case.cache.write_text("a file")
    with pytest.raises(ConfigError, match="--data_cache .*cannot be written to.*--data_cache off"):
        case.load()


def test_nothing_is_left_behind_where_reading_fails(case: Case) -> None:
    shutil.rmtree(case.data)
    with pytest.raises(DataError, match="no such file or folder"):
        case.load()
    assert not list(case.cache.glob("*"))
