"""`llmrecipes plan`: what a fine-tuning would take on a GPU that need not be here, from config and data alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llmrecipes.batch import document_spans
from llmrecipes.config.loading import Loaded
from llmrecipes.config.options import size_in_bytes
from llmrecipes.config.schema import PlanConfig
from llmrecipes.data.loaders import Loader
from llmrecipes.errors import ConfigError
from llmrecipes.kernels.attention import apply_document_attention
from llmrecipes.kernels.decoder import Keep
from llmrecipes.kernels.footprint import Shape, keeps_within
from llmrecipes.kernels.layers import KNOWN_LAYERS, UnknownLayerError, decoder_layers
from llmrecipes.models.adapters import attach_trained, count_parameters
from llmrecipes.models.loading import load_tokenizer, model_config, resolve_model
from llmrecipes.precision import Precision
from llmrecipes.reports.format import count, duration, gib
from llmrecipes.reports.plan import aligned
from llmrecipes.run.finetune import build_loaders, method_text, resolve_plugins, train_plan
from llmrecipes.run.memory import CONTEXT, MARGIN, asked_keeps, divisors, kept_text, largest_tokens
from llmrecipes.run.preparing import set_seeds
from llmrecipes.run.speed import EXACT, check_fusible, eight_bit_compute, fused_shape
from llmrecipes.training.optimizers import state_bytes, tensor_bytes


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet."""

    name: str
    memory: int
    capability: tuple[int, int]
    peak: float
    """operations a second of dense bfloat16 matmuls that add in float32"""


CARDS = {
    "3090": Card("GeForce RTX 3090", 24 << 30, (8, 6), 71e12),
    "4090": Card("GeForce RTX 4090", 24 << 30, (8, 9), 165e12),
    "a100": Card("A100 80GB", 80 << 30, (8, 0), 312e12),
    "h100": Card("H100 SXM", 80 << 30, (9, 0), 989e12),
    "h200": Card("H200", 141 * 10**9, (9, 0), 989e12),
}
"""NVIDIA's white papers GA102, AD102, A100, H100 and the H200's data sheet."""

REACHED = {EXACT: 0.56, "int8": 0.80, "fp8": 0.80}
"""Share of the peak that a training step reaches in useful operations, measured on an H200 (benchmarks/gpu.py,
4 x 4,096 tokens, 7B, LoRA r 16); other cards are taken to reach the same. 8-bit matmuls count as bfloat16's peak."""


