"""What makes a run fast, where it may be, and told in the plan: attention by document, fused layers, 8 bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmrecipes.batch import BY_DOCUMENT
from llmrecipes.config.rules import EXPANDED
from llmrecipes.config.schema import RunConfig
from llmrecipes.data.loaders import Loader
from llmrecipes.errors import ConfigError, HardwareError
from llmrecipes.kernels.attention import apply_document_attention
from llmrecipes.kernels.calibration import BOUND, calibrate
from llmrecipes.kernels.footprint import Shape
from llmrecipes.kernels.graphs import MOST, Replayed
from llmrecipes.kernels.head import fused_loss_sum
from llmrecipes.kernels.jit import triton
from llmrecipes.kernels.layers import (
    KNOWN_LAYERS,
    FusedLayer,
    UnknownLayerError,
    apply_fused_layers,
    base_of,
    decoder_layers,
)
from llmrecipes.precision import Precision, out_of_memory_told
from llmrecipes.training.loss import loss_sum
from llmrecipes.training.optimizers import tensor_bytes
from llmrecipes.training.updater import LossSum, Updater

EXACT = "exact"

WIDE = 2048
"""Width of a model from which 8-bit matmuls are taken to pay for what rounding costs: on an H200 they make 7B, 4,096
wide, faster by 1.4, and 135M, 576 wide, slower by 2.3; in between nothing was measured."""


@dataclass(frozen=True)
class Fused:
    """What became of the model's layers."""

    told: str
    """for the plan"""
    loss: LossSum
    layers: Sequence[FusedLayer] = ()
    """the fused layers, none where they are as they were"""
    compute: str = EXACT
    """how their frozen weights are multiplied: exact, int8 or fp8"""
    shape: Shape | None = None
    """the model's, where layers are fused"""


def apply_attention(model: Any, config: RunConfig) -> str:
    """Makes the model attend by document where it can; returns what was done, for the plan."""
    if config.use_fast_kernels is False:
        return "none: the plain reference path (eager attention)"
    prefixes = config.use_peft and config.peft_method == "prefix"
    replaced = 0 if prefixes else apply_document_attention(model)
    if replaced:
        return f"attention by document in {replaced} layers"
    if config.use_fast_kernels:
        raise ConfigError("--use_fast_kernels true: this model cannot attend by document; leave the flag out")
    return f"{model.config._attn_implementation} attention"


def fuse_layers(model: Any, config: RunConfig, precision: Precision) -> Fused:
    """Replaces the decoder layers of a model, adapter attached, by fused ones where that is right and pays.

    Raises `ConfigError` where `--use_fast_kernels true` or an 8-bit `quantization_config.compute` demands it in vain.
    """
    asked = config.quantization_config.compute
    wanted = config.use_fast_kernels or (config.quantization in EXPANDED and asked in ("int8", "fp8"))
    on_gpu = precision.device.type == "cuda"
    if config.use_fast_kernels is False or not (wanted or on_gpu):
        return Fused("", loss_sum)
    capability = torch.cuda.get_device_capability(precision.device) if on_gpu else None
    compute = eight_bit_compute(config, capability, model.config.get_text_config().hidden_size)
    try:
        check_fusible(model, config, precision)
        apply_fused_layers(model, precision.compute, compute)
    except UnknownLayerError as error:
        if wanted:
            flag = "use_fast_kernels true" if config.use_fast_kernels else f"quantization_config.compute {asked}"
            raise ConfigError(f"--{flag}: the layers cannot be fused ({error}); leave the flag out") from None
        return Fused(f"layers as transformers has them ({error})", loss_sum)
    layers = [layer for layer in decoder_layers(model) if isinstance(layer, FusedLayer)]
    shape = fused_shape(model, layers[0], config, precision, compute)
    return Fused(f"{len(layers)} fused layers", fused_loss_sum, layers, compute, shape)


def fused_shape(model: Any, layer: Any, config: RunConfig, precision: Precision, compute: str) -> Shape:
    """Returns the shape of a model, LoRA and types included, by one of its layers, fused or not."""
    parts = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
    adapted = {name: part for name, part in parts.items() if hasattr(part, "lora_A")}
    ranks = [part.r[adapter] for part in adapted.values() for adapter in part.active_adapters]
    return Shape.of(
        model.config,
        adapted=tuple(adapted),
        rank=max(ranks, default=0),
        stream=model.get_input_embeddings().weight.element_size(),
        compute=precision.compute.itemsize,
        eight_bit=compute != EXACT,
        in_one=config.use_peft and config.quantization is None and config.lora_config.lora_dropout == 0,
        drops=config.use_peft and config.lora_config.lora_dropout > 0,
    )


