"""One run in a folder at a time, and what became of it: `run.lock` while it lasts, `status.json` for who comes after.

A scheduler reads `state` in status.json: `stopped` is to be started again with --resume auto, `done` is not.
"""

import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmrecipes.errors import ConfigError, LlmRecipesError, TrainingError
from llmrecipes.reports.trackers import without_secrets
from llmrecipes.run.manifest import flush
from llmrecipes.run.output import LOCK_FILE, STATUS_FILE, write_file
from llmrecipes.run.stopping import EXIT_STOPPED, StoppedEarlyError


class RunLock:
    """Keeps a second run out of an output folder; frees itself however the process ends.

    A POSIX record lock belongs to the process: data workers, which are copies of it, do not inherit it.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: int | None = None

    def acquire(self, folder: Path) -> None:
        """Takes a folder, which must be there; raises `ConfigError` naming the process that has it."""
        if self._file is not None:
            return
        try:
            import fcntl
        except ImportError:  # Windows
            return
        while True:
            file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = os.read(file, 100).decode(errors="replace").strip()
                os.close(file)
                raise ConfigError(
                    f"--output_dir {folder}: process {holder or 'unknown'} is writing to it; wait for it to end, or "
                    "name another folder"
                ) from None
            except OSError:  # a file system without locks
                os.close(file)
                return
            if _is_file(file, folder / LOCK_FILE):
                break
            os.close(file)  # its holder took it away between our opening and locking it: the next run makes another
        os.truncate(file, 0)
        os.write(file, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        self._path, self._file = folder / LOCK_FILE, file

    def release(self) -> None:
        """Gives the folder back."""
        if self._file is not None and self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


def _is_file(number: int, path: Path) -> bool:
    """Returns whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


class Status:
    """Keeps status.json up to date."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STATUS_FILE
        self._facts: dict[str, Any] = {}

    def update(self, state: str, **facts: Any) -> None:
        """Writes the state with all facts so far; that it cannot be written is not what ends a run."""
        self._facts |= facts
        now = datetime.now(UTC).isoformat(timespec="seconds")
        told = {"state": state, "pid": os.getpid(), "host": socket.gethostname(), "time": now, **self._facts}
        with suppress(OSError):
            write_file(self._path, json.dumps(told, indent=1, allow_nan=False) + "\n")

    def forget(self) -> bool:
        """Removes what the run before told; returns whether it told anything."""
        told = self._path.exists()
        self._path.unlink(missing_ok=True)
        flush(self._path.parent)
        return told

    def failed(self, error: BaseException) -> None:
        """Writes that an error ended the run."""
        if isinstance(error, KeyboardInterrupt):
            self.update("stopped", exit_code=130, message="stopped by Ctrl-C")
            return
        if isinstance(error, StoppedEarlyError):
            self.update("stopped", exit_code=EXIT_STOPPED, signal=str(error))
            return
        code = error.exit_code if isinstance(error, LlmRecipesError) else 1
        state = "unhealthy" if isinstance(error, TrainingError) else "failed"
        self.update(state, exit_code=code, message=" ".join(without_secrets(str(error)).split())[:500])


def read_status(folder: Path) -> dict[str, Any]:
    """Returns what status.json says; empty where there is none that can be read."""
    try:
        status = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}
