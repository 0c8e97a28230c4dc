"""The data-set seam: `(dataset_config, tokenizer, split) -> rows with input_ids, labels[, attention_mask]`.

It is llama-recipes' own contract. The shipped sets come in by the door that anybody's file does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrecipes.config.dataset_schema import DatasetOptions
from llmrecipes.plugins import Plugin, load_plugin, shipped_folder

DATASETS = {
    "samsum_dataset": "samsum.py:get_preprocessed_samsum",
    "grammar_dataset": "grammar.py:get_preprocessed_grammar",
    "alpaca_dataset": "alpaca.py:get_preprocessed_alpaca",
    "arithmetic_dataset": "arithmetic.py:get_preprocessed_arithmetic",
    "guanaco_dataset": "guanaco.py:get_preprocessed_guanaco",
    "chat_dataset": "chat.py:get_preprocessed_chat",
}
"""Name -> preprocessor in `custom_datasets/`."""


def load_preprocessor(config: DatasetOptions, folders: Sequence[Path]) -> Plugin:
    """Returns the preprocessor that `--dataset` names; raises `PluginError` where there is none."""
    if config.dataset == "custom_dataset":
        return load_plugin(config.custom_dataset.file, "custom_dataset.file", "get_custom_dataset", folders)
    return load_plugin(DATASETS[config.dataset], "dataset", "", [shipped_folder("custom_datasets")])


def is_shipped(preprocessor: Plugin) -> bool:
    """Returns whether a preprocessor is in one of our own files, whatever else lies beside them."""
    return preprocessor.path in {shipped_folder("custom_datasets") / name.split(":")[0] for name in DATASETS.values()}


def dataset_section(config: DatasetOptions) -> Any:
    """Returns the section of the chosen data set: what its preprocessor gets as `dataset_config`."""
    return getattr(config, config.dataset)
