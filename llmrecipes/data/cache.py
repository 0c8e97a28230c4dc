"""Tokenized splits, kept between runs and never stale: an entry is used only where all that it was made of is the same.

An entry is named by what is known before a split is read: the plug-in's and our own source, the tokenizer, the data
set's settings, the split. Beside its arrays lies a manifest of all that was read meanwhile (see `inputs`), each thing
with what it was when it was first met; all of it is looked at again before the entry is used. Where anything may have
been read that nobody noted, nothing is kept, and the user is told why.
"""

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrecipes.data.inputs import Inputs, content, is_as_told
from llmrecipes.data.preprocessors import is_shipped
from llmrecipes.data.purity import doubt, is_as_first_seen
from llmrecipes.data.rendering import DATED, tells_the_date
from llmrecipes.data.store import KINDS, SampleStore, mapped_store
from llmrecipes.plugins import Plugin

LAYOUT = 2
"""Goes up when an entry's files change their meaning."""

ENTRIES = "tokenized"
"""Folder within the user's that all entries lie in: what lies beside it is not ours."""

ENTRY = re.compile(r"[0-9a-f]{64}")

MANIFEST = "manifest.json"

TEMPORARY = ".tmp-"

KEPT_BYTES = 20 << 30
"""Size of all entries beyond which those not used for longest are removed."""

STALE_SECONDS = 24 * 3600
"""Age from which a temporary folder is nobody's any more: its process was killed."""

LIBRARIES = ("tokenizers", "transformers", "numpy", "pyarrow", "jinja2")
"""Packages that have a say in what a sample is."""

PASSING = ("deprecation_warnings", "verbose")
"""What a tokenizer holds that has no say in what it makes."""

log = logging.getLogger("llmrecipes")


def unkept_reason(preprocessor: Plugin, tokenizer: Any) -> str:
    """Returns why nobody could tell whether a data set is the same in the next run; "" where it can be told."""
    if preprocessor.module is None or preprocessor.source is None:
        return "its file is not known"
    if preprocessor.sibling("get_data_collator"):
        return "it brings get_data_collator"
    if not hasattr(tokenizer, "backend_tokenizer") or not type(tokenizer).__module__.startswith("transformers."):
        return "its tokenizer is a program of its own"
    if tells_the_date(tokenizer) and b"apply_chat_template" in preprocessor.source:
        return DATED
    why = "" if is_shipped(preprocessor) else doubt(preprocessor.source)
    return why or ("" if is_as_first_seen(preprocessor.module) else "it keeps something from one call to the next")


# --- the name of an entry ---------------------------------------------------------------------------------------------


def entry_name(preprocessor: Plugin, dataset_config: Any, tokenizer: Any, split: str) -> str:
    """Returns the SHA-256 of all that is known of a split before it is read."""
    parts = name_parts(preprocessor, dataset_config, tokenizer, split)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def name_parts(preprocessor: Plugin, dataset_config: Any, tokenizer: Any, split: str) -> dict[str, object]:
    """Returns what an entry is named by."""
    settings = vars(dataset_config) if hasattr(dataset_config, "__dict__") else {"": dataset_config}
    ours = [*Path(__file__).parent.glob("*.py"), *Path(__file__).parents[1].glob("*.py")]
    return {
        "layout": LAYOUT,
        "plug-in": hashlib.sha256(preprocessor.source or b"").hexdigest(),
        "function": [str(preprocessor.path), preprocessor.name],
        "our code": [content(path) for path in sorted(ours)],
        "tokenizer": tokenizer_identity(tokenizer),
        "versions": [sys.version, *(version(name) for name in LIBRARIES)],
        "settings": {str(name): repr(value) for name, value in settings.items()},
        "split": split,
        # What relative paths and `~` mean; `Path` would raise where there is no home.
        "folders": [str(Path.cwd()), os.path.expanduser("~")],  # noqa: PTH111
    }


