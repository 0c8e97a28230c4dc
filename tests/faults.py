"""Faults on purpose, for the tests of what survives them: processes that die, disks that are full.

A run is started in a copy of this process (`forked`), which has all that it needs imported: that takes a few
hundredths of a second, and what happens to the copy does not happen to the tests.
"""

import errno
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., int]

RUNS: dict[str, dict[str, Any]] = {
    "lora with dropout": {"lora_config.lora_dropout": 0.2},
    "full": {"use_peft": None, "lora_config.lora_dropout": None, "lr": 1e-3},
    "nf4": {"quantization": "4bit", "lora_config.lora_dropout": 0.2},
    "as the quickstart": {
        "batching_strategy": "packing",
        "context_length": 16,
        "batch_size_training": 2,
        "optimizer": "adamw_fused",
        "lr_scheduler": "linear",
        "gradient_clipping": True,
        "lora_config.target_modules": "all-linear",
    },
    "fp16, 8-bit optimizer": {"use_fp16": True, "mixed_precision": None, "optimizer": "adamw_8bit"},
}
COMMON = {
    "num_epochs": 3,
    "batch_size_training": 4,
    "save_steps": 2,
    "run_validation": True,
    "lr_scheduler": "cosine",
    "gamma": None,
    "warmup_steps": 2,
    "resume": "auto",
}
"""Nine steps of three epochs, so that checkpoints fall within epochs and at their end."""

EXACT = ("step", "epoch", "loss", "gradient_norm", "learning_rate", "supervised_tokens", "useful_tokens")


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """All that a run wrote of its steps and validations, but for what a clock measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], *(line.get(name) for name in (*EXACT, "eval_loss"))) for line in lines]


def weights(folder: Path) -> dict[str, bytes]:
    """The saved weights, byte for byte, of the result and of `last`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*.safetensors")
        if "step-" not in str(path) and "black-box" not in str(path)
    }


def forked(action: Callable[[], int]) -> int:
    """Runs an action in a copy of this process and returns how it ended, as `subprocess` tells it."""
    return ended(begun(action))


def ended(child: int) -> int:
    """Waits for a copy to end and returns how it did."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begun(action: Callable[[], int]) -> int:
    """Begins an action in a copy of this process; returns its process id."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def appears(path: Path, seconds: float = 60) -> None:
    """Waits for a file that another process is to make."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def at_write(number: int, folder: Path, then: Callable[[str], None], lasting: bool = False) -> list[str]:
    """Calls `then` when this process is about to touch `folder` for the nth time; returns what it touches.

    A fault that is `lasting` comes each time from then on.
    """
    seen: list[str] = []
    kinds = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
    place = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in kinds or not str(arguments[0]).startswith(place):
            return
        if event == "open" and isinstance(arguments[2], int) and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        seen.append(f"{event} {arguments[0]}")
        if len(seen) == number or (lasting and number and len(seen) > number and not event.startswith(REMOVING)):
            then(seen[-1])

    sys.addaudithook(hook)
    return seen


REMOVING = ("os.remove", "os.rmdir")
"""What a full disk still does."""


def killed(what: str) -> None:
    """Ends this process as a machine does that is switched off."""
    os.kill(os.getpid(), signal.SIGKILL)


def failing(code: int) -> Callable[[str], None]:
    """Fails as a disk does with an error of the system."""

    def fail(what: str) -> None:
        raise OSError(code, os.strerror(code))

    return fail


disk_full = failing(errno.ENOSPC)


def assert_equal(found: Path, expected: Path) -> None:
    assert curve(found) == curve(expected)
    assert weights(found) == weights(expected)
    assert not list(found.glob(".tmp-*")) and not (found / "run.lock").exists()


def count_writes(finetune: Command, folder: Path, flags: dict[str, Any]) -> int:
    """How often a run touches its folder."""
    told = folder.parent / "writes"

    def run() -> int:
        seen = at_write(0, folder, killed)
        code = finetune(folder, **flags)
        told.write_text("\n".join(seen))
        return code

    assert forked(run) == 0
    shutil.rmtree(folder)
    return len(told.read_text().splitlines())