KERNELS, KERNEL_SECONDS = 115, 4e-6
"""Kernels that a layer takes for a batch, forward and backward, and the time of each that no card saves.

Measured on H200 machines: a batch of a 7B with 32 layers makes some 3,700 launches, each of 5 to 30 microseconds of
the host's time; played from a CUDA graph, a kernel still takes the GPU about 3. So this is a bound from below.
"""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a step at its fullest, by what they are for."""

    weights: int
    """of the frozen ones, as they are stored"""
    trained: int
    """weights that train"""
    copies: int
    """of LoRA, in the compute type; the larger where the base is not quantized: there they stand in one matrix with it
    and are filled up to 64 columns, else to 16"""
    optimizer: int
    gradients: int
    kept: int
    """by the layers, for the backward pass"""
    passing: int
    accumulates: bool
    """whether a step has several batches: then the gradient of the first is there while the second is computed"""

    @property
    def peak(self) -> int:
        """All that is there at once: the backward pass frees what was kept while the gradient grows."""
        grown = self.kept + self.gradients if self.accumulates else max(self.kept, self.gradients)
        return self.weights + self.trained + self.copies + self.optimizer + grown + self.passing

    @property
    def told(self) -> str:
        """Each part, in words."""
        parts = {
            "frozen": self.weights,
            "trained": self.trained,
            "LoRA's copies": self.copies,
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "kept for the backward pass": self.kept,
            "on its way": self.passing,
        }
        return ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)


def plan(loaded: Loaded[PlanConfig], config_path: str | None) -> int:
    """Prints the plan of a fine-tuning; returns the exit code, 2 where it would not fit."""
    config = loaded.config
    card, precision = CARDS[config.card], planned_precision(config)
    plugins = resolve_plugins(config, config_path)
    source = resolve_model(config, weights=False)
    model = meta_model(config, source, precision)
    compute = eight_bit_compute(config, card.capability, model.config.get_text_config().hidden_size)
    shape = fused_shape(model, decoder_layers(model)[0], config, precision, compute)
    tokenizer = load_tokenizer(config, source)
    set_seeds(config.seed)
    loaders = build_loaders(config, tokenizer, plugins, source, document_spans)
    limit = min(size_in_bytes(config.fit) or card.memory, card.memory)
    pieces, keeps, found = fitted(config, model, shape, loaders.training, limit)
    total, trained = count_parameters(model)
    steps = train_plan(config, loaders).steps
    epochs = steps / len(loaders.training.window_rows(0))
    seconds, bound, source_told = training_time(shape, loaders.training.cut(pieces), config, card, compute)
    rows = [
        ("model", f"{config.model_name}: {count(total)} parameters, {count(trained)} of them train"),
        ("method", f"{method_text(config)}; base in {config.quantization or precision.name}, matmuls {compute}"),
        ("steps", f"{count(steps)}, an epoch has {count(loaders.training.useful_tokens)} tokens"),
        ("memory", f"{gib(found.peak)} at most, of {gib(limit)}: {found.told}"),
        ("", kept_text(keeps) + (f"; each batch cut into {pieces}, with the same update" if pieces > 1 else "")),
        ("time", f"{bound} {duration(epochs * seconds)} of training on one {card.name}"),
        ("", source_told),
    ]  # fmt: skip
    print(aligned(rows))
    if found.peak <= MARGIN * (limit - CONTEXT):
        return 0
    print("it does not fit; try --quantization 4bit, --optimizer adamw_8bit or a smaller --context_length")
    return ConfigError.exit_code


def planned_precision(config: PlanConfig) -> Precision:
    """Returns the types that the run would have on the card."""
    if config.use_fp16:
        return Precision(torch.device("meta"), torch.float16, torch.float32, loss_scaling=True)
    compute = torch.float32 if config.mixed_precision is False else torch.bfloat16
    trained = torch.bfloat16 if config.fsdp_config.pure_bf16 else torch.float32
    return Precision(torch.device("meta"), compute, trained, loss_scaling=False)


def meta_model(config: PlanConfig, source: str, precision: Precision) -> Any:
    """Returns the model with what trains attached, without any weights."""
    described = model_config(config, source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described)
        model = model.to(precision.compute if config.use_peft else precision.trained)
        model = attach_trained(model, replace(config, from_peft_checkpoint=""), precision)
    reason = why_not_fused(model, config, precision)
    if reason:
        raise ConfigError(f"plan: it knows runs whose layers are fused, and this one's are not ({reason})")
    return model


def why_not_fused(model: Any, config: PlanConfig, precision: Precision) -> str:
    """Returns why the trainer would not fuse the layers of a model without weights; nothing where it would."""
    if config.use_fast_kernels is False:
        return "--use_fast_kernels false; leave it out"
    if config.quantization == "8bit":
        return "--quantization 8bit; plan it with 4bit or fp8"
    if config.use_peft and (config.lora_config.use_dora or config.lora_config.bias != "none"):
        return "DoRA, or biases that train; leave them out"
    if config.freeze_layers and precision.trained != precision.compute:
        return "--freeze_layers without --pure_bf16; add that"
    try:
        apply_document_attention(model)
        check_fusible(model, config, precision)
        kinds = {type(layer).__name__ for layer in decoder_layers(model)}
    except UnknownLayerError as error:
        return str(error)
    unknown = sorted(kinds - set(KNOWN_LAYERS))
    return f"{', '.join(unknown)}, not one of {', '.join(KNOWN_LAYERS)}" if unknown else ""


def fitted(
    config: PlanConfig, model: Any, shape: Shape, loader: Loader, limit: int
) -> tuple[int, list[Keep], Footprint]:
    """Returns into how many a batch is cut, what layers keep, and what that takes: as the trainer would decide."""
    free = MARGIN * (limit - CONTEXT)
    for pieces in divisors(loader.batch_rows):
        cut = loader.cut(pieces)
        tokens, accumulates = largest_tokens(cut), cut.window_batches > 1
        keeps = asked_keeps(config, shape, tokens)
        found = footprint(config, model, shape, tokens, keeps, accumulates)
        if found.peak > free and cut.batch_rows == 1 and config.activation_memory == "auto":
            least = footprint(config, model, shape, tokens, [Keep.INPUT] * shape.layers, accumulates)
            keeps = keeps_within(shape, tokens, int(least.kept + free - least.peak))
            found = footprint(config, model, shape, tokens, keeps, accumulates)
        if found.peak <= free:
            break
    return pieces, keeps, found


def footprint(
    config: PlanConfig, model: Any, shape: Shape, tokens: int, keeps: Sequence[Keep], accumulates: bool
) -> Footprint:
    """Returns the bytes of a step whose largest batch has so many tokens."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    weights = tensor_bytes(frozen)
    gradients = tensor_bytes(trained)
    return Footprint(
        weights=weights - saved_bytes(config, shape),
        trained=gradients,
        copies=shape.adapter_copies if config.use_peft else 0,
        optimizer=state_bytes(config.optimizer, trained),
        gradients=gradients,
        kept=sum(tokens * shape.kept_bytes(keep) for keep in keeps),
        passing=shape.passing_bytes(tokens, keeps[-1]),
        accumulates=accumulates,
    )


def saved_bytes(config: PlanConfig, shape: Shape) -> int:
    """Returns how many bytes the linear layers' weights take less than in the compute type."""
    if not config.quantization:
        return 0
    if config.quantization == "fp8":
        return shape.linear_parameters * (shape.compute - 1) - 4 * shape.linear_rows
    # A scale of 4 bytes for 64 weights; of 1 byte, and 4 for 256 of them, with double quantization.
    scales = (1 + 4 / 256) / 64 if config.quantization_config.use_double_quant else 4 / 64
    return int(shape.linear_parameters * (shape.compute - 0.5 - scales))


def training_time(shape: Shape, loader: Loader, config: PlanConfig, card: Card, compute: str) -> tuple[float, str, str]:
    """Returns an epoch's seconds, `about` or `at least`, and what they come from.

    That is what the matmuls take, or, where a model is too small for them to count, what its kernels take at least.
    """
    multiplied = operations(shape, loader, config) / card.peak / REACHED[compute]
    batches = sum(map(len, loader.window_rows(0)))
    launched = batches * shape.layers * KERNELS * KERNEL_SECONDS
    if multiplied >= launched:
        share = f"at {REACHED[compute]:.0%} of its {card.peak / 1e12:.0f} TFLOP/s, the share measured on an H200"
        return multiplied, "about", share
    each = f"{KERNELS} a layer and batch, {KERNEL_SECONDS * 1e6:.0f} microseconds each, measured on an H200"
    return launched, "at least", f"its matmuls are too small to count, its kernels are not: {each}"


def operations(shape: Shape, loader: Loader, config: PlanConfig) -> int:
    """Returns the floating-point operations of an epoch."""
    pairs = sum(length * (length + 1) // 2 for length in loader.lengths)
    return shape.operations(loader.useful_tokens, loader.supervised_tokens, pairs, not config.use_peft)
