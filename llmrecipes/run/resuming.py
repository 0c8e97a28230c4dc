"""Going on with a run: which checkpoint from, whether it is the same run, and putting everything back.

Resumed at any step, a run comes to the very bits that it would have come to undisturbed.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmrecipes.config.schema import RunConfig
from llmrecipes.config.show import flat_config, plain
from llmrecipes.errors import ConfigError, ModelError, first_line
from llmrecipes.models.folders import ADAPTER_WEIGHTS, local_path
from llmrecipes.models.identity import weights_hash
from llmrecipes.reports.trackers import METRICS_FILE, redacted
from llmrecipes.run.blackbox import FOLDER as BLACK_BOX
from llmrecipes.run.checkpoints import TENSORS, TRAINER, WEIGHTS
from llmrecipes.run.manifest import CHECKPOINT, ManifestError, check_folder, checkpoints, flush, step_of
from llmrecipes.run.output import tidy
from llmrecipes.run.status import read_status
from llmrecipes.training.state import Place, Tensors, restore_state, trained_parameters, unpacked
from llmrecipes.training.updater import Updater

FREE = (
    "output_dir", "overwrite_output_dir", "resume", "resume_allow_changes", "save_model", "save_steps", "save_on",
    "keep_last", "logging_steps", "save_metrics", "report_to", "use_wandb", "wandb_config.", "data_cache",
    "num_workers_dataloader", "batch_size_training", "gradient_accumulation_steps", "fit", "activation_memory",
    "val_batch_size", "trust_remote_code", "max_skipped_steps", "flop_counter", "use_profiler", "profiler_dir",
    "one_gpu", "leak_probe", "allow_base_mismatch",
)  # fmt: skip
"""Keys that may change: neither the samples of a step nor its update depend on them. How a step's samples are cut
into batches is free as long as the step stays the same, which the order's fingerprint tells."""

PARTS = {
    "place": dict, "state": dict, "settings": dict, "plugins": dict, "versions": dict,
    "samples": str, "validation": str, "base": str, "order": str, "metrics_bytes": int,
}  # fmt: skip
"""What a trainer.json holds."""

UNFIT = (
    OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError
)  # fmt: skip
"""What reading a checkpoint raises that is not as a run writes it."""

LENGTHS = ("max_train_step", "num_epochs")
"""The keys that tell where a run ends."""

BESIDE = "set-aside-"
"""How the name begins of what a run that goes on finds and does not know: newer checkpoints, a black box."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run goes on from."""

    folder: Path
    trainer: Mapping[str, Any]
    told: tuple[str, ...]
    """notices: what was skipped, and why"""

    @property
    def place(self) -> Place:
        """Returns how far it is."""
        return Place.of(self.trainer["place"])


def goes_on_within(config: RunConfig) -> bool:
    """Returns whether the run goes on with the one in its output folder, and so replaces nothing there."""
    if config.resume in ("auto", "never"):
        return config.resume == "auto"
    named, folder = local_path(config.resume).resolve(), local_path(config.output_dir).resolve()
    return folder in (named, named.parent)


def find_origin(config: RunConfig, folder: Path) -> Origin | None:
    """Returns the checkpoint to go on from, whole to the byte; None where the run begins at the beginning.

    Raises `ConfigError` where there are checkpoints and none of them is whole.
    """
    if config.resume == "never":
        return None
    if config.resume != "auto":
        return _named(config.resume, folder)
    if not folder.is_dir():
        return None
    tidy(folder)
    found, reasons = _newest(folder)
    if found is None and reasons:
        raise ConfigError(
            f"--resume auto: none of the checkpoints in {folder} is whole ({'; '.join(reasons)}); nothing was removed: "
            "give another folder with --resume PATH, or begin anew with --overwrite_output_dir --resume never"
        )
    if found is None and _holds_result(folder) and not config.overwrite_output_dir:
        raise ConfigError(
            f"--resume auto: {folder} holds a result and no checkpoint to go on from (--save_steps writes them); "
            "name another folder, or begin anew with --overwrite_output_dir --resume never"
        )
    return found


