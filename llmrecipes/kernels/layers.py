"""Decoder layers of a model replaced by fused ones: the same modules under the same names, computed as one step.

A kernel is a function `(model, ...) -> number of parts replaced`. A layer that is not of the shape known here leaves
the whole model as it is, and the reason is told.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmrecipes.batch import DocumentLayout
from llmrecipes.kernels.attend import Attention
from llmrecipes.kernels.decoder import Decoder, Keep, Norm, Shared
from llmrecipes.kernels.eight_bit import eight_bit_of
from llmrecipes.kernels.four_bit import FourBit
from llmrecipes.kernels.offload import HostMemory
from llmrecipes.kernels.projections import Adapter, Projections
from llmrecipes.kernels.storage import Float8Storage, FourBitStorage, FrozenStorage, Storage, TrainedStorage

KNOWN_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
"""RMSNorm before attention and before SwiGLU, rotary positions, nothing else."""


class UnknownLayerError(ValueError):
    """A layer that cannot be fused, and why."""


class FusedLayer(nn.Module):
    """A decoder layer that runs as one step in training, and as it was where there is a cache to answer from.

    What else peft can do to a model, switch an adapter off or merge it, does not reach the fused step.
    """

    def __init__(self, layer: nn.Module, decoder: Decoder, host_memory: HostMemory) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)  # so that parameters keep their names
        self.plain = [layer]  # in a list: not a child, its parts are children already
        self.decoder = decoder
        self.keep = Keep.ALL
        self.host_memory = host_memory

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        layout: DocumentLayout | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Returns [rows, tokens, width]; `layout` tells documents apart, without one each row is one document."""
        if past_key_values is not None or (layout is None and attention_mask is not None):
            result: torch.Tensor = self.plain[0](
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings,
                past_key_values=past_key_values, layout=layout, **options,
            )  # fmt: skip
            return result
        assert position_embeddings is not None
        return self.at(hidden_states, position_embeddings, layout).view_as(hidden_states)

    def refresh(self) -> None:
        """Brings copies of the adapters up to date with them."""
        for group in self.decoder.groups:
            group.refresh()

    def at(
        self,
        hidden_states: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        layout: DocumentLayout | None,
        needed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns [rows * tokens, width], or only the rows whose places are `needed`, [needed, width]."""
        rows, size = hidden_states.shape[0], self.decoder.head_size
        cosine, sine = (angle.expand(rows, -1, -1).reshape(-1, size) for angle in angles)
        shared = Shared(cosine, sine, Attention(rows, layout, size**-0.5), needed)
        trained = self.decoder.trained if torch.is_grad_enabled() else ()
        y: torch.Tensor = _Step.apply(hidden_states.flatten(0, 1), self, shared, *trained)
        return y


class _Step(torch.autograd.Function):
    """One layer, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FusedLayer, shared: Shared, *trained: torch.Tensor) -> torch.Tensor:
        ctx.seed = int(torch.randint(2**30, ())) if layer.training and layer.decoder.drops else None
        with torch.autocast(x.device.type, enabled=False):
            y, kept = layer.decoder.forward(x, shared, ctx.seed, layer.keep)
        ctx.stored = None
        if layer.keep == Keep.OFFLOADED and x.is_cuda and any(ctx.needs_input_grad):
            ctx.stored, kept.x = layer.host_memory.store(x), x.new_empty(0)
        ctx.layer, ctx.shared, ctx.kept = layer, shared, kept
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        decoder, shared, kept = ctx.layer.decoder, ctx.shared, ctx.kept
        ctx.kept = None  # freed as it is used up, not when the whole graph is
        gradient = gradients[0].contiguous()
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.stored is not None:
                kept.x = ctx.stored.take()
                ctx.stored = None
            found, trained = decoder.backward(gradient, kept, shared, ctx.seed, ctx.needs_input_grad[0])
        return found, None, None, *trained


def apply_fused_layers(model: Any, dtype: torch.dtype, compute: str = "exact") -> int:
    """Replaces the decoder layers of a model, LoRA attached or not; returns how many.

    Matmuls are in `dtype`; `compute` is exact, or fp8 or int8 for those of frozen weights. Raises `UnknownLayerError`
    where a layer is of another shape; then nothing is replaced.
    """
    layers = decoder_layers(model)
    decoders = [decoder_of(layer, dtype, compute) for layer in layers]
    host_memory = HostMemory()
    for place, decoder in enumerate(decoders):
        layers[place] = FusedLayer(layers[place], decoder, host_memory)
    return len(decoders)


