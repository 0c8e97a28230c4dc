"""Sources are drawn by weight and parts held out by seed: the same every time, and no row is lost or leaks."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrecipes.data.mixing import HoldOut, Source, draw_counts, sources_of
from llmrecipes.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("data_path", "sources"),
    [
        ("train.jsonl", [Source("train.jsonl")]),
        ("hub:someone/chats", [Source("hub:someone/chats")]),
        ("a.jsonl, b", [Source("a.jsonl"), Source("b")]),
        ("a.jsonl=0.7,hub:x/y=3", [Source("a.jsonl", 0.7), Source("hub:x/y", 3.0)]),
        ("a=b.jsonl=1,c=2", [Source("a=b.jsonl", 1.0), Source("c", 2.0)]),
    ],
)
def test_a_data_path_names_one_source_or_several(data_path: str, sources: list[Source]) -> None:
    assert sources_of(data_path) == sources


def test_a_path_that_is_there_is_one_source_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "a=1", "c=2"):
        Path(name).touch()
        assert sources_of(name) == [Source(name)]
    assert sources_of("a=1,c=2") == [Source("a=1"), Source("c=2")]


@pytest.mark.parametrize(
    ("data_path", "message"),
    [
        ("", "--chat_dataset.data_path is required"),
        ("a=0.7", "a weight has no effect on one source"),
        ("a=0.7,b", "some sources have no weight"),
        ("a=0,b=1", "the weight '0' of a is no number above 0"),
        ("a=-1,b=1", "the weight '-1' of a"),
        ("a=nan,b=1", "the weight 'nan' of a"),
        ("a=inf,b=1", "the weight 'inf' of a"),
        ("a=half,b=1", "the weight 'half' of a"),
        ("a,,b", "a source without a name"),
        ("=1,b=1", "a source without a name"),
        ("a,a", "a source is named twice"),
    ],
)
def test_a_data_path_that_cannot_be_meant_is_refused(data_path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sources_of(data_path)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(10, 200), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.2, 3.0), min_size=4, max_size=4),
    seed=st.integers(0, 9),
)
def test_as_many_are_drawn_as_there_are_in_the_shares_asked_for(
    sizes: list[int], weights: list[float], seed: int
) -> None:
    weights = weights[: len(sizes)]
    draws = draw_counts(sizes, weights, seed)
    assert draws == draw_counts(sizes, weights, seed)
    assert sum(map(sum, draws)) == sum(sizes)
    for size, weight, counts in zip(sizes, weights, draws, strict=True):
        assert len(counts) == size
        assert abs(sum(counts) - sum(sizes) * weight / sum(weights)) < 1
        assert max(counts) - min(counts) <= 1


def test_another_seed_draws_other_rows_and_no_two_sources_draw_alike() -> None:
    first, second, _ = draw_counts([1000, 1000, 500], [1, 1, 3], seed=1)
    assert sum(first) == sum(second) == 500
    assert draw_counts([1000, 1000, 500], [1, 1, 3], seed=2)[0] != first != second


def test_a_source_of_which_nothing_would_be_drawn_is_refused() -> None:
    for sizes, weights in (([10, 10], [1, 0.001]), ([10, 0], [1, 0.001])):
        with pytest.raises(DataError, match="source 2 is too small or weighs too little"):
            draw_counts(sizes, weights, seed=0)


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=40), seed=st.integers(0, 9), data=st.data())
def test_what_is_held_out_is_asked_nowhere_in_train(keys: list[str], seed: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, len(set(keys))))
    if wanted == len(set(keys)):
        with pytest.raises(DataError, match="none would be left to train on"):
            HoldOut.of([keys], wanted, seed)
        return
    cut = data.draw(st.integers(0, len(keys)))
    sources = [keys[:cut], keys[cut:]]
    hold_out = HoldOut.of(sources, wanted, seed)
    places = [(source, number, key) for source, part in enumerate(sources) for number, key in enumerate(part)]
    held = [place for place, (source, number, key) in enumerate(places) if hold_out.has(key, source, number)]
    train = [place for place, key in enumerate(keys) if not hold_out.asks(key)]
    assert len(held) == len({keys[row] for row in held}) == wanted
    assert not {keys[row] for row in held} & {keys[row] for row in train}
    assert {keys[row] for row in held} | {keys[row] for row in train} == set(keys)
    assert hold_out.twins == len(keys) - len(held) - len(train)
    assert all(row == keys.index(keys[row]) for row in held)


def held_keys(keys: list[str], seed: int) -> set[str]:
    hold_out = HoldOut.of([keys], 100, seed)
    return {key for number, key in enumerate(keys) if hold_out.has(key, 0, number)}


def test_the_held_out_depend_on_the_seed_and_hardly_on_other_rows() -> None:
    keys = [str(number) for number in range(1000)]
    held = held_keys(keys, 1)
    assert held == held_keys(keys[::-1], 1)
    assert len(held & held_keys(keys, 2)) < 30
    more = [*keys, *(f"new {number}" for number in range(50))]
    assert len(held & held_keys(more, 1)) > 85


def test_a_file_is_its_train_split_and_a_folder_has_a_file_for_each(tmp_path: Path) -> None:
    config = SimpleNamespace(train_split="train", test_split="validation")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "validation.csv").write_text("text\nb\n")
    assert list(Source(str(tmp_path / "train.jsonl")).rows(config, "train")) == [{"text": "a"}]
    assert list(Source(str(tmp_path)).rows(config, "validation")) == [{"text": "b"}]
    with pytest.raises(DataError, match="is one file and holds 'train' only.*--chat_dataset.validation_rows 100"):
        Source(str(tmp_path / "train.jsonl")).rows(config, "validation")


def test_a_hub_name_is_read_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    config = SimpleNamespace(train_split="train", test_split="validation")
    (tmp_path / "train.csv").write_text("text\na\n")  # `datasets` reads a folder by the same call
    assert list(Source(f"hub:{tmp_path}").rows(config, "train")) == [{"text": "a"}]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="^hub data set someone/chats, split train: .*--chat_dataset.data_path FOLDER"):
        Source("hub:someone/chats").rows(config, "train")
