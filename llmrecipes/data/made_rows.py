"""What a preprocessor made: rows of lists, arrays or tensors, taken as they are meant, or the promise they break."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmrecipes.batch import IdArray, Sample
from llmrecipes.data.rows import shortened
from llmrecipes.errors import PluginError

NAMED_ROWS = 5
"""Rows named in a message; the others are counted."""

ID_RANGE = np.iinfo(np.int32)

KEYS = "each row is a mapping with input_ids and labels"
NUMBERS = "input_ids, labels and attention_mask are flat lists of whole numbers"
LENGTHS = "labels and attention_mask are as long as input_ids, and none is empty"
MASK = "attention_mask is 1, and 0 for padding at the ends only"
VOCABULARY = "every id lies within the vocabulary"


class RowError(ValueError):
    """A row that is no sample; `promise` is the one that it breaks."""

    def __init__(self, promise: str, detail: str) -> None:
        super().__init__(shortened(detail))
        self.promise = promise


def named(rows: Sequence[int]) -> str:
    """Returns `row 3`, or `rows 1, 2, 3, 4, 5 and 7 more`."""
    first = ", ".join(str(row) for row in rows[:NAMED_ROWS])
    more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {first}{more}"


def samples_of(made: Any, place: str) -> Iterator[Sample | RowError]:
    """Yields each row that a preprocessor made as a sample, or what is wrong with it; raises `PluginError`."""
    for number, row in enumerate(iterated(made, place)):
        try:
            yield sample_of(row, number)
        except RowError as error:
            yield error


def iterated(made: Any, place: str) -> Iterable[Any]:
    """Returns what a preprocessor made as something to go through; a map-style torch data set has only an index."""
    if not isinstance(made, Mapping | str | bytes):
        if isinstance(made, Iterable):
            return made
        if hasattr(made, "__getitem__") and hasattr(made, "__len__"):
            return _indexed(made)
    keys = f" with {', '.join(map(str, list(made)[:NAMED_ROWS]))}" if isinstance(made, Mapping) else ""
    raise PluginError(
        f"{place}: expected a sequence of rows, each with input_ids and labels, but it returned {_kind(made)}{keys}"
    )


def _indexed(made: Any) -> Iterator[Any]:
    for index in range(len(made)):
        yield made[index]


def sample_of(row: Any, number: int) -> Sample:
    """Returns one row as a sample, without the padding at its ends; raises `RowError`."""
    if not (hasattr(row, "keys") and hasattr(row, "get")):  # a dict, a BatchEncoding, a pandas row
        raise RowError(KEYS, f"expected a mapping with input_ids and labels, got {_kind(row)}")
    missing = [key for key in ("input_ids", "labels") if key not in row]
    if missing:
        raise RowError(KEYS, f"no {' and no '.join(missing)}, only {', '.join(map(str, row.keys())) or 'nothing'}")
    input_ids, labels = _ids(row["input_ids"], "input_ids"), _ids(row["labels"], "labels")
    mask = row.get("attention_mask")
    attended = None if mask is None else _ids(mask, "attention_mask")
    for name, values in (("labels", labels), ("attention_mask", attended)):
        if values is not None and len(values) != len(input_ids):
            raise RowError(LENGTHS, f"{len(values)} {name} for {len(input_ids)} input_ids")
    if attended is None or (attended == 1).all():
        return Sample(input_ids, labels, number)
    kept = np.flatnonzero(attended)
    start, end = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, 0)
    if (attended[start:end] != 1).any():
        raise RowError(MASK, "attention_mask must be 1, and 0 for padding at the ends only")
    return Sample(input_ids[start:end], labels[start:end], number)


def _ids(values: Any, name: str) -> IdArray:
    """Returns a list, array or tensor of one sample as int32 [tokens]; `[1, tokens]`, a batch of one, is taken too."""
    try:
        found = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    except (ValueError, TypeError, RuntimeError):
        raise RowError(NUMBERS, f"{name} is no flat list of whole numbers, but {_kind(values)}") from None
    if found.ndim == 2 and len(found) == 1:
        found = found[0]
    kinds = "iub" if name == "attention_mask" else "iu"
    if found.ndim != 1 or (found.size and found.dtype.kind not in kinds):
        raise RowError(NUMBERS, f"{name} must be a flat list of whole numbers, got {_shape(values, found)}")
    if found.size and not ID_RANGE.min <= int(found.min()) <= int(found.max()) <= ID_RANGE.max:
        raise RowError(VOCABULARY, f"{name} holds {_farthest(found)}, which no token has for its id")
    return found.astype(np.int32)


def _shape(values: Any, found: npt.NDArray[Any]) -> str:
    return _kind(values) if found.ndim == 0 else f"{_kind(values)} of shape {list(found.shape)}, {found.dtype}"


def _farthest(found: npt.NDArray[Any]) -> int:
    return int(found.max()) if int(found.max()) > ID_RANGE.max else int(found.min())


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