def base_of(model: Any) -> Any:
    """Returns the model that an adapter wraps, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> nn.ModuleList:
    """Returns the list of a model's decoder layers; raises `UnknownLayerError` where there is none."""
    base = base_of(model)
    layers = getattr(base.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnknownLayerError(f"{type(base).__name__} has no list of decoder layers")
    return layers


def decoder_of(layer: Any, dtype: torch.dtype, compute: str) -> Decoder:
    """Returns the parts of a layer, shared with it; raises `UnknownLayerError`."""
    kind = type(layer).__name__
    if kind not in KNOWN_LAYERS:
        raise UnknownLayerError(f"{kind} is not one of {', '.join(KNOWN_LAYERS)}")
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    if config.hidden_act != "silu" or getattr(config, "attention_dropout", 0):
        raise UnknownLayerError(f"{kind} has the activation {config.hidden_act}, or dropout in its attention")

    def group(names: Sequence[Any], takes_room: bool = True) -> Projections:
        return _group(names, dtype, compute, takes_room)

    return Decoder(
        first_norm=_norm(layer.input_layernorm),
        qkv=group([attention.q_proj, attention.k_proj, attention.v_proj]),
        output=group([attention.o_proj], takes_room=False),
        second_norm=_norm(layer.post_attention_layernorm),
        gate_up=group([mlp.gate_proj, mlp.up_proj]),
        down=group([mlp.down_proj]),
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=attention.head_dim,
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _group(modules: Sequence[Any], dtype: torch.dtype, compute: str, takes_room: bool) -> Projections:
    """Returns linear layers that read the same rows, with their adapters."""
    bases = [getattr(module, "base_layer", module) for module in modules]
    storage = _storage(bases, dtype)
    ends = [sum(storage.sizes[: place + 1]) for place in range(len(modules))]
    adapters = [
        _adapter(module, slice(end - size, end))
        for module, end, size in zip(modules, ends, storage.sizes, strict=True)
        if hasattr(module, "base_layer")
    ]
    eight_bit = None if compute == "exact" or storage.trained else eight_bit_of(storage, compute)
    return Projections(storage, adapters, eight_bit, takes_room)


def _storage(bases: Sequence[Any], dtype: torch.dtype) -> Storage:
    kinds = {type(base).__name__ for base in bases}
    weights = [base.weight for base in bases]
    trains = {bool(weight.requires_grad) for weight in weights}
    biases = [base.bias for base in bases]
    if kinds == {"Linear"} and trains == {True}:
        if any(bias is not None and not bias.requires_grad for bias in biases):
            raise UnknownLayerError("some biases are frozen and their weights are not")
        return TrainedStorage(weights, biases, dtype)
    if any(bias is not None and bias.requires_grad for bias in biases) or trains != {False}:
        raise UnknownLayerError("biases train, or some weights of a group and not all")
    bias = None if all(bias is None for bias in biases) else _stacked_bias(biases, weights, dtype)
    if kinds == {"Linear"} and all(weight.dtype == dtype for weight in weights):
        return FrozenStorage(weights, bias)
    if kinds == {"Linear4bit"}:
        return FourBitStorage([FourBit.of(weight) for weight in weights], dtype, bias)
    if kinds == {"Float8Linear"}:
        return Float8Storage(bases, dtype, bias)
    raise UnknownLayerError(f"linear layers of the kind {', '.join(sorted(kinds))} in {weights[0].dtype}")


def _stacked_bias(biases: Sequence[torch.Tensor | None], weights: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    made = [
        torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if bias is None else bias.detach().to(dtype)
        for bias, weight in zip(biases, weights, strict=True)
    ]
    return torch.cat(made)


def _adapter(module: Any, columns: slice) -> Adapter:
    """Returns a layer's LoRA; raises `UnknownLayerError` for a variant of it."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or len(module.lora_A) != 1:
        raise UnknownLayerError("not exactly one adapter")
    name = names[0]
    if getattr(module, "lora_variant", {}).get(name) is not None or module.lora_B[name].bias is not None:
        raise UnknownLayerError("DoRA, or LoRA with biases")
    dropout = module.lora_dropout[name]
    share = float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0
    return Adapter(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]), share, columns)
