"""A YAML config file as flat keys, their text exactly as written, and the line of each.

Every value stays a string until the schema gives it a type, as a flag's value does: YAML's own guesses (`on` is true,
`010` is 8, `1e-4` is text) never happen. Tags, references and repeated keys are refused.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from llmrecipes.config.options import listed
from llmrecipes.errors import ConfigError

Value = str | list[str] | None


@dataclass(frozen=True)
class Given:
    """One value as the user gave it, and where: `--lr` or `configs/x.yaml:12`."""

    key: str
    value: object
    origin: str


def read_config_file(path: Path) -> list[Given]:
    """Returns the keys of a YAML file, nested ones dotted; raises `ConfigError` naming file and line."""
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file{_neighbours(path)}")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise ConfigError(f"{path}: expected `key: value` lines, found {kind}")
    return _flatten(root, "", path)


def _flatten(node: yaml.MappingNode, prefix: str, path: Path) -> list[Given]:
    given: list[Given] = []
    seen: set[str] = set()
    for key_node, value_node in node.value:
        origin = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{origin}: a key must be a plain name")
        key = prefix + key_node.value
        if key in seen:
            raise ConfigError(f"{origin}: {key} stands here a second time; keep one")
        seen.add(key)
        if isinstance(value_node, yaml.MappingNode):
            if prefix.count(".") > 2:
                raise ConfigError(f"{origin}: {key} is nested too deeply")
            given += _flatten(value_node, f"{key}.", path)
        else:
            given.append(Given(key, _value(value_node, origin, key), origin))
    return given


def _value(node: yaml.Node, origin: str, key: str) -> Value:
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.split(":")[-1] not in ("str", "seq"):
        raise ConfigError(f"{origin}: {key} carries the YAML tag {node.tag}, and tags are not read; write plain values")
    if isinstance(node, yaml.SequenceNode):
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise ConfigError(f"{origin}: {key} must be a list of plain values")
        return [str(item.value) for item in node.value]
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return None if plain and node.value in ("", "~", "null") else str(node.value)


def _neighbours(path: Path) -> str:
    found = sorted(item.name for item in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return f"; {path.parent} holds {listed(found)}" if found else ""
