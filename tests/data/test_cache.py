"""A split that is kept is used where all that it was made of is the same, and nowhere else; nothing else is touched."""

import copy
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import AddedToken

from llmrecipes.config.dataset_schema import ChatDataset
from llmrecipes.data import cache as module
from llmrecipes.data import store
from llmrecipes.data.limits import SampleLimits
from llmrecipes.data.preprocessors import is_shipped
from llmrecipes.data.samples import Reading, load_samples
from llmrecipes.errors import ConfigError, DataError
from llmrecipes.plugins import Plugin, load_plugin, shipped_folder

LIMITS = SampleLimits(context_length=64, max_positions=64, vocabulary_size=300)

PLUGIN = """
import logging
import random

from llmrecipes.data.files import load_hub, load_rows, load_split, save_rows
from llmrecipes.errors import DataError
from llmrecipes.prompts import encode_pairs

SUFFIX = "?"
SEEN = []


def pairs(rows):
    return rows.map(lambda row: (row["q"] + SUFFIX, row["a"]))


def rows(dataset_config, tokenizer, split):
    logging.getLogger("llmrecipes").warning("a word on %s", split)
    return encode_pairs(tokenizer, pairs(load_split(dataset_config, split, ("q", "a"))))


def with_an_empty_one(dataset_config, tokenizer, split):
    return [*rows(dataset_config, tokenizer, split), {"input_ids": [], "labels": []}]


def other_rows(dataset_config, tokenizer, split):
    return rows(dataset_config, tokenizer, split)


def shuffled(dataset_config, tokenizer, split):
    found = list(pairs(load_split(dataset_config, split, ("q", "a"))))
    random.shuffle(found)
    return encode_pairs(tokenizer, found)


def with_extra(dataset_config, tokenizer, split):
    try:
        extra = load_rows(dataset_config.data_path + "/../extra.csv").first["a"]
    except DataError:
        extra = "none"
    found = load_split(dataset_config, split, ("q", "a"))
    return encode_pairs(tokenizer, found.map(lambda row: (row["q"], extra)))


def from_hub(dataset_config, tokenizer, split):
    found = load_hub(dataset_config.data_path, split, way_out="")
    return encode_pairs(tokenizer, found.map(lambda row: (row["q"], str(row["a"]))))


def from_nowhere(dataset_config, tokenizer, split):
    return encode_pairs(tokenizer, [("a", "b")])


def writing(dataset_config, tokenizer, split):
    save_rows({})
    return rows(dataset_config, tokenizer, split)


def remembering(dataset_config, tokenizer, split):
    found = [pair for pair in pairs(load_split(dataset_config, split, ("q", "a"))) if pair not in SEEN]
    SEEN.extend(found)
    return encode_pairs(tokenizer, found)


def leaving_out_what_was_seen(dataset_config, tokenizer, split):
    if split == "train":
        return remembering(dataset_config, tokenizer, split)
    found = pairs(load_split(dataset_config, split, ("q", "a")))
    return encode_pairs(tokenizer, [pair for pair in found if pair not in SEEN])


def changing_the_tokenizer(dataset_config, tokenizer, split):
    tokenizer.add_tokens([f"<{split}>"])
    return rows(dataset_config, tokenizer, split)


def changing_the_settings(dataset_config, tokenizer, split):
    dataset_config.more.append(split)
    return rows(dataset_config, tokenizer, split)
"""


