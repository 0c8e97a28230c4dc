"""What trains: an adapter of the `peft` library, or the model itself, all or but its first layers."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from textwrap import shorten
from typing import Any

import torch
from peft import AdaptionPromptConfig, LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from llmrecipes.config.schema import RunConfig, TrainedOptions
from llmrecipes.errors import ConfigError, ModelError, first_line
from llmrecipes.models.float8 import Float8Linear
from llmrecipes.models.folders import ADAPTER_WEIGHTS, check_adapter_folder, local_path
from llmrecipes.models.identity import Base, base_of, check_base
from llmrecipes.models.quantization import has_finite_weights, stored_shape
from llmrecipes.precision import Precision

MERGEABLE = ("LORA",)
"""PEFT types that are a change of weights and can be added into the base."""


def lora(config: TrainedOptions) -> Any:
    """LoRA (Hu et al. 2021, arXiv 2106.09685); rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353)."""
    options = config.lora_config
    alpha = options.lora_alpha
    kind: Any = LoraConfig
    return kind(
        r=options.r,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        target_modules=options.target_modules,
        lora_dropout=options.lora_dropout,
        bias=options.bias,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        task_type=TaskType.CAUSAL_LM,
    )


def llama_adapter(config: TrainedOptions) -> Any:
    """LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199)."""
    options = config.llama_adapter_config
    return AdaptionPromptConfig(
        adapter_len=options.adapter_len, adapter_layers=options.adapter_layers, task_type=TaskType.CAUSAL_LM
    )


def prefix(config: TrainedOptions) -> Any:
    """Prefix tuning (Li and Liang 2021, arXiv 2101.00190)."""
    return PrefixTuningConfig(num_virtual_tokens=config.prefix_config.num_virtual_tokens, task_type=TaskType.CAUSAL_LM)


ADAPTERS: dict[str, Callable[[TrainedOptions], Any]] = {"lora": lora, "llama_adapter": llama_adapter, "prefix": prefix}

PEFT_TYPES = {"lora": "LORA", "llama_adapter": "ADAPTION_PROMPT", "prefix": "PREFIX_TUNING"}
"""`peft_method` -> what adapter_config.json calls it."""


def attach_trained(model: Any, config: RunConfig, precision: Precision) -> Any:
    """Returns the model with just what trains requiring gradients, in the precision's trained type."""
    model.requires_grad_(False)
    if not config.use_peft:
        _unfreeze(model, config)
    elif config.from_peft_checkpoint:
        model = load_adapter(model, config.from_peft_checkpoint, "from_peft_checkpoint", trainable=True)
    else:
        model = _new_adapter(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != precision.trained:
            parameter.data = parameter.data.to(precision.trained)
    return model


def checked_base(config: RunConfig, source: str) -> tuple[Base, list[str]]:
    """Returns which model the base is, by its files, and notices.

    Raises where `from_peft_checkpoint` holds no whole adapter, one of another method than the run's or of another base.
    """
    folder, flag = config.from_peft_checkpoint, "from_peft_checkpoint"
    if not folder:
        return base_of(config, source), []
    _check_method(config, folder)
    told = check_base(folder, flag, config, source, config.allow_base_mismatch)
    return base_of(config, source), told


def _check_method(config: RunConfig, folder: str) -> None:
    found = check_adapter_folder(local_path(folder), "from_peft_checkpoint").get("peft_type")
    if found != PEFT_TYPES[config.peft_method]:
        method = next((name for name, kind in PEFT_TYPES.items() if kind == found), None)
        remedy = f"give --peft_method {method}" if method else f"expected one of {', '.join(PEFT_TYPES.values())}"
        raise ConfigError(
            f"--from_peft_checkpoint {folder}: it holds a {found} adapter, and --peft_method is {config.peft_method}; "
            + remedy
        )


def load_adapter(model: Any, folder: str, flag: str, trainable: bool = False) -> Any:
    """Returns the model wrapped by the adapter in `folder`; raises `ModelError` where it does not fit the base."""
    path = local_path(folder)
    settings = check_adapter_folder(path, flag)
    reads_weights = settings.get("use_dora") or settings.get("peft_type") not in PEFT_TYPES.values()
    if reads_weights and any(isinstance(module, Float8Linear) for module in model.modules()):
        raise ModelError(
            f"--{flag} {folder}: for an adapter of its kind peft reads the base's weights, which it cannot from fp8; "
            "use --quantization 4bit or 8bit"
        )
    trains_biases = settings.get("bias", "none") != "none"
    biases = [(parameter, parameter.detach().clone()) for parameter in _biases(model)] if trains_biases else []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped: Any = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError, OSError) as error:
        raise ModelError(f"--{flag} {folder}: the adapter does not fit this base model ({first_line(error)})") from None
    wrapped.biases_of_the_base = biases
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    with safe_open(path / ADAPTER_WEIGHTS, framework="numpy") as file:
        found = set(file.keys())
    odd = sorted(set(expected) ^ found)
    if odd:
        raise ModelError(
            f"--{flag} {folder}: the adapter was trained on another base model: {len(odd)} tensors have no "
            f"counterpart, such as {odd[0]}"
        )
    for name, tensor in expected.items():
        if not has_finite_weights(tensor):
            raise ModelError(f"--{flag} {folder}: {name} holds NaN or infinity; take another copy of the adapter")
    return wrapped


