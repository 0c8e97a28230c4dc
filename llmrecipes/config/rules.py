"""What a combination of keys must satisfy, and llama-recipes' older names.

A key that the user set and that nothing would read is an error which names what would make it effective; so is a
choice that cannot work. Nothing is altered in silence.
"""

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmrecipes.config.data_schema import DataViewConfig, TokenizerOptions
from llmrecipes.config.dataset_schema import DatasetOptions
from llmrecipes.config.files import Given
from llmrecipes.config.options import listed, size_in_bytes
from llmrecipes.config.schema import EvaluationConfig, InferenceConfig, MergingConfig, ModelOptions, RunConfig
from llmrecipes.errors import did_you_mean


@dataclass(frozen=True)
class Effect:
    """Keys that are read only where `when` holds; `needs` tells the user how to get there."""

    keys: tuple[str, ...]
    when: Callable[[Any], bool]
    needs: str


@dataclass(frozen=True)
class Conflict:
    """Settings that cannot go together, and what to do."""

    when: Callable[[Any], bool]
    message: str


def _trains_with(method: str) -> Callable[[Any], bool]:
    return lambda config: config.use_peft and config.peft_method == method and not config.from_peft_checkpoint


def _named(dataset: str) -> Callable[[Any], bool]:
    return lambda config: config.dataset == dataset


EXPANDED = ("4bit", "fp8")
"""Storages whose weights are expanded for each matmul."""

NEW_ADAPTER = " (and a new adapter: with --from_peft_checkpoint the adapter's own settings hold)"

DATASET_NAMES = tuple(name for name in DatasetOptions.__dataclass_fields__ if name.endswith("_dataset"))

UNSHIPPED_DATASETS = ("llamaguard_toxicchat_dataset",)

MODEL_EFFECTS = (
    Effect(("quantization_config.compute",), lambda c: c.quantization in EXPANDED, "--quantization 4bit or fp8"),
    Effect(
        ("quantization_config.quant_*", "quantization_config.use_double_quant", "quantization_config.compute_dtype"),
        lambda c: c.quantization == "4bit",
        "--quantization 4bit",
    ),
)

DATASET_EFFECTS = (
    *(Effect((f"{name}.*",), _named(name), f"--dataset {name}") for name in DATASET_NAMES),
    Effect(
        ("chat_dataset.prompt_format",),
        lambda c: c.dataset != "chat_dataset" or c.chat_dataset.template == "plain",
        "--chat_dataset.template plain",
    ),
)

DATASET_CONFLICTS = (
    Conflict(
        lambda c: c.dataset == "custom_dataset" and not c.custom_dataset.file,
        "--custom_dataset.file is required with --dataset custom_dataset: FILE.py:FUNCTION",
    ),
    Conflict(
        lambda c: c.dataset in UNSHIPPED_DATASETS,
        "--dataset llamaguard_toxicchat_dataset is not shipped; write its preprocessor and name it with "
        "--dataset custom_dataset --custom_dataset.file FILE.py:FUNCTION",
    ),
)

RUN_EFFECTS = (
    Effect(("lora_config.*",), _trains_with("lora"), "--use_peft --peft_method lora" + NEW_ADAPTER),
    Effect(
        ("llama_adapter_config.*",),
        _trains_with("llama_adapter"),
        "--use_peft --peft_method llama_adapter" + NEW_ADAPTER,
    ),
    Effect(("prefix_config.*",), _trains_with("prefix"), "--use_peft --peft_method prefix" + NEW_ADAPTER),
    Effect(("peft_method", "from_peft_checkpoint"), lambda c: c.use_peft, "--use_peft"),
    Effect(("allow_base_mismatch",), lambda c: c.from_peft_checkpoint, "--from_peft_checkpoint"),
    Effect(("num_freeze_layers",), lambda c: c.freeze_layers, "--freeze_layers"),
    Effect(("gradient_clipping_threshold",), lambda c: c.gradient_clipping, "--gradient_clipping"),
    Effect(("gamma",), lambda c: c.lr_scheduler == "step", "--lr_scheduler step"),
    Effect(("leak_probe",), lambda c: c.batching_strategy == "packing", "--batching_strategy packing"),
    Effect(("group_by_length",), lambda c: c.batching_strategy == "padding", "--batching_strategy padding"),
    Effect(
        ("eval_steps", "max_eval_step", "val_batch_size"), lambda c: c.run_validation, "--run_validation"
    ),
    Effect(("wandb_config.*",), lambda c: c.use_wandb or "wandb" in c.report_to, "--use_wandb"),
    Effect(("flop_counter_start",), lambda c: c.flop_counter, "--flop_counter"),
    Effect(("profiler_dir",), lambda c: c.use_profiler, "--use_profiler"),
    Effect(("save_steps", "save_on", "keep_last"), lambda c: c.save_model, "--save_model"),
    Effect(("resume_allow_changes",), lambda c: c.resume != "never", "--resume auto"),
    Effect(("skip_spikes",), lambda c: c.spike_sigma > 0, "--spike_sigma above 0"),
    Effect(
        ("low_cpu_fsdp", "dist_checkpoint_root_folder", "dist_checkpoint_folder", "save_optimizer",
         "fsdp_config.sharding_strategy", "fsdp_config.hsdp", "fsdp_config.*_group_size", "fsdp_config.checkpoint_type",
         "fsdp_config.fsdp_*"),
        lambda c: c.enable_fsdp,
        "--enable_fsdp",
    ),
)  # fmt: skip

