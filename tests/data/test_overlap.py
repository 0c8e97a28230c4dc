"""What splits share is counted as a slow and obvious count would have it."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrecipes.data import overlap as module
from llmrecipes.data.overlap import (
    RUN_WORDS,
    TEMPLATE_ROWS,
    Hashes,
    RunSketch,
    Sketch,
    among,
    numbers_key,
    overlap,
    question_digest,
    repeats,
    runs,
    shared_runs,
    split_template,
    words,
)

SAMSUM = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "samsum"
VOCABULARY = [f"w{number}" for number in range(4000)]


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.int32)


def sketch(split: str, rows: list[tuple[str, str]]) -> Sketch:
    """A split of (question, answer) rows whose tokens are their characters, the answer's supervised."""
    made = Sketch(split)
    pairs = []
    for question, answer in rows:
        input_ids = np.concatenate([ids("\1" + question), ids(answer)])
        labels = input_ids.copy()
        labels[: len(question) + 1] = -100
        pairs.append((input_ids, labels))
    made.add(pairs, [question for question, _ in rows], [answer for _, answer in rows])
    return made


def some_text(random: Random, count: int = 40) -> str:
    return " ".join(random.choices(VOCABULARY, k=count))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is it?", "what  is IT"),
        ("3-4", "3 - 4"),
        ("A well-known fact.", "a well known fact"),
        ("ﬁne, “quoted”", 'fine "quoted"'),
        ("5 – 3", "5 - 3"),
        ("(a) b; c", "a b c"),
    ],
)
def test_case_blanks_and_prose_punctuation_make_no_difference(one: str, other: str) -> None:
    assert words(one) == words(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3 - 4", "3 + 4"),
        ("3.5", "35"),
        ("-7", "7"),
        ("3 * 4", "3 / 4"),
        ("12:30", "1230"),
        ("C#", "C"),
        ("猫犬", "犬猫"),
    ],
)
def test_what_changes_the_meaning_makes_a_difference(one: str, other: str) -> None:
    assert words(one) != words(other)


def test_chinese_is_read_character_by_character() -> None:
    assert words("你好, world") == ["你", "好", "world"]


def test_each_kind_of_overlap_counts_what_it_is_named_for() -> None:
    train = sketch("train", [("Who came?", "Ann"), ("What is 3 - 4?", "-1"), ("Where is it?", "Here")])
    test = sketch(
        "test",
        [
            ("Who came?", "Ann"),  # the row
            ("Where is it?", "There"),  # the question
            ("who  came", "Bob"),  # the question, normalised
            ("Start at 3 and go down by 4.", "-1"),  # other words, same numbers and answer
            ("What is 3 + 4?", "7"),  # nothing
        ],
    )
    found = overlap(train, test)
    assert (found.same_rows, found.same_questions, found.normalised_questions) == (1, 2, 3)
    assert found.same_numbers is None  # only two rows of five are about numbers
    assert not found.identical


def test_rows_that_are_no_sums_are_not_the_same_sum() -> None:
    train = sketch("train", [(f"{number} + 1", str(number + 1)) for number in range(3)] + [("Who?", "Ann")])
    test = sketch("test", [(f"{number} + 5", str(number + 5)) for number in range(3)] + [("Where?", "Here")])
    assert overlap(train, test).same_numbers == 0
    assert overlap(train, train).same_numbers == 3


def test_questions_of_signs_alone_are_compared_as_they_are() -> None:
    found = overlap(sketch("train", [("???", "yes")]), sketch("test", [("???", "no"), ("!!!", "yes"), ("...", "yes")]))
    assert (found.same_questions, found.normalised_questions) == (1, 1)


def test_plain_text_is_its_own_question() -> None:
    texts = [np.array([1, *ids(text)], dtype=np.int32) for text in ("abc", "abd")]
    digests = [question_digest(text, np.where(text == 1, -100, text)) for text in texts]
    assert digests[0] != digests[1]


def test_splits_are_identical_whatever_their_order() -> None:
    rows = [(f"question {number}", "yes") for number in range(9)]
    assert overlap(sketch("a", rows), sketch("b", rows[::-1])).identical
    assert not overlap(sketch("a", rows), sketch("b", [*rows[:8], ("question 9", "yes")])).identical
    assert not overlap(sketch("a", rows), sketch("b", [*rows, rows[0]])).identical


def test_repeats_are_told_by_kind() -> None:
    found = repeats(sketch("a", [("Q?", "1"), ("Q?", "1"), ("Q?", "2"), ("q", "3"), ("R?", "1")]))
    assert (found.rows, found.normalised_questions, found.other_answers) == (1, 3, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("12 - 5", "7"), ("Take 5 from 12!", "7")),
        (("3 + 4", "3 + 4 = 7"), ("4 + 3", "4 + 3 = 7")),
    ],
)
def test_the_same_sum_in_other_words_has_the_same_key(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert numbers_key(one[0], words(one[1])) == numbers_key(other[0], words(other[1])) != 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("12 - 5", "7"), ("5 - 12", "-7")),
        (("5 - 0", "5 - 0 = 5"), ("5 + 0", "5 + 0 = 5")),
        (("2 + 2", "2 + 2 = 4"), ("2 * 2", "2 * 2 = 4")),
        (("3 apples and 4", "7 apples"), ("3 pears and 4", "7 pears")),
        (("1 and 2", "3"), ("1 and 2", "3 3")),
    ],
)
def test_another_sum_has_another_key(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert numbers_key(one[0], words(one[1])) != numbers_key(other[0], words(other[1]))


@pytest.mark.parametrize(("question", "answer"), [("Who?", "7"), ("Only 1 number", "7"), ("3 and 4", "a lot")])
def test_what_is_no_sum_has_no_key(question: str, answer: str) -> None:
    assert numbers_key(question, words(answer)) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=40), max_size=6))
