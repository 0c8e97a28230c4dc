"""What keeps the figures of a run: the tracker seam and its built-in entries.

A tracker is a function `(record) -> None`. A new one is a function in any file: `--tracker my_tracker.py:my_tracker`.
Records are dicts; "kind" says which:

    start       output_dir, config (the run, flat: dotted key to value), total_steps, steps_done (of a run that goes on)
    step        step, epoch, loss, learning_rate, gradient_norm, tokens_per_second, supervised_tokens, useful_tokens,
                seconds, memory_bytes, loss_scale (fp16), with --flop_counter teraflops and ceiling_share; of a step
                that was skipped or a spike also rows, spike; all but the memory are those of this one step, also where
                steps between two records are not told
    evaluation  step, eval_loss, eval_perplexity, eval_tokens
    notice      text: what the run decided on its way
    end         whatever the run closes with

A key that is missing or None is left out. A tracker that is given a new start begins a new run.
"""

import json
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Any

from llmrecipes.environment import secrets
from llmrecipes.errors import ConfigError

Record = Mapping[str, Any]
Tracker = Callable[[Record], None]

METRICS_FILE = "metrics.jsonl"
_PREFIXES = {"step": "train/", "evaluation": "eval/"}
_WANDB_SECTION = "wandb_config."
_SECRET_NAME = re.compile(
    r"(^|\.)(token|(\w+_)?((hf|hub|access|auth|api|bearer)_?token|key|apikey|secret|password|authorization))$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{12,}")
_REDACTED = "(redacted)"


class JsonLinesTracker:
    """Appends one line of strict JSON for each step and evaluation to `output_dir/metrics.jsonl`.

    Each line is handed to the system before the next step. NaN and infinity, which JSON lacks, become null. A run that
    goes on does so in the same file, cut back to its checkpoint, so that no step occurs twice.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def __call__(self, record: Record) -> None:
        if record["kind"] == "start":
            self._close()
            self._file = _open_for_lines(Path(record["output_dir"]) / METRICS_FILE)
        elif record["kind"] in _PREFIXES:
            file = _started(self._file)
            file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
            file.flush()
        elif record["kind"] == "end":
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


class TensorBoardTracker:
    """Writes the numbers of each step and evaluation as scalars to `output_dir/tensorboard`."""

    def __init__(self) -> None:
        self._writer: Any = None

    def __call__(self, record: Record) -> None:
        if record["kind"] == "start":
            self._close()
            check_tracker("tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            done = int(record.get("steps_done") or 0)
            place = str(Path(record["output_dir"]) / "tensorboard")
            self._writer = SummaryWriter(place, flush_secs=10, purge_step=done + 1 if done else None)
        elif record["kind"] in _PREFIXES:
            writer = _started(self._writer)
            for name, value in _scalars(record).items():
                writer.add_scalar(name, value, global_step=int(record["step"]))
        elif record["kind"] == "end":
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class WandbTracker:
    """Sends the numbers of each step and evaluation to Weights & Biases; secrets in the config stay here.

    The keys `wandb_config.*` (project, entity, job_type, tags, group, notes, mode) go to `wandb.init` as they are.
    """

    def __init__(self) -> None:
        self._run: Any = None

    def __call__(self, record: Record) -> None:
        if record["kind"] == "start":
            self._close()
            self._run = self._begin(record)
        elif record["kind"] in _PREFIXES:
            _started(self._run).log(_scalars(record), step=int(record["step"]))
        elif record["kind"] == "end":
            self._close()

    def _begin(self, record: Record) -> Any:
        check_tracker("wandb")
        import wandb

        config = dict(record.get("config") or {})
        sections = {key: value for key, value in config.items() if key.startswith(_WANDB_SECTION)}
        choices = {key.removeprefix(_WANDB_SECTION): value for key, value in sections.items() if value is not None}
        shown = redacted({key: value for key, value in config.items() if key not in sections})
        return wandb.init(**choices, config=shown, dir=str(record["output_dir"]))

    def _close(self) -> None:
        if self._run is not None:
            self._run.finish()
        self._run = None


TRACKERS: dict[str, Tracker] = {
    "jsonl": JsonLinesTracker(),
    "tensorboard": TensorBoardTracker(),
    "wandb": WandbTracker(),
}

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_tracker(name: str) -> None:
    """Raises `ConfigError` with the install line where the built-in tracker's package is missing.

    Imports nothing; a name that is no built-in tracker passes.
    """
    package = _PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        raise ConfigError(f"the tracker {name} needs the package {package}; run: pip install {package}")


def redacted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with the values hidden that have a secret's name or a known token's form."""
    return {
        key: _REDACTED if value is not None and _SECRET_NAME.search(key) else _without_secrets(value)
        for key, value in config.items()
    }


def without_secrets(text: str) -> str:
    """Returns a text, which somebody's code may have put together, with known tokens and the environment's hidden."""
    for secret in secrets():
        text = text.replace(secret, _REDACTED)
    return _SECRET_VALUE.sub(_REDACTED, text)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str):
        return _SECRET_VALUE.sub(_REDACTED, value)
    if isinstance(value, Mapping):
        return redacted({str(key): item for key, item in value.items()})
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in value]
    return value


def _started(sink: Any) -> Any:
    """Returns what the start opened; raises where a record came before the start."""
    if sink is None:
        raise RuntimeError("a tracker was given a record outside a run; expected a record of kind start first")
    return sink


def _scalars(record: Record) -> dict[str, float]:
    """Returns the numbers of a record under their plot names: `train/loss`, `eval/perplexity`."""
    prefix = _PREFIXES[record["kind"]]
    plain = {key.removeprefix("eval_"): _plain(value, strict=False) for key, value in record.items() if key != "step"}
    return {prefix + key: value for key, value in plain.items() if type(value) in (int, float)}


def _plain(value: Any, strict: bool = True) -> Any:
    """Returns a value in JSON's own types; numbers of numpy and torch as Python's, NaN as None where strict."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, strict) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item, strict) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if hasattr(value, "item"):
        return _plain(value.item(), strict)
    if isinstance(value, Real):
        number = float(value)
        return number if isfinite(number) or not strict else None
    return str(value)


def _open_for_lines(path: Path) -> IO[str]:
    """Opens a file to append lines to; a line that a crash has torn is closed first, so it spoils no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = False
    if path.exists() and path.stat().st_size > 0:
        with path.open("rb") as written:
            written.seek(-1, 2)
            torn = written.read() != b"\n"
    file = path.open("a", encoding="utf-8", newline="\n")
    if torn:
        file.write("\n")
    return file
