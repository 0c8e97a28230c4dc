"""Linear layers whose frozen weight lies in 8-bit floating point, and how transformers makes them while it loads."""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest number of float8_e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433, table 1)."""
SMALLEST_SCALE = 1e-12
"""Scale of a row of zeros: nothing is ever divided by 0."""
NOT_A_NUMBER = 127
"""The bits of float8_e4m3fn's NaN, but for the sign; it has no infinity."""


class Float8Linear(nn.Linear):
    """A linear layer with its weight in float8_e4m3fn, and a float32 scale for each row, which is each output.

    `weight` is declared as bytes, [size, width]: no library is to take it for numbers to cast, or for the type that a
    new adapter is rounded to, as peft does. `scales` is [size, 1].
    """

    scales: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Makes a layer like another one, which multiplies in its type, on no device and without numbers."""
        bias, dtype = linear.bias is not None, linear.weight.dtype
        super().__init__(linear.in_features, linear.out_features, bias, device="meta", dtype=dtype)
        self.dtype = dtype
        self.requires_grad_(False)

    def stored(self, weight: torch.Tensor) -> nn.Parameter:
        """Returns what `self.weight` is to be for such numbers, [size, width]; keeps their scales."""
        numbers = weight.float()
        scales = (numbers.abs().amax(1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
        self.register_buffer("scales", scales)
        return nn.Parameter((numbers / scales).to(FLOAT8).view(torch.uint8), requires_grad=False)

    def expanded(self) -> torch.Tensor:
        """Returns the numbers, rounded once to the type that is multiplied: [size, width]."""
        return (self.weight.view(FLOAT8).float() * self.scales).to(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the input times the weight transposed, and the bias, in the type that is multiplied."""
        y: torch.Tensor = _Product.apply(input.to(self.dtype), self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """A matmul that keeps nothing: the weight is expanded again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Float8Linear) -> torch.Tensor:
        ctx.layer = layer
        return x @ layer.expanded().t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.layer.expanded(), None


@register_quantization_config("float8_rows")
class Float8Config(QuantizationConfigMixin):
    """Asks transformers for `Float8Linear` in place of every linear layer that bitsandbytes would take, too."""

    def __init__(self) -> None:
        self.quant_method: Any = "float8_rows"


@register_quantizer("float8_rows")
class Float8Quantizer(HfQuantizer):
    """Stores each weight as soon as it is read: the device never holds the whole model in 16 bits."""

    quantized_element_size = 1.0

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and should_convert_module(name, kept):
                model.set_submodule(name, Float8Linear(module))

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Whether this is the name of a weight to store."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Float8Linear) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """Returns what stores it."""
        return _Store()

    def is_serializable(self) -> bool:
        """The base is never written so: adapters are, and what is merged is merged into the numbers as they were."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters upon it train."""
        return True


class _Store(ConversionOps):
    """transformers' step from a weight as it was read to a weight as it is kept."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        found = {}
        for name, read in input_dict.items():
            module, _ = get_module_from_name(kwargs["model"], name)
            found[name] = module.stored(read[0] if isinstance(read, list) else read)
        return found


def has_finite_values(weight: torch.Tensor) -> bool:
    """Returns whether a stored weight was finite: an infinite number spoils its scale, and becomes NaN itself."""
    return not bool((weight & NOT_A_NUMBER == NOT_A_NUMBER).any())
