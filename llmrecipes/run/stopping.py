"""Ctrl-C and SIGTERM ask a run to stop at the next step's end; a second Ctrl-C stops at once."""

import signal
import threading
from types import FrameType, TracebackType

EXIT_STOPPED = 143


class StopRequest:
    """A context in which the signals only leave a mark, read by calling the object."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread listen; in another one the signals keep their usual effect.
        here = threading.current_thread() is threading.main_thread()
        kinds = (signal.SIGINT, signal.SIGTERM) if here else ()
        self.previous = {kind: signal.signal(kind, self._mark) for kind in kinds}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _mark(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
