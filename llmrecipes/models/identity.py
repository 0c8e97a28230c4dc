"""Which base model an adapter was trained on, kept beside its weights, so that no other is taken for it in silence.

An adapter fits every model of the same shape, and on another than its own says nonsense without an error.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from llmrecipes.config.schema import ModelOptions
from llmrecipes.errors import ModelError
from llmrecipes.models.folders import is_local, local_path, read_json

FILE_NAME = "base.json"

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

SLICE_BYTES = 1 << 12
"""Of each tensor so much is looked at, from its middle: of a 7B model 1 MB."""

UNCOUNTED = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Keys of config.json that tell who wrote it and how to load it, not which model it is."""


@dataclass(frozen=True)
class Base:
    """A base model by its files, whatever their place and however they are stored in memory."""

    name: str
    """as it was given: hub id, folder or .gguf file"""
    revision: str
    """commit of a hub model; empty for others"""
    config: str
    """SHA-256 of config.json; empty where `weights` is of all that there is"""
    weights: str
    """SHA-256 of every tensor's name, type, shape and a slice of it, or of a .gguf file; empty where none is here"""

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint[:8]})"

    @property
    def fingerprint(self) -> str:
        """What is equal for equal models; of one whose files are not to be found, its name."""
        if not self.weights:
            return f"{self.name}@{self.revision}"
        return hashlib.sha256(f"{self.config} {self.weights}".encode()).hexdigest()

    def difference(self, other: "Base") -> str:
        """Returns what of two models differs, in words."""
        parts = {"weights": "other weights", "config": "another config.json"}
        return " and ".join(told for name, told in parts.items() if getattr(self, name) != getattr(other, name))

    def save(self, folder: Path) -> None:
        """Writes base.json into a folder."""
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def base_of(options: ModelOptions, source: str) -> Base:
    """Returns the identity of the model that `resolve_model` found; a hub model is fetched into the cache first."""
    name, revision, folder = options.model_name, "", Path(source)
    if local_path(name).suffix == ".gguf" and is_local(name):
        # The folder is named by the file's hash; its own files differ with the release of transformers that wrote them.
        return Base(name, revision, "", folder.name.partition("-")[2])
    if not is_local(name):
        found = hub_folder(name, options.model_revision)
        if found is None:
            return Base(name, options.model_revision or "main", "", "")
        folder, revision = found, found.name
    try:
        return Base(name, revision, config_hash(folder), weights_hash(weight_files(folder)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # loading it tells what is wrong with it
        return Base(name, revision, "", "")


def check_base(adapter: str, flag: str, options: ModelOptions, source: str, allowed: bool) -> list[str]:
    """Raises `ModelError` where an adapter was trained on another base than this one, unless it is `allowed`.

    Returns notices: that it was, or that nobody knows.
    """
    trained = load_base(local_path(adapter), flag)
    if trained is None:
        return [f"--{flag} {adapter}: it does not say which base it was trained on, so this could not be checked"]
    base = base_of(options, source)
    if trained.fingerprint == base.fingerprint:
        return []
    if not (trained.weights and base.weights):
        return [f"--{flag} {adapter}: it was trained on {trained}, which could not be compared with {base}"]
    told = (
        f"--{flag} {adapter}: it was trained on the base {trained}, and --model_name {base} is another one: "
        f"{base.difference(trained)}"
    )
    if allowed:
        return [told]
    raise ModelError(f"{told}; give that base, or use this one all the same with --allow_base_mismatch")


def load_base(adapter: Path, flag: str) -> Base | None:
    """Returns the base that an adapter names, or None where its folder has no base.json."""
    path = adapter / FILE_NAME
    if not path.is_file():
        return None
    found = read_json(path, flag)
    values: dict[str, Any] = {item.name: found.get(item.name) for item in fields(Base)}
    if not all(isinstance(value, str) and value.isprintable() for value in values.values()):
        raise ModelError(f"--{flag} {path}: not the base.json that fine-tuning writes; mend or remove it")
    return Base(**values)


def hub_folder(name: str, revision: str | None) -> Path | None:
    """Returns the cache's folder of a hub model, its weights fetched if they were not; None where that fails."""
    try:
        folder = Path(hf_hub_download(name, "config.json", revision=revision)).parent
        try:
            hf_hub_download(name, SINGLE, revision=revision)
        except Exception:  # the library has a class for each way in which there may be no such file
            hf_hub_download(name, INDEX, revision=revision)
            for path in weight_files(folder):
                hf_hub_download(name, path.name, revision=revision)
    except Exception:  # loading it tells what is wrong
        return None
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that transformers reads a folder's weights from; others may lie beside them."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def config_hash(folder: Path) -> str:
    """Returns the SHA-256 of what config.json says of the model, in whatever order."""
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    counted = {key: value for key, value in told.items() if key not in UNCOUNTED}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def weights_hash(files: Iterable[Path]) -> str:
    """Returns the SHA-256 of every tensor's name, type, shape and a slice of it, however they are cut into files."""
    tensors = sorted(tensor for path in files for tensor in _tensors(path))
    return hashlib.sha256("\n".join(" ".join(tensor) for tensor in tensors).encode()).hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yields (name, type, shape, hash of a slice) of each tensor of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, told in header.items():
            begin, end = told["data_offsets"]
            file.seek(8 + length + max(begin, (begin + end - SLICE_BYTES) // 2))
            content = file.read(min(end - begin, SLICE_BYTES))
            yield name, told["dtype"], str(told["shape"]), hashlib.sha256(content).hexdigest()
