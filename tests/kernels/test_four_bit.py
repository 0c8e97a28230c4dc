"""bitsandbytes' 4-bit weights come out as bitsandbytes itself expands them, and in 8 bits as near as 8 bits are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrecipes.kernels.four_bit import FourBit, expand, expand_scaled, expand_transposed, expanded
from llmrecipes.kernels.quantize import FP8, rotated, rotation_of
from tests.kernels.conftest import poisoned

Run = Callable[..., Any]

SHAPES = ((96, 128), (33, 576), (7, 64), (32, 96))
KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


def packed(rows: int, width: int, kind: tuple[str, bool], device: torch.device) -> Any:
    import bitsandbytes

    torch.manual_seed(0)
    weight = torch.randn(rows, width, dtype=torch.bfloat16)
    made = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type=kind[0], compress_statistics=kind[1], quant_storage=torch.bfloat16
    )
    return made._quantize(device)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_16_bits_are_bitsandbytes_own(
    shape: tuple[int, int], kind: tuple[str, bool], kernel: Run, device: torch.device
) -> None:
    import bitsandbytes

    rows, width = shape
    weight = packed(rows, width, kind, device)
    four_bit = FourBit.of(weight)
    expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(expanded(four_bit).to(expected.dtype), expected)
    # The interpreter cuts bfloat16 off where a GPU rounds; float32 it has exactly.
    dtype = expected.dtype if device.type == "cuda" else torch.float32
    out = poisoned(rows, width + 16, dtype=dtype, device=device)
    kernel(expand, four_bit, out[:, :width])
    assert torch.equal(out[:, :width], expanded(four_bit).to(dtype)) and out[:, width:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (64, 576), (160, 96), (130, 320), (64, 40)])
def test_8_bits_are_the_weight_turned_and_scaled(
    shape: tuple[int, int], transposed: bool, dtype: torch.dtype, kernel: Run, device: torch.device
) -> None:
    rows, width = shape
    four_bit = FourBit.of(packed(rows, width, ("nf4", True), device))
    numbers = expanded(four_bit).t() if transposed else expanded(four_bit)
    rotation = rotation_of(width) if dtype == torch.int8 and not transposed else 1
    turned = rotated(numbers, rotation)
    scales = turned.abs().amax(1) / (127 if dtype == torch.int8 else 448)
    out = poisoned(len(numbers), numbers.shape[1] + 16, dtype=dtype, device=device)
    plain = torch.empty(numbers.shape, dtype=dtype, device=device)
    for run, given in ((kernel, out[:, : numbers.shape[1]]), (lambda function, *rest: function(*rest), plain)):
        if transposed:
            run(expand_transposed, four_bit, given, scales)
        else:
            run(expand_scaled, four_bit, given, scales, rotation)
    for found in (out[:, : numbers.shape[1]], plain):
        error = (found.float() * scales[:, None] - turned).abs()
        near = error <= (scales[:, None] * 0.6 if dtype == torch.int8 else turned.abs() / 15 + scales[:, None] / 100)
        # Triton's interpreter rounds float8 wrongly where the exponent changes; a GPU does not.
        assert float(near.float().mean()) >= (0.75 if dtype == FP8 and device.type == "cpu" else 1.0)


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_a_weight_is_written_beside_others(dtype: torch.dtype, kernel: Run, device: torch.device) -> None:
    """As gate and up are: one below the other, or, transposed, side by side; from any row on, even or odd."""
    for above in (4, 6, 7):
        four_bit = FourBit.of(packed(40, 96, ("nf4", True), device))
        numbers = expanded(four_bit)
        below, beside = (poisoned(*shape, dtype=dtype, device=device) for shape in ((60, 96), (96, 60)))
        before = below.clone(), beside.clone()
        rotation = 32 if dtype == torch.int8 else 1
        largest = 127 if dtype == torch.int8 else 448
        turned = rotated(numbers, rotation)
        scales, column_scales = turned.abs().amax(1) / largest, numbers.abs().amax(0) / largest
        kernel(expand_scaled, four_bit, below[above : above + 40], scales, rotation)
        kernel(expand_transposed, four_bit, beside[:, above : above + 40], column_scales)
        rest = [row for row in range(60) if not above <= row < above + 40]
        assert torch.equal(below[rest].view(torch.uint8), before[0][rest].view(torch.uint8))
        assert torch.equal(beside[:, rest].view(torch.uint8), before[1][:, rest].view(torch.uint8))
        if dtype == torch.int8:  # see above of float8
            assert (below[above : above + 40] * scales[:, None] - turned).abs().max() <= scales.max() * 0.6
            made = beside[:, above : above + 40] * column_scales[:, None]
            assert (made - numbers.t()).abs().max() <= column_scales.max() * 0.6