def known_shape(model: Any, config: RunConfig, precision: Precision) -> Shape:
    """Returns the shape of a model whose layers are known, fused or not; raises `UnknownLayerError`."""
    layer = decoder_layers(model)[0]
    if not isinstance(layer, FusedLayer) and type(layer).__name__ not in KNOWN_LAYERS:
        raise UnknownLayerError(f"{type(layer).__name__} is not one of {', '.join(KNOWN_LAYERS)}")
    return fused_shape(model, layer, config, precision, EXACT)


def check_fusible(model: Any, config: RunConfig, precision: Precision) -> None:
    """Raises `UnknownLayerError` where the run has something that fused layers do not."""
    if config.use_peft and config.peft_method != "lora":
        raise UnknownLayerError(f"--peft_method {config.peft_method} changes them")
    if model.config._attn_implementation != BY_DOCUMENT:
        raise UnknownLayerError("the model does not attend by document")
    head = model.get_output_embeddings()
    if hasattr(head, "lora_A") or getattr(head, "bias", None) is not None:
        raise UnknownLayerError("the head has LoRA or a bias")
    if precision.device.type == "cuda" and triton is None:
        raise UnknownLayerError("Triton is not installed")


def eight_bit_compute(config: RunConfig, capability: tuple[int, int] | None, width: int) -> str:
    """Returns how weights in 4 bits or fp8 are to be multiplied, `auto` resolved; raises `HardwareError`.

    `capability` is the GPU's, None without one; `width` the model's.
    """
    asked = config.quantization_config.compute
    if config.quantization not in EXPANDED or asked == "bf16":
        return EXACT
    if asked == "fp8" and capability is not None and capability < (8, 9):
        raise HardwareError(
            "--quantization_config.compute fp8: this GPU has no 8-bit floating point (Ada and Hopper do); use int8"
        )
    if asked != "auto":
        return asked
    return "int8" if width >= WIDE and capability is not None and capability >= (8, 0) else EXACT


ROOM_BYTES = 1 << 30
"""Memory left beside records: for what matmuls work in on a stream of their own, for saving, for gaps."""

VALIDATION = 0.25
"""Share of a step's memory that is left beside records for what keeps nothing for a backward pass."""

ASKING = ("dynamic", "longrope")
"""Rotary positions whose angles depend on the longest document, for which transformers asks the GPU."""


def replay_batches(config: RunConfig, fused: Fused, loader: Loader, updater: Updater, peak: int, limit: int) -> str:
    """Has batches recorded as CUDA graphs, and played from then on, where that is right; returns a text.

    Shapes must repeat, and nothing may be drawn at random within. Records hold what a step does, `peak` bytes with the
    model, a gradient each, and `limit` must hold a validation beside them. A batch of another shape is computed beside
    them as well: where that does not fit, they are given up.
    """
    precision = updater.precision
    layers: list[Any] = list(fused.layers)
    repeats = loader.fixed_shapes and precision.device.type == "cuda" and config.use_peft
    if not (layers and repeats) or precision.loss_scaling:
        return ""
    if any(layer.decoder.drops for layer in layers):
        return ""
    if (layers[0].self_attn.config.rope_parameters or {}).get("rope_type") in ASKING:
        return ""
    step = peak - torch.cuda.memory_allocated(precision.device)
    if peak + VALIDATION * step + MOST * tensor_bytes(updater.parameters) + ROOM_BYTES > limit:
        return ""

    def refresh() -> None:
        for layer in layers:
            layer.refresh()

    def settle() -> None:
        layers[0].host_memory.wait(precision.device)

    updater.loss = Replayed(updater.loss, updater.parameters, refresh, settle)
    return "batches replayed as CUDA graphs"


def calibrated(fused: Fused, model: Any, loader: Loader, precision: Precision, asked: str) -> str:
    """Tries 8-bit matmuls on the first row, switches them off in layers where they are too far off; returns a text.

    Where the user `asked` for a kind instead of `auto`, no layer is switched off.
    """
    if fused.compute == EXACT:
        return ""
    batch = loader.batch(loader.window_rows(0)[0][0][:1])
    bound = BOUND if asked == "auto" else float("inf")
    with precision.autocast(), out_of_memory_told("calibration", "--quantization_config.compute bf16"):
        errors = calibrate(base_of(model).base_model, list(fused.layers), batch.to(precision.device), bound)
    exact = [number for number, error in enumerate(errors) if error > bound]
    told = f"matmuls in {fused.compute} (error of a layer {min(errors):.1%} to {max(errors):.1%}"
    return told + (f"; above {bound:.0%} and exact: layers {', '.join(map(str, exact))})" if exact else ")")
