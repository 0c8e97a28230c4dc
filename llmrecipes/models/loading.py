"""A tokenizer and a base model from a hub id, a local folder or a .gguf file: safetensors only, no code from afar."""

import logging
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from llmrecipes.config.schema import ModelOptions
from llmrecipes.environment import cache_folder
from llmrecipes.errors import ConfigError, ModelError, first_line
from llmrecipes.models.folders import check_model_folder, is_local, local_path
from llmrecipes.models.gguf import gguf_folder
from llmrecipes.models.quantization import QUANTIZATIONS, has_finite_weights, is_quantized, misshapen, settle_quantized
from llmrecipes.precision import Precision, out_of_memory_told

ATTENTION = {None: None, True: "sdpa", False: "eager"}
"""`use_fast_kernels` -> transformers' attention implementation; None is SDPA where the model knows it, else eager."""


def resolve_model(config: ModelOptions, weights: bool = True) -> str:
    """Returns what transformers loads: a hub id, or a checked local folder (a .gguf file is converted once).

    Without `weights` a folder need not hold any.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    name = config.model_name
    if not name.strip():
        raise ConfigError("--model_name is empty; give a hub id, a model folder or a .gguf file")
    source = name
    if is_local(name):
        path = local_path(name)
        if path.suffix == ".gguf":
            path = gguf_folder(path, cache_folder())
        check_model_folder(path, "model_name", weights)
        source = str(path)
    model_config(config, source)
    return source


def load_tokenizer(config: ModelOptions, source: str) -> Any:
    """Returns the run's tokenizer; padding gets a token of its own where the vocabulary has one to spare."""
    name = config.tokenizer_name or source
    flag = "tokenizer_name" if config.tokenizer_name else "model_name"
    if is_local(name) and not local_path(name).is_dir():
        raise ModelError(f"--{flag} {name}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(local_path(name)) if is_local(name) else name,
            revision=config.model_revision if not is_local(name) else None,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:  # a foreign folder may fail in any way, `tokenizers` with a bare Exception
        lacks = is_local(name) and not (local_path(name) / "tokenizer.json").is_file()
        why = "it has no tokenizer.json" if lacks else why_not(name, error)
        raise ModelError(f"--{flag} {name}: no tokenizer can be read from it ({why})") from None
    if not tokenizer.is_fast:
        raise ModelError(f"--{flag} {name}: its tokenizer has no tokenizer.json; only fast tokenizers are supported")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def model_config(config: ModelOptions, source: str) -> Any:
    """Returns what a model's config.json says, weights unread; raises `ModelError` where it cannot be used.

    The attention is the run's own: a config.json may name one that is fetched from the hub as code.
    """
    try:
        described = AutoConfig.from_pretrained(
            source, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
        described._attn_implementation = ATTENTION[config.use_fast_kernels]
        int(described.get_text_config().vocab_size)
    except Exception as error:  # whatever stands in a foreign config.json
        why = why_not(source, error)
        raise ModelError(f"--model_name {config.model_name}: its config.json cannot be read ({why})") from None
    if getattr(described, "quantization_config", None):
        raise ModelError(
            f"--model_name {config.model_name}: its weights are stored quantized already; give the unquantized model, "
            "and --quantization 4bit or 8bit where the memory is short"
        )
    return described


def model_limits(config: ModelOptions, source: str) -> tuple[int, int]:
    """Returns (vocabulary size, longest sequence) of a model from its config.json, weights unread."""
    text = model_config(config, source).get_text_config()
    return int(text.vocab_size), int(getattr(text, "max_position_embeddings", None) or 2**31)


def load_model(config: ModelOptions, source: str, precision: Precision, dtype: torch.dtype | None = None) -> Any:
    """Returns the base model on the run's device, in evaluation mode, in `dtype` (default: the compute type).

    Raises `ModelError` where a tensor is missing, superfluous, of another shape or not finite: nothing is ever
    initialized at random in silence.
    """
    described = model_config(config, source)
    quantization = QUANTIZATIONS[config.quantization](config, precision) if config.quantization else None
    try:
        with out_of_memory_told(f"--model_name {config.model_name}", "--quantization 4bit, or a smaller model"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=described,
                dtype=dtype or precision.compute,
                quantization_config=quantization,
                device_map={"": precision.device} if quantization or precision.device.type != "cpu" else None,
                revision=config.model_revision or "main",
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told below, by name
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(f"--model_name {config.model_name}: it cannot be loaded ({first_line(error)})") from None
    model, info = loaded
    check_loaded(config, model, info)
    settle_quantized(model)
    return model.eval()


def check_loaded(config: ModelOptions, model: Any, info: dict[str, Any]) -> None:
    """Raises where the weights are not those that config.json tells of, not finite, or not quantized as asked."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = [key if isinstance(key, str) else key[0] for key in info.get(kind, ())]
        keys += misshapen(model) if kind == "mismatched_keys" else []
        if keys:
            raise ModelError(
                f"--model_name {config.model_name}: {len(keys)} {kind.replace('_keys', '')} tensors, such as "
                f"{min(keys)}; the weights do not belong to its config.json"
            )
    for name, parameter in model.named_parameters():
        if not has_finite_weights(parameter):
            raise ModelError(f"--model_name {config.model_name}: {name} holds NaN or infinity; fetch the weights again")
    if config.quantization and not any(is_quantized(parameter) for parameter in model.parameters()):
        raise ConfigError(f"--quantization {config.quantization}: no layer of this model can be quantized")


def why_not(name: str, error: BaseException) -> str:
    """Returns why nothing could be read; of a name that is no path, also that no folder of that name is here."""
    if "custom code" in str(error):
        return "it brings Python code of its own; read that, and allow it with --trust_remote_code"
    if is_local(name):
        return first_line(error)
    if is_offline_mode() or "connect to" in first_line(error):
        why, way = ("HF_HUB_OFFLINE is set", ", or unset it") if is_offline_mode() else ("no network", "")
        return f"no such folder is here, nor in the local cache, and the hub is not reached: {why}; give a folder{way}"
    return f"no such folder is here, and from the hub: {first_line(error)}"
