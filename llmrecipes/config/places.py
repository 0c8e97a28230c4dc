"""Which plug-ins a config file may name: those beside or below it or the current folder, and the shipped ones.

A config is text that people pass on, and a plug-in is a program. What stands on the command line was typed by the user
and may lie anywhere.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = (PACKAGE / "shipped", PACKAGE.parent / "custom_datasets")

PLUGIN_KEYS = ("custom_dataset.file", "optimizer", "lr_scheduler", "report_to", "metric")


def outside_plugins(tree: Any, origins: Mapping[str, str], config_path: Path) -> list[str]:
    """Returns one line for each plug-in that a config file names outside the folders where it may.

    `tree` holds the values, `origins` where each came from: `FILE:LINE` for those of the file.
    """
    allowed = [config_path.resolve().parent, Path.cwd().resolve(), *SHIPPED]
    problems = []
    for key in PLUGIN_KEYS:
        origin = origins.get(key, "default")
        if not origin.startswith(f"{config_path}:"):
            continue
        value: Any = tree
        for part in key.split("."):
            value = getattr(value, part)
        for name in [value] if isinstance(value, str) else list(value):
            file_name = name.rpartition(":")[0] if not name.endswith(".py") else name
            if file_name.endswith(".py") and not _is_within(Path(file_name).expanduser(), allowed):
                problems.append(
                    f"{origin}: {key} names {file_name}, which lies neither below the config's folder nor below this; "
                    f"give it as a flag, --{key}, or allow it with --allow_outside_plugins"
                )
    return problems


def _is_within(path: Path, allowed: Sequence[Path]) -> bool:
    """Returns whether a path, looked for in the folders where it may lie, stays in one of them."""
    candidates = [(folder / path).resolve() for folder in allowed]
    return all(any(candidate.is_relative_to(folder) for folder in allowed) for candidate in candidates)
