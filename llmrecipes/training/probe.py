"""The leak probe: before training, proof on the very model of this run that packing changes nothing.

Packed documents do not see each other, and each comes out as it does alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from llmrecipes.batch import Batch
from llmrecipes.errors import TrainingError
from llmrecipes.precision import Precision
from llmrecipes.training.loss import model_inputs

TOLERANCE = 1e-3
"""Largest change of another document's logits, over their spread, that counts as none. Exact arithmetic gives 0; a
kernel may round otherwise from run to run, in bfloat16 by some 1e-3 of a logit. A leak moves them by 1e-1 and more."""

ALONE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Difference, root mean square over the spread, between a document's logits in a row and alone: other kernels round
otherwise. Positions that run on, or a window that is lost, make 1e-1 and more."""


@torch.no_grad()
def check_no_leak(
    model: Any, batch: Batch, precision: Precision, exactly: Callable[[], AbstractContextManager[None]] = nullcontext
) -> float:
    """Returns how much the other documents' logits move when the first document's tokens change; 0 is no leak.

    `batch` is one row of two documents at least. Raises `TrainingError` where they move, or are not those of the
    documents alone. 8-bit matmuls round by what other kernels make of the same numbers: the second is tried `exactly`.
    """
    if batch.layout is None:
        return 0.0
    batch = batch.to(precision.device)
    first = batch.documents == 1
    changed = torch.where(first, (batch.input_ids + 1) % model.config.get_text_config().vocab_size, batch.input_ids)
    others = batch.documents > 1
    was_training = model.training
    model.eval()
    with precision.autocast():
        before, after = (
            model(**model_inputs(model, replace(batch, input_ids=ids), precision)).logits[others].float()
            for ids in (batch.input_ids, changed)
        )
    with precision.autocast(), exactly():
        packed = model(**model_inputs(model, batch, precision)).logits[others].float()
        alone = [model(input_ids=batch.input_ids[batch.documents == number][None], use_cache=False).logits[0].float()
                 for number in range(2, int(batch.documents.max()) + 1)]  # fmt: skip
    model.train(was_training)
    moved = float((before - after).abs().max() / before.std())
    if not moved <= TOLERANCE:
        raise TrainingError(
            f"leak probe: changing one packed document moved the logits of the others by {moved:.2g} of their spread; "
            "this model's attention does not keep documents apart; use --batching_strategy padding"
        )
    apart = float((packed - torch.cat(alone)).square().mean().sqrt() / packed.std())
    if not apart <= ALONE_TOLERANCE[precision.compute]:
        raise TrainingError(
            f"leak probe: in a packed row the logits of documents are {apart:.2g} of their spread away from those of "
            "the documents alone; this model loses positions or windows there; use --batching_strategy padding"
        )
    return moved
