"""Attention within short documents equals PyTorch's own of each document, forward and backward, grouped heads too."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmrecipes.batch import document_spans
from llmrecipes.kernels import short_attention

Run = Callable[..., Any]

LENGTHS = ([70, 1, 64, 13], [5], [63, 65, 2])


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(2, 2, 16), (4, 2, 32), (3, 1, 64)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_document_by_itself(
    lengths: list[int], heads: int, key_heads: int, size: int, kernel: Run, device: torch.device
) -> None:
    numbers = np.concatenate(
        [np.full(length, number + 1) for number, length in enumerate(lengths)] + [np.zeros(12, int)]
    )
    documents = np.stack([numbers, np.roll(numbers, 12)]).astype(np.int64)
    spans = document_spans(documents) or pytest.skip("one document a row needs no spans")
    spans = spans.to(device)
    torch.manual_seed(0)
    states = torch.randn(documents.size, heads + 2 * key_heads, size, device=device)
    query, key, value = states.split([heads, key_heads, key_heads], dim=1)
    gradient = torch.randn(documents.size, heads, size, device=device)
    plain = [part.double().detach().requires_grad_() for part in (query, key, value)]
    offsets = spans.offsets.tolist()
    parts = [
        F.scaled_dot_product_attention(
            *(part[start:end].transpose(0, 1)[None] for part in plain), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        for start, end in itertools.pairwise(offsets)
        if end > start
    ]
    expected = torch.cat(parts)
    expected.backward(gradient.double())
    out, sums = kernel(short_attention.forward, query, key, value, spans, size**-0.5)
    assert (out - expected).abs().max() < 1e-5
    found = kernel(short_attention.backward, gradient, (query, key, value), out, sums, spans, size**-0.5)
    for mine, theirs in zip(found, plain, strict=True):
        assert theirs.grad is not None and (mine - theirs.grad).abs().max() < 1e-5
