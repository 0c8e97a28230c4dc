"""Laws of a plug-in's rows: what is harmless is taken as it is meant, all else is one clear line that names the row."""

from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

from llmrecipes.batch import Sample
from llmrecipes.data.limits import SampleLimits
from llmrecipes.data.made_rows import named
from llmrecipes.data.rows import KEPT_FAULTS
from llmrecipes.data.samples import load_samples
from llmrecipes.data.store import SampleStore
from llmrecipes.errors import DataError, LlmRecipesError, PluginError
from llmrecipes.plugins import Plugin

LIMITS = SampleLimits(context_length=8, max_positions=16, vocabulary_size=100)
PLACE = "mine.py:rows, split train"
IDS, LABELS = [5, 6, 7, 8], [-100, -100, 7, 8]
ROW = {"input_ids": IDS, "labels": LABELS}


def samples(made: Any, limits: SampleLimits = LIMITS) -> list[Sample]:
    return list(load(made, limits)[0])


def load(made: Any, limits: SampleLimits = LIMITS) -> tuple[SampleStore, list[str]]:
    plugin = Plugin(Path("/somewhere/mine.py"), "rows", lambda config, tokenizer, split: made)
    return load_samples(plugin, None, None, "train", limits)


def told(made: Any, kind: type[LlmRecipesError], limits: SampleLimits = LIMITS) -> str:
    """Returns the message behind the place, which every message opens with; it is one line."""
    with pytest.raises(kind) as caught:
        load(made, limits)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith(PLACE) and "\n" not in message and len(message) < 400
    return message.removeprefix(PLACE).removeprefix(", ").removeprefix(": ")


def row(length: int, supervised: int = 1) -> dict[str, list[int]]:
    """A row of so many tokens, of which the last ones are supervised."""
    ids = list(range(10, 10 + length))
    return {"input_ids": ids, "labels": [-100] * (length - supervised) + ids[length - supervised :]}


def limits(**changes: Any) -> SampleLimits:
    return SampleLimits(**{"context_length": 8, "max_positions": 16, "vocabulary_size": 100, **changes})


# --- what is taken ----------------------------------------------------------------------------------------------------


class MapStyle(torch.utils.data.Dataset[Any]):
    """torch's map-style data set, as llama-recipes' own are: an index and a length, and nothing to go through."""

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return [ROW, ROW][index % 2]

    def __len__(self) -> int:
        return 2


def generator() -> Iterator[dict[str, list[int]]]:
    yield from [ROW, ROW]


