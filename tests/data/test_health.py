"""The doctor's figures are those of a slow and obvious count; the quick part says what it should and nothing else."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmrecipes.batch import Sample
from llmrecipes.data import health
from llmrecipes.data.health import (
    EMPTY_ANSWER,
    FINDING,
    NO_TOKENS,
    NOTE,
    ONE_LETTER,
    OUTSIDE,
    PROBLEM,
    SHORT_ANSWER,
    WRONG_LABEL,
    findings,
    overlaps_of,
    profile_split,
    quick_findings,
)
from llmrecipes.data.lints import LINTS, NO_END, NOTHING_SUPERVISED
from llmrecipes.data.loaders import Loader
from llmrecipes.data.plans import padding_share
from llmrecipes.data.rows import BadRowError, BadRows
from llmrecipes.data.samples import SampleLimits
from llmrecipes.prompts import Piece, encode_sample, end_piece

LIMITS = SampleLimits(64, 2**31, 260)


def encoded(tokenizer: Any, rows: list[tuple[str, str]]) -> list[Sample]:
    samples = []
    for row, (question, answer) in enumerate(rows):
        pieces = [Piece(question), Piece(answer, supervised=True), end_piece(tokenizer)]
        made = encode_sample(tokenizer, pieces)
        ids, labels = (np.array(made[name], dtype=np.int32) for name in ("input_ids", "labels"))
        samples.append(Sample(ids, labels, row))
    return samples


def asked(prefix: str, count: int) -> list[tuple[str, str]]:
    return [(f"{prefix} {number}?", f"is {number}") for number in range(count)]


def levels(tokenizer: Any, samples: list[Sample], limits: SampleLimits = LIMITS) -> list[tuple[str, str]]:
    profile = profile_split("train", samples, tokenizer, limits)
    return [(finding.level, finding.text) for finding in findings([profile], [])]


def loader(samples: list[Sample], **changes: Any) -> Loader:
    return Loader(
        **{"samples": samples, "strategy": "packing", "row_tokens": 64, "batch_rows": 4, "seed": 1, **changes}
    )


def test_a_healthy_set_has_no_findings(byte_tokenizer: Any) -> None:
    profiles = [
        profile_split(name, encoded(byte_tokenizer, asked(name, 30)), byte_tokenizer, LIMITS) for name in ("a", "b")
    ]
    assert findings(profiles, overlaps_of(profiles)) == []


def test_a_profile_counts_tokens_and_what_is_learned_of_them(byte_tokenizer: Any, random_samples: Any) -> None:
    samples = random_samples(50)
    profile = profile_split("train", iter(samples), byte_tokenizer, LIMITS)
    assert (profile.rows, profile.tokens) == (50, sum(len(sample.input_ids) for sample in samples))
    assert profile.supervised == profile.kept_supervised == sum(sample.supervised_tokens for sample in samples)
    assert profile.kept_lengths == profile.lengths


def test_a_profile_is_the_same_in_one_go_and_in_chunks(
    byte_tokenizer: Any, random_samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = random_samples(50)
    whole = profile_split("train", samples, byte_tokenizer, LIMITS)
    monkeypatch.setattr(health, "CHUNK_ROWS", 7)
    parts = profile_split("train", samples, byte_tokenizer, LIMITS)
    template = "template of"  # looked at in the first chunk only
    assert {k: v for k, v in parts.faults.items() if template not in k} == whole.faults
    assert (parts.lengths, parts.sketch.rows) == (whole.lengths, whole.sketch.rows)
    assert overlaps_of([whole, parts])[0].identical


@pytest.mark.parametrize(
    ("change", "level", "fault"),
    [
        (lambda ids, labels: (ids[:0], labels[:0]), PROBLEM, NO_TOKENS),
        (lambda ids, labels: (np.append(ids[:-1], 260), np.append(labels[:-1], 260)), PROBLEM, OUTSIDE),
        (lambda ids, labels: (np.append(ids[:-1], -1), np.append(labels[:-1], -1)), PROBLEM, OUTSIDE),
        (lambda ids, labels: (ids, np.full_like(labels, -100)), PROBLEM, NOTHING_SUPERVISED),
        (lambda ids, labels: (ids[:-1], labels[:-1]), FINDING, NO_END),
    ],
)
def test_a_row_that_training_refuses_is_a_problem(change: Any, level: str, fault: str, byte_tokenizer: Any) -> None:
    samples = encoded(byte_tokenizer, asked("train", 9))
    ids, labels = change(samples[4].input_ids, samples[4].labels)
    samples[4] = Sample(ids.astype(np.int32), labels.astype(np.int32), 4)
    told = levels(byte_tokenizer, samples)
    assert (level, True) in [
        (found, f"1 of 9 rows (11.1 %): {fault}" in text and "row 4" in text) for found, text in told
    ]
    assert told[0][0] == level  # the gravest stands first


@pytest.mark.parametrize(
    ("answer", "level", "fault"),
    [
        ("", FINDING, EMPTY_ANSWER),
        (" \n", FINDING, EMPTY_ANSWER),
        (".", FINDING, SHORT_ANSWER),
        ("B", NOTE, ONE_LETTER),
    ],
)
def test_answers_that_say_next_to_nothing_are_told(answer: str, level: str, fault: str, byte_tokenizer: Any) -> None:
    told = levels(byte_tokenizer, encoded(byte_tokenizer, [*asked("train", 9), ("last?", answer)]))
    assert [(found, fault in text and "row 9" in text) for found, text in told] == [(level, True)]


@pytest.mark.parametrize("overlong", ["error", "truncate", "drop", "split"])
def test_what_the_context_length_cuts_is_counted(overlong: str, byte_tokenizer: Any) -> None:
    limits = SampleLimits(32, 2**31, 260, overlong)
    rows = [*asked("train", 5), ("x" * 20, "y" * 60), ("x" * 50, "y")]
    samples = encoded(byte_tokenizer, rows)
    profile = profile_split("train", samples, byte_tokenizer, limits)
    assert profile.overlong == 2
    fits = [len(sample.input_ids) for sample in samples[:5]]
    # <s>, 20 x, 60 y, </s> is 82 tokens: 32 + 32 + 18; <s>, 50 x, y, </s> is 53: of 32 + 21 only the second is learned
    kept = {"error": [], "truncate": [32], "drop": [], "split": [32, 32, 18, 21]}[overlong]
    assert profile.kept_lengths == fits + kept
    told = [(finding.level, finding.text) for finding in findings([profile], [])]
    assert [level for level, text in told if "longer than --context_length 32" in text] == [
        PROBLEM if overlong == "error" else FINDING
    ]
    if overlong == "error":
        assert told[0][1].endswith("; raise it, or say with --overlong what becomes of them: truncate, drop or split")
    lost = profile.tokens - sum(fits) - sum(kept)
    assert overlong == "error" or f"leaves out {lost:,} tokens" in told[0][1]


def test_the_models_own_positions_cannot_be_raised(byte_tokenizer: Any) -> None:
    profile = profile_split(
        "train", encoded(byte_tokenizer, asked("train", 5)), byte_tokenizer, SampleLimits(64, 8, 260)
    )
    told = findings([profile], [])[0].text
    assert "longer than the model's 8 positions; say with --overlong what becomes of them: truncate, drop or" in told


def test_overlap_by_each_kind_is_a_finding_of_its_own(byte_tokenizer: Any) -> None:
    def told(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> list[str]:
        profiles = [
            profile_split(name, encoded(byte_tokenizer, rows), byte_tokenizer, LIMITS)
            for name, rows in (("train", train), ("test", test))
        ]
        found = findings(profiles, overlaps_of(profiles))
        return [finding.text for finding in found if finding.level == FINDING]

    shared = told(asked("a", 10), [*asked("b", 8), ("a 1?", "is 1"), ("A 2 ?", "is 2")])
    assert shared == [
        "test and train: 2 of 10 rows (20.0 %) of test ask what train asks (1 token by token, 1 with the same answer)"
    ]
    assert "the very same rows" in " ".join(told(asked("a", 10), asked("a", 10)))
    sums = [(f"What is {a} - {b}?", str(a - b)) for a in range(5) for b in range(4)]
    others = [(f"Take {b} from {a}.", str(a - b)) for a in range(5) for b in range(4)]
    assert told(sums, others) == [
        "test and train: by the same numbers in the question and the same answer, 20 of 20 rows (100.0 %) of test "
        "stand in train"
    ]


@pytest.mark.parametrize(("allowed", "level"), [(0, PROBLEM), (3, PROBLEM), (4, FINDING)])
def test_bad_rows_are_a_problem_where_there_are_more_than_may_be_left_out(
    allowed: int, level: str, byte_tokenizer: Any
) -> None:
    samples = encoded(byte_tokenizer, asked("a", 30))
    samples[3] = replace(samples[3], labels=np.full_like(samples[3].labels, -100))
    samples[4] = replace(samples[4], labels=np.where(samples[4].labels > 0, samples[4].labels + 1, -100))
    bad = BadRows(allowed=9)
    bad.note(BadRowError("a.csv:2", "1 field"))
    bad.note(BadRowError("a.csv:7", "1 field"))
    bad.allowed = allowed
    told = findings([profile_split("train", samples, byte_tokenizer, LIMITS, bad)], [])
    more = f" (4 with those below), and skip_bad_rows allows {allowed}" if level == PROBLEM else " left out"
    assert (told[0].level, told[0].text) == (level, f"train: 2 bad rows{more}: a.csv:2, a.csv:7: 1 field")
    others = {finding.text.split(": ")[2]: finding.level for finding in told[1:]}
    assert others[WRONG_LABEL] == level
    assert level in (found for text, found in others.items() if text.startswith(NOTHING_SUPERVISED))


# --- the trainer's part -----------------------------------------------------------------------------------------------


def test_the_trainer_is_told_nothing_of_healthy_data(byte_tokenizer: Any) -> None:
    loaders = {name: loader(encoded(byte_tokenizer, asked(name, 40))) for name in ("training", "validation")}
    assert quick_findings(loaders, byte_tokenizer) == []
    assert quick_findings({**loaders, "validation": None}, byte_tokenizer) == []


def test_the_trainer_is_told_of_shared_and_repeated_rows(byte_tokenizer: Any) -> None:
    training = asked("a", 40)
    validation = [*asked("b", 5), ("a 3?", "is 3"), ("a 4?", "else"), ("a 4?", "else")]
    loaders = {
        "training": loader(encoded(byte_tokenizer, training)),
        "validation": loader(encoded(byte_tokenizer, validation), seed=None),
    }
    assert [text for text in quick_findings(loaders, byte_tokenizer) if "padding" not in text] == [
        "validation: 1 of 8 rows (12.5 %) repeat another row, question and answer",
        "validation: 3 of 8 rows (37.5 %) ask what training asks, 1 of them with the same answer",
    ]


@pytest.mark.parametrize("lint", [lint for lint in LINTS if lint != NOTHING_SUPERVISED])
def test_the_trainer_is_told_of_every_lint(lint: str, byte_tokenizer: Any) -> None:
    from llmrecipes.data import lints

    change = {
        lints.NO_START: lambda ids, labels: (ids[1:], labels[1:]),
        lints.TWO_STARTS: lambda ids, labels: (np.append(ids[:1], ids), np.append(labels[:1], labels)),
        lints.NO_END: lambda ids, labels: (ids[:-1], labels[:-1]),
        lints.END_IGNORED: lambda ids, labels: (ids, np.append(labels[:-1], -100)),
        lints.ALL_SUPERVISED: lambda ids, labels: (ids, ids),
    }[lint]
    samples = encoded(byte_tokenizer, asked("a", 40))
    changed = [Sample(*(part.astype(np.int32) for part in change(s.input_ids, s.labels)), s.row) for s in samples]
    told = quick_findings({"training": loader([*samples[:20], *changed[20:]])}, byte_tokenizer)
    assert len(told) == 1
    assert told[0].startswith(f"training: 20 of 40 rows (50.0 %): {lint} (")
    assert told[0].endswith("rows 20, 21, 22, 23, 24 and 15 more")


def test_the_trainer_is_told_of_much_padding(byte_tokenizer: Any) -> None:
    rows = [(f"{number} " + "x" * (40 * (number % 4 == 0)), "y") for number in range(40)]
    samples = encoded(byte_tokenizer, rows)
    padded = loader(samples, strategy="padding")
    told = [text for text in quick_findings({"training": padded}, byte_tokenizer) if "padding" in text]
    assert told == [
        f"training: {padding_share(padded):.0%} of the tokens computed are padding; --batching_strategy packing would "
        "have less"
    ]
    own = replace(padded, collator=lambda rows: {name: [row[name][:5] for row in rows] for name in rows[0]})
    assert not any("padding" in text for text in quick_findings({"training": own}, byte_tokenizer))


def test_the_trainers_part_takes_under_a_second_for_fifteen_thousand_samples(byte_tokenizer: Any) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(50, 400, 15_000)
    ids = generator.integers(4, 260, int(lengths.sum()), dtype=np.int32)
    labels = np.where(generator.random(len(ids)) < 0.2, ids, -100).astype(np.int32)
    ends = np.cumsum(lengths)
    samples = [
        Sample(ids[end - length : end], labels[end - length : end], row)
        for row, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True))
    ]
    training = loader(samples, row_tokens=4096)
    training.window_rows(0)  # the trainer plans its batches anyway
    started = time.process_time()
    quick_findings({"training": training}, byte_tokenizer)
    assert time.process_time() - started < 1.0


def test_rows_in_a_report_are_those_of_the_preprocessor(byte_tokenizer: Any) -> None:
    samples = [replace(sample, row=sample.row * 10) for sample in encoded(byte_tokenizer, asked("a", 9))]
    samples[3] = replace(samples[3], labels=np.append(samples[3].labels[:-1], -100).astype(np.int32))
    assert "row 30" in quick_findings({"training": loader(samples)}, byte_tokenizer)[0]
    assert levels(byte_tokenizer, samples)[0][1].endswith("row 30")