def tokenizer_identity(tokenizer: Any) -> str:
    """Returns the SHA-256 of all that has a say in a tokenizer's ids."""
    attributes = {name: repr(value) for name, value in vars(tokenizer).items() if name[0] != "_"}
    told = [
        type(tokenizer).__qualname__,
        tokenizer.backend_tokenizer.to_str(),
        repr(tokenizer.special_tokens_map),
        *(f"{name} {attributes[name]}" for name in sorted(set(attributes) - set(PASSING))),
    ]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()


# --- entries ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A split as it was read: its samples, what was said meanwhile, and what was wrong with which rows."""

    store: SampleStore
    notices: tuple[str, ...]
    faults: Mapping[str, list[int]]
    """what is wrong -> rows of the preprocessor's"""
    bad_rows: Mapping[str, list[str]]
    """what is wrong -> places in the files"""

    @property
    def bad_count(self) -> int:
        """Rows that cannot be used."""
        return sum(map(len, self.faults.values())) + sum(map(len, self.bad_rows.values()))


def entry_folder(cache: Path, name: str) -> Path:
    """Returns where an entry of the user's cache folder lies."""
    return cache / ENTRIES / name


def kept_entry(folder: Path, seed: int) -> Entry | None:
    """Returns the entry in `folder` where all that it was made of is as it was, else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        store = mapped_store(folder)  # before it is looked at: another process may put a newer one there
        same = manifest["seed"] in (None, seed) and manifest["arrays"] == _digests(store)
        if not same or not all(is_as_told(*found) for found in manifest["inputs"]):
            return None
        with suppress(OSError):  # a cache that may only be read serves, too
            os.utime(folder)
        return Entry(store, tuple(manifest["notices"]), manifest["faults"], manifest["bad_rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def new_folder(cache: Path) -> Path:
    """Returns a folder to write an entry into, to be removed unless `keep` moves it to its place; raises `OSError`."""
    temporary = cache / ENTRIES / f"{TEMPORARY}{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    return temporary


def keep(temporary: Path, folder: Path, inputs: Inputs, seed: int | None, entry: Entry) -> str:
    """Moves an entry to its place; `seed` None: it made no difference. Returns why it was not kept, or ""."""
    if inputs.unknown:
        return inputs.unknown
    if not inputs.told:
        return "it reads no file by load_split or load_rows"
    if inputs.changed:
        return f"{inputs.changed} was changed while it was read"
    manifest = {
        "seed": seed,
        "inputs": [[kind, path, told] for (kind, path), told in inputs.told.items()],
        "arrays": _digests(entry.store),
        "notices": entry.notices,
        "faults": dict(entry.faults),
        "bad_rows": dict(entry.bad_rows),
    }
    aside = folder.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        with suppress(FileNotFoundError):
            folder.rename(aside)  # whoever reads it goes on reading
        temporary.rename(folder)
    except OSError as error:
        faster = error.errno in (errno.ENOTEMPTY, errno.EEXIST)  # another process, which kept the same
        return "" if faster else f"{folder}: {error.strerror or error}"
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        _prune(folder)
    return ""


def _digests(store: SampleStore) -> dict[str, str]:
    return {name: hashlib.sha256(np.ascontiguousarray(getattr(store, name)).data).hexdigest() for name in KINDS}


def _prune(newest: Path) -> None:
    """Removes what killed processes left, and the entries not used for longest where all are too large together."""
    entries = []
    for folder in newest.parent.iterdir():
        with suppress(OSError):  # another process may remove it at the same time
            files = list(folder.iterdir())
            used = folder.stat().st_mtime
            written = max([used, *(file.stat().st_mtime for file in files)])
            if folder.name.startswith(TEMPORARY) and time.time() - written > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
            elif ENTRY.fullmatch(folder.name) and folder / MANIFEST in files:
                entries.append((used, sum(file.stat().st_size for file in files), folder))
    total = 0
    for _, size, folder in sorted(entries, reverse=True):
        total += size
        if total > KEPT_BYTES and folder != newest:
            shutil.rmtree(folder, ignore_errors=True)


# --- what reading leaves ----------------------------------------------------------------------------------------------


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
