"""The loss of a batch: cross entropy summed over its supervised tokens.

A window's loss is the sum over all its batches divided by the window's supervised tokens, so that neither the batch
size nor accumulation nor padding changes the gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F

from llmrecipes.batch import BY_DOCUMENT, Batch, attention_window
from llmrecipes.precision import Precision
from llmrecipes.prompts import IGNORED_LABEL


def loss_sum(model: Any, batch: Batch, precision: Precision) -> torch.Tensor:
    """Returns the sum, in float32 at least, of -log p(label) over the batch's supervised tokens, a scalar.

    Logits are computed only at positions that predict a supervised token in some row.
    """
    columns, targets = prediction_targets(batch.labels)
    with precision.autocast():
        logits = model(**model_inputs(model, batch, precision), logits_to_keep=columns).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def prediction_targets(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (positions, targets): where a row predicts a supervised token, [kept], and what, [rows, kept].

    The token at position i is predicted from position i - 1; labels are [rows, tokens].
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    columns = torch.nonzero((targets != IGNORED_LABEL).any(dim=0)).flatten()
    return columns, targets[:, columns]


def model_inputs(model: Any, batch: Batch, precision: Precision) -> dict[str, Any]:
    """Returns the arguments of a forward, with what keeps a packed batch's documents apart.

    Positions restart with each document. Where the model attends by document it is given their layout. A model with
    windows of its own (Mistral, Gemma) makes its masks itself, by the positions: a mask of ours would undo the windows.
    Any other gets a mask [rows, 1, tokens, tokens], 0 where a token may look and the type's smallest number elsewhere
    (a boolean mask would be added as 0 and 1 by the eager path). A batch that is not packed needs nothing: causal
    attention never looks at the padding behind.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.layout is None:
        return inputs
    documents = batch.documents
    index = torch.arange(documents.shape[1], device=documents.device)
    inputs["position_ids"] = batch.positions
    if model.config._attn_implementation == BY_DOCUMENT:
        # Four dimensions are transformers' sign that the mask is final: it builds none, and none is looked at.
        return {**inputs, "attention_mask": documents[:, None, None], "layout": batch.layout}
    if attention_window(model.config):
        return inputs
    allowed = (documents[:, :, None] == documents[:, None, :]) & (index[:, None] >= index[None, :])
    mask = torch.zeros(allowed.shape, dtype=precision.compute, device=documents.device)
    mask.masked_fill_(~allowed, torch.finfo(precision.compute).min)
    return {**inputs, "attention_mask": mask[:, None]}
