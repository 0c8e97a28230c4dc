"""Weights in float8_e4m3fn come out as their own layers expand them, in int8 as near as that is, and as they lie."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrecipes.kernels.eight_bit import AsStored, eight_bit_of
from llmrecipes.kernels.float8 import Float8, expand, expand_scaled, expand_transposed, expanded
from llmrecipes.kernels.quantize import Quantizer, quantized_rows, rotated, rotation_of
from llmrecipes.kernels.storage import Float8Storage
from llmrecipes.models.float8 import Float8Linear
from tests.kernels.conftest import poisoned

Run = Callable[..., Any]

SHAPES = [(96, 128), (33, 576), (7, 30)]


def layer(rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Float8Linear:
    """Rows of very different sizes, one of them 0, so that every number of the type and every scale stands there."""
    torch.manual_seed(0)
    made = Float8Linear(torch.nn.Linear(width, rows, bias=False, dtype=dtype))
    weight = torch.randn(rows, width, device=device) ** 3 * torch.logspace(-3, 1, rows, device=device)[:, None]
    weight[rows // 2] = 0
    made.weight = made.stored(weight)
    return made


def weight_of(rows: int, width: int, device: torch.device) -> Float8:
    made = layer(rows, width, device)
    return Float8(made.weight.data, made.scales)


def test_every_number_of_the_type_is_right(kernel: Run, device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes = codes[(codes & 127) != 127].view(2, 127)
    weight = Float8(codes, torch.tensor([[1.0], [3e-5]], device=device))
    out = poisoned(2, 127, dtype=torch.float32, device=device)
    assert torch.equal(kernel(expand, weight, out), codes.view(torch.float8_e4m3fn).float() * weight.scales)


@pytest.mark.parametrize("shape", SHAPES)
def test_expanded_it_is_what_its_layer_multiplies_with(
    shape: tuple[int, int], kernel: Run, device: torch.device
) -> None:
    rows, width = shape
    # The interpreter cuts bfloat16 off where a GPU rounds; float32 it has exactly.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = layer(rows, width, device, dtype)
    weight = Float8(made.weight.data, made.scales)
    out = poisoned(rows, width + 16, dtype=dtype, device=device)
    kernel(expand, weight, out[:, :width])
    assert torch.equal(out[:, :width], made.expanded()) and out[:, width:].isnan().all()
    assert torch.equal(expanded(weight).to(dtype), made.expanded())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (64, 576), (160, 96), (130, 320)])
def test_int8_is_the_weight_turned_and_scaled(
    shape: tuple[int, int], transposed: bool, kernel: Run, device: torch.device
) -> None:
    rows, width = shape
    weight = weight_of(rows, width, device)
    rotation = 1 if transposed else rotation_of(width)
    turned = expanded(weight).t() if transposed else rotated(expanded(weight), rotation)
    scales = (turned.abs().amax(1) / 127).clamp(min=1e-12)
    out = poisoned(len(turned), turned.shape[1] + 16, dtype=torch.int8, device=device)
    plain = torch.empty(turned.shape, dtype=torch.int8, device=device)
    for run, given in ((kernel, out[:, : turned.shape[1]]), (lambda function, *rest: function(*rest), plain)):
        if transposed:
            run(expand_transposed, weight, given, scales)
        else:
            run(expand_scaled, weight, given, scales, rotation)
        assert torch.all((given.float() * scales[:, None] - turned).abs() <= 0.51 * scales[:, None])
    assert (out[:, turned.shape[1] :] == -99).all()


def test_layers_and_storage_are_one(device: torch.device) -> None:
    layers = [layer(rows, 64, device) for rows in (48, 16, 32)]
    before = torch.cat([each.expanded() for each in layers])
    storage = Float8Storage(layers, torch.float32, None)
    assert torch.equal(storage.matrix(), before)
    assert torch.equal(torch.cat([each.expanded() for each in layers]), before)
    assert [each.weight.data_ptr() - storage.weights.codes.data_ptr() for each in layers] == [0, 48 * 64, 64 * 64]
    storage.weights.codes.zero_()
    assert not any(each.expanded().any() for each in layers)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_products_and_the_gradient_of_the_rows_are_near(kind: str, device: torch.device) -> None:
    torch.manual_seed(1)
    storage = Float8Storage([layer(96, 128, device), layer(64, 128, device)], torch.float32, None)
    eight_bit, matrix = eight_bit_of(storage, kind), storage.matrix()
    rows, gradient = torch.randn(40, 128, device=device), torch.randn(40, 160, device=device)
    low = (torch.randn(40, 16, device=device), torch.randn(160, 16, device=device) / 16)
    pairs = [
        (eight_bit.product(rows, None, low, None), rows @ matrix.t() + low[0] @ low[1].t()),
        (eight_bit.rows_gradient(gradient, None, None), gradient @ matrix),
    ]
    for found, exact in pairs:
        assert (found - exact).norm() < {"int8": 0.015, "fp8": 0.05}[kind] * exact.norm()


def test_fp8_takes_the_values_as_they_lie(device: torch.device) -> None:
    storage = Float8Storage([layer(96, 128, device)], torch.float32, None)
    found = eight_bit_of(storage, "fp8")
    assert isinstance(found, AsStored) and found.gradients is None
    assert found.operand(False).data_ptr() == storage.weights.codes.data_ptr()
    assert torch.equal(found.operand(True).float() * storage.weights.scales.t(), storage.matrix().t())
    assert found.operand(True).is_contiguous()
    assert not isinstance(eight_bit_of(storage, "int8"), AsStored)


@pytest.mark.parametrize("rotation", [1, 16])
def test_factors_are_multiplied_in_before_rows_are_rounded(
    rotation: int, kernel: Run, plain: Run, device: torch.device
) -> None:
    rows, factors = torch.randn(5, 96, device=device), torch.rand(96, device=device)
    quantizer = Quantizer(torch.int8, rotation)
    expected = plain(quantized_rows, rows * factors, quantizer)
    for found in (kernel(quantized_rows, rows, quantizer, factors), plain(quantized_rows, rows, quantizer, factors)):
        assert torch.allclose(found.scales.cpu(), expected.scales, rtol=1e-5)
        assert (found.values.cpu().int() - expected.values.int()).abs().max() <= 1
