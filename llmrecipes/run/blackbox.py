"""The black box: what a run that stopped for its numbers' sake was doing last, in a folder to be looked at.

batch.jsonl      each sample of the last steps: step, row, its text, its ids, its labels
layers.json      of each trained parameter type, shape, norm, and its gradient's norm for the last step
metrics.jsonl    the last 50 records
error.txt        why the run stopped
"""

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

import torch

from llmrecipes.batch import Batch, Window
from llmrecipes.errors import ConfigError
from llmrecipes.reports.format import printable
from llmrecipes.reports.trackers import without_secrets
from llmrecipes.run.output import write_folder
from llmrecipes.training.state import trained_parameters
from llmrecipes.training.updater import Updater

FOLDER = "black-box"
RECORDS = 50
WINDOWS = 4
"""Steps whose samples are kept: on a GPU a step is judged when the next one is under way already."""


class BlackBox:
    """Remembers the last windows and records of a run."""

    def __init__(self) -> None:
        self._windows: deque[Window] = deque(maxlen=WINDOWS)
        self._records: deque[dict[str, Any]] = deque(maxlen=RECORDS)

    def window(self, window: Window) -> None:
        """Takes a window that is about to be computed."""
        self._windows.append(window)

    def record(self, record: dict[str, Any]) -> None:
        """Takes a record of the run."""
        if record["kind"] != "start":
            self._records.append(record)

    def write(self, folder: Path, model: Any, tokenizer: Any, updater: Updater, error: BaseException) -> str:
        """Writes what is remembered; returns where, to stand behind the error; empty where it could not be written."""
        gradients = gradient_norms(model, self._windows[-1], updater) if self._windows else {}

        def fill(target: Path) -> None:
            lines = [
                json.dumps({"steps_before_the_end": len(self._windows) - 1 - place, **sample})
                for place, window in enumerate(self._windows)
                for batch in window
                for sample in samples_of(batch, tokenizer)
            ]
            (target / "batch.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            layers = {
                name: {
                    "type": str(parameter.dtype).removeprefix("torch."),
                    "shape": list(parameter.shape),
                    "norm": strict(float(parameter.detach().float().norm())),
                    "gradient_norm": gradients.get(name),
                }
                for name, parameter in trained_parameters(model).items()
            }
            (target / "layers.json").write_text(json.dumps(layers, indent=1, allow_nan=False), encoding="utf-8")
            records = [
                json.dumps({key: strict(value) for key, value in record.items()}, default=str)
                for record in self._records
            ]
            (target / "metrics.jsonl").write_text("".join(f"{line}\n" for line in records), encoding="utf-8")
            (target / "error.txt").write_text(f"{without_secrets(str(error))}\n", encoding="utf-8")

        try:
            write_folder(folder / FOLDER, fill, {"kind": "black box"})
        except ConfigError:
            return ""
        return f"; the last samples and norms are in {folder / FOLDER}"


def samples_of(batch: Batch, tokenizer: Any) -> list[dict[str, Any]]:
    """Returns each sample of a batch: row, text, ids, labels; of a collator's batch each row is one."""
    rows = iter(batch.sample_rows)
    samples = []
    for ids, labels, documents in zip(batch.input_ids, batch.labels, batch.documents, strict=True):
        for document in range(1, int(documents.max()) + 1):
            within = documents == document
            found = ids[within].tolist()
            text = printable(tokenizer.decode(found))
            samples.append({"row": next(rows, None), "text": text, "ids": found, "labels": labels[within].tolist()})
    return samples


def gradient_norms(model: Any, window: Window, updater: Updater) -> dict[str, str | float]:
    """Returns the norm of the gradient of each trained parameter for a window, computed once more and forgotten."""
    updater.forget()
    try:
        for batch in window:
            updater.backward(updater.loss(model, batch.to(updater.precision.device), updater.precision))
        return {
            name: strict(float(parameter.grad.float().norm()))
            for name, parameter in trained_parameters(model).items()
            if parameter.grad is not None
        }
    except (RuntimeError, torch.OutOfMemoryError):
        return {}
    finally:
        updater.forget()


def strict(value: Any) -> Any:
    """Returns a value that JSON has: a number that is none as its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
