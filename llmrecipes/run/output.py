"""The folder a run writes: the result at its root, `last/` and `step-N/` beside it, each whole or not at all."""

import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmrecipes.errors import ConfigError
from llmrecipes.models.folders import local_path
from llmrecipes.models.identity import Base
from llmrecipes.prompt_contract import PromptContract
from llmrecipes.run.manifest import MANIFEST, ManifestError, check_folder, flush, seal
from llmrecipes.training.state import Place

MARKS = ("run.yaml", "merging.yaml")
"""Settings that every run, and every merging, writes first: what holds one of them is ours to replace."""

TEMPORARY = ".tmp-"
"""How the name of what is being written begins."""

LOCK_FILE = "run.lock"

STATUS_FILE = "status.json"

PENDING = ".result"
"""A finished result on its way to the folder's root."""

OURS = (*MARKS, "prompt.json", "metrics.jsonl", "tensorboard", "wandb", "last", "step-[0-9]*", ".tmp-*", PENDING,
        "set-aside-*", MANIFEST, LOCK_FILE, STATUS_FILE, "black-box", "base.json",
        "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")  # fmt: skip
"""Names that a run may leave in its output folder, and that --overwrite_output_dir may therefore remove."""

RESULTS = ("*.safetensors", "metrics.jsonl", "step-[0-9]*", "last")
"""Names that make a folder hold a run."""


def check_output_dir(path: str, overwrite: bool, inputs: Sequence[str | None] = (), goes_on: bool = False) -> Path:
    """Returns the folder to write to, untouched as yet; raises `ConfigError` where writing would endanger anything.

    `inputs` are the models and adapters that the run reads; None and hub ids among them are no folders. A run that
    `goes_on` with the one in the folder replaces nothing.
    """
    folder = local_path(path)
    resolved = folder.resolve()
    if resolved in (Path("/"), Path.home().resolve(), Path.cwd().resolve()) or resolved in Path.cwd().resolve().parents:
        raise ConfigError(
            f"--output_dir {path}: this folder holds other things; name a new one, such as outputs/my-run"
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output_dir {path}: this is a file; name a folder")
    for name in filter(None, inputs):
        source = local_path(name).resolve()
        if source.exists() and (source == resolved or resolved in source.parents):
            raise ConfigError(f"--output_dir {path}: this run reads {name} in it; name another folder")
    if not (goes_on and (_held(folder, MARKS) or any(folder.glob("step-*/manifest.json")))):
        _check_contents(folder, path, overwrite)
    _check_writable(folder, f"--output_dir {path}")
    return folder


def check_output_file(path: str, flag: str) -> Path:
    """Returns the file to write, untouched as yet; raises `ConfigError` where it could not be written."""
    file = local_path(path)
    if file.is_dir():
        raise ConfigError(f"--{flag} {path}: this is a folder; name a file")
    if file.exists() and not os.access(file, os.W_OK):
        raise ConfigError(f"--{flag} {path}: it cannot be written to; name another file")
    _check_writable(file.parent, f"--{flag} {path}")
    return file


def claim_output_dir(folder: Path, mark: str, settings: str) -> None:
    """Empties a checked folder of the run that it holds and writes the settings of the new one, as file `mark`.

    Until then the old one's settings stay, by which the folder is known to be ours, and what became of it. Checkpoints
    go first, the newest before all others, so that none is left whose steps the metrics no longer have.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = [item for item in _held(folder, OURS) if item.name not in (LOCK_FILE, STATUS_FILE, *MARKS)]
        for item in sorted(held, key=lambda item: (item.match("step-*"), len(item.name), item.name), reverse=True):
            (remove_folder if item.match("step-*") else _remove)(item)
        write_file(folder / mark, settings)
        for item in _held(folder, (*MARKS, STATUS_FILE)):
            if item.name != mark:
                _remove(item)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be written to ({error.strerror})") from None


def check_still_new(folder: Path) -> None:
    """Raises `ConfigError` where another run made a folder its own after this one had found it missing."""
    if _held(folder, MARKS):
        raise ConfigError(
            f"--output_dir {folder}: another run began in it after this one; name another folder, or go on with it "
            "(--resume auto)"
        )


def _check_contents(folder: Path, path: str, overwrite: bool) -> None:
    """Raises `ConfigError` where a folder holds what no run wrote, or a run that is not to be replaced."""
    foreign = set(folder.glob("*")) - _held(folder, OURS if _held(folder, MARKS) else (".tmp-*", LOCK_FILE))
    if foreign:
        raise ConfigError(
            f"--output_dir {path}: holds files that no run wrote ({min(foreign).name}); name a new folder"
        )
    held = _held(folder, RESULTS)
    if held and not overwrite:
        raise ConfigError(
            f"--output_dir {path}: holds a run already ({min(held).name}); name another folder, go on with it "
            "(fine-tuning: --resume auto), or replace it with --overwrite_output_dir"
        )


def _check_writable(folder: Path, told: str) -> None:
    """Raises `ConfigError` where a folder, or the nearest one above it that is there, cannot be written to."""
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{told}: {existing} cannot be written to; name another place")


def free_bytes(folder: Path) -> int:
    """Returns how much room is left on the disk of a folder that need not be there yet."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())


def _held(folder: Path, patterns: Sequence[str]) -> set[Path]:
    return {item for pattern in patterns for item in folder.glob(pattern)}


def write_folder(folder: Path, write: Callable[[Path], object], about: Mapping[str, Any] | None = None) -> None:
    """Lets `write` fill a new folder and puts it, sealed by a manifest, in the place of `folder`.

    Whatever happens, the old folder or the new one is whole; `tidy` ends what was broken off between the two.
    """
    temporary = folder.parent / f"{TEMPORARY}{folder.name}"
    _written(temporary, write, about)
    with disk_told(folder.parent):
        aside = folder.parent / f"{TEMPORARY}old-{folder.name}"
        if folder.exists():
            _remove_if_there(aside)
            folder.rename(aside)
        temporary.rename(folder)
        flush(folder.parent)
        _remove_if_there(aside)


def write_into(folder: Path, write: Callable[[Path], object], about: Mapping[str, Any] | None = None) -> None:
    """Lets `write` fill a new folder and moves its files into `folder`, the manifest last; others stay.

    From the moment when the new folder is called `PENDING` its files count, and `tidy` moves what is left of them.
    """
    temporary = folder / f"{TEMPORARY}result"
    _written(temporary, write, about)
    with disk_told(folder):
        temporary.rename(folder / PENDING)
        flush(folder)
        _move_pending(folder)


def write_file(path: Path, text: str) -> None:
    """Puts a text in the place of a file, whole or not at all."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.replace(path)


def remove_folder(folder: Path) -> None:
    """Removes a folder of ours, which no one takes for a whole one in the meantime."""
    gone = folder.parent / f"{TEMPORARY}gone-{folder.name}"
    with disk_told(folder.parent):
        _remove_if_there(gone)
        folder.rename(gone)
        _remove(gone)


def tidy(folder: Path) -> None:
    """Ends what a run that was killed had begun to write, and removes what it had not finished writing."""
    with disk_told(folder):
        if (folder / PENDING).is_dir():
            _move_pending(folder)
        for item in sorted(folder.glob(f"{TEMPORARY}*")):
            name = item.name.removeprefix(TEMPORARY)
            target = folder / name.removeprefix("old-")
            unwanted = name == "result" or name.startswith("gone-")
            if item.is_dir() and not unwanted and not target.exists() and is_whole(item):
                item.rename(target)
            else:
                _remove(item)


def is_whole(folder: Path) -> bool:
    """Returns whether a folder has a manifest, and is as that says."""
    try:
        check_folder(folder)
    except ManifestError:
        return False
    return True


def _move_pending(folder: Path) -> None:
    pending = folder / PENDING
    for item in sorted(pending.iterdir(), key=lambda item: item.name == MANIFEST):
        item.replace(folder / item.name)
    flush(folder)
    pending.rmdir()


def _written(temporary: Path, write: Callable[[Path], object], about: Mapping[str, Any] | None) -> None:
    with disk_told(temporary.parent):
        _remove_if_there(temporary)
        temporary.mkdir(parents=True)
    try:
        with disk_told(temporary.parent):
            write(temporary)
            _let_read(temporary)
            seal(temporary, about or {})
    except ConfigError:
        with suppress(OSError):
            _remove_if_there(temporary)
        raise


def _let_read(folder: Path) -> None:
    """Gives weights the mode that the umask, by which the folder was made, gives other files.

    safetensors writes through a temporary file, which is for its owner alone.
    """
    for path in folder.glob("*.safetensors"):
        with suppress(PermissionError):  # a disk without modes
            path.chmod(folder.stat().st_mode & 0o666)


@contextmanager
def disk_told(folder: Path) -> Iterator[None]:
    """Turns what keeps files from being written into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{folder}: it could not be written to ({why}); what was saved before is whole: make room, and run it again"
        ) from None