def test_runs_are_those_of_each_row_and_never_cross(rows: list[list[str]]) -> None:
    hashes, numbers = runs(rows)
    wanted = [
        (row, tuple(text[start : start + RUN_WORDS]))
        for row, text in enumerate(rows)
        for start in range(len(text) - RUN_WORDS + 1)
    ]
    assert numbers.tolist() == [row for row, _ in wanted]
    by_hash: dict[int, tuple[str, ...]] = {}
    for value, (_, run) in zip(hashes.tolist(), wanted, strict=True):
        assert by_hash.setdefault(value, run) == run
    assert len(by_hash) == len({run for _, run in wanted})


def test_near_is_half_of_the_runs_and_touched_is_one() -> None:
    random = Random(1)
    texts = [some_text(random, 60) for _ in range(4)]
    train = sketch("train", [(text, "yes") for text in texts])
    parts = [texts[0].split(), texts[1].split(), texts[2].split()]
    test = sketch(
        "test",
        [
            (" ".join([*parts[0], "and", "more"]), "no"),  # nearly all of it
            (" ".join([*parts[1][:20], *some_text(random, 40).split()]), "no"),  # eight runs of 48
            (" ".join(parts[2][:12]), "no"),  # twelve words are no run
            (some_text(random, 60), "no"),
        ],
    )
    found = overlap(train, test)
    assert (found.near, found.touched, found.one_in) == (1, 2, 1)
    assert (found.same_questions, found.normalised_questions) == (0, 0)


def test_a_template_that_all_rows_hold_is_no_overlap() -> None:
    random = Random(2)
    preamble = some_text(random, 30)
    splits = [[(f"{preamble} {name}{row} {some_text(random, 30)}", "yes") for row in range(40)] for name in "ab"]
    found = overlap(sketch("train", splits[0]), sketch("test", splits[1]))
    assert (found.near, found.touched) == (0, 0)
    few = overlap(sketch("train", splits[0][:TEMPLATE_ROWS]), sketch("test", splits[1]))
    assert few.touched == 40  # so few rows may say it by chance


def test_a_template_hides_no_copy_behind_it() -> None:
    random = Random(4)
    preamble = some_text(random, 60)
    train = [(f"{preamble} {some_text(random, 20)}", "yes") for _ in range(40)]
    test = [(f"{question} now", "no") for question, _ in train[:3]]
    assert overlap(sketch("train", train), sketch("test", test)).near == 3


def test_runs_are_kept_the_same_in_one_go_and_in_parts() -> None:
    random = Random(5)
    texts = [some_text(random).split() for _ in range(20)]
    whole, parts = RunSketch(), RunSketch()
    whole.add(texts, 0)
    for start in range(0, 20, 6):
        parts.add(texts[start : start + 6], start)
    for one, two in zip(whole.pairs(1), parts.pairs(1), strict=True):
        assert one.tolist() == two.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), max_size=80))
def test_the_template_is_what_many_different_rows_hold(pairs: list[tuple[int, int]]) -> None:
    hashes = np.array([value for value, _ in pairs], dtype=np.uint64)
    own, template = split_template(hashes, np.array([row for _, row in pairs], dtype=np.int32), 31)
    holders = {value: len({row for other, row in pairs if other == value}) for value, _ in pairs}
    assert own.tolist() == sorted(value for value, rows in holders.items() if rows <= TEMPLATE_ROWS)
    assert template.tolist() == sorted(value for value, rows in holders.items() if rows > TEMPLATE_ROWS)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)))
def test_among_is_membership(values: list[int], known: list[int]) -> None:
    def array(numbers: list[int]) -> Hashes:
        return np.array(numbers, dtype=np.uint64)

    assert among(array(values + known), np.sort(array(known))).tolist() == [v in known for v in values + known]


def test_a_long_split_keeps_a_bounded_number_of_runs_and_still_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_RUNS", 3000)
    random = Random(3)
    texts = [some_text(random, 80).split() for _ in range(400)]
    reference, other = RunSketch(), RunSketch()
    for start in range(0, 400, 50):
        reference.add(texts[start : start + 50], start)
        assert reference.kept <= 3000
    other.add([*texts[:60], *(some_text(random, 80).split() for _ in range(40))], 0)
    assert reference.one_in == 16  # 27,200 runs
    near, touched, one_in = shared_runs(reference, other, 400, 100)
    assert one_in == 16
    assert 50 <= near <= touched <= 60


@pytest.mark.skipif(not SAMSUM.is_dir(), reason="SAMSum is not to be had here")
def test_samsums_splits_share_the_dialogues_that_plain_sets_share() -> None:
    splits, dialogues = {}, {}
    for split in ("train", "validation", "test"):
        lines = (SAMSUM / f"{split}.json").read_text(encoding="utf-8").splitlines()
        rows = [(row["dialogue"], row["summary"]) for row in map(json.loads, lines) if row["dialogue"].strip()]
        splits[split], dialogues[split] = sketch(split, rows), {dialogue for dialogue, _ in rows}
    for (one, other), shared in ((("train", "validation"), 47), (("train", "test"), 41), (("validation", "test"), 4)):
        assert len(dialogues[one] & dialogues[other]) == shared
        found = overlap(splits[one], splits[other])
        assert (found.same_questions, found.same_rows) == (shared, 0)
        assert shared <= found.normalised_questions <= found.near + 2  # short dialogues have no run of 13 words
