"""The data commands' keys: all told of in --help, all with defaults, and one word for a data set."""

import pytest

from llmrecipes.config.data_schema import DataCheckConfig, DataDoctorConfig, DataViewConfig, dataset_flags
from llmrecipes.config.loading import leaves_of, load_config
from llmrecipes.config.show import help_text
from llmrecipes.errors import ConfigError

SCHEMAS = (DataViewConfig, DataCheckConfig, DataDoctorConfig)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_key_is_told_of_and_has_a_default(schema: type) -> None:
    text = help_text("x", schema)
    for leaf in leaves_of(schema):
        assert f"--{leaf.key} " in text
        assert leaf.limits.help or "." in leaf.key, leaf.key
    load_config(schema, {"dataset": "samsum_dataset", "tokenizer_name": "x"})


@pytest.mark.parametrize(
    ("word", "flags"),
    [
        ("samsum", {"dataset": "samsum_dataset"}),
        ("samsum_dataset", {"dataset": "samsum_dataset"}),
        ("a/b.py:f", {"dataset": "custom_dataset", "custom_dataset.file": "a/b.py:f"}),
        ("b.py", {"dataset": "custom_dataset", "custom_dataset.file": "b.py"}),
        ("samsun", {"dataset": "samsun_dataset"}),
    ],
)
def test_one_word_stands_for_a_data_set(word: str, flags: dict[str, str]) -> None:
    assert dataset_flags(word) == flags


def test_an_unknown_data_set_is_told_with_what_is_near() -> None:
    with pytest.raises(ConfigError, match="samsun.*did you mean samsum_dataset"):
        load_config(DataCheckConfig, {**dataset_flags("samsun"), "tokenizer_name": "x"})
