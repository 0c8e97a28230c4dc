"""Laws of the generation settings: what could not be carried out is refused, all of it at once."""

from typing import Any

import pytest

from llmrecipes.errors import ConfigError
from llmrecipes.generation.settings import GenerationSettings


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens"),
        ({"do_sample": True, "temperature": 0.0}, "--temperature"),
        ({"do_sample": True, "temperature": float("nan")}, "--temperature"),
        ({"top_p": 0.0}, "--top_p"),
        ({"top_p": 1.5}, "--top_p"),
        ({"top_k": -1}, "--top_k"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty"),
        ({"length_penalty": 2.0}, "--length_penalty"),
        ({"min_new_tokens": 101}, "--min_new_tokens"),
        ({"min_length": -1}, "--min_length"),
        ({"stop_token_ids": (-1,)}, "stop tokens"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_a_value_that_cannot_be_carried_out_is_refused_by_name(values: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        GenerationSettings(**values)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        GenerationSettings(max_new_tokens=0, top_p=2.0, length_penalty=0.5)
    assert len(str(told.value).splitlines()) == 3


def test_temperature_plays_no_part_without_sampling() -> None:
    assert GenerationSettings(do_sample=False, temperature=0.0).temperature == 0.0
