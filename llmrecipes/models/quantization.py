"""How the frozen base is stored: the seam `(config, precision) -> transformers quantization config`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from llmrecipes.config.schema import ModelOptions
from llmrecipes.errors import HardwareError
from llmrecipes.models.float8 import Float8Config, has_finite_values
from llmrecipes.precision import Precision

Scheme = Callable[[ModelOptions, Precision], Any]


def int8(config: ModelOptions, precision: Precision) -> Any:
    """LLM.int8(): 8-bit weights, outlier features in the compute type (Dettmers et al. 2022, arXiv 2208.07339)."""
    # bitsandbytes tells on every call of every layer that inputs are cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(load_in_8bit=True)


def int4(config: ModelOptions, precision: Precision) -> Any:
    """NF4 or FP4 in blocks of 64 with one scale each (Dettmers et al. 2023, arXiv 2305.14314)."""
    options = config.quantization_config
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quant_type,
        bnb_4bit_compute_dtype=getattr(torch, options.compute_dtype) if options.compute_dtype else precision.compute,
        bnb_4bit_use_double_quant=options.use_double_quant,
        bnb_4bit_quant_storage=getattr(torch, options.quant_storage),
    )


def float8(config: ModelOptions, precision: Precision) -> Any:
    """float8_e4m3fn, row by row (Micikevicius et al. 2022, arXiv 2209.05433); multiplied in the compute type."""
    return Float8Config()


QUANTIZATIONS: dict[str, Scheme] = {"8bit": int8, "4bit": int4, "fp8": float8}


def is_quantized(parameter: torch.Tensor) -> bool:
    """Returns whether a parameter is stored by bitsandbytes in 4 or 8 bits, or as bytes of 8-bit floating point."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params") or parameter.dtype == torch.uint8


def stored_shape(parameter: torch.Tensor) -> torch.Size:
    """Returns the shape of the weight that a parameter stands for: in 4 bits its own is another."""
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else torch.Size(state.shape)


def misshapen(model: Any) -> list[str]:
    """Returns the quantized weights that are not of the shape of their layer: transformers compares the others only."""
    linears = [(name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    return [
        f"{name}.weight"
        for name, linear in linears
        if is_quantized(linear.weight) and stored_shape(linear.weight) != (linear.out_features, linear.in_features)
    ]


def has_finite_weights(parameter: Any) -> bool:
    """Returns whether a parameter holds neither NaN nor infinity; a quantized one is known by its scales."""
    state = getattr(parameter, "quant_state", None)
    if parameter.dtype == torch.uint8 and state is None:
        return has_finite_values(parameter)
    values = parameter
    if is_quantized(parameter):
        values = parameter.SCB if state is None else state.offset if state.nested else state.absmax
    return bool(torch.isfinite(values).all())


def settle_quantized(model: Any) -> None:
    """Makes 4-bit layers on a CPU right, or raises `HardwareError` where bitsandbytes 0.50 cannot have them right.

    Where the CPU has AVX512-BF16, `Linear4bit.forward` without gradient rounds the scales to bfloat16 for good, and
    afterwards passes no gradient on: the first validation would end the training. That is switched off. And unpacking
    on some CPUs counts the blocks of 64 row by row, packing does not: see `unpacks_any_width`.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state = module.weight.quant_state
            on_cpu = module.weight.device.type == "cpu"
            if on_cpu and state.shape[-1] % state.blocksize and not unpacks_any_width():
                raise HardwareError(
                    f"--quantization 4bit: on this CPU a layer's width must be a multiple of {state.blocksize}, and "
                    f"{name} is {state.shape[-1]} wide; use --quantization 8bit, or a GPU"
                )


@cache
def unpacks_any_width() -> bool:
    """Returns whether bitsandbytes unpacks on this CPU what it has packed where rows end within a block.

    With AVX512 it does not: nf4 of normal weights, 288 wide, comes out 25 % off and not 9. With AVX2 it does.
    """
    from bitsandbytes import functional

    weight = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    made = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    return bool((made - weight).norm() < 0.15 * weight.norm())


@contextmanager
def rows_unrounded(model: Any) -> Iterator[None]:
    """Lets bitsandbytes' 8-bit layers multiply by what their weights stand for, rows unrounded, in this context.

    LLM.int8() rounds a token by the columns in which any token of its batch is large, and a last bit that another
    attention kernel makes otherwise becomes a whole step of 1/127 of the row. Neither is attention: a leak probe of
    packed rows must not take it for a leak.
    """
    linears: list[Any] = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    layers = [linear for linear in linears if type(linear.weight).__name__ == "Int8Params"]
    for layer in layers:
        layer.forward = partial(_unrounded, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _unrounded(layer: Any, x: torch.Tensor) -> torch.Tensor:
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    weight = (layer.weight.data * (scales / 127)[:, None]).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))
