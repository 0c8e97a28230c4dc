"""Data on the command line.

    python -m llmrecipes.data create arithmetic --output_dir data/arithmetic
    python -m llmrecipes.data view   samsum --model_name MODEL --samsum_dataset.data_path FOLDER
    python -m llmrecipes.data check  mine.py:get_mine --model_name MODEL
    python -m llmrecipes.data doctor arithmetic --model_name MODEL

`create NAME|FILE.py` calls the file's `create_data(options)`, whose one argument is a dataclass of options: its fields
are the flags, checked like those of any command.
"""

import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, is_dataclass
from typing import Any

from llmrecipes.command import guarded, launch, parse_flags, print_config_wanted
from llmrecipes.config.data_schema import dataset_flags
from llmrecipes.config.loading import Loaded, leaves_of, load_config
from llmrecipes.config.show import config_text, help_text
from llmrecipes.errors import ConfigError, PluginError, did_you_mean
from llmrecipes.plugins import Plugin, blamed, plugin_folders, plugin_of, shipped_folder

USAGE = "usage: python -m llmrecipes.data create|view|check|doctor NAME|FILE.py [--flag value ...]"

LOOKS = ("view", "check", "doctor")


def main(words: Sequence[str]) -> int:
    """Runs one data command; returns the exit code."""
    return guarded(lambda: run(words))


def run(words: Sequence[str]) -> int:
    """Runs one data command; raises `LlmRecipesError`."""
    if not words or {"--help", "-h"} & set(words[:2]):
        if words and words[0] in LOOKS:
            return launch(f"data {words[0]}", words[1:])
        print(f"{USAGE}\n\ncreate knows: {', '.join(creators())}")
        return 0
    if words[0] in LOOKS:
        return look(words[0], words[1:])
    if words[0] != "create":
        raise ConfigError(f"data {words[0]}: not one of create, view, check, doctor; {USAGE}")
    if len(words) < 2 or words[1].startswith("-"):
        raise ConfigError(f"data create: expected one of {', '.join(creators())}, or FILE.py; {USAGE}")
    name = words[1]
    schema, create = creator(name)
    if {"--help", "-h"} & set(words):
        print(help_text(f"python -m llmrecipes.data create {name}", schema))
        return 0
    flags: dict[str, Any] = {**parse_flags(words[2:])}
    print_config = print_config_wanted(flags)
    loaded: Loaded[Any] = load_config(schema, flags)
    print(config_text(loaded, {}) if print_config else create(loaded.config))
    return 0


def look(name: str, words: Sequence[str]) -> int:
    """Looks at a data set: the word behind the command names it, or flags do as in fine-tuning."""
    named = dataset_flags(words[0]) if words and not words[0].startswith("-") else {}
    flags = [f"--{key}={value}" for key, value in named.items()]
    return launch(f"data {name}", [*flags, *words[1 if named else 0 :]])


def creators() -> list[str]:
    """Returns the shipped data sets that can be made here; their files are read, not run."""
    files = sorted(shipped_folder("custom_datasets").glob("*.py"))
    return [path.stem for path in files if "\ndef create_data(" in path.read_text(encoding="utf-8")]


def creator(name: str) -> tuple[type, Plugin]:
    """Returns the options of a shipped data set's or a file's `create_data`, and the function itself."""
    known = creators()
    if name not in known and ".py" not in name:
        raise ConfigError(
            f"data create {name}: not one of {', '.join(known)}, and not FILE.py{did_you_mean(name, known)}"
        )
    file_name = f"{name}.py" if name in known else name
    folders = [shipped_folder("custom_datasets")] if name in known else plugin_folders(None)
    plugin = plugin_of(file_name, f"data create {name}", "create_data", folders)
    return options_of(plugin), plugin


def options_of(plugin: Plugin) -> type:
    """Returns the dataclass that annotates the one argument of `create_data`; raises `PluginError`."""
    with blamed(f"in the annotations of {plugin.name}", plugin.path):
        hints = typing.get_type_hints(plugin.function)
    kinds = [kind for name, kind in hints.items() if name != "return"]
    if len(kinds) != 1 or not is_dataclass(kinds[0]):
        raise PluginError(
            f"{plugin.path}: {plugin.name} must take one argument, annotated with a dataclass of its options"
        )
    schema = typing.cast(type, kinds[0])
    for leaf in leaves_of(schema):
        if leaf.kind not in (str, int, float, bool, list) or leaf.default is MISSING:
            raise PluginError(
                f"{plugin.path}: option {leaf.key} must be str, int, float, bool or list[str] and have a default; "
                "REQUIRED of llmrecipes.config.options is the default of one that must be given"
            )
    return schema


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
