"""Turning by positions is transformers' own, and turning back undoes it, with nothing left unwritten."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llmrecipes.kernels import rotary
from llmrecipes.kernels.quantize import FP8, Quantizer
from tests.kernels.conftest import poisoned
from tests.kernels.test_rowwise import Run, check_quantized, drawn


@pytest.mark.parametrize("quantizer", [None, Quantizer(torch.int8), Quantizer(FP8)], ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(3, 3, 64), (5, 1, 96), (4, 2, 128)])
def test_turning_by_positions_and_back(
    heads: int, key_heads: int, size: int, quantizer: Quantizer | None, kernel: Run, device: torch.device
) -> None:
    turning, width = heads + key_heads, (heads + 2 * key_heads) * size
    states = drawn(7, turning + key_heads, size, dtype=torch.float32, device=device)
    angles = drawn(7, size // 2, dtype=torch.float32, device=device, seed=1).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()
    turned = states[None, :, :turning].transpose(1, 2)
    expected = apply_rotary_pos_emb(turned, turned, cosine[None], sine[None])[0].transpose(1, 2)[0]
    for run in (kernel, lambda function, *given: function(*given)):
        out = states.clone()
        run(rotary.rotate, out[:, :turning], cosine, sine)
        assert torch.allclose(out[:, :turning], expected, atol=1e-6)
        assert torch.equal(out[:, turning:], states[:, turning:])
        back = poisoned(7, width + 16, dtype=torch.float32, device=device)
        query, key, value = out.split([heads, key_heads, key_heads], dim=1)
        given = (query.contiguous(), key, value)  # of any layout
        made = run(rotary.rotate_back, given, cosine, sine, back[:, :width], quantizer)
        assert torch.allclose(back[:, :width], states.flatten(1), atol=1e-5) and back[:, width:].isnan().all()
        check_quantized(made, back[:, :width], quantizer)
