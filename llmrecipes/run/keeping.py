"""What keeps a run from being lost, from its first station to its last: signals, lock, checkpoints, status.

`finetune` opens a `Keeper` around all of its stations and tells it, at each, what is known by then.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from llmrecipes.config.loading import Loaded
from llmrecipes.config.schema import RunConfig
from llmrecipes.config.show import run_yaml
from llmrecipes.data.fingerprint import order_fingerprint, samples_fingerprint
from llmrecipes.data.loaders import Loader
from llmrecipes.models.folders import local_path
from llmrecipes.models.identity import Base
from llmrecipes.plugins import Plugin, shipped_folder
from llmrecipes.precision import Precision, device_name
from llmrecipes.reports.trackers import METRICS_FILE
from llmrecipes.run.blackbox import FOLDER as BLACK_BOX
from llmrecipes.run.checkpoints import Checkpoints, versions
from llmrecipes.run.manifest import ManifestError, check_folder, flush
from llmrecipes.run.output import (
    ResultWriter,
    check_still_new,
    claim_output_dir,
    disk_told,
    remove_folder,
    write_file,
)
from llmrecipes.run.resuming import (
    Origin,
    changed,
    check_same_run,
    compared_settings,
    find_origin,
    finished_run,
    named_inputs,
    restore,
    rewind_metrics,
)
from llmrecipes.run.status import RunLock, Status
from llmrecipes.run.stopping import EXIT_STOPPED, StopRequest
from llmrecipes.training.loop import TrainResult
from llmrecipes.training.state import Place, generators, restore_generators
from llmrecipes.training.updater import Updater

ASKED_ONCE = ("resume", "resume_allow_changes", "overwrite_output_dir")
"""Keys that say how to begin, and so are no part of the run that run.yaml is to reproduce."""

Describe = Callable[[int | None], Mapping[str, Any]]
"""epoch -> what a run that goes on must find again; without an epoch, the order of samples in it is left open"""


class Keeper:
    """A context around one run. `stop` tells whether a signal asks it to end."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.stop = StopRequest()
        self.place = Place()
        """where the run is; kept up to date by the training loop"""
        self.origin: Origin | None = None
        self._finished: Mapping[str, Any] | None = None
        """status.json of the run in the folder, where that is done and its settings are this one's"""
        self._spoiled = ""
        """why the result of such a run is none"""
        self._compares = True
        """whether validation losses are on the data that the checkpoint's were on"""
        self._lock = RunLock()
        self._new = False
        """whether the folder was not there when this run began"""
        self._checkpoints: Checkpoints | None = None
        self._random: Mapping[str, Any] | None = None
        self._status: Status | None = None
        self._describe: Describe | None = None

    def __enter__(self) -> "Keeper":
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop.__exit__(kind, error, trace)
        if error is not None and self._status is not None:
            self._status.failed(error)
        self._lock.release()

    def open(self, folder: Path) -> None:
        """Takes a folder that is there and finds what to go on from, unless the run in it seems to be done."""
        with disk_told(folder):
            self._new = not folder.is_dir()
            if not self._new:
                self._lock.acquire(folder)
        self._finished = finished_run(self.config, folder)
        try:
            if self._finished and self.config.save_model:
                check_folder(folder)
        except ManifestError as error:
            self._finished, self._spoiled = None, str(error)
        self.origin = None if self._finished else find_origin(self.config, folder)

    def finished(self, describe: Describe) -> bool:
        """Returns whether the run is done, with today's data and programs, and says so; else finds its checkpoint."""
        if self._finished is None:
            return False
        folder = local_path(self.config.output_dir)
        if changed(self._finished, describe(None)):
            self.origin = find_origin(self.config, folder)
            return False
        print(f"the run in {folder} is done ({self._finished.get('step')} steps); nothing to go on with")
        return True

    def notices(self, describe: Describe) -> list[str]:
        """Returns what the plan says of going on; raises `ConfigError` where this is another run."""
        if self.origin is None:
            return []
        description = describe(self.origin.place.epoch)
        told = check_same_run(self.config, self.origin, description)
        self._compares = self.origin.trainer["validation"] == description["validation"]
        goes_on = f"goes on from {self.origin.folder}, behind step {self.origin.place.step}"
        folder = local_path(self.config.output_dir)
        box = self._is_of(folder) and (folder / BLACK_BOX).is_dir()
        aside = [f"the {BLACK_BOX} of the run before is set aside"] if box else []
        anew = [f"the result of the run before is written anew: {self._spoiled}"] if self._spoiled else []
        return [goes_on, *self.origin.told, *told, *aside, *anew]

    def claim(self, folder: Path, loaded: Loaded[RunConfig], values: Mapping[str, object]) -> None:
        """Makes the folder this run's own: emptied of an older run, or rewound to the checkpoint."""
        with disk_told(folder):
            self._claim(folder, loaded, values)

    def _claim(self, folder: Path, loaded: Loaded[RunConfig], values: Mapping[str, object]) -> None:
        origins = {key: "default" if key in ASKED_ONCE else origin for key, origin in loaded.origins.items()}
        settings = run_yaml(replace(loaded, origins=origins), values)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(folder)
        if self._new:
            check_still_new(folder)
        status = Status(folder)
        if status.forget():  # before anything goes: killed on the way, the folder must not seem to be done
            self._status = status
            self.told("running")
        if self.origin is None or not self._is_of(folder):
            claim_output_dir(folder, "run.yaml", settings)
        else:
            rewind_metrics(folder, self.origin)
            write_file(folder / "run.yaml", settings)
        assert self._checkpoints is not None
        self._checkpoints.find_best(self.place)
        self._status = status
        self.told("running")

    def _is_of(self, folder: Path) -> bool:
        """Returns whether the checkpoint is one of this folder."""
        return self.origin is not None and self.origin.folder.parent.resolve() == folder.resolve()

    def restore(self, writer: ResultWriter, updater: Updater) -> None:
        """Puts back what the checkpoint holds, where there is one to go on from."""
        if self.origin is None:
            return
        restore(writer.model, updater, self.origin)
        self._random = generators(updater.precision.device)
        self.place = self.origin.place
        if not self._compares:
            self.place.forget_best()

    def restore_random(self, device: torch.device) -> None:
        """Puts the random generators back, after all that might have drawn from them on the way to the first step."""
        if self._random is not None:
            restore_generators(self._random, device)

    def keep(self, writer: ResultWriter, updater: Updater, describe: Describe) -> None:
        """Prepares for checkpoints of this run; raises `ConfigError` where not one would fit on the disk."""

        def described(epoch: int) -> dict[str, Any]:
            metrics = writer.folder / METRICS_FILE
            if metrics.is_file():
                flush(metrics)
            return {**describe(epoch), "metrics_bytes": metrics.stat().st_size if metrics.is_file() else 0}

        self._describe = describe
        origin = self.origin.folder if self.origin else None
        self._checkpoints = Checkpoints(writer, updater, described, self.config.keep_last, origin)
        if writer.enabled:
            self._checkpoints.check_space(at_start=True)

    def checkpoint(self, place: Place) -> None:
        """Saves all that the run needs to go on from `place`."""
        assert self._checkpoints is not None
        self._checkpoints(place)
        self.told("running", step=place.step, checkpoint=self._checkpoints.newest)

    def ended(self, result: TrainResult) -> int:
        """Writes how the run ended, and says how to go on with one that was stopped; returns the exit code."""
        if not result.stopped:
            last = self._checkpoints.writer.folder / "last" if self._checkpoints else None
            if last is not None and last.is_dir() and result.best_step == result.steps:
                remove_folder(last)  # of when the run was stopped
            self.told("done", step=result.steps, exit_code=0)
            return 0
        self.told("stopped", step=result.steps, exit_code=EXIT_STOPPED, signal=self.stop.told)
        way = "; go on with the same command and --resume auto" if self.config.save_model else ""
        print(f"\nstopped by {self.stop.told} behind step {result.steps}{way}", flush=True)
        return EXIT_STOPPED

    def told(self, state: str, **facts: Any) -> None:
        """Writes status.json."""
        if self._status is not None:
            assert self._describe is not None
            self._status.update(state, inputs=named_inputs(self.config), **self._describe(None), **facts)


