"""Flags and a YAML file become one frozen, complete, checked config; all that is wrong is told in one go.

Order of precedence: default, then `--config FILE`, then flags.
"""

import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmrecipes.config import rules
from llmrecipes.config.files import Given, read_config_file
from llmrecipes.config.options import REQUIRED, Limits, limits_of, listed
from llmrecipes.config.places import outside_plugins
from llmrecipes.errors import ConfigError, did_you_mean

T = TypeVar("T")

ALIKE = 0.75
"""How much of a name must be as in a known key for that to be what was meant."""

BARE = "\0bare"
"""What the command line hands over for a flag without a value."""


@dataclass(frozen=True)
class Leaf:
    """One key that can be set: its dotted name, group title, type and limits."""

    key: str
    group: str
    kind: type
    optional: bool
    limits: Limits
    default: Any

    @property
    def type_name(self) -> str:
        """The type as `--help` shows it."""
        name = "list" if self.kind is list else self.kind.__name__
        return f"{name} or none" if self.optional else name


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A checked config, where each value came from, and what the user should be told about it."""

    config: T
    origins: Mapping[str, str]
    """dotted key -> default | auto | --flag | file:line"""
    notices: tuple[str, ...] = ()


def load_config(schema: type[T], flags: Mapping[str, object]) -> Loaded[T]:
    """Returns the config that defaults, `flags["config"]` (a YAML file) and the other flags add up to.

    Flags are `{name or dotted name: value as typed}`; raises `ConfigError` with one line for every problem.
    """
    flags = dict(flags)
    path = flags.pop("config", None)
    from_file = [] if path is None else read_config_file(Path(str(path)).expanduser())
    given = [*from_file, *flatten_flags(flags)]
    leaves = {leaf.key: leaf for leaf in leaves_of(schema)}
    known, problems, notices = resolve_names(given, leaves)
    tree = unlocked(OmegaConf.structured(schema))
    origins = dict.fromkeys(leaves, "default")
    for key, item in known:
        problem = assign(tree, leaves[key], item)
        origins[key] = item.origin
        if problem:
            problems.append(f"{item.origin}: {problem}")
    if not problems:
        problems += [
            f"--{key} is required: {leaf.limits.help}"
            for key, leaf in leaves.items()
            if leaf.default == REQUIRED and OmegaConf.is_missing(tree, key)
        ]
    if not problems:
        config = typing.cast(T, OmegaConf.to_object(tree))
        problems = rules.problems(config, {key for key, origin in origins.items() if origin != "default"})
        notices += rules.notices(config, origins)
        if path is not None and not _allows_outside(config, origins):
            problems += outside_plugins(config, origins, Path(str(path)).expanduser())
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return Loaded(config, origins, tuple(notices))


def _allows_outside(config: object, origins: Mapping[str, str]) -> bool:
    """Returns whether the user, and not the file itself, lets a config file name plug-ins anywhere."""
    typed = origins.get("allow_outside_plugins", "").startswith("--")
    return typed and bool(getattr(config, "allow_outside_plugins", False))


def leaves_of(schema: type, prefix: str = "") -> list[Leaf]:
    """Returns every key of a schema, sections included, in the order of its groups."""
    groups = {name: kind for kind in schema.__mro__ for name in inspect.get_annotations(kind)}
    hints = typing.get_type_hints(schema)
    leaves: list[Leaf] = []
    for item in fields(typing.cast(Any, schema)):
        kind, optional = _plain_type(hints[item.name])
        if is_dataclass(kind):
            leaves += leaves_of(kind, f"{prefix}{item.name}.")
            continue
        owner = groups[item.name] if not prefix else schema
        title = (owner.__doc__ or "").strip().splitlines()[0]
        group = f"{prefix.rstrip('.')}: {title}" if prefix else title
        default = item.default_factory() if callable(item.default_factory) else item.default
        leaves.append(Leaf(prefix + item.name, group, kind, optional, limits_of(item), default))
    return leaves


def flatten_flags(flags: Mapping[str, object], prefix: str = "") -> list[Given]:
    """Returns flags as `Given`s; a mapping (a section handed over from Python) becomes dotted keys."""
    given: list[Given] = []
    for name, value in flags.items():
        if isinstance(value, Mapping):
            given += flatten_flags(value, f"{prefix}{name}.")
        else:
            given.append(Given(prefix + name, value, f"--{prefix}{name}"))
    return given


def resolve_names(
    given: Iterable[Given], leaves: Mapping[str, Leaf]
) -> tuple[list[tuple[str, Given]], list[str], list[str]]:
    """Returns (dotted key, value) pairs, problems and notices: old names renamed, undotted names found."""
    known: list[tuple[str, Given]] = []
    problems: list[str] = []
    notices: list[str] = []
    given = list(given)
    datasets = [item.value for item in given if item.key == "dataset"]
    chosen = str(datasets[-1] if datasets else leaves["dataset"].default if "dataset" in leaves else "")
    for item in given:
        for renamed, notice in rules.renamed(item):
            notices += [notice] if notice else []
            keys = matching_keys(renamed.key, leaves, chosen)
            if len(keys) == 1:
                known.append((keys[0], renamed))
            elif keys:
                problems.append(f"{item.origin}: several sections have it; say which: {listed(keys)}")
            else:
                problems.append(f"{item.origin}: {item.key} is not a key of this command{near(item.key, leaves)}")
    return known, problems, notices


def matching_keys(name: str, leaves: Mapping[str, Leaf], dataset: str = "") -> list[str]:
    """Returns the dotted keys that a name may mean: itself, the chosen data set's, or every section's of that name."""
    if name in leaves:
        return [name]
    if f"{dataset}.{name}" in leaves:
        return [f"{dataset}.{name}"]
    return [key for key in leaves if "." not in name and key.split(".")[-1] == name]


def near(name: str, leaves: Iterable[str]) -> str:
    """Returns `; did you mean --x?` for the nearest known key, also where another trainer calls it that."""
    known = {key: key for leaf in leaves for key in (leaf, leaf.split(".")[-1])}
    elsewhere = {other: ours for other, ours in rules.NAMES_ELSEWHERE.items() if ours.split()[0] in known}
    spelled = name.replace("-", "_")
    close = difflib.get_close_matches(spelled, [*known, *elsewhere], n=1, cutoff=ALIKE)
    guess = {**elsewhere, **known}.get(close[0]) if close else None
    return f"; did you mean --{guess}?" if guess else "; --help lists all keys"


def assign(tree: DictConfig, leaf: Leaf, item: Given) -> str | None:
    """Sets one value in the tree, converted to its type; returns what is wrong with it, or None."""
    value, limits = item.value, leaf.limits
    if value == BARE:
        value = True if leaf.kind is bool else limits.bare
        if value is None:
            return f"needs a value ({leaf.type_name}): {limits.help}"
    if isinstance(value, str) and leaf.optional and value.lower() in ("none", "null"):
        value = None
    if value is None and not leaf.optional:
        return f"needs a value ({leaf.type_name}), it cannot be none"
    if limits.any_case and isinstance(value, str):
        value = value.lower()
    if leaf.kind is list and isinstance(value, str):
        value = [part.strip().strip("'\"") for part in value.strip().strip("[]()").split(",") if part.strip()]
    try:
        OmegaConf.update(tree, leaf.key, _literal(value))
        value = OmegaConf.select(tree, leaf.key)
    except OmegaConfBaseException:
        return f"expected {_article(leaf.type_name)}, found {item.value!r}"
    chosen = list(value or ()) if leaf.kind is list else [] if value is None else [value]
    for choice in chosen:
        if limits.choices and choice not in limits.choices and not (limits.plugin and ".py" in choice):
            return f"{choice!r} is not one of {listed(limits.choices)}{did_you_mean(choice, limits.choices)}"
    return limits.problem(value)


def unlocked(tree: DictConfig) -> DictConfig:
    """Returns the tree with its sections made writable: frozen dataclasses give read-only ones."""
    OmegaConf.set_readonly(tree, False)
    for key in tree:
        child = None if OmegaConf.is_missing(tree, key) else tree[key]
        if isinstance(child, DictConfig):
            unlocked(child)
    return tree


def _literal(value: object) -> object:
    """Returns a value in which OmegaConf sees no `${...}` to fill in: what the user typed is what is meant."""
    if isinstance(value, list | tuple):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _plain_type(hint: Any) -> tuple[type, bool]:
    """Returns a field's type without `| None` and `list[str]`'s item type, and whether None is allowed."""
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        arguments = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        optional = len(arguments) < len(typing.get_args(hint))
        hint = arguments[0]
    return typing.get_origin(hint) or hint, optional


def _article(type_name: str) -> str:
    examples = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "list": "a list"}
    return examples.get(type_name.split(" ")[0], type_name)