CONTAINERS: dict[str, Callable[[], Any]] = {
    "list": lambda: [ROW, ROW],
    "tuple": lambda: (ROW, ROW),
    "generator": generator,
    "datasets.Dataset": lambda: Dataset.from_list([ROW, ROW]),
    "datasets.Dataset of tensors": lambda: Dataset.from_list([ROW, ROW]).with_format("torch"),
    "datasets.Dataset of arrays": lambda: Dataset.from_list([ROW, ROW]).with_format("numpy"),
    "datasets.IterableDataset": lambda: Dataset.from_list([ROW, ROW]).to_iterable_dataset(),
    "map-style torch data set": MapStyle,
    "torch Subset": lambda: torch.utils.data.Subset(MapStyle(), [1, 0]),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_any_sequence_of_rows_is_taken(make: Callable[[], Any]) -> None:
    assert_is_row(samples(make()), rows=2)


ROWS: dict[str, Any] = {
    "lists": ROW,
    "arrays": {"input_ids": np.array(IDS), "labels": np.array(LABELS, dtype=np.int16)},
    "tensors": {"input_ids": torch.tensor(IDS), "labels": torch.tensor(LABELS)},
    "a batch of one, from return_tensors='pt'": {"input_ids": torch.tensor([IDS]), "labels": torch.tensor([LABELS])},
    "a batch of one, as lists": {"input_ids": [IDS], "labels": [LABELS], "attention_mask": [[1, 1, 1, 1]]},
    "mixed kinds": {"input_ids": torch.tensor(IDS), "labels": tuple(LABELS)},
    "scalars of tensors": {"input_ids": [torch.tensor(i) for i in IDS], "labels": [np.int64(i) for i in LABELS]},
    "a range": {"input_ids": range(5, 9), "labels": LABELS},
    "BatchEncoding": BatchEncoding({**ROW, "attention_mask": [1, 1, 1, 1]}),
    "UserDict": UserDict(ROW),
    "other columns": {**ROW, "id": "a", "text": "b", "token_type_ids": [0, 0, 0, 0]},
    "no mask": {**ROW, "attention_mask": None},
    "a mask of truths": {**ROW, "attention_mask": [True] * 4},
    "padding behind": {"input_ids": [*IDS, 0, 0], "labels": [*LABELS, 0, 0], "attention_mask": [1, 1, 1, 1, 0, 0]},
    "padding before": {"input_ids": [0, *IDS], "labels": [-100, *LABELS], "attention_mask": [0, 1, 1, 1, 1]},
    "padding, a batch of one": {
        "input_ids": torch.tensor([[*IDS, 0]]),
        "labels": torch.tensor([[*LABELS, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0]]),
    },
}


@pytest.mark.parametrize("given_row", ROWS.values(), ids=ROWS.keys())
def test_any_harmless_row_is_taken(given_row: Any) -> None:
    assert_is_row(samples([given_row]), rows=1)


def test_a_row_of_a_data_frame_is_taken() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([{**ROW, "attention_mask": [1] * 4}])
    assert_is_row(samples([line for _, line in frame.iterrows()]), rows=1)


def assert_is_row(found: list[Sample], rows: int) -> None:
    assert [sample.row for sample in found] == list(range(rows))
    for sample in found:
        assert (sample.input_ids.tolist(), sample.labels.tolist()) == (IDS, LABELS)
        assert sample.input_ids.dtype == sample.labels.dtype == np.int32


@given(st.lists(st.integers(1, 8), min_size=1, max_size=30))
def test_every_good_row_becomes_one_sample_in_order(lengths: list[int]) -> None:
    found = samples([row(length + 1) for length in lengths], limits(context_length=9))
    assert [len(sample.input_ids) for sample in found] == [length + 1 for length in lengths]
    assert [sample.row for sample in found] == list(range(len(lengths)))


def test_the_preprocessor_gets_config_tokenizer_and_split() -> None:
    given_arguments: list[Any] = []

    def rows(*arguments: Any) -> list[Any]:
        given_arguments.extend(arguments)
        return [ROW]

    load_samples(Plugin(Path("mine.py"), "rows", rows), "config", "tokenizer", "validation", LIMITS)
    assert given_arguments == ["config", "tokenizer", "validation"]


# --- what is refused: the plug-in's -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "got"),
    [
        (None, "returned None"),
        (5, "returned int"),
        ("abc", "returned str"),
        (b"abc", "returned bytes"),
        (ROW, "returned dict with input_ids, labels"),
        (BatchEncoding({"input_ids": [IDS], "labels": [LABELS]}), "returned BatchEncoding with input_ids, labels"),
        (DatasetDict(train=Dataset.from_list([ROW])), "returned DatasetDict with train"),
        (object(), "returned object"),
    ],
)
def test_what_is_no_sequence_of_rows_is_refused(made: Any, got: str) -> None:
    assert told(made, PluginError) == f"expected a sequence of rows, each with input_ids and labels, but it {got}"


@pytest.mark.parametrize(
    ("bad_row", "message"),
    [
        (None, "expected a mapping with input_ids and labels, got None"),
        ("text", "expected a mapping with input_ids and labels, got str"),
        ((IDS, LABELS), "expected a mapping with input_ids and labels, got tuple"),
        (torch.tensor(IDS), "expected a mapping with input_ids and labels, got Tensor"),
        ({"text": "a"}, "no input_ids and no labels, only text"),
        ({"input_ids": IDS, "label": LABELS}, "no labels, only input_ids, label"),
        ({"input_ids": IDS, "labels": LABELS[:3]}, "3 labels for 4 input_ids"),
        ({**ROW, "attention_mask": [1] * 5}, "5 attention_mask for 4 input_ids"),
        ({**ROW, "attention_mask": [1, 0, 1, 1]}, "attention_mask must be 1, and 0 for padding at the ends only"),
        ({**ROW, "attention_mask": [1, 1, 2, 2]}, "attention_mask must be 1, and 0 for padding at the ends only"),
        ({**ROW, "input_ids": None}, "input_ids must be a flat list of whole numbers, got None"),
        ({**ROW, "input_ids": (i for i in IDS)}, "input_ids must be a flat list of whole numbers, got generator"),
        ({**ROW, "input_ids": set(IDS)}, "input_ids must be a flat list of whole numbers, got set"),
        ({**ROW, "input_ids": 5}, "input_ids must be a flat list of whole numbers, got int"),
        ({**ROW, "labels": "abcd"}, "labels must be a flat list of whole numbers, got str"),
        ({**ROW, "labels": ["a", "b"]}, "labels must be a flat list of whole numbers, got list of shape [2], <U1"),
        ({**ROW, "labels": [True] * 4}, "labels must be a flat list of whole numbers, got list of shape [4], bool"),
        (
            {"input_ids": torch.tensor(IDS) / 1, "labels": LABELS},
            "input_ids must be a flat list of whole numbers, got Tensor of shape [4], float32",
        ),
        (
            {"input_ids": torch.tensor([IDS, IDS]), "labels": LABELS},
            "input_ids must be a flat list of whole numbers, got Tensor of shape [2, 4], int64",
        ),
        ({**ROW, "input_ids": [[1, 2], [3]]}, "input_ids is no flat list of whole numbers, but list"),
        ({**ROW, "input_ids": torch.ones(4).bfloat16()}, "input_ids is no flat list of whole numbers, but Tensor"),
        ({**ROW, "input_ids": [5, 2**32 + 6, 7, 8]}, "input_ids holds 4294967302, which no token has for its id"),
        ({**ROW, "labels": [-100, -(2**31) - 1, 7, 8]}, "labels holds -2147483649, which no token has for its id"),
        ({**ROW, "labels": [-100, 2**70, 7, 8]}, "labels must be a flat list of whole numbers, got list of shape [4]"),
    ],
)
def test_a_row_of_another_form_is_refused_by_its_number(bad_row: Any, message: str) -> None:
    assert told([ROW, ROW, bad_row], PluginError).startswith(f"row 2: {message}")


