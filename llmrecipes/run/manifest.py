"""What a saved folder holds, each file with its size and SHA-256, and whether it still does.

`manifest.json` is written last, once every other file is on the disk: a folder without one was never finished.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

CHECKPOINT = re.compile(r"step-(\d{6,})")
"""Names of the folders that are checkpoints of a run."""

FORMAT = 1

LARGEST_MANIFEST = 16 << 20
"""Bytes above which a manifest is not read: a thousand files take some 100 KB."""


class ManifestError(ValueError):
    """A folder is not what its manifest says; the message says how, in a few words."""


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in an output folder, newest first; whether they are whole is another question."""
    found = [item for item in folder.glob("step-*") if CHECKPOINT.fullmatch(item.name) and item.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Returns the step that a checkpoint was saved behind, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Puts every file of a folder on the disk and writes its manifest, which also holds `about`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest(path)}
            flush(path)
    manifest = {"format": FORMAT, **about, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    flush(folder / MANIFEST)
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        flush(inner)
    flush(folder)


def flush(path: Path) -> None:
    """Returns once a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns a folder's manifest; raises `ManifestError` where it has none, or one that cannot be ours."""
    path = folder / MANIFEST
    if folder.is_symlink() or path.is_symlink():
        raise ManifestError("a symbolic link")
    if not path.is_file():
        raise ManifestError(f"no {MANIFEST}, so it was never finished")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise ManifestError(f"its {MANIFEST} is too large")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ManifestError(f"its {MANIFEST} is no JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not _are_files(manifest.get("files")):
        raise ManifestError(f"its {MANIFEST} is of no format known here")
    return manifest


def check_folder(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a folder whose every file is as it was written; raises `ManifestError`."""
    try:
        manifest = read_manifest(folder)
        for name, file in manifest["files"].items():
            _check_file(folder, name, file)
    except OSError as error:
        raise ManifestError(f"it cannot be read ({error.strerror or error})") from None
    return manifest


def _check_file(folder: Path, name: str, file: Mapping[str, Any]) -> None:
    parts = name.split("/")
    if not name or "\\" in name or Path(name).is_absolute() or any(part in ("", ".", "..") for part in parts):
        raise ManifestError(f"its {MANIFEST} names {name[:80]!r}, which is not within")
    path = folder / name
    if any((folder / "/".join(parts[: length + 1])).is_symlink() for length in range(len(parts))):
        raise ManifestError(f"{name} is a symbolic link")
    if not path.is_file():
        raise ManifestError(f"{name} is missing")
    size = path.stat().st_size
    if size != file["bytes"]:
        raise ManifestError(f"{name} has {size} bytes, {file['bytes']} were written")
    if digest(path) != file["sha256"]:
        raise ManifestError(f"{name} is not what was written (its SHA-256 differs)")


def _are_files(files: object) -> bool:
    return isinstance(files, dict) and all(
        isinstance(file, dict) and isinstance(file.get("bytes"), int) and isinstance(file.get("sha256"), str)
        for file in files.values()
    )
