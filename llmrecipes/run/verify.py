"""Whether saved folders are still what was written: their files hashed again, and compared with their manifests."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from llmrecipes.errors import ModelError
from llmrecipes.run.manifest import CHECKPOINT, MANIFEST, ManifestError, check_folder, checkpoints

LARGEST_HEADER = 100 << 20
"""Bytes of a safetensors header, as the library itself allows."""


def verify(names: Sequence[str]) -> int:
    """Prints a line for each folder, and for those a run made in it; raises `ModelError` with a line for each bad one.

    All are looked at before it is raised.
    A folder without a manifest, such as a model from the hub, is looked at only for files that are cut short.
    """
    bad = []
    for name in names:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            bad.append(f"verify {name}: {no_folder(folder)}")
            continue
        for item in saved_folders(folder):
            try:
                print(f"{item}: {checked(item)}")
            except ManifestError as error:
                bad.append(f"{item}: {error}; {way_out(item)}")
    if bad:
        raise ModelError("\n".join(bad))
    return 0


def no_folder(path: Path) -> str:
    """Returns why what was named cannot be verified."""
    if not path.exists():
        return "no such folder"
    if path.suffix == ".gguf":
        return "a file; folders are verified, and of a .gguf nothing is written down to compare it with"
    return f"a file; folders are verified, give the one that holds it: {path.parent}"


def way_out(folder: Path) -> str:
    """Returns what to do about a damaged folder: of a checkpoint, which other one is gone on from."""
    if CHECKPOINT.fullmatch(folder.name):
        for other in (item for item in checkpoints(folder.parent) if item != folder):
            try:
                check_folder(other)
            except ManifestError:
                continue
            return f"{other.name} beside it is whole, go on from there with the run's command and --resume auto"
    return "fetch or write it again"


def saved_folders(folder: Path) -> list[Path]:
    """Returns a folder, where it holds weights or a manifest, and the checkpoints and results that a run left in it."""
    inner = sorted(item for item in folder.glob("*") if item.is_dir() and is_saved(item))
    found = [folder] if is_saved(folder) or not inner else []
    return found + inner


def is_saved(folder: Path) -> bool:
    """Returns whether something was saved in a folder."""
    runs = folder.name == "last" or folder.name.startswith("step-")
    return runs or (folder / MANIFEST).exists() or any(folder.glob("*.safetensors"))


def checked(folder: Path) -> str:
    """Returns what was found to be right with a folder; raises `ManifestError`."""
    if (folder / MANIFEST).exists() or folder.name.startswith("step-"):
        files = check_folder(folder)["files"]
        size = sum(file["bytes"] for file in files.values())
        return f"whole, {len(files)} files of {size:,} bytes are as they were written"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ManifestError(f"no {MANIFEST} and no weights in it")
    for path in weights:
        _check_size(path)
    told = f"{len(weights)} weight files have their" if len(weights) > 1 else "weight file has its"
    return f"no {MANIFEST}; its {told} full size, and no bytes were compared"


def _check_size(path: Path) -> None:
    """Raises `ManifestError` where a safetensors file is not as long as its header says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= LARGEST_HEADER else {}
            ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
            expected, found = 8 + length + max(ends), file.seek(0, os.SEEK_END)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ManifestError(f"{path.name} is no safetensors file") from None
    if found != expected:
        raise ManifestError(f"{path.name} has {found} bytes, its header tells of {expected}")
