"""A schema as `--help`, a config as `--print_config` and as the `run.yaml` that reproduces the run."""

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import yaml

from llmrecipes.config.loading import Leaf, Loaded, leaves_of
from llmrecipes.config.options import REQUIRED


def help_text(command: str, schema: type) -> str:
    """Returns every key of a command by group: name, type, default, choices and range, what it does."""
    lines = [(schema.__doc__ or "").strip(), ""]
    lines.append(f"usage: {command} [--config FILE.yaml] [--key value ...]")
    lines.append("  --config FILE.yaml     the same keys as a YAML file; flags go on top of it")
    lines.append("  --print_config         print every value and where it comes from, and stop")
    grouped: dict[str, list[Leaf]] = {}
    for leaf in leaves_of(schema):
        grouped.setdefault(leaf.group, []).append(leaf)
    for group, leaves in sorted(grouped.items(), key=lambda item: item[0].split(":")[0] in schema_sections(schema)):
        lines += ["", group]
        for leaf in leaves:
            default = "required" if leaf.default == REQUIRED else f"default {plain(leaf.default)}"
            lines.append(f"  --{leaf.key} {leaf.type_name} ({default}{_range(leaf)})")
            lines += [f"      {leaf.limits.help}"] if leaf.limits.help else []
    return "\n".join(lines)


def schema_sections(schema: type) -> set[str]:
    """Returns the names of a schema's sections."""
    return {leaf.key.split(".")[0] for leaf in leaves_of(schema) if "." in leaf.key}


def config_text(loaded: Loaded[Any], automatic: Mapping[str, object]) -> str:
    """Returns the config as YAML with each value's origin behind it; `automatic` holds what unset keys come to."""
    lines = []
    for name, leaves in _sections(loaded.config):
        lines += [f"{name}:"] if name else []
        for leaf in leaves:
            value, origin = value_of(loaded.config, leaf.key), loaded.origins[leaf.key]
            if leaf.key in automatic and value in (None, "auto"):
                value, origin = automatic[leaf.key], "auto"
            lines.append(f"{'  ' if name else ''}{leaf.key.split('.')[-1]}: {plain(value)}  # {origin}")
    return "\n".join(lines)


def run_yaml(loaded: Loaded[Any], resolved: Mapping[str, object]) -> str:
    """Returns a config file that loads to this very config: the keys that were given.

    `resolved` holds keys whose value is written otherwise than given: a plug-in's full path.
    """
    tree: dict[str, Any] = {}
    for key, origin in loaded.origins.items():
        if origin == "default":
            continue
        *names, last = key.split(".")
        branch = tree
        for name in names:
            branch = branch.setdefault(name, {})
        branch[last] = resolved.get(key, value_of(loaded.config, key))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def flat_config(config: object) -> dict[str, Any]:
    """Returns every dotted key of a config with its value."""
    return {leaf.key: value_of(config, leaf.key) for leaf in leaves_of(type(config))}


def value_of(config: object, key: str) -> Any:
    """Returns the value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def plain(value: object) -> str:
    """Returns a value as it is written in YAML."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).strip().removesuffix("...").strip()


def _sections(config: object) -> Iterable[tuple[str, list[Leaf]]]:
    leaves = sorted(leaves_of(type(config)), key=lambda leaf: "." in leaf.key)
    for name, group in groupby(leaves, key=lambda leaf: leaf.key.rpartition(".")[0]):
        yield name, list(group)


def _range(leaf: Leaf) -> str:
    limits = leaf.limits
    parts = [
        "; " + " | ".join(limits.choices) if limits.choices else "",
        f"; at least {limits.at_least:g}" if limits.at_least is not None else "",
        f"; above {limits.above:g}" if limits.above is not None else "",
        f"; at most {limits.at_most:g}" if limits.at_most is not None else "",
    ]
    return "".join(parts)
