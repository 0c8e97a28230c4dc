"""Matmuls of a frozen weight on 8-bit matrix units, forward and for the gradient of the rows.

Forward, int8 turns rows and weight by a Hadamard matrix before it rounds them, so that no large number spoils the scale
of its row; gradients have no such numbers, and fp8 (float8_e4m3fn, Hopper and Ada) rounds every number by itself:
neither is turned. A row has a scale, and so has each output: forward a row of the weight, for the gradient a column.
"""

import torch

from llmrecipes.kernels.four_bit import expand_scaled, expand_transposed
from llmrecipes.kernels.quantize import FP8, SMALLEST_SCALE, Quantized, Quantizer, quantized_rows, rotated, rotation_of
from llmrecipes.kernels.scaled_matmul import scaled_matmul
from llmrecipes.kernels.storage import FourBitStorage, Storage

DTYPES = {"fp8": FP8, "int8": torch.int8}

Low = tuple[torch.Tensor, torch.Tensor]
"""LoRA's part, added before anything is written: [rows, ranks] and [outputs, ranks]."""


class EightBit:
    """Products with the weights of a `Storage` in 8 bits, which are made anew for each."""

    def __init__(self, storage: Storage, kind: str) -> None:
        self.storage = storage
        dtype = DTYPES[kind]
        self.rows = Quantizer(dtype, rotation_of(storage.width) if dtype == torch.int8 else 1)
        self.gradients = Quantizer(dtype)
        matrix = storage.matrix().float()
        self.scales = _scales(matrix, self.rows)
        """float32 [size]"""
        self.transposed_scales = _scales(matrix.t(), self.gradients)
        """float32 [width]"""

    def product(
        self, rows: torch.Tensor, quantized: Quantized | None, low: Low | None, plus: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns rows times the weight transposed, and what is added to it, [rows, size], in the compute type."""
        given = quantized or quantized_rows(rows, self.rows)
        return scaled_matmul(*given, self.operand(False), self.scales, self.storage.dtype, low, plus)

    def rows_gradient(self, gradient: torch.Tensor, quantized: Quantized | None, low: Low | None) -> torch.Tensor:
        """Returns the gradient of the outputs, [rows, size], times the weight, and LoRA's part: [rows, width]."""
        given = quantized or quantized_rows(gradient, self.gradients)
        return scaled_matmul(*given, self.operand(True), self.transposed_scales, self.storage.dtype, low)

    def operand(self, transposed: bool) -> torch.Tensor:
        """Returns the weight over its scales in 8 bits: turned [size, width], or transposed [width, size]."""
        storage, dtype = self.storage, self.rows.dtype
        scales = self.transposed_scales if transposed else self.scales
        if not isinstance(storage, FourBitStorage):
            matrix = storage.matrix().float()
            numbers = matrix.t() if transposed else rotated(matrix, self.rows.rotation)
            numbers = numbers / scales[:, None]
            return (numbers.round() if dtype == torch.int8 else numbers).to(dtype).contiguous()
        shape = (storage.width, storage.size) if transposed else (storage.size, storage.width)
        whole = torch.empty(shape, dtype=dtype, device=scales.device)
        start = 0
        for weight in storage.weights:
            mine = slice(start, start + weight.rows)
            if transposed:
                expand_transposed(weight, whole[:, mine], scales)
            else:
                expand_scaled(weight, whole[mine], scales[mine], self.rows.rotation)
            start = mine.stop
        return whole


def _scales(matrix: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """Returns the scale of each row of a matrix, float32; fp8, which needs none, has the same for all."""
    largest = rotated(matrix, quantizer.rotation).abs().amax(1) / quantizer.largest
    largest = largest.max().expand_as(largest).contiguous() if quantizer.dtype == FP8 else largest
    return largest.clamp(min=SMALLEST_SCALE)
