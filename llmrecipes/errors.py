"""Every error that a user, and not we, can mend: one class for who can mend it.

The message of each says what was found, what was expected and what to do, and names the flag, file or row.
The commands print it as one line `error: ...` and leave with `exit_code`; any other exception is our own bug
and keeps its traceback.
"""

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_OUR_BUG = 1


class LlmRecipesError(Exception):
    """Root of the tree; `exit_code` is what the command leaves with."""

    exit_code = 2


class ConfigError(LlmRecipesError):
    """The user's to mend: a flag or a key of a config file. Holds one line a problem."""


class PluginError(LlmRecipesError):
    """The plug-in author's to mend: no such file or function, a wrong return value, an exception inside."""


class DataError(LlmRecipesError):
    """The data owner's to mend: names file, row and column."""


class ModelError(LlmRecipesError):
    """The model folder's owner to mend: missing, pickled, incomplete or mismatched weights."""


class HardwareError(LlmRecipesError):
    """The machine's: no GPU where one was demanded, a data type it cannot compute, too little memory."""


class TrainingError(LlmRecipesError):
    """The numbers': a loss or gradient that is not finite."""

    exit_code = 3


def did_you_mean(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Returns `; did you mean X?` for the candidate nearest to `name`, or an empty text."""
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def first_line(error: BaseException) -> str:
    """Returns an exception's name and the first line of its message, and the next where that only announces it."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    told = " ".join(text[:2]) if text[0].endswith(":") else text[0]
    return f"{type(error).__name__}: {told[:200]}"
