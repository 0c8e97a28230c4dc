"""The folder a run writes: the result at its root, `last/` and `step-N/` beside it, each whole or not at all."""

import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmrecipes.errors import ConfigError
from llmrecipes.models.folders import local_path
from llmrecipes.prompt_contract import PromptContract

MARKS = ("run.yaml", "merging.yaml")
"""Settings that every run, and every merging, writes first: what holds one of them is ours to replace."""

OURS = (*MARKS, "prompt.json", "metrics.jsonl", "tensorboard", "wandb", "last", "step-[0-9]*", ".tmp-*",
        "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")  # fmt: skip
"""Names that a run may leave in its output folder, and that --overwrite_output_dir may therefore remove."""

RESULTS = ("*.safetensors", "metrics.jsonl", "step-[0-9]*", "last")
"""Names that make a folder hold a run."""


def check_output_dir(path: str, overwrite: bool, inputs: Sequence[str | None] = ()) -> Path:
    """Returns the folder to write to, untouched as yet; raises `ConfigError` where writing would endanger anything.

    `inputs` are the models and adapters that the run reads; None and hub ids among them are no folders.
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
    """Empties a checked folder of the run that it holds and writes the settings of the new one, as file `mark`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for item in _held(folder, OURS):
            _remove(item)
        (folder / mark).write_text(settings, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be written to ({error.strerror})") from None


def _check_contents(folder: Path, path: str, overwrite: bool) -> None:
    """Raises `ConfigError` where a folder holds what no run wrote, or a run that is not to be replaced."""
    foreign = set(folder.glob("*")) - _held(folder, OURS if _held(folder, MARKS) else (".tmp-*",))
    if foreign:
        raise ConfigError(
            f"--output_dir {path}: holds files that no run wrote ({min(foreign).name}); name a new folder"
        )
    held = _held(folder, RESULTS)
    if held and not overwrite:
        raise ConfigError(
            f"--output_dir {path}: holds a run already ({min(held).name}); name another folder, or replace it with "
            "--overwrite_output_dir"
        )


def _check_writable(folder: Path, told: str) -> None:
    """Raises `ConfigError` where a folder, or the nearest one above it that is there, cannot be written to."""
    existing = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{told}: {existing} cannot be written to; name another place")


def _held(folder: Path, patterns: Sequence[str]) -> set[Path]:
    return {item for pattern in patterns for item in folder.glob(pattern)}


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new folder and puts it in the place of `folder` in one move."""
    temporary = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    _written(temporary, write)
    if folder.exists():
        _remove(folder)
    temporary.rename(folder)


def write_into(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new folder and moves its files into `folder`, each in one move; others stay."""
    temporary = folder / f".tmp-{os.getpid()}"
    _written(temporary, write)
    for item in temporary.iterdir():
        item.replace(folder / item.name)
    temporary.rmdir()


def _written(temporary: Path, write: Callable[[Path], None]) -> None:
    if temporary.exists():
        _remove(temporary)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except (OSError, SafetensorError) as error:
        _remove(temporary)
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{temporary.parent}: the weights could not be written ({why})") from None


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
    enabled: bool = True
    holds_best: bool = False

    def __call__(self, name: str) -> None:
        """Writes adapter or model, tokenizer and prompt.json under a name of the training loop's."""
        if not self.enabled:
            return
        if name == "best" or (name == "last" and not self.holds_best):
            write_into(self.folder, self._write)
        else:
            write_folder(self.folder / name, self._write)
        self.holds_best = self.holds_best or name == "best"

    def _write(self, folder: Path) -> None:
        save_weights(self.model, folder)
        self.tokenizer.save_pretrained(str(folder))
        self.contract.save(folder)


def save_weights(model: Any, folder: Path) -> None:
    """Writes an adapter, or a whole model where none is attached, as safetensors."""
    is_adapter = hasattr(model, "peft_config")
    model.save_pretrained(str(folder), **({"save_embedding_layers": False} if is_adapter else {}))
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card: a form with nothing filled in