class Case:
    """A plug-in, data of two splits, and runs that find the plug-in as it stands in its file."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer, self.cache = folder, tokenizer, folder / "cache"
        self.plugin = folder / "mine.py"
        self.plugin.write_text(PLUGIN)
        self.data = folder / "data"
        self.data.mkdir()
        for split in ("train", "test"):
            (self.data / f"{split}.csv").write_text("q,a\n" + "".join(f"{split}{n},{n}\n" for n in range(5)))
        self.settings: dict[str, Any] = {"data_path": str(self.data), "train_split": "train"}
        self.reading = Reading(self.cache, seed=1)

    @property
    def entries(self) -> list[Path]:
        return sorted(path for path in (self.cache / module.ENTRIES).glob("*") if path.is_dir())

    def add_row(self, split: str = "train") -> None:
        with (self.data / f"{split}.csv").open("a") as file:
            file.write("x,y\n")

    def found(self, function: str = "rows") -> Plugin:
        """Returns the plug-in as a new run finds it."""
        for name in [name for name in sys.modules if name.startswith("llmrecipes_plugin_mine")]:
            del sys.modules[name]
        return load_plugin(f"{self.plugin}:{function}", "custom_dataset.file", "", [])

    def load(self, function: str = "rows", split: str = "train", seed: int = 1, **settings: Any) -> tuple[Any, ...]:
        """Returns (texts of all samples, notices, whether the plug-in was called)."""
        return self.run(self.found(function), split, seed, **settings)

    def run(self, plugin: Plugin, split: str = "train", seed: int = 1, **settings: Any) -> tuple[Any, ...]:
        calls = []

        def called(*arguments: Any) -> Any:
            calls.append(arguments)
            return plugin.function(*arguments)

        config = SimpleNamespace(**{**self.settings, **settings})
        reading = replace(self.reading, seed=seed)
        samples, notices = load_samples(
            replace(plugin, function=called), config, self.tokenizer, split, LIMITS, reading
        )
        return [self.tokenizer.decode(sample.input_ids) for sample in samples], notices, bool(calls)


@pytest.fixture
def case(tmp_path: Path, byte_tokenizer: Any) -> Case:
    return Case(tmp_path, copy.deepcopy(byte_tokenizer))


def test_the_second_reading_is_the_first_one_kept(case: Case) -> None:
    texts, notices, called = case.load()
    assert called and texts[0] == "<s>train0?0</s>" and notices == ["a word on train"]
    assert case.load() == (texts, notices, False)
    assert case.load(split="test")[2] and not case.load(split="test")[2]
    assert not case.load()[2]


# --- what a kept split is named by, and what it was made of -----------------------------------------------------------


def edited(path: Path, old: str, new: str) -> None:
    """Changes a file and leaves its size and its times as they were: nobody can tell but by reading it."""
    times = path.stat()
    assert len(old) == len(new) and old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES: dict[str, Callable[[Case], Any]] = {
    "the data": lambda case: edited(case.data / "train.csv", "train0", "trail0"),
    "a row more": Case.add_row,
    "the plug-in": lambda case: edited(case.plugin, "a word on %s", "a wort on %s"),
    "a setting": lambda case: case.settings.update(more=1),
    "the working folder": lambda case: os.chdir(case.folder),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_made_of_something_else_is_not_used(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case.folder.parent)
    assert case.load()[2] and not case.load()[2]
    CHANGES[name](case)
    assert case.load()[2]
    assert not case.load()[2]


TOKENIZERS: dict[str, Callable[[Any], Any]] = {
    "a token more": lambda tokenizer: tokenizer.add_tokens(["train1"]),
    "an added token's flags": lambda tokenizer: tokenizer.add_tokens([AddedToken("<turn>", lstrip=True)]),
    "a special token": lambda tokenizer: setattr(tokenizer, "pad_token", "</s>"),
    "the padding side": lambda tokenizer: setattr(tokenizer, "padding_side", "left"),
    "the truncation side": lambda tokenizer: setattr(tokenizer, "truncation_side", "left"),
    "the longest text": lambda tokenizer: setattr(tokenizer, "model_max_length", 7),
    "the chat template": lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
    "its name": lambda tokenizer: setattr(tokenizer, "name_or_path", "another"),
    "what it was made with": lambda tokenizer: tokenizer.init_kwargs.update(more=1),
    "its parts": lambda tokenizer: setattr(tokenizer.backend_tokenizer, "post_processor", None),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_trait_of_the_tokenizer_counts(name: str, case: Case) -> None:
    assert case.load()[2] and not case.load()[2]
    TOKENIZERS[name](case.tokenizer)
    assert case.load()[2] and not case.load()[2]


def test_every_part_of_the_name_counts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(**case.settings)

    def parts(function: str = "rows", split: str = "train") -> dict[str, object]:
        return module.name_parts(case.found(function), config, case.tokenizer, split)

    def changed(**arguments: str) -> list[str]:
        other = parts(**arguments)
        return [name for name in usual if usual[name] != other[name]]

    usual = parts()
    assert changed() == []
    assert changed(split="test") == ["split"]
    assert changed(function="other_rows") == ["function"]
    for part, target, name, value in [
        ("layout", module, "LAYOUT", 99),
        ("our code", module, "content", lambda path: [0, "other"]),
        ("versions", module, "version", lambda name: "0"),
        ("versions", sys, "version", "3.99"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert changed() == [part]
    monkeypatch.setenv("HOME", str(case.folder))
    assert changed() == ["folders"]
    assert set(usual) == {"layout", "plug-in", "function", "our code", "tokenizer", "versions", "settings", "split",
                          "folders"}  # fmt: skip


def test_each_part_makes_another_name(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = case.found()
    names = {module.entry_name(plugin, SimpleNamespace(), case.tokenizer, "train")}
    usual = module.name_parts(plugin, SimpleNamespace(), case.tokenizer, "train")
    for part in usual:
        monkeypatch.setattr(module, "name_parts", lambda *_, part=part: {**usual, part: "other"})
        names.add(module.entry_name(plugin, SimpleNamespace(), case.tokenizer, "train"))
    assert len(names) == len(usual) + 1


def test_times_of_files_count_for_nothing(case: Case) -> None:
    case.load()
    for path in case.folder.rglob("*"):
        os.utime(path, (time.time() + 9, time.time() + 9))
    assert not case.load()[2]


def test_the_seed_counts_where_rows_are_drawn_and_only_there(case: Case) -> None:
    assert case.load("shuffled", seed=1)[2] and not case.load("shuffled", seed=1)[2]
    assert case.load("shuffled", seed=2)[2]
    assert case.load("rows", seed=1)[2] and not case.load("rows", seed=2)[2]


def test_a_file_of_any_kind_counts(case: Case) -> None:
    for name, write in (
        ("a.jsonl", lambda path, q: path.write_text(json.dumps({"q": q, "a": "b"}))),
        ("a.json", lambda path, q: path.write_text(json.dumps([{"q": q, "a": "b"}]))),
        ("a.parquet", lambda path, q: pyarrow.parquet.write_table(pyarrow.table({"q": [q], "a": ["b"]}), path)),
    ):
        path = case.folder / name
        write(path, "one")
        assert case.load(data_path=str(path))[2] and not case.load(data_path=str(path))[2]
        write(path, "two")
        assert case.load(data_path=str(path))[0] == ["<s>two?b</s>"]


def test_a_link_that_leads_elsewhere_counts(case: Case) -> None:
    link, other = case.folder / "link", case.folder / "other"
    shutil.copytree(case.data, other)
    edited(other / "train.csv", "train0", "trail0")
    link.symlink_to(case.data)
    assert case.load(data_path=str(link))[2] and not case.load(data_path=str(link))[2]
    link.unlink()
    link.symlink_to(other)
    assert case.load(data_path=str(link))[0][0] == "<s>trail0?0</s>"


def test_a_file_that_was_missed_counts_once_it_is_there(case: Case) -> None:
    assert case.load("with_extra")[0][0] == "<s>train0none</s>"
    assert not case.load("with_extra")[2]
    (case.folder / "extra.csv").write_text("a\nmore\n")
    assert case.load("with_extra")[0][0] == "<s>train0more</s>"


def test_another_data_file_beside_counts_and_no_other_file(case: Case) -> None:
    assert case.load()[2]
    (case.data / "notes.txt").touch()
    assert not case.load()[2]
    (case.data / "old_train.csv").write_text("q,a\n1,2\n")
    with pytest.raises(DataError, match="2 files for the split 'train'"):
        case.load()


def test_a_folder_that_has_become_a_file_counts(case: Case) -> None:
    place = case.folder / "here.csv"
    shutil.copytree(case.data, place)
    assert case.load(data_path=str(place))[2]
    shutil.rmtree(place)
    place.write_text("q,a\n1,2\n")
    assert case.load(data_path=str(place))[0] == ["<s>1?2</s>"]


# --- what is never kept -----------------------------------------------------------------------------------------------


def assert_never_kept(case: Case, function: str, why: str, **settings: Any) -> None:
    for _ in range(2):
        _, notices, called = case.load(function, **settings)
        assert called and not case.entries
        told = [notice for notice in notices if "made anew in each run" in notice]
        assert len(told) == 1 and why in told[0] and told[0].startswith(f"mine.py:{function}: ")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("from_nowhere", "it reads no file by load_split or load_rows"),
        ("from_hub", "the hub may hold another"),
        ("writing", "it writes files"),
        ("remembering", "it keeps something from one call to the next"),
        ("changing_the_tokenizer", "it changes its tokenizer or settings"),
    ],
)
def test_what_cannot_be_told_again_is_never_kept(function: str, why: str, case: Case) -> None:
    tokenizer = case.tokenizer
    for _ in range(2):
        case.tokenizer = copy.deepcopy(tokenizer)
        _, notices, called = case.load(function)
        assert called and not case.entries and why in notices[-1]


def test_a_plug_in_that_changes_its_settings_is_never_kept(case: Case) -> None:
    for _ in range(2):
        assert "it changes its tokenizer or settings" in case.load("changing_the_settings", more=[])[1][-1]
        assert not case.entries


def test_a_split_that_depends_on_what_another_ones_call_left_is_neither_kept_nor_used(case: Case) -> None:
    function = "leaving_out_what_was_seen"
    assert len(case.load(function, "test")[0]) == 5 and not case.load(function, "test")[2]
    (case.data / "train.csv").write_text("q,a\ntest0,0\n")
    plugin = case.found(function)
    for split, count in (("train", 1), ("test", 4)):
        texts, notices, called = case.run(plugin, split)
        assert called and len(texts) == count and "it keeps something from one call to the next" in notices[-1]
    assert len(case.entries) == 1


@pytest.mark.parametrize(
    ("added", "why"),
    [
        ("import pandas", "it imports pandas"),
        ("import helper_beside", "it imports helper_beside"),
        ("def also(path):\n    return open(path)", "it uses open"),
        ("def get_data_collator(tokenizer):\n    return None", "it brings get_data_collator"),
    ],
)
def test_a_plug_in_that_may_read_otherwise_is_never_kept(added: str, why: str, case: Case) -> None:
    (case.folder / "helper_beside.py").touch()
    case.plugin.write_text(f"{PLUGIN}\n\n{added}\n")
    assert_never_kept(case, "rows", why)


def test_a_tokenizer_with_code_of_its_own_and_a_function_without_a_file_are_never_kept(case: Case) -> None:
    plugin = case.found()
    assert "its file is not known" in case.run(replace(plugin, path=Path("nowhere.py")))[1][-1]
    case.tokenizer.__class__ = type("Mine", (type(case.tokenizer),), {"__module__": "mine"})
    assert_never_kept(case, "rows", "its tokenizer is a program of its own")


def test_a_chat_template_that_tells_the_date_is_never_kept_and_only_where_it_is_used(case: Case) -> None:
    case.tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<turn>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<turn>{% endif %}"
    )
    case.plugin.write_text(
        PLUGIN + "\n\ndef chats(dataset_config, tokenizer, split):\n"
        "    tokenizer.apply_chat_template([{'role': 'user', 'content': 'a'}])\n"
        "    return rows(dataset_config, tokenizer, split)\n"
    )
    assert_never_kept(case, "chats", "the tokenizer's chat template tells the date")
    case.plugin.write_text(PLUGIN)
    assert case.load()[2] and not case.load()[2]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (case.data / "train.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    chat = load_plugin("chat.py:get_preprocessed_chat", "dataset", "", [shipped_folder("custom_datasets")])
    settings = vars(ChatDataset(data_path=str(case.data / "train.jsonl"), template="tokenizer"))
    for _ in range(2):
        _, notices, called = case.run(chat, **settings)
        assert called and "tells the date" in notices[-1]
    assert len(case.entries) == 1
    settings["template"] = "llama2"
    assert case.run(chat, **settings)[2] and not case.run(chat, **settings)[2]


def test_without_a_cache_nobody_is_told_that_nothing_is_kept(case: Case) -> None:
    case.reading = Reading()
    assert case.load("from_nowhere")[1] == []


def test_our_own_data_sets_are_trusted_and_what_lies_beside_them_is_not(case: Case) -> None:
    folder = shipped_folder("custom_datasets")
    samsum = load_plugin("samsum.py:get_preprocessed_samsum", "dataset", "", [folder])
    assert is_shipped(samsum) and module.unkept_reason(samsum, case.tokenizer) == ""
    assert not is_shipped(replace(samsum, path=folder / "mine.py"))
    for split in ("train", "test"):
        text = "dialogue,summary\n" + "".join(f"{split} {n},s\n" for n in range(3))
        (case.data / f"{split}.csv").write_text(text)
    assert case.run(samsum)[2] and not case.run(samsum)[2]


# --- changes while a split is read ------------------------------------------------------------------------------------


def test_data_changed_while_they_are_read_are_not_kept(case: Case) -> None:
    plugin = case.found()

    def changed_meanwhile(*arguments: Any) -> Iterator[Any]:
        yield from plugin.function(*arguments)
        case.add_row()

    _, notices, _ = case.run(replace(plugin, function=changed_meanwhile))
    assert f"{case.data}/train.csv was changed while it was read" in notices[-1] and not case.entries
    assert len(case.load()[0]) == 6


def test_a_plug_in_edited_after_it_was_imported_is_kept_as_what_it_was(case: Case) -> None:
    plugin = case.found()
    edited(case.plugin, 'SUFFIX = "?"', 'SUFFIX = "!"')
    assert case.run(plugin)[0][0] == "<s>train0?0</s>"
    texts, _, called = case.load()
    assert called and texts[0] == "<s>train0!0</s>"


def load_in_a_process(case: Case, gate: Any, failures: Any) -> None:
    gate.wait()
    try:
        for _ in range(5):
            texts, notices, _ = case.load()
            assert len(texts) == 5 and notices == ["a word on train"], notices
            for entry in case.entries:
                if not entry.name.startswith(module.TEMPORARY):  # so that all of them keep it anew
                    shutil.rmtree(entry, ignore_errors=True)
    except BaseException as error:
        failures.put(repr(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share the test's objects")
def test_processes_that_keep_the_same_split_at_once_do_not_disturb_each_other(case: Case) -> None:
    context: Any = multiprocessing.get_context("fork")
    gate, failures = context.Barrier(4), context.Queue()
    processes = [context.Process(target=load_in_a_process, args=(case, gate, failures)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert failures.empty(), failures.get()
    case.load()
    assert not case.load()[2] and len(case.entries) == 1


def test_an_entry_that_another_process_was_faster_to_keep_is_no_fault(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def slow_rename(path: Path, target: Path) -> Path:
        if path.name.startswith(module.TEMPORARY):
            shutil.copytree(path, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", slow_rename)
    assert case.load()[1] == ["a word on train"]
    monkeypatch.undo()
    assert not case.load()[2] and len(case.entries) == 1


def test_a_reader_never_gets_parts_of_two_entries(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.load()
    (entry,) = case.entries
    mapped = module.mapped_store

    def replaced_meanwhile(folder: Path) -> Any:
        for name in ("ids", "ends"):
            (folder / f"{name}.bin").write_bytes((folder / f"{name}.bin").read_bytes()[::-1])
        return mapped(folder)

    monkeypatch.setattr(module, "mapped_store", replaced_meanwhile)
    assert module.kept_entry(entry, 1) is None


def read_for_ever(case: Case, started: Any) -> None:
    plugin = case.found()

    def slow(*arguments: Any) -> Iterator[Any]:
        yield from plugin.function(*arguments)
        started.set()
        time.sleep(60)

    case.run(replace(plugin, function=slow))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share the test's objects")
def test_a_process_killed_while_it_reads_leaves_nothing_that_is_used_and_nothing_for_ever(case: Case) -> None:
    context: Any = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=read_for_ever, args=(case, started))
    process.start()
    assert started.wait(30)
    process.terminate()
    process.join(30)
    assert process.exitcode == -signal.SIGTERM
    (left,) = case.entries
    assert left.name.startswith(module.TEMPORARY)
    assert case.load()[2]
    assert left in case.entries, "another process may still be writing to it"
    for path in (left, *left.iterdir()):
        os.utime(path, (time.time() - module.STALE_SECONDS - 9,) * 2)
    case.load(more=1)
    assert left not in case.entries and len(case.entries) == 2


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_kept_split_that_is_broken_is_made_anew(case: Case) -> None:
    texts = case.load()[0]
    (entry,) = case.entries
    for name in ("ids.bin", "supervised.bin", "starts.bin", "ends.bin", "rows.bin", "manifest.json"):
        data = bytearray((entry / name).read_bytes())
        data[len(data) // 2] ^= 1
        (entry / name).write_bytes(data)
        assert case.load()[::2] == (texts, True)
    (entry / "rows.bin").unlink()
    assert case.load()[::2] == (texts, True)
    (entry / "manifest.json").write_text(json.dumps({"seed": None}))
    assert case.load()[::2] == (texts, True)
    assert case.load()[::2] == (texts, False)
    assert case.entries == [entry]


def test_a_refused_split_is_not_kept_and_bad_rows_are_told_again(case: Case) -> None:
    with (case.data / "train.csv").open("a") as file:
        file.write("x\nz\n")
    with pytest.raises(DataError, match="7: 1 field"):
        case.load()
    with pytest.raises(DataError, match="2 bad rows, and skip_bad_rows allows 1"):
        case.load(skip_bad_rows=1)
    assert not case.entries
    first = case.load(skip_bad_rows=2)
    assert "left out 2 bad rows" in first[1][1]
    assert case.load(skip_bad_rows=2) == (*first[:2], False)
    first = case.load("with_an_empty_one", skip_bad_rows=3)
    assert "left out 3 bad rows: row 5: no tokens; " in first[1][1]
    assert case.load("with_an_empty_one", skip_bad_rows=3) == (*first[:2], False)


def test_the_entries_used_last_are_those_that_stay(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        case.load(more=number)
        for entry in case.entries:
            os.utime(entry, (entry.stat().st_atime - 100, entry.stat().st_mtime - 100))
    assert not case.load(more=0)[2]  # used now, so it stays
    size = sum(file.stat().st_size for file in case.entries[0].iterdir())
    monkeypatch.setattr(module, "KEPT_BYTES", int(2.5 * size))
    case.load(more=3)
    assert len(case.entries) == 2
    assert not case.load(more=0)[2] and not case.load(more=3)[2] and case.load(more=1)[2]


def test_what_is_not_ours_in_the_users_folder_is_never_removed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = case.cache / module.ENTRIES
    theirs = [case.cache / "thesis", case.cache / ("a" * 64), inside / "thesis", inside / ("b" * 64)]
    for folder in theirs:
        folder.mkdir(parents=True)
        (folder / "chapter.txt").write_text("years of work")
        os.utime(folder, (1, 1))
    (case.cache / "notes.txt").touch()
    (inside / "thesis" / module.MANIFEST).write_text("{}")  # many programs write a file of this name
    linked = case.folder / "linked"
    linked.mkdir()
    (linked / module.MANIFEST).touch()
    (inside / ("c" * 64)).symlink_to(linked)
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    for number in range(3):
        case.load(more=number)
    assert all((folder / "chapter.txt").read_text() == "years of work" for folder in theirs)
    assert (case.cache / "notes.txt").exists() and (linked / module.MANIFEST).exists()
    kept = [entry for entry in case.entries if (entry / "ids.bin").exists()]
    assert len(kept) == 1


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(case: Case) -> None:
    case.cache.write_text("a file")
    with pytest.raises(ConfigError, match="--data_cache .*cannot be written to.*--data_cache off"):
        case.load()


def test_a_cache_that_nobody_asked_for_is_done_without(case: Case) -> None:
    case.cache.write_text("a file")
    case.reading = replace(case.reading, asked_for=False)
    texts, notices, _ = case.load()
    assert len(texts) == 5
    assert notices[-1] == (
        f"mine.py:rows: its samples are made anew in each run: {case.cache} cannot be written to (Not a directory)"
    )


def test_an_error_of_the_preprocessors_files_is_not_the_caches(case: Case) -> None:
    plugin = case.found()

    def failing(*arguments: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", "secret.txt")

    with pytest.raises(Exception, match="in rows: PermissionError") as caught:
        case.run(replace(plugin, function=failing))
    assert "data_cache" not in str(caught.value)


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 4, 7, 8])
def test_a_full_disk_is_a_notice_and_costs_no_sample(writes: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = case.load()[0]
    append = store._append
    done = []

    def until_full(*arguments: Any) -> None:
        done.append(arguments)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(*arguments)

    monkeypatch.setattr(store, "FLUSH_TOKENS", 20)
    monkeypatch.setattr(store, "_append", until_full)
    texts, notices, called = case.load(more=1)
    assert (texts, called) == (expected, True)
    assert f"{case.cache} cannot be written to (No space left on device)" in notices[-1]
    assert len(case.entries) == 1


def test_a_manifest_that_cannot_be_written_is_a_notice(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *arguments: Any, **options: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    texts, notices, _ = case.load()
    assert len(texts) == 5 and "No space left on device" in notices[-1] and not case.entries


def test_nothing_is_left_behind_where_reading_fails(case: Case) -> None:
    shutil.rmtree(case.data)
    with pytest.raises(DataError, match="no such file or folder"):
        case.load()
    assert not case.entries
