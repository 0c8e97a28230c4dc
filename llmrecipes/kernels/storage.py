"""How the weights of linear layers that read the same rows are kept, and what a matmul gets of them."""

from collections.abc import Sequence
from typing import Any

import torch

from llmrecipes.kernels import float8, four_bit
from llmrecipes.kernels.float8 import Float8
from llmrecipes.kernels.four_bit import FourBit
from llmrecipes.kernels.quantize import in_8_bits, rotated


class Storage:
    """Weights one below the other, [size, width], for matmuls in `dtype`."""

    def __init__(self, sizes: Sequence[int], width: int, dtype: torch.dtype, bias: torch.Tensor | None) -> None:
        self.sizes, self.size, self.width, self.dtype = list(sizes), sum(sizes), width, dtype
        self.bias = bias
        """[size], frozen; a bias that trains is among `trained` as well"""
        self.trained: list[torch.nn.Parameter] = []

    def matrix(self) -> torch.Tensor:
        """Returns [size, width] in `dtype`, for reading only."""
        raise NotImplementedError

    def in_8_bits(self, dtype: torch.dtype, scales: torch.Tensor, rotation: int) -> torch.Tensor:
        """Returns the weights turned and over `scales`, one a row: [size, width]."""
        return in_8_bits(rotated(self.matrix().float(), rotation) / scales[:, None], dtype)

    def transposed_in_8_bits(self, dtype: torch.dtype, scales: torch.Tensor) -> torch.Tensor:
        """Returns the weights transposed and over `scales`, one a column of theirs: [width, size]."""
        return in_8_bits(self.matrix().float().t() / scales[:, None], dtype).contiguous()

    def gradients(self, gradient: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        """Returns the gradients of `trained`, from those of the outputs, [rows, size], and the rows, [rows, width]."""
        return []

    def parts(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Returns the part of each layer of something with `size` rows."""
        return list(whole.split(self.sizes))


class FrozenStorage(Storage):
    """Frozen weights in the compute type: moved into one matrix, of which the layers' own weights become views."""

    def __init__(self, weights: Sequence[torch.nn.Parameter], bias: torch.Tensor | None) -> None:
        super().__init__([len(weight) for weight in weights], weights[0].shape[1], weights[0].dtype, bias)
        self.weights = list(weights)
        self._matrix = weights[0].data
        if len(weights) > 1:
            self.make_room(0)

    def matrix(self) -> torch.Tensor:
        """The matrix itself."""
        return self._matrix

    def make_room(self, room: int) -> torch.Tensor:
        """Returns [size + room, width + room], zero but for the weights, which move to its upper left corner."""
        whole = self._matrix.new_zeros(self.size + room, self.width + room)
        self._matrix = whole[: self.size, : self.width]
        for weight, part in zip(self.weights, self.parts(self._matrix), strict=True):
            part.copy_(weight.data)
            weight.data = part
        return whole


class FourBitStorage(Storage):
    """bitsandbytes' 4-bit weights, expanded for each matmul and forgotten."""

    def __init__(self, weights: Sequence[FourBit], dtype: torch.dtype, bias: torch.Tensor | None) -> None:
        super().__init__([weight.rows for weight in weights], weights[0].width, dtype, bias)
        self.weights = list(weights)

    def matrix(self) -> torch.Tensor:
        """The weights as bitsandbytes would expand them, bit for bit."""
        whole = torch.empty(self.size, self.width, dtype=self.dtype, device=self.weights[0].packed.device)
        for weight, part in zip(self.weights, self.parts(whole), strict=True):
            four_bit.expand(weight, part)
        return whole

    def in_8_bits(self, dtype: torch.dtype, scales: torch.Tensor, rotation: int) -> torch.Tensor:
        """The same, expanded to no more than that."""
        whole = torch.empty(self.size, self.width, dtype=dtype, device=scales.device)
        parts = zip(self.weights, self.parts(whole), self.parts(scales), strict=True)
        for weight, part, its_scales in parts:
            four_bit.expand_scaled(weight, part, its_scales, rotation)
        return whole

    def transposed_in_8_bits(self, dtype: torch.dtype, scales: torch.Tensor) -> torch.Tensor:
        """The same, expanded to no more than that."""
        whole = torch.empty(self.width, self.size, dtype=dtype, device=scales.device)
        for weight, part in zip(self.weights, whole.split(self.sizes, dim=1), strict=True):
            four_bit.expand_transposed(weight, part, scales)
        return whole


class Float8Storage(Storage):
    """float8_e4m3fn with a scale a row, moved into one matrix, of which the layers' own become views."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype, bias: torch.Tensor | None) -> None:
        super().__init__([len(layer.weight) for layer in layers], layers[0].weight.shape[1], dtype, bias)
        self.weights = Float8(
            torch.cat([layer.weight.data for layer in layers]), torch.cat([layer.scales for layer in layers])
        )
        for layer, codes, scales in zip(
            layers, self.parts(self.weights.codes), self.parts(self.weights.scales), strict=True
        ):
            layer.weight.data, layer.scales = codes, scales

    def matrix(self) -> torch.Tensor:
        """The weights as the layers themselves would expand them, bit for bit."""
        return float8.expand(self.weights, self._room(self.size, self.width, self.dtype))

    def in_8_bits(self, dtype: torch.dtype, scales: torch.Tensor, rotation: int) -> torch.Tensor:
        """The same, expanded to no more than that."""
        return float8.expand_scaled(self.weights, self._room(self.size, self.width, dtype), scales, rotation)

    def transposed_in_8_bits(self, dtype: torch.dtype, scales: torch.Tensor) -> torch.Tensor:
        """The same, expanded to no more than that."""
        return float8.expand_transposed(self.weights, self._room(self.width, self.size, dtype), scales)

    def _room(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=self.weights.codes.device)


def weight_gradient(gradient: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the gradient of a weight, [size, width] in `dtype`, from those of its outputs and its rows."""
    if gradient.is_cuda and dtype == torch.float32 != gradient.dtype:
        return torch.mm(gradient.t(), rows, out_dtype=dtype)  # not rounded in between
    return (gradient.t() @ rows).to(dtype)


class TrainedStorage(Storage):
    """Weights that train, perhaps kept in a wider type than they multiply in."""

    def __init__(
        self, weights: Sequence[torch.nn.Parameter], biases: Sequence[torch.nn.Parameter | None], dtype: torch.dtype
    ) -> None:
        super().__init__([len(weight) for weight in weights], weights[0].shape[1], dtype, None)
        self.weights, self.biases = list(weights), [bias for bias in biases if bias is not None]
        self.trained = [*self.weights, *self.biases]
        if self.biases:
            self.bias = torch.empty(0)  # made anew for each matmul

    def matrix(self) -> torch.Tensor:
        """A copy in the compute type, or the weight itself where it is one in that type."""
        if self.biases:
            self.bias = torch.cat([bias.detach() for bias in self.biases]).to(self.dtype)
        parts = [weight.detach().to(self.dtype) for weight in self.weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gradients(self, gradient: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        """One matmul a layer: each gradient is the whole of its own memory, and may become `.grad` as it is."""
        found = [
            weight_gradient(part, rows, weight.dtype)
            for part, weight in zip(gradient.split(self.sizes, dim=1), self.weights, strict=True)
        ]
        biases = [part.sum(0) for part in gradient.float().split(self.sizes, dim=1)] if self.biases else []
        return found + [part.to(bias.dtype) for part, bias in zip(biases, self.biases, strict=True)]