@contextmanager
def adapter_switched_off(model: Any) -> Iterator[None]:
    """Makes a wrapped model answer as its base: peft itself leaves the biases that were trained as they are."""
    trained = [(parameter, parameter.data) for parameter, _ in model.biases_of_the_base]
    with ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stack.enter_context(model.disable_adapter())
        for parameter, original in model.biases_of_the_base:
            parameter.data = original
        try:
            yield
        finally:
            for parameter, data in trained:
                parameter.data = data


def count_parameters(model: Any) -> tuple[int, int]:
    """Returns (all parameters, those that train); 4-bit storage is counted by the weights it stands for."""
    total = trained = 0
    for parameter in model.parameters():
        count = stored_shape(parameter).numel()
        total += count
        trained += count if parameter.requires_grad else 0
    return total, trained


def _new_adapter(model: Any, config: RunConfig) -> Any:
    adapter = ADAPTERS[config.peft_method](config)
    if config.peft_method == "lora":
        adapter.target_modules = _targets(model, config.lora_config.target_modules)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, adapter)
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        why = shorten(first_line(error), 110, placeholder=" ...")
        raise ConfigError(
            f"--peft_method {config.peft_method}: it does not fit this model ({why}); its linear layers "
            f"are {', '.join(_linear_names(model))}, its decoder layers number {model.config.num_hidden_layers}"
        ) from None
    if count_parameters(wrapped)[1] == 0:
        raise ConfigError(f"--peft_method {config.peft_method}: no parameter would train on this model")
    return wrapped


def _targets(model: Any, targets: Sequence[str]) -> set[str]:
    """Returns the names of the layers to adapt; raises `ConfigError` for one that no layer has.

    peft asks for one match of all names, not of each. It would spell `all-linear` out layer by layer, and an adapter
    that names its layers so also loads into a base that has more of them.
    """
    if targets == ["all-linear"]:
        head = model.get_output_embeddings()
        return set(_linear_names(model, besides=head))
    names = [name for name, _ in model.named_modules()]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unknown:
        raise ConfigError(
            f"--lora_config.target_modules {','.join(unknown)}: this model has no such layers; its linear layers are "
            f"{', '.join(_linear_names(model))}"
        )
    return set(targets)


def _linear_names(model: Any, besides: Any = None) -> list[str]:
    linears = (torch.nn.Linear, Conv1D)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, linears)]
    return sorted({name.split(".")[-1] for name, module in modules if module is not besides})


def _biases(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]


def _unfreeze(model: Any, config: RunConfig) -> None:
    model.requires_grad_(True)
    if not config.freeze_layers:
        return
    layers = getattr(model.base_model, "layers", None)
    if layers is None or config.num_freeze_layers > len(layers):
        count = 0 if layers is None else len(layers)
        raise ConfigError(f"--num_freeze_layers {config.num_freeze_layers}: this model has {count} decoder layers")
    for layer in layers[: config.num_freeze_layers]:
        layer.requires_grad_(False)
