"""Alpaca: follow an instruction (`instruction`, with or without an `input`) with an answer (`output`).

    python -m llmrecipes.finetuning --dataset alpaca_dataset --model_name MODEL --output_dir OUTPUT

Source: Taori et al., "Stanford Alpaca" (2023), https://github.com/tatsu-lab/stanford_alpaca, 52,002 rows in one
split, from the hub or, with `--alpaca_dataset.data_path`, from one local file or from a folder with one file per
split. Licence CC BY-NC 4.0: for research, not for business.
"""

from itertools import islice
from pathlib import Path
from typing import Any

from llmrecipes.data.files import load_split
from llmrecipes.data.rows import Row, Rows, text, with_text
from llmrecipes.errors import DataError
from llmrecipes.prompts import EncodedSamples, encode_pairs

HUB = "tatsu-lab/alpaca"
COLUMNS = ("instruction", "input", "output")
HELD_OUT_ROWS = 200
"""The first rows of a set that comes undivided are its validation split, as in llama-recipes."""

WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Both texts are Stanford Alpaca's, letter by letter: models tuned on them know no other."""


def get_preprocessed_alpaca(dataset_config: Any, tokenizer: Any, split: str) -> EncodedSamples:
    """Returns the samples of `train`, or of `val` (or `validation`): the prompt masked, output and end supervised.

    Rows without an output (Stanford's file has some) teach nothing, so they are left out.
    """
    rows = with_text(_split_rows(dataset_config, split), "output", f"alpaca, {split}")
    return encode_pairs(tokenizer, rows.map(lambda row: (_prompt(row), row["output"])))


def _prompt(row: Row) -> str:
    has_input = text(row, "input", blank_allowed=True).strip()
    text(row, "instruction")
    return (WITH_INPUT if has_input else WITHOUT_INPUT).format(**row)


def _split_rows(dataset_config: Any, split: str) -> Rows[Row]:
    """Returns the rows of a folder's file, or of one part of a set that comes undivided; parts share no question."""
    if split not in ("train", "val", "validation"):
        raise DataError(f"alpaca has no split {split!r}: its splits are train and val (or validation)")
    if Path(getattr(dataset_config, "data_path", "") or "_").expanduser().is_dir():
        return load_split(dataset_config, split, COLUMNS)
    rows = load_split(dataset_config, getattr(dataset_config, "train_split", "train"), COLUMNS, hub_name=HUB)
    first = list(islice(rows, HELD_OUT_ROWS))
    held_out = Rows(lambda: iter(first), rows.place)
    if split != "train":
        return held_out
    asked = set(held_out.map(_question))
    kept = rows.map(lambda row: None if _question(row) in asked else row)
    if not any(True for _ in kept):
        raise DataError(f"{rows.place}: the first {HELD_OUT_ROWS} rows are held out, and none is left to train on")
    return kept


def _question(row: Row) -> tuple[str, str]:
    return text(row, "instruction"), text(row, "input", blank_allowed=True)
