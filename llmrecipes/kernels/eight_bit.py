"""Matmuls of a frozen weight on 8-bit matrix units, forward and for the gradient of the rows.

Forward, int8 turns rows and weight by a Hadamard matrix before it rounds them, so that no large number spoils the scale
of its row; gradients have no such numbers, and fp8 (float8_e4m3fn, Hopper and Ada) rounds every number by itself:
neither is turned. A row has a scale, and so has each output: forward a row of the weight, for the gradient a column.
Weights that lie in fp8 multiply in fp8 as they lie, and have the scales of their rows alone.
"""

import torch

from llmrecipes.kernels.quantize import FP8, SMALLEST_SCALE, Quantized, Quantizer, quantized_rows, rotated, rotation_of
from llmrecipes.kernels.scaled_matmul import scaled_matmul
from llmrecipes.kernels.storage import Float8Storage, Storage

DTYPES = {"fp8": FP8, "int8": torch.int8}

Low = tuple[torch.Tensor, torch.Tensor]
"""LoRA's part, added before anything is written: [rows, ranks] and [outputs, ranks]."""


class EightBit:
    """Products with the weights of a `Storage` in 8 bits, which are made anew for each."""

    def __init__(self, storage: Storage, kind: str) -> None:
        self.storage = storage
        dtype = DTYPES[kind]
        self.rows = Quantizer(dtype, rotation_of(storage.width) if dtype == torch.int8 else 1)
        self.gradients: Quantizer | None = Quantizer(dtype)
        """of gradients that whoever makes them may round; None where only `rows_gradient` can"""
        matrix = storage.matrix().float()
        self.scales = _scales(matrix, self.rows)
        """float32 [size]"""
        self.transposed_scales = _scales(matrix.t(), Quantizer(dtype))
        """float32 [width]"""

    def product(
        self, rows: torch.Tensor, quantized: Quantized | None, low: Low | None, plus: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns rows times the weight transposed, and what is added to it, [rows, size], in the compute type."""
        given = quantized or quantized_rows(rows, self.rows)
        return scaled_matmul(*given, self.operand(False), self.scales, self.storage.dtype, low, plus)

    def rows_gradient(self, gradient: torch.Tensor, quantized: Quantized | None, low: Low | None) -> torch.Tensor:
        """Returns the gradient of the outputs, [rows, size], times the weight, and LoRA's part: [rows, width]."""
        given = quantized or self.quantized_gradient(gradient)
        return scaled_matmul(*given, self.operand(True), self.transposed_scales, self.storage.dtype, low)

    def quantized_gradient(self, gradient: torch.Tensor) -> Quantized:
        """Returns the gradient of the outputs in 8 bits."""
        return quantized_rows(gradient, Quantizer(self.rows.dtype))

    def operand(self, transposed: bool) -> torch.Tensor:
        """Returns the weight over its scales in 8 bits: turned [size, width], or transposed [width, size]."""
        if transposed:
            return self.storage.transposed_in_8_bits(self.rows.dtype, self.transposed_scales)
        return self.storage.in_8_bits(self.rows.dtype, self.scales, self.rows.rotation)


class AsStored(EightBit):
    """Products in fp8 with weights that lie in fp8: no second copy, and none of their numbers rounded again.

    For the gradient the scales of the rows stand on the side that is summed over: they go into the gradient first.
    """

    def __init__(self, storage: Float8Storage) -> None:
        self.storage, self.values = storage, storage.weights.values
        self.rows, self.gradients = Quantizer(FP8), None
        self.scales = storage.weights.scales.flatten()
        self.transposed_scales = self.scales.new_ones(storage.width)

    def quantized_gradient(self, gradient: torch.Tensor) -> Quantized:
        """Returns the gradient of the outputs, times the weight's scales, in 8 bits."""
        return quantized_rows(gradient, self.rows, self.scales)

    def operand(self, transposed: bool) -> torch.Tensor:
        """Returns the values as they lie, [size, width], or turned on their side for one matmul, [width, size]."""
        return self.values.t().contiguous() if transposed else self.values


def eight_bit_of(storage: Storage, kind: str) -> EightBit:
    """Returns how a storage multiplies in fp8 or int8."""
    if kind == "fp8" and isinstance(storage, Float8Storage):
        return AsStored(storage)
    return EightBit(storage, kind)


def _scales(matrix: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """Returns the scale of each row of a matrix, float32; fp8, which needs none, has the same for all."""
    largest = rotated(matrix, quantizer.rotation).abs().amax(1) / quantizer.largest
    largest = largest.max().expand_as(largest).contiguous() if quantizer.dtype == FP8 else largest
    return largest.clamp(min=SMALLEST_SCALE)
