"""What can be known of a model or adapter folder before its weights are read."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llmrecipes.errors import ModelError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def local_path(name: str) -> Path:
    """Returns a path as typed, with `~` filled in where it names a home folder that exists."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def is_local(name: str) -> bool:
    """Returns whether a model name means a file or folder here, and not a hub id such as `org/name`."""
    path = local_path(name)
    spelled_as_path = path.is_absolute() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1
    return path.exists() or spelled_as_path or name.endswith((".gguf", "/"))


def check_model_folder(folder: Path, flag: str, weights: bool = True) -> None:
    """Raises `ModelError` unless `folder` holds a config and, with `weights`, complete safetensors weights."""
    if folder.is_file():
        raise ModelError(f"--{flag} {folder}: this is a file; give a hub id, a model folder or a .gguf file")
    if not folder.is_dir():
        raise ModelError(f"--{flag} {folder}: no such folder; give a hub id, a model folder or a .gguf file")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"--{flag} {folder}: this folder holds an adapter, not a plain model; give its base model here and the "
            "folder as --peft_model (fine-tuning: --from_peft_checkpoint)"
        )
    config = read_json(folder / "config.json", flag, missing="it is not a model folder")
    if "model_type" not in config:
        raise ModelError(f"--{flag} {folder / 'config.json'}: no model_type in it; it is not a transformers model")
    if weights:
        check_weights(folder, flag)


def check_adapter_folder(folder: Path, flag: str) -> dict[str, Any]:
    """Returns `adapter_config.json`; raises `ModelError` unless `folder` holds a complete PEFT adapter."""
    if not folder.is_dir():
        raise ModelError(f"--{flag} {folder}: no such folder; give the folder that fine-tuning wrote")
    config = read_json(folder / "adapter_config.json", flag, missing="it is not an adapter folder")
    check_weights(folder, flag)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"--{flag} {folder}: it has no {ADAPTER_WEIGHTS}, so it is not a whole adapter folder")
    return config


def check_weights(folder: Path, flag: str) -> None:
    """Raises `ModelError` where weights are missing, pickled or cut short."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(item.name for pattern in PICKLES for item in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"--{flag} {folder}: its weights are pickles ({pickles[0]}), which can run code and are never read; "
                "convert them once to safetensors: huggingface.co/docs/safetensors/convert-weights"
            )
        raise ModelError(f"--{flag} {folder}: no weights (*.safetensors) in it")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index, flag).get("weight_map")
        if not isinstance(named, dict):
            raise ModelError(f"--{flag} {index}: no weight_map in it; fetch it again")
        shards = {str(name) for name in named.values()}
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise ModelError(
                f"--{flag} {folder}: {len(missing)} of {len(shards)} weight files are missing: {missing[0]}"
            )
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size
            raise ModelError(
                f"--{flag} {file}: broken or cut short at {size} bytes ({error}); fetch it again"
            ) from None


def read_json(path: Path, flag: str, missing: str = "") -> dict[str, Any]:
    """Returns a JSON object from a file; raises `ModelError`."""
    if not path.is_file():
        raise ModelError(f"--{flag} {path.parent}: it has no {path.name}" + (f", so {missing}" if missing else ""))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"--{flag} {path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"--{flag} {path}: expected a JSON object")
    return content
