"""What several commands do first: precision, model, tokenizer, the samples of a split, the adapter."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from llmrecipes.config.files import read_config_file
from llmrecipes.config.schema import GenerationOptions, ModelOptions, PrecisionOptions, RunConfig
from llmrecipes.config.show import plain, value_of
from llmrecipes.data.limits import SampleLimits
from llmrecipes.data.preprocessors import dataset_section
from llmrecipes.data.samples import Reading, load_samples
from llmrecipes.data.store import SampleStore
from llmrecipes.environment import cache_folder, prepare_determinism
from llmrecipes.errors import ConfigError, HardwareError, first_line
from llmrecipes.generation.decoding import check_prompts
from llmrecipes.generation.settings import GenerationSettings
from llmrecipes.models.folders import local_path
from llmrecipes.models.identity import check_base
from llmrecipes.models.loading import load_tokenizer, model_config, model_limits
from llmrecipes.plugins import Plugin
from llmrecipes.precision import Precision, computes_bf16, resolve_precision
from llmrecipes.prompt_contract import PromptContract, load_contract
from llmrecipes.reports.progress import reading
from llmrecipes.training.lanes import lane_count


def set_seeds(seed: int) -> None:
    """Seeds every random generator that a plug-in or a library may use; the order of samples uses none of them."""
    if seed >= 2**63:
        raise ConfigError(f"--seed {seed} is too large, the largest is {2**63 - 1}")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(wanted: bool) -> None:
    """Has PyTorch take only operations that give the same bits each time, or, as is usual, any."""
    if wanted:
        prepare_determinism()
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = False


@contextmanager
def determinism_told() -> Iterator[None]:
    """Turns an operation that --deterministic does not allow into a `HardwareError`."""
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise HardwareError(f"--deterministic: {first_line(error)}; leave the flag out") from None


def automatic_values(config: Any) -> dict[str, object]:
    """Returns what the keys that are left open come to on this machine."""
    if not isinstance(config, PrecisionOptions):
        return {}
    precision = run_precision(config) if isinstance(config, RunConfig) else answering_precision(config)
    return {
        "device": str(precision.device),
        "mixed_precision": precision.compute == torch.bfloat16,
        "use_fast_kernels": True,
        "tokenizer_name": value_of(config, "model_name"),
        "quantization_config.compute_dtype": str(precision.compute).removeprefix("torch."),
    }


def run_precision(config: RunConfig) -> Precision:
    """Returns where and in which types a fine-tuning computes."""
    return resolve_precision(
        config.device, config.mixed_precision, config.use_fp16, pure_bf16=config.fsdp_config.pure_bf16
    )


def precision_notices(precision: Precision) -> list[str]:
    """Returns a notice where the device only emulates the type that is computed in."""
    if precision.compute != torch.bfloat16 or computes_bf16(precision.device):
        return []
    return [
        "this device only emulates bf16, and is many times slower in it than in float32; leave out "
        "--mixed_precision and --pure_bf16"
    ]


def run_lanes(config: RunConfig, source: str, precision: Precision) -> int:
    """Returns how many batches of a window a fine-tuning computes side by side.

    1 on a GPU, and where threads would change what others read: the generator that dropout draws from, the state of
    quantized layers. Of a whole model each lane would also hold a gradient.
    """
    adapter = config.use_peft and config.peft_method == "lora" and config.lora_config.lora_dropout == 0
    if precision.device.type != "cpu" or not adapter or config.quantization:
        return 1
    described = model_config(config, source).get_text_config().to_dict()
    drops = any("drop" in key and isinstance(value, float) and value > 0 for key, value in described.items())
    return 1 if drops else lane_count(config.batch_size_training, torch.get_num_threads())


def answering_precision(config: Any) -> Precision:
    """Returns the precision for generating: nothing trains, so no loss scaling and no float32 copies."""
    return resolve_precision(config.device, config.mixed_precision, config.use_fp16)


def answering_tokenizer(config: Any, source: str) -> Any:
    """Returns `--tokenizer_name`'s tokenizer, else the one that the adapter was trained with, else the model's."""
    adapter = config.peft_model
    kept = adapter is not None and (local_path(adapter) / "tokenizer.json").is_file()
    if kept and config.tokenizer_name is None:
        return load_tokenizer(replace(config, tokenizer_name=str(local_path(adapter))), source)
    return load_tokenizer(config, source)


def load_split(
    config: Any, tokenizer: Any, preprocessor: Plugin, split: str, source: str
) -> tuple[SampleStore, list[str]]:
    """Returns a split's checked samples and notices, within the limits of the config and the model.

    The seeds are set first: rows that a plug-in draws are the same whatever was read, or found in the cache, before.
    """
    set_seeds(config.seed)
    limits = sample_limits(config, source)
    with reading(f"reading {split}") as progress:
        cache = data_cache_folder(config.data_cache)
        how = Reading(cache, config.seed, progress, asked_for=config.data_cache != "auto")
        found = load_samples(preprocessor, dataset_section(config), tokenizer, split, limits, how)
    set_seeds(config.seed)
    return found


def data_cache_folder(data_cache: str) -> Path | None:
    """Returns where tokenized splits are kept, None for nowhere."""
    if data_cache == "off":
        return None
    if data_cache != "auto":
        return local_path(data_cache)
    try:
        return cache_folder() / "data"
    except RuntimeError:  # the user has no home folder
        return None


def sample_limits(config: Any, source: str) -> SampleLimits:
    """Returns what samples must keep to: the config's context length, the model's positions and vocabulary."""
    vocabulary_size, max_positions = model_limits(config, source)
    return SampleLimits(config.context_length, max_positions, vocabulary_size, config.overlong)


def contract_of(config: Any) -> PromptContract | None:
    """Returns the prompt contract beside the adapter, or beside a fine-tuned model; None where there is none."""
    for folder in (config.peft_model, config.model_name):
        contract = load_contract(local_path(folder)) if folder else None
        if contract is not None:
            return contract
    return None


def generation_settings(config: GenerationOptions, min_length: int | None = None) -> GenerationSettings:
    """Returns the settings of generation, none left to the model folder's own; what ends an answer is added later."""
    return GenerationSettings(
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        min_length=min_length,
        do_sample=config.do_sample,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        repetition_penalty=config.repetition_penalty,
        length_penalty=config.length_penalty,
        use_cache=config.use_cache,
        seed=config.seed,
    )