def test_rows_that_fail_as_they_are_made_are_the_authors() -> None:
    class Broken(MapStyle):
        def __getitem__(self, index: int) -> dict[str, list[int]]:
            raise KeyError("dialogue")

    class Endless(MapStyle):
        def __len__(self) -> int:
            raise RuntimeError("no length")

    def failing() -> Iterator[Any]:
        yield ROW
        raise ValueError("bad line")

    lazy = Dataset.from_list([ROW]).with_transform(lambda batch: {"input_ids": batch["no_such"]})
    for made, message in [
        (Broken(), "KeyError: 'dialogue'"),
        (Endless(), "RuntimeError: no length"),
        (failing(), "ValueError: bad line"),
        (lazy, "KeyError: 'no_such'"),
    ]:
        with pytest.raises(PluginError, match=f"in the rows of rows: {message}"):
            load(made)


# --- what is refused: the data's --------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [[], (), iter([]), Dataset.from_list([])])
def test_no_rows_are_refused(made: Any) -> None:
    assert told(made, DataError) == "no samples in it"


NOTHING_LEARNED = "no supervised token (all labels behind the first are -100)"
UNEQUAL = "labels must equal input_ids or be -100 (the shift is the trainer's)"
ADVICE = "say with --overlong what becomes of them: truncate, drop or split"
OUTSIDE = "an id outside the model's vocabulary of 100; is the tokenizer another model's, or was a token added to it?"