PRECISION_CONFLICTS = (
    Conflict(
        lambda c: c.use_fp16 and c.mixed_precision is False,
        "--use_fp16 contradicts --mixed_precision false (which means float32); leave one of them out",
    ),
)

COMMIT = re.compile(r"[0-9a-f]{40}")


def _runs_code_that_may_change(config: Any) -> bool:
    """Whether Python code of the hub would be run whose author may exchange it between two runs."""
    names = [name for name in (config.model_name, getattr(config, "tokenizer_name", None)) if name]
    pinned = COMMIT.fullmatch(config.model_revision or "")
    return bool(config.trust_remote_code and not pinned and not all(map(_is_here, names)))


def _is_here(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


CODE_CONFLICTS = (
    Conflict(
        _runs_code_that_may_change,
        "--trust_remote_code runs Python code from the hub, which may be another tomorrow: pin it with "
        "--model_revision (a commit of 40 digits), or give a local folder whose code you have read",
    ),
)

ACTIVATION_MEMORY = ("auto", "keep", "recompute", "offload")

RUN_CONFLICTS = (
    Conflict(
        lambda c: c.fit != "auto" and not size_in_bytes(c.fit),
        "--fit: expected auto or a size such as 24GiB",
    ),
    Conflict(
        lambda c: c.activation_memory not in ACTIVATION_MEMORY and not size_in_bytes(c.activation_memory),
        f"--activation_memory: expected {', '.join(ACTIVATION_MEMORY)}, or a size such as 8GiB",
    ),
    Conflict(
        lambda c: c.use_peft and c.peft_method == "prefix" and c.activation_memory == "recompute",
        "--activation_memory recompute: with --peft_method prefix nothing can be computed again; leave it out",
    ),
    Conflict(
        lambda c: c.use_fast_kernels is False and c.quantization_config.compute in ("int8", "fp8"),
        "--quantization_config.compute int8 and fp8 are fast kernels, which --use_fast_kernels false switches off; "
        "leave one of them out",
    ),
    Conflict(
        lambda c: c.quantization == "fp8" and c.use_peft and c.lora_config.use_dora,
        "--lora_config.use_dora: it needs the norms of the base's weights, which peft cannot read from fp8; use "
        "--quantization 4bit or 8bit",
    ),
    Conflict(lambda c: c.enable_fsdp, "--enable_fsdp: several GPUs are not supported yet; run without it on one GPU"),
    Conflict(
        lambda c: c.freeze_LLM_only,
        "--freeze_LLM_only: it belongs to vision models, which are not supported; leave it out",
    ),
    Conflict(
        lambda c: c.quantization is not None and not c.use_peft,
        "--quantization: quantized weights cannot be trained; add --use_peft, or leave --quantization out",
    ),
    Conflict(
        lambda c: c.freeze_layers and c.use_peft,
        "--freeze_layers: with --use_peft the whole base is frozen already; leave one of them out",
    ),
    Conflict(
        lambda c: c.fsdp_config.pure_bf16 and (c.use_fp16 or c.mixed_precision is False),
        "--pure_bf16 contradicts --use_fp16 and --mixed_precision false; leave one of them out",
    ),
    Conflict(
        lambda c: c.fsdp_config.use_fp16 and not c.use_fp16,
        "--fsdp_config.use_fp16 contradicts --use_fp16 false, which governs the whole run; set --use_fp16",
    ),
    Conflict(
        lambda c: c.fsdp_config.mixed_precision is not None and c.fsdp_config.mixed_precision != c.mixed_precision,
        "--fsdp_config.mixed_precision contradicts --mixed_precision, which governs the whole run; set the latter",
    ),
    Conflict(
        lambda c: c.fsdp_config.optimizer == "anyprecision",
        "--fsdp_config.optimizer anyprecision: not shipped; use --optimizer adamw with --pure_bf16",
    ),
    Conflict(
        lambda c: c.warmup_steps > 0 and c.warmup_ratio > 0,
        "--warmup_steps and --warmup_ratio are two ways to say one thing; give one",
    ),
    Conflict(
        lambda c: c.use_peft and c.lora_config.inference_mode,
        "--lora_config.inference_mode true freezes the adapter, so nothing would train; leave it out",
    ),
)

ADAPTER_EFFECTS = (Effect(("allow_base_mismatch", "compare_base"), lambda c: c.peft_model is not None, "--peft_model"),)

SAMPLING_EFFECTS = (Effect(("temperature", "top_p", "top_k"), lambda c: c.do_sample, "--do_sample"),)

VIEW_EFFECTS = (Effect(("context_length", "seed"), lambda c: c.packed, "--packed"),)

TOKENIZER_CONFLICTS = (
    Conflict(
        lambda c: not c.model_name and not c.tokenizer_name,
        "--tokenizer_name or --model_name is required: samples are made with a tokenizer",
    ),
)

NOT_SHIPPED = tuple(
    Conflict(
        lambda c, name=name: getattr(c, name),  # type: ignore[misc]
        f"--{name}: {what}; leave it out",
    )
    for name, what in (
        ("enable_azure_content_safety", "no safety checker is shipped"),
        ("enable_sensitive_topics", "no safety checker is shipped"),
        ("enable_salesforce_content_safety", "no safety checker is shipped"),
        ("enable_llamaguard_content_safety", "no safety checker is shipped"),
        ("share_gradio", "no web page is shipped"),
    )
)


OLD_NAMES = {
    "micro_batch_size": "batch_size_training",
    "enable_wandb": "use_wandb",
    "flop_counter_startpoint": "flop_counter_start",
    "profiler": "use_profiler",
    "profile_output_dir": "profiler_dir",
    "input_length": "context_length",
    "wandb_project": "wandb_config.project",
    "wandb_entity": "wandb_config.entity",
    "enable_saleforce_content_safety": "enable_salesforce_content_safety",
}
"""Older llama-recipes spellings -> today's names."""

NAMES_ELSEWHERE = {
    "learning_rate": "lr", "lr_scheduler_type": "lr_scheduler", "optim": "optimizer", "max_steps": "max_train_step",
    "num_train_epochs": "num_epochs", "epochs": "num_epochs", "per_device_train_batch_size": "batch_size_training",
    "train_batch_size": "batch_size_training", "batch_size": "batch_size_training",
    "per_device_eval_batch_size": "val_batch_size", "eval_batch_size": "val_batch_size",
    "max_grad_norm": "gradient_clipping_threshold", "gradient_checkpointing": "activation_memory recompute",
    "max_seq_length": "context_length", "max_seq_len": "context_length", "cutoff_len": "context_length",
    "packing": "batching_strategy packing", "lora_r": "lora_config.r", "lora_rank": "lora_config.r",
    "load_in_4bit": "quantization 4bit", "load_in_8bit": "quantization 8bit", "model": "model_name",
    "model_name_or_path": "model_name", "base_model": "model_name",
}  # fmt: skip
"""What other trainers call a key -> what it is here."""

ENUM_KEYS = ("sharding_strategy", "checkpoint_type")
"""Keys whose values llama-recipes' own files write with the enum's name in front."""

CACHE_WORDS = {
    **dict.fromkeys(("", "off", "false", "no", "none", "null", "0"), "off"),
    **dict.fromkeys(("auto", "true", "yes", "on", "1"), "auto"),
}
"""What --data_cache may be besides a folder -> what it means."""


def renamed(item: Given) -> list[tuple[Given, str | None]]:
    """Returns what a value given under an old name or in an old form means today, each with a notice or None."""
    key, value = item.key.replace("-", "_"), item.value
    if key in OLD_NAMES:
        new = OLD_NAMES[key]
        return [(replace(item, key=new), f"{item.origin} is now called {new}")]
    if key == "gradient_clipping" and _is_number(value):
        notice = f"{item.origin} {value} is read as --gradient_clipping --gradient_clipping_threshold {value}"
        return [
            (replace(item, key=key, value="true"), notice),
            (replace(item, key="gradient_clipping_threshold"), None),
        ]
    if key == "quantization" and str(value).lower() in ("true", "false"):
        new_value = "8bit" if str(value).lower() == "true" else None
        return [(replace(item, key=key, value=new_value), f"{item.origin} {value} is read as {new_value}")]
    if key == "data_cache" and str(value).strip().lower() in CACHE_WORDS:
        return [(replace(item, key=key, value=CACHE_WORDS[str(value).strip().lower()]), None)]
    is_enum = key.rpartition(".")[2] in ENUM_KEYS
    if is_enum and isinstance(value, str) and value.startswith(("StateDictType.", "ShardingStrategy.")):
        return [(replace(item, key=key, value=value.split(".", 1)[1]), None)]
    return [(replace(item, key=key), None)]


def problems(config: object, given: Set[str]) -> list[str]:
    """Returns one line for every conflict in a config, and for every key in `given` that nothing would read."""
    found = [conflict.message for conflict in _conflicts(config) if conflict.when(config)]
    for effect in _effects(config):
        if not effect.when(config):
            found += [
                f"--{key} would have no effect without {effect.needs}; add that, or leave --{key} out"
                for key in sorted(given)
                if any(fnmatchcase(key, pattern) for pattern in effect.keys)
            ]
    if isinstance(config, DatasetOptions) and config.dataset not in DATASET_NAMES + UNSHIPPED_DATASETS:
        guess = did_you_mean(config.dataset, DATASET_NAMES)
        found.append(f"--dataset {config.dataset}: not one of {listed(DATASET_NAMES)}{guess}")
    return found


def notices(config: object, origins: Mapping[str, str]) -> list[str]:
    """Returns what the user should know about a valid config."""
    told: list[str] = []
    if isinstance(config, ModelOptions) and config.quantization == "8bit" and origins["quantization"] != "default":
        told.append("8bit is bitsandbytes LLM.int8(); --quantization 4bit takes half the memory")
    if isinstance(config, ModelOptions) and config.quantization == "4bit":
        kind = config.quantization_config.quant_type
        if origins["quantization_config.quant_type"] == "default":
            told.append(f"4bit stores {kind} (llama-recipes' default was fp4)")
    if isinstance(config, RunConfig) and config.quantization_config.compute == "fp8":
        told.append(
            "matmuls in fp8 are beyond the bound: an adapter's gradient has a cosine of 0.967 to the exact one (135M), "
            "and 0.99 is asked of auto; int8 keeps it"
        )
    for key in ("one_gpu", "use_auditnlg", "max_padding_length"):
        if origins.get(key, "default") != "default":
            told.append(f"{origins[key]} is accepted and ignored: it has no effect here")
    return told


def _effects(config: object) -> tuple[Effect, ...]:
    if isinstance(config, RunConfig):
        return MODEL_EFFECTS + DATASET_EFFECTS + RUN_EFFECTS
    if isinstance(config, EvaluationConfig):
        return MODEL_EFFECTS + DATASET_EFFECTS + ADAPTER_EFFECTS + SAMPLING_EFFECTS
    if isinstance(config, InferenceConfig):
        return MODEL_EFFECTS + ADAPTER_EFFECTS + SAMPLING_EFFECTS
    if isinstance(config, DataViewConfig):
        return DATASET_EFFECTS + VIEW_EFFECTS
    return DATASET_EFFECTS if isinstance(config, DatasetOptions) else ()


def _conflicts(config: object) -> tuple[Conflict, ...]:
    runs_code = isinstance(config, ModelOptions | TokenizerOptions | MergingConfig)
    return _own_conflicts(config) + (CODE_CONFLICTS if runs_code else ())


def _own_conflicts(config: object) -> tuple[Conflict, ...]:
    if isinstance(config, RunConfig):
        return DATASET_CONFLICTS + PRECISION_CONFLICTS + RUN_CONFLICTS
    if isinstance(config, TokenizerOptions):
        return DATASET_CONFLICTS + TOKENIZER_CONFLICTS
    if isinstance(config, DatasetOptions):
        return DATASET_CONFLICTS + (PRECISION_CONFLICTS if isinstance(config, EvaluationConfig) else ())
    return NOT_SHIPPED + PRECISION_CONFLICTS if isinstance(config, InferenceConfig) else ()


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    try:
        return float(value) not in (0.0, 1.0) or "." in str(value)
    except ValueError:
        return False
