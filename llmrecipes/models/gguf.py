"""A .gguf file becomes a plain model folder once, and every command loads that folder.

A model that transformers reads straight from a .gguf file is marked as quantized: it can be neither trained, saved
nor quantized anew. Reading also takes some 15 s for 135M parameters, most of it the file's vocabulary, parsed three
times; the folder loads in 1.5 s.
"""

import hashlib
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrecipes.errors import HardwareError, ModelError, first_line

LAYOUT = 1
"""Goes up when `convert_gguf` writes something else, so that no folder of an older layout is ever taken."""

PLAIN_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def gguf_folder(source: Path, cache_root: Path) -> Path:
    """Returns the model folder made from a .gguf file, made now if this content was never converted before.

    Folders are named by the SHA-256 of the whole file: a sum over its ends and size would miss a model that was
    patched in the middle. It reads some 0.5 GB a second, 0.2 s for the demo model and less than loading takes for any.
    Raises what `convert_gguf` raises.
    """
    check_gguf_name(source)
    try:
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{source}: it cannot be read ({error.strerror})") from None
    folder = cache_root / f"gguf{LAYOUT}-{digest[:24]}"
    if not folder.is_dir():
        convert_gguf(source, folder)
    return folder


def convert_gguf(source: Path, target: Path) -> None:
    """Writes the model and tokenizer of a .gguf file, chat template included, as a plain safetensors folder.

    The folder appears whole or not at all. Where another process was faster, its folder stands: what is there
    already is never touched.
    Raises `ModelError` where the file is missing, cut short, no GGUF, one part of several, of an architecture that
    transformers cannot read, or lacks weights or tokenizer; `HardwareError` where the folder cannot be written.
    """
    check_gguf_name(source)
    dtype = stored_dtype(source)
    model, tokenizer = load_gguf(source, dtype)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir(parents=True)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if not target.is_dir():
            part.rename(target)
    except (OSError, SafetensorError) as error:
        if not target.is_dir():
            raise HardwareError(f"{target}: the model converted from {source} cannot be written ({error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_gguf_name(source: Path) -> None:
    """Raises `ModelError` unless `source` is an existing file, and names its neighbours where it is not."""
    if source.is_file():
        return
    near = sorted(item.name for item in source.parent.glob("*.gguf")) if source.parent.is_dir() else []
    hint = f"there is {', '.join(near[:5])}" if near else "give the path of a .gguf file"
    raise ModelError(f"{source}: no such file; {hint}")


def stored_dtype(source: Path) -> torch.dtype:
    """Returns the type that the matrices of a checked .gguf file are unpacked to.

    Files of plain numbers keep theirs. Packed ones become bfloat16: a rounding of at most 2^-9 of a weight that was
    itself cut to 2..8 bits (SmolLM2-135M Q4_1: KL 6e-5 nats a token to float32, top token equal in 99.4 %), for half
    of float32's disk and memory, and what bf16 training would round it to anyway. float16 would be closer still, but
    overflows in some models and takes 50 to 90 s instead of 2 for a training step on a CPU.
    Raises `ModelError`.
    """
    try:
        # Mapped, not read: the vocabulary is parsed, and every tensor's place is held against the file's size.
        reader = GGUFReader(source)
        split = reader.get_field("split.count")
        parts = int(split.contents()) if split else 1
        types = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
    except Exception as error:  # bytes of any origin: the reader checks nothing, so it can fail in any way
        raise ModelError(broken(source, error)) from None
    if parts > 1:
        raise ModelError(f"{source}: one of {parts} parts; join them first: llama-gguf-split --merge PART_1 WHOLE.gguf")
    if not types:
        raise ModelError(f"{source}: a GGUF without weights (a vocabulary only?); give one that holds a model")
    if types <= PLAIN_DTYPES.keys():
        return PLAIN_DTYPES[types.pop()] if len(types) == 1 else torch.float32
    return torch.bfloat16


def load_gguf(source: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns model and tokenizer of a .gguf file, every weight unpacked to `dtype`, no mark of a quantizer left.

    Raises `ModelError`.
    """
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    # Newer releases of transformers keep the blocks packed where they have a kernel for it, unless told otherwise.
    unpack = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": unpack(dequantize=True)} if unpack else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(**place, **options, dtype=dtype, output_loading_info=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise ModelError(broken(source, error)) from None
    model, info = loaded
    lost = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info.get(kind, ()))
    if lost:
        raise ModelError(f"{source}: {len(lost)} tensors are missing or of another shape, such as {lost[0]}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise ModelError(f"{source}: its tokenizer cannot be read ({first_line(error)})") from None
    clear_quantizer_marks(model)
    return model, tokenizer


def clear_quantizer_marks(model: Any) -> None:
    """Removes from a model whose weights are all unpacked what forbids to train and save it."""
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model).pop("quantization_method", None)
    vars(model.config).pop("quantization_config", None)


def broken(source: Path, error: Exception) -> str:
    """Returns the message for a file that no reader gets through."""
    with source.open("rb") as file:
        start = file.read(4)
    size = source.stat().st_size
    if start != b"GGUF":
        return f"{source}: not a GGUF file (it begins with {start!r}, expected b'GGUF')"
    return f"{source}: broken, cut short at {size} bytes, or of an unknown kind ({first_line(error)}); fetch it again"
