"""Laws of `FILE.py:FUNCTION`: found where the user says, run once, and never blamed for what it did not do."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrecipes.config.dataset_schema import DatasetOptions
from llmrecipes.data.preprocessors import DATASETS, load_preprocessor
from llmrecipes.errors import DataError, PluginError
from llmrecipes.plugins import (
    TOLD_CHARACTERS,
    Plugin,
    blamed,
    load_plugin,
    plugin_folders,
    plugin_of,
    resolve_function,
    shipped_folder,
    split_reference,
)

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    """Leaves no plug-in's folder importable behind."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a Python file into the test's own folder."""

    def write_file(text: str, name: str = "dataset.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def load(reference: object, *, default_name: str = "get_custom_dataset", folders: tuple[Path, ...] = ()) -> Plugin:
    return load_plugin(str(reference), "custom_dataset.file", default_name, folders)


def told(reference: object, *arguments: Any, **options: Any) -> str:
    """Returns the message with which loading, or else calling with `arguments`, fails; it is one line."""
    with pytest.raises(PluginError) as caught:
        load(reference, **options)(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- which file, which function ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("dataset.py:get", ("dataset.py", "get")),
        ("dataset.py", ("dataset.py", "")),
        ("dataset.py:", ("dataset.py", "")),
        ("C:\\data\\a.py:get", ("C:\\data\\a.py", "get")),
        ("C:\\data\\a.py", ("C:\\data\\a.py", "")),
        ("C:/a.py:get", ("C:/a.py", "get")),
        ("a:b/c.py:get", ("a:b/c.py", "get")),
        ("a.py.bak:get", ("a.py.bak:get", "")),
    ],
)
def test_a_reference_is_split_behind_the_file(reference: str, parts: tuple[str, str]) -> None:
    assert split_reference(reference) == parts


def test_a_named_function_is_found_and_called(write: Write) -> None:
    path = write("def double(a, b):\n    return [a, b] * 2\n")
    plugin = load(f"{path}:double")
    assert (plugin(1, 2), plugin.name, plugin.path) == ([1, 2, 1, 2], "double", path)


@pytest.mark.parametrize("end", ["", ":"])
def test_without_a_function_the_default_name_counts(write: Write, end: str) -> None:
    path = write("def get_custom_dataset():\n    return 'default'\n")
    assert load(f"{path}{end}")() == "default"


def test_without_a_default_name_a_function_must_be_named(write: Write) -> None:
    path = write("def f(): ...\n")
    assert f"name a function behind the file, {path}:FUNCTION" in told(path, default_name="")


def test_classes_imported_functions_and_callable_objects_will_do(write: Write) -> None:
    path = write("from os.path import basename\nclass Made:\n    pass\nlast = max\n")
    assert load(f"{path}:basename")("a/b") == "b"
    assert type(load(f"{path}:Made")()).__name__ == "Made"
    assert load(f"{path}:last")(1, 3) == 3


def test_a_missing_function_is_told_with_its_likes_and_without_private_ones(write: Write) -> None:
    path = write("import json\nfrom os.path import join\nRATE = 1\ndef get_data(): ...\ndef _hidden(): ...\n")
    message = told(f"{path}:get_dat")
    assert message.startswith(f"--custom_dataset.file {path}:get_dat: ")
    assert "has no function get_dat, only get_data; did you mean get_data?" in message
    assert "has no function RATE" in told(f"{path}:RATE")
    assert "only none" in told(write("a = 1\n", "empty.py"))


def test_a_private_name_is_refused(write: Write) -> None:
    message = told(f"{write('def _f(): ...')}:_f")
    assert "_f is private to its file" in message


@pytest.mark.parametrize("name", ["get data", "a.b", "f()", "1f"])
def test_what_is_no_name_is_refused_before_the_file_is_run(write: Write, name: str) -> None:
    path = write("raise SystemExit('was run')\n")
    assert "cannot be a function's name" in told(f"{path}:{name}")


@pytest.mark.parametrize("name", ["dataset.txt", "dataset.txt:get", "dataset", "dataset.py::get", "dataset.py:a:b"])
def test_what_is_no_python_file_is_refused(write: Write, name: str) -> None:
    path = write("def get(): ...", "dataset.txt")
    assert "expected a Python file and a function of it, FILE.py:FUNCTION" in told(path.parent / name)


def test_a_missing_file_is_told_with_the_folders_and_its_likes(write: Write, tmp_path: Path) -> None:
    path = write("def get(): ...")
    message = told("datset.py:get", folders=(tmp_path / "nowhere", tmp_path))
    assert f"no such file in {tmp_path / 'nowhere'}, {tmp_path}; did you mean dataset.py?" in message
    assert f"no such file in {tmp_path}; did you mean dataset.py?" in told(f"{path.parent}/datase.py:get")
    assert "no such file" in told(f"{tmp_path}/folder.py") and not (tmp_path / "folder.py").mkdir()
    assert "no such file" in told(f"{tmp_path}/folder.py")


# --- where it is looked for -------------------------------------------------------------------------------------------


def test_a_file_is_looked_for_beside_the_config_then_here_then_among_the_shipped(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folders = tuple(plugin_folders(str(tmp_path / "configs" / "a.yaml")))
    assert load("samsum.py:get_preprocessed_samsum", folders=folders).path == shipped_folder(
        "custom_datasets"
    ).joinpath("samsum.py")
    places = ["here", "configs"]
    for place in places:
        write(f"def get_preprocessed_samsum():\n    return '{place}'\n", f"{place}/samsum.py")
        assert load("samsum.py:get_preprocessed_samsum", folders=folders)() == place
    assert load("samsum.py:get_preprocessed_samsum", folders=tuple(plugin_folders(None)))() == "here"
    assert load("../configs/samsum.py:get_preprocessed_samsum", folders=tuple(plugin_folders(None)))() == "configs"


def test_a_home_folder_is_understood(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("def get_custom_dataset():\n    return 1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/dataset.py")() == 1


@pytest.mark.parametrize("name", DATASETS)
def test_every_shipped_name_stands_for_a_function(name: str) -> None:
    assert load_preprocessor(DatasetOptions(dataset=name), []).path.parent == shipped_folder("custom_datasets")


def test_a_table_goes_first_and_a_file_second(write: Write) -> None:
    path = write("def mine():\n    return 'mine'\n")
    table = {"linear": min, "a.py:f": max}
    assert resolve_function("linear", "lr_scheduler", table) is min
    assert resolve_function("a.py:f", "lr_scheduler", table) is max
    assert resolve_function(f"{path}:mine", "lr_scheduler", table)() == "mine"
    with pytest.raises(PluginError, match=r"--lr_scheduler linaer: not one of linear.*did you mean linear\?"):
        resolve_function("linaer", "lr_scheduler", table)
    with pytest.raises(PluginError, match="--lr_scheduler .*: name a function behind the file"):
        resolve_function(str(path), "lr_scheduler", table)


def test_another_beginning_of_the_message_may_be_given(write: Write) -> None:
    with pytest.raises(PluginError, match="^data create x: .* has no function create_data"):
        plugin_of(str(write("")), "data create x", "create_data", [])


# --- run once, with its own folder ------------------------------------------------------------------------------------


def test_the_file_is_run_once_whatever_is_taken_from_it_and_however_it_is_spelt(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(
        "from pathlib import Path\n"
        "with (Path(__file__).parent / 'runs').open('a') as log:\n    log.write('x')\n"
        "def get_custom_dataset(): ...\n"
        "def get_data_collator(tokenizer):\n    return tokenizer\n"
    )
    (tmp_path / "link.py").symlink_to(path)
    plugin = load("dataset.py", folders=(tmp_path,))
    load(path)
    load("./link.py:get_data_collator", folders=(tmp_path,))
    collator = plugin.sibling("get_data_collator")
    assert collator is not None and collator("t") == "t"
    assert (tmp_path / "runs").read_text() == "x"


def test_what_is_run_is_the_file_as_it_stands_and_what_was_run_is_known(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = write("def get_custom_dataset():\n    return 1\n")
    times = path.stat()
    plugin = load(path)
    assert plugin() == 1 and plugin.source == path.read_bytes()
    assert plugin.module is not None and plugin.module.get_custom_dataset is plugin.function
    path.write_text("def get_custom_dataset():\n    return 2\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # of one size and age, as if a tool had restored it
    assert plugin.source != path.read_bytes()
    del sys.modules[plugin.module.__name__]
    assert load(path)() == 2 and load(path).source == path.read_bytes()
    assert Plugin(path.with_name("none.py"), "f", print).source is None
    assert Plugin(path.with_name("none.py"), "f", print).sibling("f") is None


def test_two_files_of_one_name_are_two(write: Write) -> None:
    files = [write(f"def get_custom_dataset():\n    return {n}\n", f"{n}/dataset.py") for n in range(2)]
    assert [load(path)() for path in files] == [0, 1]


def test_a_sibling_that_is_not_there_is_none(write: Write) -> None:
    plugin = load(write("get_data_collator = None\ndef get_custom_dataset(): ..."))
    assert plugin.sibling("get_data_collator") is None
    assert plugin.sibling("nothing") is None


def test_the_files_own_folder_is_importable_and_nothing_installed_is_hidden_by_it(write: Write) -> None:
    write("VALUE = 7\n", "helper_of_mine.py")
    write("raise RuntimeError('the wrong yaml')\n", "yaml.py")
    path = write(
        "from dataclasses import dataclass\n"
        "import helper_of_mine\n"
        "def get_custom_dataset():\n    import yaml\n    return helper_of_mine.VALUE, yaml.safe_load('1')\n"
    )
    assert load(path)() == (7, 1)


def test_a_dataclass_with_postponed_annotations_works(write: Write) -> None:
    path = write(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Row:\n    a: int\n"
        "def get_custom_dataset():\n    return Row(3).a\n"
    )
    assert load(path)() == 3


# --- errors: told apart, with the author's own line -------------------------------------------------------------------


def test_an_attribute_error_inside_is_no_missing_function(write: Write) -> None:
    path = write("def get_custom_dataset(config):\n    value = 1\n    return config.no_such_thing\n")
    message = told(path, object())
    assert message.startswith(f"{path}:3: in get_custom_dataset: AttributeError: 'object' object has no attribute")
    assert message.endswith("(return config.no_such_thing)")
    assert "has no function" not in message


def test_the_line_told_is_the_authors_last_one_not_the_librarys(write: Write) -> None:
    write("import json\ndef parse(text):\n    return json.loads(text)\n", "helper_of_mine.py")
    path = write("import helper_of_mine\ndef get_custom_dataset():\n    return helper_of_mine.parse('{')\n")
    assert told(path).startswith(f"{path.parent / 'helper_of_mine.py'}:3: in get_custom_dataset: JSONDecodeError: ")


def test_a_syntax_error_is_told_with_its_line(write: Write) -> None:
    path = write("a = 1\ndef get_custom_dataset(:\n")
    assert told(path) == f"{path}:2: SyntaxError: invalid syntax"
    path = write("def f():\nreturn 1\n", "indented.py")
    assert told(path).startswith(f"{path}:2: IndentationError: expected an indented block")


def test_a_syntax_error_of_a_helper_is_the_helpers(write: Write) -> None:
    helper = write("(\n", "helper_of_mine.py")
    assert told(write("import helper_of_mine\n")).startswith(f"{helper}:1: SyntaxError: '(' was never closed")


def test_a_syntax_error_in_data_is_told_with_the_line_that_read_them(write: Write) -> None:
    path = write("import ast\ndef get_custom_dataset():\n    return ast.literal_eval('1 +')\n")
    assert told(path).startswith(f"{path}:3: in get_custom_dataset: SyntaxError: ")


def test_a_file_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "dataset.py"
    path.write_bytes(b"a = 1\nname = 'caf\xe9'\ndef get_custom_dataset(): ...\n")
    assert told(path).startswith(f"{path}:2: SyntaxError: (unicode error) 'utf-8' codec can't decode byte 0xe9")


def test_an_import_error_is_told_with_the_authors_line_and_the_file_can_be_mended(write: Write) -> None:
    path = write("\nimport no_such_package\n")
    assert told(path) == (
        f"{path}:2: while importing it: ModuleNotFoundError: No module named 'no_such_package' (import no_such_package)"
    )
    os.utime(write("def get_custom_dataset():\n    return 1\n"), (1, 1))
    assert load(path)() == 1


@pytest.mark.parametrize("text", ["import sys\nsys.exit(0)\n", "raise SystemExit\n"])
def test_a_file_that_exits_does_not_end_the_run_in_silence(write: Write, text: str) -> None:
    assert "while importing it: SystemExit" in told(write(text))


def test_a_function_that_exits_does_not_end_the_run_in_silence(write: Write) -> None:
    path = write("def get_custom_dataset():\n    exit()\n")
    assert f"{path}:2: in get_custom_dataset: SystemExit" in told(path)


def test_a_wrong_number_of_arguments_names_the_file(write: Write) -> None:
    path = write("def get_custom_dataset(config, tokenizer): ...\n")
    message = told(path, 1, 2, 3)
    assert message.startswith(f"{path}: in get_custom_dataset: TypeError: ")
    assert "takes 2 positional arguments but 3 were given" in message


def test_a_long_message_of_many_lines_becomes_one_short_line(write: Write) -> None:
    path = write("def get_custom_dataset():\n    raise ValueError('a\\n' * 5000)\n")
    assert len(told(path)) < 2 * TOLD_CHARACTERS + len(str(path))


def test_the_authors_exception_stays_behind_ours(write: Write) -> None:
    path = write("def get_custom_dataset():\n    return {}['dialogue']\n")
    with pytest.raises(PluginError) as caught:
        load(path)()
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__cause__.__traceback__ is not None


def test_errors_of_ours_and_ctrl_c_pass_through(write: Write) -> None:
    path = write(
        "from llmrecipes.errors import DataError\n"
        "def get_custom_dataset():\n    raise DataError('data.csv:3: bad')\n"
        "def interrupted():\n    raise KeyboardInterrupt\n"
    )
    with pytest.raises(DataError, match="^data.csv:3: bad$"):
        load(path)()
    with pytest.raises(KeyboardInterrupt):
        load(f"{path}:interrupted")()


def test_rows_made_one_by_one_are_guarded_as_they_are_made(write: Write) -> None:
    path = write("def get_custom_dataset():\n    yield 1\n    yield 2 / 0\n")
    plugin = load(path)
    rows = plugin.each(plugin())
    assert next(rows) == 1
    with pytest.raises(PluginError, match=rf"^{path}:3: in the rows of get_custom_dataset: ZeroDivisionError"):
        next(rows)


def test_without_an_author_the_last_line_of_all_is_told() -> None:
    with (
        pytest.raises(PluginError, match=r"json/decoder.py:\d+: in the collator: JSONDecodeError"),
        blamed("in the collator"),
    ):
        __import__("json").loads("{")