def _remove_if_there(item: Path) -> None:
    if item.exists() or item.is_symlink():
        _remove(item)


def _remove(item: Path) -> None:
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item)
    else:
        item.unlink()


def command_line(words: Sequence[str]) -> str:
    """Returns a command line from its words, quoted for a shell where needed."""
    return " ".join(shlex.quote(word) for word in words)


@dataclass
class ResultWriter:
    """Saves the weights as they are now: `best` at the folder's root, `last` beside it where it is not the best."""

    folder: Path
    model: Any
    tokenizer: Any
    contract: PromptContract
    base: Base
    """what an adapter is an adapter of"""
    enabled: bool = True
    holds_best: bool = False

    def __call__(self, name: str, place: Place) -> None:
        """Writes the result under a name of the training loop's, `best` or `last`."""
        if not self.enabled:
            return
        about = about_best(place) if name == "best" else {"kind": "result", "step": place.step}
        if name == "best" or not self.holds_best:
            write_into(self.folder, self.write, about)
        else:
            write_folder(self.folder / name, self.write, about)
        self.holds_best = self.holds_best or name == "best"

    def write(self, folder: Path) -> None:
        """Writes adapter and base.json, or model, and tokenizer and prompt.json into a folder."""
        save_weights(self.model, folder)
        if is_adapter(self.model):
            self.base.save(folder)
        self.tokenizer.save_pretrained(str(folder))
        self.contract.save(folder)


def about_best(place: Place) -> dict[str, Any]:
    """Returns what the manifest of the best result of a run at `place` tells, so that a run knows it again."""
    loss = place.best_loss if math.isfinite(place.best_loss) else None
    return {"kind": "result", "step": place.best_step, "eval_loss": loss}


def save_weights(model: Any, folder: Path) -> None:
    """Writes an adapter, or a whole model where none is attached, as safetensors."""
    model.save_pretrained(str(folder), **({"save_embedding_layers": False} if is_adapter(model) else {}))
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card: a form with nothing filled in


def is_adapter(model: Any) -> bool:
    """Returns whether a model is a base with an adapter on it."""
    return hasattr(model, "peft_config")