def finished_run(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """Returns the status of the run in a folder, where that is done and had the same settings, else None."""
    asked = config.resume == "auto" and not config.overwrite_output_dir
    status = read_status(folder) if asked else {}
    if status.get("state") != "done" or not isinstance(status.get("step"), int):
        return None
    same = (compared_settings(config), named_inputs(config))
    known = (status.get("settings"), status.get("inputs")) == same and isinstance(status.get("plugins"), dict)
    return status if known else None


def read_trainer(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's trainer.json; raises `ManifestError` where a run could not go on by it."""
    try:
        trainer = dict(json.loads((folder / TRAINER).read_text(encoding="utf-8")))
        for name, kind in PARTS.items():
            if type(trainer[name]) is not kind:
                raise TypeError(f"{name} is no {kind.__name__}")
        place, state = Place.of(trainer["place"]), trainer["state"]
        if CHECKPOINT.fullmatch(folder.name) and step_of(folder) != place.step:
            raise ValueError(f"it is of step {place.step}")
        for name in ("skipped_in_a_row", "halvings"):
            if type(state["updater"][name]) is not int:
                raise TypeError(f"{name} is no int")
        with safe_open(folder / TENSORS, framework="pt") as file:
            tensors = dict.fromkeys(file.keys(), torch.empty(0))
        for name in ("optimizer", "groups", "random"):
            unpacked(state[name], tensors, torch.device("cpu"))
    except UNFIT as error:
        raise ManifestError(f"its {TRAINER} cannot be gone on by ({first_line(error)})") from None
    return trainer


def compared_settings(config: RunConfig) -> dict[str, str]:
    """Returns the settings that must not change in a run, as they are written in YAML, secrets hidden."""
    flat = redacted(flat_config(config))
    compared = {key: _compared(value) for key, value in flat.items() if not _is_free(key)}
    if config.from_peft_checkpoint:
        compared["from_peft_checkpoint"] += f" ({_adapter_hash(local_path(config.from_peft_checkpoint))})"
    return compared


def named_inputs(config: RunConfig) -> dict[str, str]:
    """Returns the files and folders that the settings name, each with its whole path."""
    flat = redacted(flat_config(config))
    paths = {key: local_path(value) for key, value in flat.items() if isinstance(value, str) and not _is_free(key)}
    return {key: str(path.resolve()) for key, path in paths.items() if flat[key] and path.exists()}


def check_same_run(config: RunConfig, origin: Origin, description: Mapping[str, Any]) -> list[str]:
    """Raises `ConfigError` with every difference between a run and its checkpoint, unless they can be and are allowed.

    Returns notices: the differences that are.
    """
    changes = changed(origin.trainer, description)
    if origin.trainer["order"] != description["order"]:
        way = "--from_peft_checkpoint" if config.use_peft else "--model_name"
        raise ConfigError(
            f"--resume {origin.folder}: this is another run: {'; '.join(changes)}; its place in the data is counted in "
            "the steps that it had, so that --resume_allow_changes does not help: set them back, or begin a new run "
            f"with its weights ({way} {origin.folder})"
        )
    if changes and not config.resume_allow_changes and _only_longer(origin.trainer["settings"], description, changes):
        raise ConfigError(
            f"--resume {origin.folder}: this is another run: {'; '.join(changes)}; it is longer and nothing else "
            "changed, so it goes on with --resume_allow_changes"
        )
    if changes and not config.resume_allow_changes:
        raise ConfigError(
            f"--resume {origin.folder}: this is another run: {'; '.join(changes)}; set them back, or go on with them "
            "with --resume_allow_changes"
        )
    told = [f"changed since the checkpoint: {'; '.join(changes)}"] if changes else []
    was, now = origin.trainer["versions"], description["versions"]
    others = [f"{name} {was.get(name)} -> {now.get(name)}" for name in now if was.get(name) != now.get(name)]
    return told + ([f"other versions than at the checkpoint: {', '.join(others)}"] if others else [])


def _only_longer(was: Mapping[str, str], description: Mapping[str, Any], changes: list[str]) -> bool:
    """Returns whether a run differs from its checkpoint in nothing but that it ends later."""
    now = description["settings"]
    raised = [key for key in LENGTHS if _steps(now.get(key)) > _steps(was.get(key))]
    return len(raised) == len(changes) and all(change.startswith(LENGTHS) for change in changes)


def _steps(setting: str | None) -> float:
    """Returns how far a setting lets a run go; 0 sets no bound."""
    return float(setting or 0) or float("inf")


def changed(trainer: Mapping[str, Any], description: Mapping[str, Any]) -> list[str]:
    """Returns what differs between a checkpoint and a run, each in words."""
    was, now = trainer.get("settings", {}), description["settings"]
    found = [
        f"{key} {was.get(key, 'unset')} -> {now.get(key, 'unset')}"
        for key in sorted({*was, *now})
        if was.get(key) != now.get(key)
    ]
    texts = {
        "samples": "other training data (the file, the preprocessor or the tokenizer changed)",
        "validation": "other validation data, whose losses do not compare",
        "base": "other weights of the base model",
        "order": "other samples in a step (--batch_size_training times --gradient_accumulation_steps changed, or with "
        "--group_by_length one of them)",
    }
    differ = [name for name in texts if trainer.get(name) != description[name]]
    if "samples" in differ or any(text.startswith(("seed ", "batching_", "context_")) for text in found):
        differ = [name for name in differ if name != "order"]
    found += [texts[name] for name in differ]
    for path, sha in description["plugins"].items():
        before = trainer.get("plugins", {}).get(path)
        found += [f"the plug-in {path} was edited"] if before not in (None, sha) else []
    return found


def restore(model: Any, updater: Updater, origin: Origin) -> None:
    """Puts weights, optimizer and random generators back; raises `ModelError` where they do not fit this run."""
    try:
        tensors = _tensors(origin.folder / TENSORS)
        weights = {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}
        parameters = trained_parameters(model)
        for name in parameters.keys() - weights.keys():
            weights[name] = _weight(origin.folder, name)
        with torch.no_grad():
            for name, parameter in parameters.items():
                if weights[name].shape != parameter.shape:
                    raise ValueError(f"{name} has the shape {list(weights[name].shape)}, not {list(parameter.shape)}")
                parameter.copy_(weights[name])
        restore_state(model, updater, tensors, origin.trainer["state"])
    except UNFIT as error:
        raise ModelError(
            f"--resume {origin.folder}: what it holds does not fit this run ({first_line(error)})"
        ) from None


def rewind_metrics(folder: Path, origin: Origin) -> None:
    """Cuts metrics.jsonl back to the checkpoint, so that no step stands in it twice; newer checkpoints step aside.

    They go first: a kill in between must not leave one whose steps the metrics no longer have. A black box goes, too,
    lest it be taken for this run's.
    """
    newer = [item for item in checkpoints(folder) if step_of(item) > origin.place.step]
    for item in (*newer, *folder.glob(BLACK_BOX)):
        item.rename(_free(folder / f"{BESIDE}{item.name}"))
    flush(folder)
    path, size = folder / METRICS_FILE, origin.trainer["metrics_bytes"]
    if path.is_file() and path.stat().st_size > size:
        os.truncate(path, size)


def _free(path: Path) -> Path:
    """Returns the path, or with a number behind it where something has that name."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def _named(path: str, folder: Path) -> Origin:
    """Returns the checkpoint that a path names, or the newest in it."""
    named = local_path(path)
    if not named.is_dir():
        raise ConfigError(f"--resume {path}: no such folder; expected auto, never, or a checkpoint such as step-000100")
    within = named.parent.resolve() == folder.resolve()
    if within and not CHECKPOINT.fullmatch(named.name):
        raise ConfigError(
            f"--resume {path}: what is in its folder now (metrics, result, checkpoints) is not what it had come to; go "
            "on with it in a new --output_dir, or with a step-N of this folder"
        )
    if within or named.resolve() == folder.resolve():
        tidy(folder)
    if not (named / TRAINER).is_file() and checkpoints(named):
        found, reasons = _newest(named)
        if found is None:
            raise ConfigError(f"--resume {path}: none of its checkpoints is whole ({'; '.join(reasons)})")
        return found
    try:
        return Origin(named, _whole(named), ())
    except ManifestError as error:
        raise ConfigError(f"--resume {path}: {error}; --resume auto takes the newest whole one") from None


def _newest(folder: Path) -> tuple[Origin | None, list[str]]:
    """Returns the newest checkpoint that is whole, and why each newer one is not."""
    reasons: list[str] = []
    for item in checkpoints(folder):
        try:
            return Origin(item, _whole(item), tuple(f"skipped {reason}" for reason in reasons)), reasons
        except ManifestError as error:
            reasons.append(f"{item.name}: {error}")
    return None, reasons


def _whole(folder: Path) -> dict[str, Any]:
    """Returns the trainer.json of a checkpoint that is as it was written; raises `ManifestError`."""
    if check_folder(folder).get("kind") != "checkpoint":
        raise ManifestError("no checkpoint")
    return read_trainer(folder)


def _holds_result(folder: Path) -> bool:
    """Returns whether a run saved weights here and came to its end, or nobody knows whether it did."""
    return any(folder.glob("*.safetensors")) and read_status(folder).get("state") != "running"


def _is_free(key: str) -> bool:
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)


def _compared(value: object) -> str:
    """Returns a setting as it is compared: of a path its last name, since its content has a fingerprint."""
    return Path(value).name if isinstance(value, str) and "/" in value else plain(value)


def _adapter_hash(folder: Path) -> str:
    """Returns some characters of a hash of what an adapter is, its settings too: they are in no flag."""
    hashed = hashlib.sha256((folder / "adapter_config.json").read_bytes())
    hashed.update(weights_hash([folder / ADAPTER_WEIGHTS]).encode())
    return hashed.hexdigest()[:8]


def _tensors(path: Path) -> Tensors:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _weight(folder: Path, name: str) -> torch.Tensor:
    """Returns a trained weight from the model that a checkpoint holds."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name)
    raise KeyError(f"no weights of {name}")
