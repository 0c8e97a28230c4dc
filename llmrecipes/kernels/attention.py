"""Attention by document: tokens look only at earlier tokens of their own document, and no mask is ever built.

A kernel is a function `(model) -> number of parts replaced`. This one goes through transformers' `AttentionInterface`:
no class is patched, and without documents (generation) it is transformers' own SDPA.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmrecipes.batch import (
    BY_DOCUMENT,
    DocumentGroups,
    DocumentLayout,
    DocumentSpans,
    Layout,
    attention_window,
    document_groups,
    document_spans,
)
from llmrecipes.precision import Precision

SHORT_ON_CPU = 128
"""Tokens up to which attention on a CPU runs in float32: its bfloat16 kernel works in blocks that short documents
leave mostly empty (48 documents of 33 tokens, 9 heads of 64: 22.7 ms in bfloat16, 5.7 in float32; 8 of 256: equal)."""

TAKES_ENABLE_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""From torch 2.12 on grouped queries must be announced; 2.11 knows no such argument and takes them as they are."""


def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: DocumentLayout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Returns causal attention within each document, [rows, tokens, heads, head size], and no weights.

    `query` is [rows, heads, tokens, head size]; `key` and `value` may have fewer heads (grouped queries). Without
    a layout this is transformers' SDPA.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, heads, tokens, size = query.shape
    flat = [states.transpose(1, 2).flatten(0, 1).to(value.dtype) for states in (query, key, value)]
    scale, dropout = options.get("scaling"), options.get("dropout", 0.0)
    if isinstance(layout, DocumentSpans):
        attended = _varlen(flat[0], flat[1], flat[2], layout, scale)
    else:
        attended = _grouped(flat, layout, scale, dropout)
    return attended.view(rows, tokens, heads, size), None


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: DocumentSpans, scale: float | None
) -> torch.Tensor:
    """Returns causal attention over [tokens, heads, head size], FlashAttention-2's; a window of (-1, 0) is causal."""
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if TAKES_ENABLE_GQA:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        attended: Any = varlen_attn(
            query, key, value, spans.offsets, spans.offsets, spans.longest, spans.longest, **options
        )
    return attended


def _grouped(flat: list[torch.Tensor], groups: DocumentGroups, scale: float | None, dropout: float) -> torch.Tensor:
    """Returns causal attention over [tokens, heads, head size], document by document of like length."""
    attended = []
    for index in groups.gather:
        grouped_query, grouped_key, grouped_value = (states[index].transpose(1, 2) for states in flat)
        attended.append(_causal(grouped_query, grouped_key, grouped_value, scale, dropout))
    laid_out = torch.cat([states.transpose(1, 2).flatten(0, 1) for states in attended])
    return laid_out[groups.scatter]


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, dropout: float
) -> torch.Tensor:
    """Returns causal attention over [documents, heads, tokens, head size], in the type of the values.

    Under autocast rotary embeddings may leave queries and keys in float32 where values are not.
    """
    short_on_cpu = query.device.type == "cpu" and query.shape[2] <= SHORT_ON_CPU and value.element_size() < 4
    states = [each.to(torch.float32 if short_on_cpu else value.dtype) for each in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        attended = F.scaled_dot_product_attention(
            states[0],
            states[1],
            states[2],
            dropout_p=dropout,
            is_causal=True,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return attended.to(value.dtype)


def document_layout(precision: Precision) -> Layout:
    """Returns how attention on the run's device wants to know where documents are: FlashAttention has 16 bits only."""
    takes_spans = precision.device.type == "cuda" and precision.compute in (torch.bfloat16, torch.float16)
    return document_spans if takes_spans else document_groups


def apply_document_attention(model: Any) -> int:
    """Makes the model attend by document; returns the number of its attention layers, 0 where it cannot."""
    if not getattr(model, "_supports_sdpa", False) or not getattr(model, "_supports_attention_backend", False):
        return 0
    if attention_window(model.config):
        return 0  # a window within the document is not known here
    AttentionInterface.register(BY_DOCUMENT, document_attention)
    AttentionMaskInterface.register(BY_DOCUMENT, sdpa_mask)
    model.set_attn_implementation(BY_DOCUMENT)
    return sum(hasattr(module, "is_causal") for module in model.modules())
