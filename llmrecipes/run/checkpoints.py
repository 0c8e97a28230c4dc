"""Checkpoints: `step-000120/`, all that a run needs to go on as if it had never been stopped, whole or not at all.

adapter or model, tokenizer, prompt.json    as anyone can load them
trainer.safetensors                         optimizer, random generators, and trained weights as they are
trainer.json                                how far, under which settings, on which data
manifest.json                               size and SHA-256 of each, written last
"""

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmrecipes.errors import ConfigError
from llmrecipes.reports.format import gib
from llmrecipes.run.manifest import MANIFEST, ManifestError, check_folder, checkpoints
from llmrecipes.run.output import (
    ResultWriter,
    about_best,
    free_bytes,
    is_adapter,
    is_whole,
    remove_folder,
    write_folder,
    write_into,
)
from llmrecipes.training.optimizers import tensor_bytes
from llmrecipes.training.state import Place, Tensors, mutable_state, trained_parameters
from llmrecipes.training.updater import Updater

TRAINER = "trainer.json"
TENSORS = "trainer.safetensors"

WEIGHTS = "weights/"
"""How the name of a trained weight begins in `TENSORS`, before the parameter's own."""

SPARE = 1.1
"""Free space that a checkpoint wants, over its own size."""

PACKAGES = ("llmrecipes", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


@dataclass
class Checkpoints:
    """Writes a run's checkpoints and removes old ones."""

    writer: ResultWriter
    updater: Updater
    describe: Callable[[int], Mapping[str, Any]]
    """epoch -> what a run that goes on must find again: settings, data, metrics so far"""
    keep_last: int
    """0: all"""
    origin: Path | None = None
    """the checkpoint that this run goes on from, which stays"""
    saved: Place | None = field(default=None, init=False)

    def __call__(self, place: Place) -> None:
        """Saves a checkpoint, unless it is the one saved last; raises `ConfigError` where the disk is too small."""
        if not self.writer.enabled or place == self.saved:
            return
        folder = self.folder(place.step)
        self.check_space()
        tensors, state = mutable_state(self.writer.model, self.updater)
        trainer = {"place": place.plain(), "state": state, **self.describe(place.epoch)}

        def write(target: Path) -> None:
            self.writer.write(target)
            save_file(_apart({**tensors, **self._weights_beside(target)}), target / TENSORS)
            (target / TRAINER).write_text(json.dumps(trainer, allow_nan=False), encoding="utf-8")

        write_folder(folder, write, {"kind": "checkpoint", "step": place.step, "versions": versions()})
        self.saved = replace(place)
        self._prune(place)

    def folder(self, step: int) -> Path:
        """Returns where the checkpoint of a step is."""
        return self.writer.folder / f"step-{step:06d}"

    @property
    def newest(self) -> str | None:
        """Name of the checkpoint saved last."""
        return self.folder(self.saved.step).name if self.saved else None

    def find_best(self, place: Place) -> None:
        """Has the folder's result be the best that a run at `place` had; where it is lost, the run begins at none.

        The result may be of a later step, of which this run knows nothing yet: its own is then in the checkpoint.
        """
        if not self.writer.enabled:
            return
        folder, checkpoint = self.writer.folder, self.folder(place.best_step)
        found = place.best_step > 0 and _is_best(folder, place)
        if place.best_step > 0 and not found and is_whole(checkpoint):
            beside = shutil.ignore_patterns(TRAINER, TENSORS, MANIFEST)
            write_into(
                folder,
                lambda target: shutil.copytree(checkpoint, target, ignore=beside, dirs_exist_ok=True),
                about_best(place),
            )
            found = True
        self.writer.holds_best = found
        if not found:
            place.forget_best()

    def check_space(self, at_start: bool = False) -> None:
        """Raises `ConfigError` where a checkpoint would not fit; nothing is removed to make room."""
        need = int(SPARE * checkpoint_bytes(self.writer.model, self.updater))
        free = free_bytes(self.writer.folder)
        if free < need:
            when = "one checkpoint takes" if at_start else "the next checkpoint takes"
            rest = "" if at_start else ", then go on with --resume auto; what was saved before is whole"
            raise ConfigError(
                f"--output_dir {self.writer.folder}: {when} {gib(need)}, and {gib(free)} are free; make room{rest}"
            )

    def _weights_beside(self, folder: Path) -> Tensors:
        """Returns the trained weights that a saved result does not hold under their own name, type and shape."""
        held: dict[str, tuple[str, list[int]]] = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    held[name] = (part.get_dtype(), list(part.get_shape()))
        return {
            WEIGHTS + name: parameter.detach().cpu()
            for name, parameter in trained_parameters(self.writer.model).items()
            if held.get(name) != (_SAFETENSORS.get(parameter.dtype), list(parameter.shape))
        }

    def _prune(self, place: Place) -> None:
        """Removes the oldest checkpoints; never the one just written, the best, or the one gone on from."""
        if not self.keep_last:
            return
        kept = {self.folder(place.step), self.folder(place.best_step)}
        found = checkpoints(self.writer.folder)
        for folder in found[self.keep_last :]:
            if folder not in kept and (self.origin is None or folder.resolve() != self.origin.resolve()):
                remove_folder(folder)


_SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def _is_best(folder: Path, place: Place) -> bool:
    try:
        return about_best(place).items() <= check_folder(folder).items()
    except ManifestError:
        return False


def checkpoint_bytes(model: Any, updater: Updater) -> int:
    """Returns about how many bytes a checkpoint takes: the result, the optimizer's state, and an adapter once more."""
    trained = tensor_bytes(updater.parameters)
    result = 2 * trained if is_adapter(model) else tensor_bytes(model.parameters())
    made = [value for state in updater.optimizer.state.values() for value in state.values()]
    state = tensor_bytes(value for value in made if isinstance(value, torch.Tensor))
    return result + (state or 2 * trained) + (16 << 20)


def versions() -> dict[str, str]:
    """Returns what a run ran on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _apart(tensors: Tensors) -> Tensors:
    """Returns the tensors, those that share their memory with one before as copies: safetensors refuses sharing."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart
