"""The command line: words to flags, flags to a config, the config to a run, errors to one line and an exit code.

A command is a schema and a function of `llmrecipes.run`, which is imported only once the flags are accepted, so that
a wrong one is told in well under a second.
"""

import importlib
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fire
from fire.decorators import SetParseFn

from llmrecipes.config.data_schema import DataCheckConfig, DataDoctorConfig, DataViewConfig
from llmrecipes.config.loading import BARE, Loaded, load_config
from llmrecipes.config.schema import EvaluationConfig, InferenceConfig, MergingConfig, PlanConfig, RunConfig
from llmrecipes.config.show import config_text, help_text
from llmrecipes.environment import prepare_environment
from llmrecipes.errors import ConfigError, LlmRecipesError
from llmrecipes.reports.trackers import without_secrets

EXIT_INTERRUPTED = 130

FLAG = re.compile(r"--[A-Za-z_][\w.-]*(=.*)?", re.DOTALL)
"""A word that is a flag. Others that begin with dashes, such as a prompt of `---`, may be a flag's value."""

PRINT_CONFIG = {BARE: True, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Command:
    """A command's keys, and where the function that carries it out is: module, name."""

    schema: type
    module: str
    function: str


COMMANDS = {
    "plan": Command(PlanConfig, "llmrecipes.run.plan", "plan"),
    "finetuning": Command(RunConfig, "llmrecipes.run.finetune", "finetune"),
    "inference": Command(InferenceConfig, "llmrecipes.run.infer", "infer"),
    "evaluation": Command(EvaluationConfig, "llmrecipes.run.evaluate", "evaluate"),
    "merging": Command(MergingConfig, "llmrecipes.run.merge", "merge"),
}

DATA_COMMANDS = {
    "data view": Command(DataViewConfig, "llmrecipes.run.data", "view"),
    "data check": Command(DataCheckConfig, "llmrecipes.run.data", "check"),
    "data doctor": Command(DataDoctorConfig, "llmrecipes.run.data", "doctor"),
}


def launch(name: str, words: Sequence[str]) -> int:
    """Runs a command from the words behind it; prints errors and returns the exit code."""
    if {"--help", "-h"} & set(words):
        print(help_text(f"python -m llmrecipes.{name}", (COMMANDS | DATA_COMMANDS)[name].schema))
        return 0
    return guarded(lambda: run_command(name, parse_flags(words)))


def guarded(run: Callable[[], int]) -> int:
    """Returns the exit code of `run`; an error that the user can mend is printed as lines, not as a traceback."""
    try:
        return run()
    except LlmRecipesError as error:
        for line in without_secrets(str(error)).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C", file=sys.stderr)
        return EXIT_INTERRUPTED


def run_command(name: str, flags: Mapping[str, object]) -> int:
    """Checks a command's flags and runs it; returns the exit code, raises `LlmRecipesError`."""
    command = (COMMANDS | DATA_COMMANDS)[name]
    flags = dict(flags)
    print_config = print_config_wanted(flags)
    loaded: Loaded[Any] = load_config(command.schema, flags)
    if print_config:
        prepare_environment()
        automatic = importlib.import_module("llmrecipes.run.preparing").automatic_values(loaded.config)
        print(config_text(loaded, automatic))
        return 0
    config_path = None if flags.get("config") is None else str(flags["config"])
    prepare_environment()
    quiet_libraries()
    function = getattr(importlib.import_module(command.module), command.function)
    return int(function(loaded, config_path))


def quiet_libraries() -> None:
    """Silences what libraries say while they are imported, about things that are none of the user's business."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def print_config_wanted(flags: dict[str, Any]) -> bool:
    """Takes `print_config` out of the flags and returns whether it is set."""
    value = str(flags.pop("print_config", False)).lower()
    if value not in PRINT_CONFIG:
        raise ConfigError(f"--print_config: expected true or false, found {value!r}")
    return PRINT_CONFIG[value]


def parse_flags(words: Sequence[str]) -> dict[str, str]:
    """Returns `{name: value}` from `--name value`, `--name=value` and bare `--name`, every value as typed.

    A flag that is given again counts as it was given last, so that a recipe's flags can be followed by one's own.
    """
    flags: dict[str, str] = {}
    fire.Fire(SetParseFn(str)(lambda **named: flags.update(named)), command=joined(words), name="llmrecipes")
    if flags.get("config") == BARE:
        raise ConfigError("--config needs a value: the path of a YAML file")
    return flags


def joined(words: Sequence[str]) -> list[str]:
    """Returns the words with each flag and its value made one, as fire takes them without guessing."""
    result: list[str] = []
    problems: list[str] = []
    waiting = False
    for word in words:
        if FLAG.fullmatch(word):
            result.append(word if "=" in word else f"{word}={BARE}")
            waiting = "=" not in word
        elif waiting:
            result[-1] = result[-1].removesuffix(BARE) + word
            waiting = False
        elif word.startswith("-") and len(word) > 1:
            problems.append(f"{word} is not a flag; flags are --name value")
        else:
            problems.append(f"{word!r} belongs to no flag; flags are --name value, lists are a,b")
    if problems:
        raise ConfigError("\n".join(problems))
    return result