def plugin_hashes(functions: Iterable[object]) -> dict[Path, str]:
    """Returns the SHA-256 of each plug-in's file, as it was when it was run."""
    plugins = [item for item in functions if isinstance(item, Plugin)]
    return {item.path: sha256(item.source or b"").hexdigest() for item in plugins}


def by_name(hashes: Mapping[Path, str]) -> dict[str, str]:
    """Returns the hashes of files by their names, wherever they are; of one name, a second is numbered."""
    counted: Counter[str] = Counter()
    named = {}
    for path, digest in hashes.items():
        counted[path.name] += 1
        named[path.name if counted[path.name] == 1 else f"{path.name} ({counted[path.name]})"] = digest
    return named


def plugin_notices(functions: Iterable[object]) -> list[str]:
    """Returns which programs of others a run runs, for its plan; those that come with llmrecipes are left out."""
    own = shipped_folder("custom_datasets")
    found = plugin_hashes(functions).items()
    return [f"runs {path}, SHA-256 {digest}" for path, digest in found if path.parent != own]


def describer(
    config: RunConfig,
    loader: Loader,
    validation: Loader | None,
    functions: Iterable[object],
    base: Base,
    precision: Precision,
) -> Describe:
    """Returns a function that tells what a run that goes on must find again. Each part is found out once."""
    hashes = plugin_hashes(functions)
    known: dict[str, Any] = {}
    orders: dict[int | None, str] = {}

    def describe(epoch: int | None) -> dict[str, Any]:
        if not known:
            known["settings"] = compared_settings(config)
            known["samples"] = samples_fingerprint(loader.samples)
            known["validation"] = samples_fingerprint(validation.samples) if validation else ""
            known["base"] = base.fingerprint
            known["plugins"] = by_name(hashes)
            known["versions"] = {**versions(), "device": device_name(precision.device)}
        if epoch is not None and epoch not in orders:
            orders.clear()
            orders[epoch] = order_fingerprint(loader, epoch)
        return {**known, "order": orders.get(epoch)}

    return describe
