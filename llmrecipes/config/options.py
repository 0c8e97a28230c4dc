"""One option of a command: a dataclass field with its default, help line, range and choices.

    @dataclass(frozen=True)
    class Settings:
        rows: int = option(9500, "rows of the train split", at_least=1)
        output_dir: str = option(REQUIRED, "folder to write to")

Allowed types: str, int, float, bool, list[str], each `| None`, and nested dataclasses (sections, see `section`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field
from typing import Any

REQUIRED = "???"
"""Default of an option that the user must give; OmegaConf's own mark of a missing value."""


@dataclass(frozen=True)
class Limits:
    """What an option's value may be, beyond its type."""

    help: str
    choices: tuple[str, ...] | None = None
    plugin: bool = False
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    any_case: bool = False
    """Whether `H200` is `h200`: for names that others write in capitals."""
    bare: str | None = None
    """What the flag means when it is given without a value; None: a value must follow (a boolean means true)."""

    def problem(self, value: Any) -> str | None:
        """Returns what is wrong with one value of the right type, or None."""
        if value is None or isinstance(value, bool):
            return None
        if isinstance(value, float) and not abs(value) < float("inf"):
            return f"{value} is not a finite number"
        if self.at_least is not None and value < self.at_least:
            return f"{value} is too small, the smallest is {self.at_least:g}"
        if self.above is not None and value <= self.above:
            return f"{value} must be greater than {self.above:g}"
        if self.at_most is not None and value > self.at_most:
            return f"{value} is too large, the largest is {self.at_most:g}"
        return None


def option(default: Any, help_line: str, **limits: Any) -> Any:
    """Returns a dataclass field; `limits` are the fields of `Limits`."""
    metadata = {"limits": Limits(help=help_line, **limits)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type, help_line: str) -> Any:
    """Returns a dataclass field that holds a nested group of options: `--name.key value`."""
    return field(default_factory=kind, metadata={"limits": Limits(help=help_line)})


def limits_of(item: Field[Any]) -> Limits:
    """Returns the limits of a dataclass field; a field made without `option` has none."""
    metadata: Mapping[str, Any] = item.metadata
    return metadata["limits"] if "limits" in metadata else Limits(help="")


SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", re.IGNORECASE)


def size_in_bytes(text: str) -> int | None:
    """Returns the bytes of `24GiB`, `24 GB` or `0.5TiB`; None for what is no size."""
    found = SIZE.fullmatch(text)
    if found is None:
        return None
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(prefix.upper())))


def listed(names: Sequence[str]) -> str:
    """Returns `a, b or c`."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else list(names))
