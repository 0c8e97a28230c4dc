"""Signals: Ctrl-C, SIGTERM and SIGUSR1 ask a run to stop at the next step's end; a second Ctrl-C stops at once.

Before the training there is nothing to save, so there SIGTERM and SIGUSR1 stop at once as well.
"""

import atexit
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType

EXIT_STOPPED = 143

STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1")
"""SIGUSR1 is what Slurm sends ahead of time (--signal=USR1@90)."""

SAVING = "SIGUSR2"
"""With --save_on signal: save a checkpoint, and go on."""


class StoppedEarlyError(BaseException):
    """A signal before the first step. No `Exception`, so that nothing takes it for a failure of its own."""


class StopRequest:
    """A context in which the signals leave a mark, read by calling the object, once `begin` was called."""

    def __init__(self) -> None:
        self.requested = False
        self.told = ""
        """name of the signal"""
        self._waiting = False

    def __call__(self) -> bool:
        return self.requested

    def begin(self) -> None:
        """From now on there is something to save: a signal only leaves a mark."""
        self._waiting = True

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self._mark) for number in _numbers(STOPPING)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.previous:
            atexit.unregister(_ignore_interrupts)
            atexit.register(_ignore_interrupts)  # the last to be registered is the first to be called

    def _mark(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self.requested or not self._waiting):
            raise KeyboardInterrupt
        self.requested, self.told = True, signal.Signals(number).name
        if not self._waiting:
            raise StoppedEarlyError(self.told)


class SaveRequest:
    """A context that tells, when called, whether a checkpoint is asked for: by a file that appears, or by a signal.

    `on` is the file, which is removed once it is seen, or `signal`, or empty for never.
    """

    def __init__(self, on: str, folder: Path) -> None:
        self.file = folder / on if on and on != "signal" else None
        self._by_signal = on == "signal"
        self._marked = False

    def __call__(self) -> bool:
        if self.file is not None and self.file.exists():
            self.file.unlink(missing_ok=True)
            return True
        marked, self._marked = self._marked, False
        return marked

    def __enter__(self) -> "SaveRequest":
        numbers = _numbers((SAVING,)) if self._by_signal else []
        self.previous = {number: signal.signal(number, self._mark) for number in numbers}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _mark(self, number: int, frame: FrameType | None) -> None:
        self._marked = True


def _ignore_interrupts() -> None:
    """Has a process that is leaving finish that: all is saved, and Ctrl-C could only print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _numbers(names: tuple[str, ...]) -> list[signal.Signals]:
    """Returns the signals of these names that this system has; none outside the main thread, which alone may listen."""
    here = threading.current_thread() is threading.main_thread()
    return [getattr(signal, name) for name in names if here and hasattr(signal, name)]
