"""An adapter and its base as one plain model folder."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llmrecipes.config.loading import Loaded
from llmrecipes.config.schema import InferenceConfig, MergingConfig, ModelOptions
from llmrecipes.config.show import run_yaml
from llmrecipes.errors import ConfigError, ModelError
from llmrecipes.models.adapters import MERGEABLE, load_adapter
from llmrecipes.models.folders import check_adapter_folder, local_path
from llmrecipes.models.identity import check_base
from llmrecipes.models.loading import load_model, model_config, resolve_model
from llmrecipes.precision import Precision
from llmrecipes.prompt_contract import load_contract
from llmrecipes.reports.format import gib
from llmrecipes.run.closing import example_prompt
from llmrecipes.run.output import (
    check_output_dir,
    claim_output_dir,
    command_line,
    free_bytes,
    save_weights,
    write_into,
)
from llmrecipes.run.preparing import answering_tokenizer, storage, storage_flags, trained_storage


def merge(loaded: Loaded[MergingConfig], config_path: str | None) -> int:
    """Writes the merged model, tokenizer and prompt contract; returns the exit code.

    The sum is formed in float32 and rounded once, to the type asked for.
    """
    config = loaded.config
    adapter_folder = local_path(config.peft_model)
    adapter = check_adapter_folder(adapter_folder, "peft_model")
    if adapter.get("peft_type") not in MERGEABLE:
        raise ConfigError(
            f"--peft_model {config.peft_model}: a {adapter.get('peft_type')} adapter adds to the model's inputs, not "
            "to its weights, so it cannot be merged; use it with --peft_model"
        )
    options = InferenceConfig(
        model_name=config.model_name,
        model_revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        peft_model=config.peft_model,
    )
    source = resolve_model(options)
    notices = check_base(config.peft_model, "peft_model", options, source, config.allow_base_mismatch)
    inputs = (config.model_name, config.peft_model)
    folder = check_output_dir(config.output_dir, config.overwrite_output_dir, inputs)
    tokenizer = answering_tokenizer(options, source)
    check_space(config, options, source, folder)
    merged, divergence = merged_model(options, source, getattr(torch, config.dtype), tokenizer)
    contract = load_contract(adapter_folder)

    def write(target: Path) -> None:
        save_weights(merged, target)
        tokenizer.save_pretrained(str(target))
        if contract is not None:
            contract.save(target)

    claim_output_dir(folder, "merging.yaml", run_yaml(loaded, {}))
    write_into(folder, write)
    for notice in (*notices, *storage_notices(adapter_folder)):
        print(f"note: {notice}", file=sys.stderr)
    print(
        f"merged model ({config.dtype}) in {folder}; its KL divergence from base and adapter: {divergence:.1e} nats a "
        f"token (0: it answers the same; above {MOST_DIVERGENCE} nothing would have been written)"
    )
    words = ["python", "-m", "llmrecipes.inference", "--model_name", str(folder)]
    words += ["--trust_remote_code"] if config.trust_remote_code else []
    print("try it:\n  " + command_line([*words, "--prompt", example_prompt(contract)]))
    return 0


def check_space(config: MergingConfig, options: InferenceConfig, source: str, folder: Path) -> None:
    """Raises `ConfigError` where the merged model would not fit on the disk, with the old one in the folder gone."""
    described = model_config(options, source)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError):
        return  # loading will say what is wrong with it
    untie(model, check_adapter_folder(local_path(config.peft_model), "peft_model"))
    need = sum(item.numel() for item in model.parameters()) * getattr(torch, config.dtype).itemsize + BESIDE
    free = free_bytes(folder) + sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if free < need:
        raise ConfigError(
            f"--output_dir {config.output_dir}: the merged model takes {gib(need)} in {config.dtype}, and {gib(free)} "
            "are free; make room, or name a folder on another disk"
        )


PROBE = (
    "The quick brown fox jumps over the lazy dog. 12 + 7 = 19, and 60 - 6 = 54. Amanda: I baked cookies. Do you want "
    "some? Jerry: Sure! Amanda: I'll bring you some tomorrow :-) def double(x): return 2 * x"
)
"""What base with adapter and the merged model are both asked to go on with, at each token."""

BESIDE = 16 << 20
"""Bytes for the tokenizer and the rest."""

MOST_DIVERGENCE = 0.1
"""Nats a token that a merged model may be off: a 135M model rounded to bfloat16 was 6e-5 off, to float16 1.5e-6."""


def merged_model(options: InferenceConfig, source: str, dtype: torch.dtype, tokenizer: Any) -> tuple[Any, float]:
    """Returns base plus adapter as a plain model, and its divergence, a mean over the probe's tokens.

    Raises `ModelError` where the sum does not fit the type, or answers differently in it.
    """
    precision = Precision(torch.device("cpu"), torch.float32, torch.float32, loss_scaling=False)
    base = load_model(options, source, precision)
    untie(base, check_adapter_folder(local_path(str(options.peft_model)), "peft_model"))
    model = load_adapter(base, str(options.peft_model), "peft_model")
    ids = torch.tensor([tokenizer(PROBE)["input_ids"]])
    expected = log_probabilities(model, ids)
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtype).float()  # rounded as it will be saved, computed as before
        if not torch.isfinite(parameter).all():
            raise ModelError(f"--dtype: {name} overflows {dtype}; choose bfloat16 or float32")
    divergence = float((expected.exp() * (expected - log_probabilities(merged, ids))).sum(1).mean())
    if not divergence <= MOST_DIVERGENCE:
        raise ModelError(
            f"--dtype {str(dtype).removeprefix('torch.')}: the merged model is {divergence:.2g} nats a token off base "
            f"and adapter (at most {MOST_DIVERGENCE}); choose float32, or use the adapter as it is, with --peft_model"
        )
    return merged.to(dtype), divergence


@torch.inference_mode()
def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Returns the logarithms of what a model says next, float32 [tokens, vocabulary], of ids [1, tokens]."""
    logits: torch.Tensor = model.eval()(input_ids=ids).logits[0]
    return logits.log_softmax(1)


def untie(model: Any, adapter: Mapping[str, Any]) -> None:
    """Gives the output layer weights of its own where the adapter changes only one of two that are shared."""
    ends = ("lm_head", "embed_tokens")
    targets = [str(target).split(".")[-1] for target in adapter.get("target_modules") or []]
    if model.config.tie_word_embeddings and any(end in targets for end in ends):
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def storage_notices(adapter_folder: Path) -> list[str]:
    """Returns that an adapter trained on a quantized base meets other weights here, where it does."""
    flags = storage_flags(trained_storage(adapter_folder) or storage(ModelOptions(model_name="")))
    if not flags:
        return []
    return [
        f"the adapter was trained on a base stored with {' '.join(flags)} and is merged into the unrounded weights, "
        "which differ from those by the rounding error; compare with llmrecipes.evaluation"
    ]