@pytest.mark.parametrize(
    ("bad_row", "fault"),
    [
        ({"input_ids": [], "labels": []}, "no tokens"),
        ({**ROW, "attention_mask": [0, 0, 0, 0]}, "no tokens"),
        ({"input_ids": IDS, "labels": [-100] * 4}, NOTHING_LEARNED),
        ({"input_ids": IDS, "labels": [5, -100, -100, -100]}, NOTHING_LEARNED),
        ({"input_ids": [5], "labels": [5]}, NOTHING_LEARNED),
        ({"input_ids": [5, 100], "labels": [-100, 100]}, OUTSIDE),
        ({"input_ids": [5, -1], "labels": [-100, -1]}, OUTSIDE),
        ({"input_ids": [-100, 6], "labels": [-100, 6]}, OUTSIDE),
        ({"input_ids": IDS, "labels": [6, 7, 8, -100]}, UNEQUAL),
        ({"input_ids": IDS, "labels": [-1, -1, 7, 8]}, UNEQUAL),
        ({"input_ids": IDS, "labels": [0, 0, 7, 8]}, UNEQUAL),
        (row(9), f"longer than --context_length 8 (longest 9 tokens; raise it, or {ADVICE})"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_train_is_refused_by_its_number(bad_row: Any, fault: str) -> None:
    assert told([ROW, bad_row, ROW], DataError) == f"row 1: {fault}"


def test_the_last_id_of_the_vocabulary_and_the_longest_sample_are_taken() -> None:
    assert len(samples([{"input_ids": [0, 99], "labels": [0, 99]}, row(8)])) == 2


def test_all_faults_of_all_rows_are_told_at_once() -> None:
    bad = [{"input_ids": IDS, "labels": [-100] * 4}] * 7
    message = told([ROW, *bad, {"input_ids": [], "labels": []}, row(12), row(20)], DataError)
    assert message == (
        f"rows 1, 2, 3, 4, 5 and 2 more: {NOTHING_LEARNED}; row 8: no tokens; rows 9, 10: longer than "
        f"--context_length 8 (longest 20 tokens; raise it, or {ADVICE})"
    )


def test_where_the_model_sets_the_limit_raising_the_context_is_no_advice() -> None:
    message = told([row(6)], DataError, limits(max_positions=5))
    assert message.startswith("row 0: longer than the model's 5 positions (longest 6 tokens; say with --overlong")


@pytest.mark.parametrize(
    ("rows", "text"), [([3], "row 3"), ([1, 2], "rows 1, 2"), ([*range(6)], "rows 0, 1, 2, 3, 4 and 1 more")]
)
def test_rows_are_named_and_then_counted(rows: list[int], text: str) -> None:
    assert named(rows) == text


def test_an_exception_of_a_row_of_somebodys_own_kind_is_the_authors() -> None:
    class Own(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise ZeroDivisionError("nobody saw this coming")

    with pytest.raises(PluginError, match="in the rows of rows: ZeroDivisionError: nobody saw this coming"):
        load([ROW, Own(ROW)])


def test_far_too_many_bad_rows_end_the_reading() -> None:
    read: list[int] = []

    def rows() -> Iterator[Any]:
        for number in range(10 * KEPT_FAULTS):
            read.append(number)
            yield {"input_ids": [], "labels": []}

    with pytest.raises(DataError, match="row.* 0, 1, 2, 3, 4 and 996 more: no tokens; .*so no more rows were read"):
        load(rows())
    assert len(read) == KEPT_FAULTS + 1


def test_a_message_is_kept_short_whatever_a_row_holds() -> None:
    plugin = Plugin(Path("mine.py"), "rows", lambda *_: [{"input_ids": [5] * n, "labels": [5]} for n in range(2, 99)])
    with pytest.raises(DataError, match="; and 92 rows with 92 other faults; 97 bad rows, and skip_bad_rows allows 9"):
        load_samples(plugin, SimpleNamespace(skip_bad_rows=9), None, "train", LIMITS)
    assert len(told([{"input_ids": IDS, **{"x" * 10_000: 1}}], PluginError)) < 400


# --- overlong samples, as the user chose ------------------------------------------------------------------------------


def test_drop_leaves_out_whole_samples_and_says_so() -> None:
    found, notices = load([row(4), row(9), row(8), row(30)], limits(overlong="drop"))
    assert [(sample.row, len(sample.input_ids)) for sample in found] == [(0, 4), (2, 8)]
    assert notices == [f"{PLACE}: dropped rows 1, 3: longer than --context_length 8 (longest 30 tokens)"]


def test_truncate_keeps_the_beginning_and_says_what_lost_its_answer() -> None:
    found, notices = load([row(9, supervised=3), row(12, supervised=4), row(4)], limits(overlong="truncate"))
    assert [sample.input_ids.tolist() for sample in found] == [list(range(10, 18)), [10, 11, 12, 13]]
    assert found[0].labels.tolist() == [-100] * 6 + [16, 17]
    assert notices == [
        f"{PLACE}: cut rows 0, 1: longer than --context_length 8 (longest 12 tokens); left out row 1: no supervised "
        "token was left"
    ]


@given(st.integers(9, 60), st.integers(1, 60))
def test_split_loses_no_supervised_token_but_the_first_of_a_piece(length: int, supervised: int) -> None:
    whole = row(length, supervised=min(supervised, length))
    found, notices = load([row(4), whole], limits(overlong="split"))
    pieces = found[1:]
    learned = {token for piece in pieces for token in piece.labels[1:].tolist() if token != -100}
    expected = {label for place, label in enumerate(whole["labels"]) if label != -100 and place % 8}
    assert learned == expected
    assert all(len(piece.input_ids) <= 8 and piece.row == 1 for piece in pieces)
    assert notices[0].startswith(f"{PLACE}: split row 1: longer than --context_length 8 (longest {length} tokens)")


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_where_nothing_is_left_the_reason_is_told(overlong: str) -> None:
    message = told([row(12), row(13)], DataError, limits(overlong=overlong))
    assert "rows 0, 1: longer than --context_length 8 (longest 13 tokens)" in message
    assert message.startswith("no samples in it; ")


def test_without_overlong_samples_there_is_nothing_to_note() -> None:
    assert load([ROW], limits(overlong="truncate"))[1] == []