def check_prompts_early(
    config: ModelOptions, source: str, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> None:
    """Raises `DataError` for a prompt that the model cannot take, by its config.json, before its weights are read."""
    check_prompts(SimpleNamespace(config=model_config(config, source).get_text_config()), prompts, settings)


def stop_token_ids(model: Any, tokenizer: Any, contract: PromptContract | None) -> tuple[int, ...]:
    """Returns the ids that end an answer: training's, the tokenizer's and the model's own."""
    own = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    ids |= set(contract.stop_token_ids) if contract else set()
    return tuple(sorted(ids - {None}))


STORAGE_KEYS = ("quantization", "quantization_config.quant_type", "quantization_config.use_double_quant")


def trained_storage(adapter_folder: Path) -> dict[str, str] | None:
    """Returns how the base was stored that an adapter was trained on, by its run.yaml; None where there is none."""
    beside = adapter_folder.name == "last" or adapter_folder.name.startswith("step-")
    path = (adapter_folder.parent if beside else adapter_folder) / "run.yaml"
    if not path.is_file():
        return None
    return storage(RunConfig(model_name="", output_dir="")) | {
        item.key: plain(None) if item.value is None else str(item.value)
        for item in read_config_file(path)
        if item.key in STORAGE_KEYS
    }


def storage(config: ModelOptions) -> dict[str, str]:
    """Returns the keys that decide how the base is stored, as they are written in YAML."""
    return {key: plain(value_of(config, key)) for key in STORAGE_KEYS}


def storage_flags(stored: Mapping[str, str]) -> list[str]:
    """Returns the words of a command line that store the base so; none where it is not quantized."""
    if stored["quantization"] == "null":
        return []
    usual = storage(ModelOptions(model_name=""))
    return [word for key, value in stored.items() if value != usual[key] for word in (f"--{key}", value)]


def adapter_notices(config: Any, source: str) -> list[str]:
    """Returns what there is to say of an adapter and the base it is put on; raises where that is another base."""
    if not config.peft_model:
        return []
    told = check_base(config.peft_model, "peft_model", config, source, config.allow_base_mismatch)
    trained = trained_storage(local_path(config.peft_model))
    if trained is None or storage_flags(trained) == storage_flags(storage(config)):
        return told
    flags = " ".join(storage_flags(trained))
    way = f"{flags} would load it as it was" if flags else "leave --quantization out to load it as it was"
    return [*told, f"the adapter was trained on a base stored in another way; {way}"]
