"""The 8-bit matmul with all that is added to it equals the same in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrecipes.kernels.quantize import FP8
from llmrecipes.kernels.scaled_matmul import scaled_matmul

Run = Callable[..., Any]


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize(("m", "n", "k"), [(17, 48, 96), (130, 144, 64), (1, 16, 272)])
@pytest.mark.parametrize("added", ["nothing", "low", "plus", "low and plus"])
def test_it_is_the_product_and_what_is_added(
    m: int, n: int, k: int, added: str, dtype: torch.dtype, kernel: Run, device: torch.device
) -> None:
    torch.manual_seed(m)
    rows, weight = (torch.randint(-100, 100, shape).to(dtype).to(device) for shape in ((m, k), (n, k)))
    row_scales, scales = torch.rand(m, 1, device=device), torch.rand(n, device=device)
    ranks = 48 if m > 17 else 176  # more than are multiplied at a time
    low = (torch.randn(m, ranks, device=device), torch.randn(ranks, n, device=device).t()) if "low" in added else None
    plus = torch.randn(m, n, device=device) if "plus" in added else None
    expected = (rows.double() @ weight.double().t()) * row_scales * scales
    expected = expected + low[0].double() @ low[1].double().t() if low else expected
    expected = expected + plus if plus is not None else expected
    for found in (
        kernel(scaled_matmul, rows, row_scales, weight, scales, torch.float32, low, plus),
        *([scaled_matmul(rows, row_scales, weight, scales, torch.float64, low, plus)] if device.type == "cpu" else []),
    ):
        assert (found - expected).norm() < 1e-5 * expected.norm()
