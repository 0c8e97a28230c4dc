"""Tokenized splits, kept between runs and never stale: an entry is used only where all that it was made of is the same.

An entry is named by what is known before a split is read: the plug-in's and our own source, the tokenizer, the data
set's settings, the split. Beside its arrays lies a manifest with the size and SHA-256 of every file that was opened
meanwhile, whoever opened it; each is hashed again before the entry is used. Times of files count for nothing.
"""

import ast
import hashlib
import json
import logging
import os
import random
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import source_from_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrecipes.data.store import KINDS, SampleStore, mapped_store
from llmrecipes.errors import ConfigError
from llmrecipes.plugins import Plugin

LAYOUT = 2
"""Goes up when an entry's files change their meaning."""

MANIFEST = "manifest.json"

KEPT_BYTES = 20 << 30
"""Size of all entries beyond which those not used for longest are removed."""

PROGRAMS = (
    *(str(Path(place).resolve()) for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[1])),
    *("/proc/", "/sys/", "/dev/", "/etc/"),
)
"""Where installed code and the system's own files lie: opening one of those says nothing about the data."""

UNKNOWN_EVENTS = ("socket.connect", "subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "sqlite3.connect")
"""What a plug-in may do to get its data, by the names of Python's audit events, and of which no file tells."""

UNSEEN_READERS = ("datasets", "duckdb", "h5py", "lmdb", "polars", "pyarrow", "sqlite3")
"""Packages that open files without Python: a plug-in that imports one of them is read anew in every run."""

log = logging.getLogger("llmrecipes")


@dataclass
class Inputs:
    """What a split was made of, noted while it is read."""

    files: dict[Path, None] = field(default_factory=dict)
    unknown: bool = False
    """something was read of which nobody can tell whether it will be the same"""


_reading: list[Inputs] = []
"""The split that is being read, if one is: threads of a plug-in note their files here too."""


def note_input(path: Path) -> None:
    """Notes that a file is read; what Python itself opens is seen without."""
    for inputs in _reading[-1:]:
        inputs.files[path.resolve()] = None


def note_unknown_input() -> None:
    """Notes that something is read that cannot be hashed: the split is not kept."""
    for inputs in _reading[-1:]:
        inputs.unknown = True


def _opened(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook (PEP 578): sees every file that Python code opens, and what no file stands behind."""
    if not _reading:
        return
    if event in UNKNOWN_EVENTS:
        note_unknown_input()
    if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    if isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    path = os.fsdecode(arguments[0])
    if not os.path.realpath(path).startswith(PROGRAMS):
        note_input(Path(_source(path)))


def _source(path: str) -> str:
    """Returns the source of a compiled module, which is what the user edits."""
    if path.endswith(".pyc"):
        try:
            return source_from_cache(path)
        except (ValueError, NotImplementedError):
            return path
    return path


class _Watch:
    """Installs the hook, which Python keeps for good, once."""

    installed = False

    @classmethod
    def install(cls) -> None:
        if not cls.installed:
            sys.addaudithook(_opened)
            cls.installed = True


@contextmanager
def watched() -> Iterator[Inputs]:
    """Notes all files that are opened within."""
    _Watch.install()
    inputs = Inputs()
    _reading.append(inputs)
    try:
        yield inputs
    finally:
        _reading.remove(inputs)


# --- the name of an entry ---------------------------------------------------------------------------------------------


def entry_name(preprocessor: Plugin, dataset_config: Any, tokenizer: Any, split: str) -> str:
    """Returns the SHA-256 of all that is known of a split before it is read."""
    settings = vars(dataset_config) if hasattr(dataset_config, "__dict__") else {"": dataset_config}
    parts = {
        "layout": LAYOUT,
        "code": {str(path): _sha256(path) for path in _code(preprocessor)},
        "function": [str(preprocessor.path), preprocessor.name],
        "tokenizer": _tokenizer_identity(tokenizer),
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "numpy")},
        "settings": {str(name): repr(value) for name, value in settings.items()},
        "split": split,
        "folder": str(Path.cwd()),  # relative paths of data mean others elsewhere
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _code(preprocessor: Plugin) -> list[Path]:
    """Returns the sources that make the samples: the plug-in's file, what it imports from beside it, and ours."""
    folder = preprocessor.path.parent
    files = {preprocessor.path, *Path(__file__).parent.glob("*.py"), *Path(__file__).parents[1].glob("*.py")}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).parent == folder:
            files.add(Path(file))
    return sorted(path for path in files if path.is_file())


def reads_unseen(preprocessor: Plugin) -> bool:
    """Returns whether the plug-in's code imports a package whose reading nobody can follow."""
    ours = Path(__file__).parents[1]
    trees = [ast.parse(path.read_bytes()) for path in _code(preprocessor) if ours not in path.parents]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return any(name.split(".")[0] in UNSEEN_READERS for name in names)


def _tokenizer_identity(tokenizer: Any) -> str:
    core = getattr(tokenizer, "backend_tokenizer", None)
    told = [
        type(tokenizer).__name__,
        core.to_str() if core is not None else repr(tokenizer),
        repr(getattr(tokenizer, "special_tokens_map", None)),
        repr(getattr(tokenizer, "chat_template", None)),
    ]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()


# --- entries ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A kept split: its samples, what was said while it was read, and what was wrong with which rows."""

    store: SampleStore
    notices: tuple[str, ...]
    faults: Mapping[str, list[int]]
    bad_rows: Mapping[str, list[str]]


def kept_entry(folder: Path, seed: int) -> Entry | None:
    """Returns the entry in `folder` where every file it was made of is as it was, else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        same_seed = manifest["seed"] in (None, seed)
        files = {**manifest["inputs"], **{str(folder / name): told for name, told in manifest["arrays"].items()}}
        if not same_seed or not all(_is_as_told(Path(path), *told) for path, told in files.items()):
            return None
        os.utime(folder)
        store = mapped_store(folder)
        return Entry(store, tuple(manifest["notices"]), manifest["faults"], manifest["bad_rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def new_entry(cache: Path) -> Iterator[Path]:
    """Gives a folder to write an entry into; it is removed again unless `keep` has moved it to its place."""
    temporary = cache / f".tmp-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as error:
        raise ConfigError(f"--data_cache {cache}: cannot be written to ({error.strerror}); --data_cache off") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def keep(temporary: Path, folder: Path, inputs: Inputs, seed: int | None, entry: Entry) -> None:
    """Moves an entry to its place where all that it was made of is known; `seed` None: it made no difference."""
    files = [path for path in inputs.files if temporary.resolve() not in path.parents]
    if inputs.unknown or not files:
        return
    manifest = {
        "seed": seed,
        "inputs": {str(path): _told(path) for path in files if path.is_file()},
        "arrays": {f"{name}.bin": _told(temporary / f"{name}.bin") for name in KINDS},
        "notices": entry.notices,
        "faults": dict(entry.faults),
        "bad_rows": dict(entry.bad_rows),
    }
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _prune(folder)


def _prune(newest: Path) -> None:
    """Removes the entries not used for longest where all of them together are too large."""
    entries = sorted(newest.parent.glob("[!.]*"), key=lambda entry: -entry.stat().st_mtime)
    total = 0
    for entry in entries:
        total += sum(file.stat().st_size for file in entry.glob("*"))
        if total > KEPT_BYTES and entry != newest:
            shutil.rmtree(entry, ignore_errors=True)


def random_states() -> list[bytes]:
    """Returns the state of every generator that a plug-in may draw from, to be compared."""
    numpy_state = np.random.get_state(legacy=False)
    return [repr(random.getstate()).encode(), repr(numpy_state).encode(), torch.get_rng_state().numpy().tobytes()]


@contextmanager
def heard() -> Iterator[list[str]]:
    """Gathers what our own logger says within, to be said with the plan."""
    told: list[str] = []
    handler = _Gather(told.append)
    log.addHandler(handler)
    try:
        yield told
    finally:
        log.removeHandler(handler)


class _Gather(logging.Handler):
    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record.getMessage())


def _told(path: Path) -> tuple[int, str]:
    return path.stat().st_size, _sha256(path)


def _is_as_told(path: Path, size: int, sha256: str) -> bool:
    return path.is_file() and path.stat().st_size == size and _sha256(path) == sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
