"""The keys of the data sets: a section for each, handed to its preprocessor as its first argument."""

from dataclasses import dataclass

from llmrecipes.config.options import option, section


@dataclass(frozen=True)
class DatasetSection:
    """What the preprocessor of a data set is given as its first argument."""

    dataset: str = option("", "name of the section (set by itself)")
    train_split: str = option("train", "split to train on")
    test_split: str = option("validation", "split to validate on")
    data_path: str = option("", "local file, or folder with one file a split; empty: the hub")
    skip_bad_rows: int = option(0, "ours: bad rows of a split that may be left out; they are named", at_least=0)


@dataclass(frozen=True)
class SamsumDataset(DatasetSection):
    """--dataset samsum_dataset: dialogue -> summary"""

    dataset: str = "samsum_dataset"


@dataclass(frozen=True)
class GrammarDataset(DatasetSection):
    """--dataset grammar_dataset: sentence -> corrected sentence"""

    dataset: str = "grammar_dataset"


@dataclass(frozen=True)
class AlpacaDataset(DatasetSection):
    """--dataset alpaca_dataset: instruction, input -> output"""

    dataset: str = "alpaca_dataset"
    test_split: str = option("val", "split to validate on")


@dataclass(frozen=True)
class ArithmeticDataset(DatasetSection):
    """--dataset arithmetic_dataset: question -> number"""

    dataset: str = "arithmetic_dataset"


@dataclass(frozen=True)
class GuanacoDataset(DatasetSection):
    """--dataset guanaco_dataset: OpenAssistant conversations"""

    dataset: str = "guanaco_dataset"
    test_split: str = option("test", "split to validate on")


@dataclass(frozen=True)
class ChatDataset(DatasetSection):
    """--dataset chat_dataset: your own conversations, recognised by their columns"""

    dataset: str = "chat_dataset"
    data_path: str = option(
        "", "file, folder with one file a split, hub:NAME, or several: A,B all rows; A=0.7,hub:B=0.3 by weight"
    )
    template: str = option(
        "tokenizer", "how turns are laid out; tokenizer: its own chat template",
        choices=("llama2", "llama3", "chatml", "alpaca", "vicuna", "plain", "tokenizer"),
    )  # fmt: skip
    prompt_format: str = option("{prompt}\n\n", "with template plain; {system} and {input} may stand in it")
    train_on: str = option("assistant", "what is learned", choices=("assistant", "last", "all"))
    validation_rows: int = option(0, "conversations of the train file held out to validate on", at_least=0)
    seed: int = option(42, "seed of what is held out and drawn", at_least=0)


@dataclass(frozen=True)
class CustomDataset(DatasetSection):
    """--dataset custom_dataset: your own preprocessor"""

    dataset: str = "custom_dataset"
    file: str = option("", "preprocessor as FILE.py:FUNCTION; without a function: get_custom_dataset")


@dataclass(frozen=True)
class DatasetOptions:
    """Data set"""

    dataset: str = option("samsum_dataset", "name of a data set, or custom_dataset with --custom_dataset.file")
    samsum_dataset: SamsumDataset = section(SamsumDataset, "")
    grammar_dataset: GrammarDataset = section(GrammarDataset, "")
    alpaca_dataset: AlpacaDataset = section(AlpacaDataset, "")
    arithmetic_dataset: ArithmeticDataset = section(ArithmeticDataset, "")
    guanaco_dataset: GuanacoDataset = section(GuanacoDataset, "")
    chat_dataset: ChatDataset = section(ChatDataset, "")
    custom_dataset: CustomDataset = section(CustomDataset, "")
    allow_outside_plugins: bool = option(
        False, "ours: a config file may name plug-ins that are neither below its folder nor below the current one"
    )


@dataclass(frozen=True)
class CacheOptions:
    """Cache"""

    data_cache: str = option(
        "auto", "ours: where tokenized splits are kept between runs: auto (~/.cache/llmrecipes/data), off, or a folder"
    )
