"""The keys of `llmrecipes data view`, `check` and `doctor`: the data set's own, the tokenizer's, and a few more.

llmrecipes data view   samsum --tokenizer_name MODEL_FOLDER --html samples.html
llmrecipes data check  my_data.py:get_my_data --model_name MODEL
llmrecipes data doctor samsum --model_name MODEL --strict
"""

from dataclasses import dataclass, fields

from llmrecipes.config.dataset_schema import DatasetOptions
from llmrecipes.config.options import option
from llmrecipes.config.schema import BatchOptions


@dataclass(frozen=True)
class TokenizerOptions:
    """Tokenizer"""

    model_name: str | None = option(None, "model whose tokenizer, vocabulary and longest sequence count")
    tokenizer_name: str | None = option(None, "hub id or folder of the tokenizer, with or without a model")
    model_revision: str | None = option(None, "commit, tag or branch of a hub model or tokenizer")
    trust_remote_code: bool = option(False, "run the Python code that a model folder brings along")


@dataclass(frozen=True)
class ViewOptions:
    """View"""

    split: str | None = option(None, "split to look at; unset: the data set's train_split")
    samples: int = option(3, "samples shown, the first ones", at_least=1)
    rows: list[str] = option([], "numbers of the samples shown instead, counted from 0: 3,17")
    packed: bool = option(False, "show rows as training packs them: whole samples one behind the other")
    context_length: int = option(4096, "tokens of a packed row, with --packed", at_least=2)
    seed: int = option(42, "seed of the order in which samples are packed, with --packed", at_least=0)
    listed_tokens: int = option(60, "tokens of each sample listed one by one in the terminal; 0: all", at_least=0)
    html: str | None = option(None, "file to write one self-contained page to, all tokens listed")


@dataclass(frozen=True)
class SplitsOptions:
    """Splits"""

    splits: list[str] = option([], "splits looked at; unset: the data set's train_split and test_split")


@dataclass(frozen=True)
class DoctorOptions:
    """Doctor"""

    strict: bool = option(False, "leave with exit code 2 where there is a finding")
    seed: int = option(42, "seed of the order of samples, as in fine-tuning", at_least=0)


@dataclass(frozen=True)
class DataViewConfig(ViewOptions, DatasetOptions, TokenizerOptions):
    """python -m llmrecipes.data view: samples token by token, with what is learned of them."""


@dataclass(frozen=True)
class DataCheckConfig(SplitsOptions, DatasetOptions, TokenizerOptions):
    """python -m llmrecipes.data check: does a preprocessor keep its contract? Exit code 0 or 2."""


@dataclass(frozen=True)
class DataDoctorConfig(DoctorOptions, SplitsOptions, BatchOptions, DatasetOptions, TokenizerOptions):
    """python -m llmrecipes.data doctor: what is wrong with a data set, and how full its batches are.

    Without --splits it looks at a split `test` as well, where there is one.
    """


def dataset_flags(word: str) -> dict[str, str]:
    """Returns the flags that the word behind `view`, `check` or `doctor` stands for: a data set's name, or a file."""
    if ".py" in word:
        return {"dataset": "custom_dataset", "custom_dataset.file": word}
    names = {item.name for item in fields(DatasetOptions)}
    return {"dataset": word if word in names or word.endswith("_dataset") else f"{word}_dataset"}
