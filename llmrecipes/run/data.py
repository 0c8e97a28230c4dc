"""Looking at data before it costs money: its tokens, its preprocessor's contract, its health."""

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from llmrecipes.batch import Sample
from llmrecipes.config.data_schema import DataCheckConfig, DataDoctorConfig, DataViewConfig
from llmrecipes.config.loading import Loaded
from llmrecipes.config.options import listed
from llmrecipes.config.schema import ModelOptions
from llmrecipes.data.contract import FAIL, check_contract, read_samples
from llmrecipes.data.health import (
    FINDING,
    NOTE,
    PROBLEM,
    Finding,
    Profile,
    findings,
    overlaps_of,
    profile_split,
)
from llmrecipes.data.limits import SampleLimits
from llmrecipes.data.lints import marks_of, sample_lints
from llmrecipes.data.loaders import Loader
from llmrecipes.data.overlap import Overlap
from llmrecipes.data.plans import BatchSettings, batch_plans
from llmrecipes.data.preprocessors import dataset_section, load_preprocessor
from llmrecipes.data.rows import BadRows, allowed_bad_rows, faults_text
from llmrecipes.errors import ConfigError, DataError, PluginError
from llmrecipes.models.loading import load_tokenizer, model_limits, resolve_model
from llmrecipes.plugins import Plugin, plugin_folders
from llmrecipes.prompts import IGNORED_LABEL
from llmrecipes.reports.findings import checks_text, findings_text, lengths_text, share_text, table_text, verdict
from llmrecipes.reports.format import percent
from llmrecipes.reports.tokens import ANSWER, PROMPT, REST, Shown, Token, page, samples_text
from llmrecipes.run.preparing import set_seeds

EXIT_FOUND = 2
"""A promise of the preprocessor is broken; with `--strict`, the doctor found something."""

EXTRA_SPLIT = "test"
"""The doctor looks at it unasked, where a data set has it."""

PLAN_HEADER = ("batches", "rows", "steps", "not padding", "of context_length filled")

log = logging.getLogger("llmrecipes")

DataConfig = DataViewConfig | DataCheckConfig | DataDoctorConfig


@dataclass(frozen=True)
class Source:
    """Where samples come from, and what they must keep to."""

    preprocessor: Plugin
    section: Any
    tokenizer: Any
    vocabulary_size: int
    max_positions: int

    def samples(self, split: str, bad: BadRows) -> Iterator[Sample]:
        """Yields a split's samples as the preprocessor makes them; what cannot be used is noted in `bad`."""
        return read_samples(self.preprocessor, self.section, self.tokenizer, split, bad)

    def bad_rows(self) -> BadRows:
        """Returns where the bad rows of one split are to be noted."""
        return BadRows(allowed_bad_rows(self.section))

    def profile(self, split: str, limits: SampleLimits) -> Profile:
        """Returns the profile of a split."""
        bad = self.bad_rows()
        return profile_split(split, self.samples(split, bad), self.tokenizer, limits, bad)

    @property
    def name(self) -> str:
        """The preprocessor as the user would name it."""
        return f"{self.preprocessor.path.name}:{self.preprocessor.name}"


def view(loaded: Loaded[DataViewConfig], config_path: str | None) -> int:
    """Prints samples token by token and writes them as a page where one is asked for; returns the exit code."""
    config = loaded.config
    source = build_source(config, config_path)
    set_seeds(config.seed)
    split = config.split or source.section.train_split
    numbers = wanted_rows(config.rows) if config.rows else list(range(config.samples))
    choose = packed_rows_shown if config.packed else samples_shown
    bad = source.bad_rows()
    shown = choose(config, source, split, numbers, source.samples(split, bad))
    tell_bad_rows(source, split, bad)
    tell_missing(config, split, numbers, len(shown))
    Console().print(samples_text(shown, config.listed_tokens), soft_wrap=True, end="")
    if config.html:
        write_page(Path(config.html).expanduser(), page(f"{source.name}, {split}", shown))
    return 0


def check(loaded: Loaded[DataCheckConfig], config_path: str | None) -> int:
    """Prints which promises a preprocessor keeps; returns 0, or 2 where one is broken."""
    config = loaded.config
    source = build_source(config, config_path)
    splits = config.splits or own_splits(source.section)
    checks = check_contract(source.preprocessor, source.section, source.tokenizer, splits, source.vocabulary_size)
    broken = sum(check.outcome == FAIL for check in checks)
    print(f"{source.name}, splits {listed(splits).replace(' or ', ' and ')}")
    print(checks_text([(check.outcome, check.promise, check.detail) for check in checks]))
    print(f"{broken} of {len(checks)} promises broken" if broken else "the contract is kept")
    return EXIT_FOUND if broken else 0


def doctor(loaded: Loaded[DataDoctorConfig], config_path: str | None) -> int:
    """Prints how healthy a data set is; returns 0, or with `--strict` 2 where something was found."""
    config = loaded.config
    source = build_source(config, config_path)
    set_seeds(config.seed)
    limits = SampleLimits(config.context_length, source.max_positions, source.vocabulary_size, config.overlong)
    profiles, notes = profiles_of(config, source, limits)
    overlaps = overlaps_of(profiles)
    told = [*findings(profiles, overlaps), *notes]
    print("\n\n".join([profiles_text(source, profiles), *plans_text(config, profiles), *overlaps_text(overlaps)]))
    print("\n" + findings_text([(finding.level, finding.text) for finding in told]))
    problems, found = (sum(finding.level == level for finding in told) for level in (PROBLEM, FINDING))
    print("\n" + verdict(problems, found))
    return EXIT_FOUND if config.strict and problems + found else 0


def build_source(config: DataConfig, config_path: str | None) -> Source:
    """Returns preprocessor, tokenizer and limits; without a model only the tokenizer limits the ids."""
    if not config.model_name and not config.tokenizer_name:
        raise ConfigError("--tokenizer_name or --model_name is required: samples are made with a tokenizer")
    preprocessor = load_preprocessor(config, plugin_folders(config_path))
    logging.getLogger("transformers").setLevel(logging.ERROR)  # what it says of long texts is said here by row
    options = ModelOptions(
        model_name=config.model_name or "",
        tokenizer_name=config.tokenizer_name,
        model_revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    model = resolve_model(options) if config.model_name else ""
    tokenizer = load_tokenizer(options, model)
    vocabulary_size, max_positions = model_limits(options, model) if model else (len(tokenizer), 2**31)
    return Source(preprocessor, dataset_section(config), tokenizer, vocabulary_size, max_positions)


def own_splits(section: Any) -> list[str]:
    """Returns the splits that fine-tuning would read."""
    return list(dict.fromkeys([section.train_split, section.test_split]))


# --- view -------------------------------------------------------------------------------------------------------------


def wanted_rows(words: Sequence[str]) -> list[int]:
    """Returns `--rows` as numbers; raises `ConfigError`."""
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise ConfigError(f"--rows {wrong[0]}: expected whole numbers counted from 0, such as 3,17")
    return [int(word) for word in words]


def tell_missing(config: DataViewConfig, split: str, numbers: Sequence[int], found: int) -> None:
    """Raises `ConfigError` where rows were named that are not there, or where there are none at all."""
    if not found or (config.rows and found < len(set(numbers))):
        what = "packed rows" if config.packed else "samples"
        asked = f"--rows {','.join(config.rows)}" if config.rows else f"--samples {config.samples}"
        raise ConfigError(f"{asked}: the split {split} has fewer {what}; {found} of those asked for are there")


def tell_bad_rows(source: Source, split: str, bad: BadRows) -> None:
    """Says which rows could not be shown, and whether training would do without them."""
    if bad.count:
        way = "" if bad.count <= bad.allowed else f"; skip_bad_rows allows {bad.allowed}, so training would refuse them"
        log.warning(
            "%s, split %s: left out %d bad rows: %s%s", source.name, split, bad.count, faults_text(bad.faults), way
        )


def samples_shown(
    config: DataViewConfig, source: Source, split: str, numbers: Sequence[int], samples: Iterator[Sample]
) -> list[Shown]:
    """Returns the samples of these numbers as they are shown; no row behind the last of them is read."""
    marks = marks_of(source.tokenizer)
    chosen = {}
    for sample in samples:
        if sample.row in numbers:
            chosen[sample.row] = sample
        if sample.row >= max(numbers):
            break
    shown = []
    for number in dict.fromkeys(numbers):
        if number in chosen:
            sample = chosen[number]
            lints = sample_lints(sample, source.tokenizer, marks) if len(sample.input_ids) else ["no tokens in it"]
            ones = np.ones(len(sample.input_ids), dtype=np.int64)
            tokens = tokens_of(source.tokenizer, sample.input_ids, sample.labels, ones)
            shown.append(Shown(f"{split}, sample {number}", tokens, tuple(lints)))
    return shown


def packed_rows_shown(
    config: DataViewConfig, source: Source, split: str, numbers: Sequence[int], samples: Iterator[Sample]
) -> list[Shown]:
    """Returns rows of the first epoch as training packs them: the very tensors."""
    marks = marks_of(source.tokenizer)
    fitting = [s for s in samples if 0 < len(s.input_ids) <= config.context_length]
    loader = Loader(
        samples=fitting, strategy="packing", row_tokens=config.context_length, batch_rows=1, seed=config.seed
    )
    rows = loader.rows(0) if fitting else []
    shown = []
    for number in dict.fromkeys(number for number in numbers if number < len(rows)):
        batch = loader.batch([rows[number]])
        held = [fitting[index] for index in rows[number]]
        lints = [f"sample {s.row}: {lint}" for s in held for lint in sample_lints(s, source.tokenizer, marks)]
        documents, labels = batch.documents[0].numpy(), batch.labels[0].numpy()
        tokens = tokens_of(source.tokenizer, batch.input_ids[0].numpy(), labels, documents)
        title = f"{split}, packed row {number}: samples {', '.join(str(sample.row) for sample in held)}"
        shown.append(Shown(title, tokens, tuple(lints)))
    return shown


def tokens_of(tokenizer: Any, input_ids: Any, labels: Any, documents: Any) -> tuple[Token, ...]:
    """Returns one row's tokens as they are shown; all arrays are [tokens], padding (document 0) is left out."""
    control = set(tokenizer.all_special_ids)
    control |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens: list[Token] = []
    for document in range(1, int(documents.max(initial=0)) + 1):
        mine = documents == document
        ids, supervised = input_ids[mine].tolist(), (labels[mine] != IGNORED_LABEL).tolist()
        last = max((place for place, learned in enumerate(supervised) if learned), default=len(ids))
        texts = token_texts(tokenizer, ids, control)
        for position, (number, learned, text) in enumerate(zip(ids, supervised, texts, strict=True)):
            segment = ANSWER if learned else PROMPT if position < last else REST
            enters = learned and position > 0
            tokens.append(Token(position, document, number, text, segment, enters, number in control))
    return tuple(tokens)


def token_texts(tokenizer: Any, ids: Sequence[int], control: Iterable[int]) -> list[str]:
    """Returns each token's own text, its leading blank included; of a part of a character, its name."""
    names = {number: str(tokenizer.convert_ids_to_tokens(number)) for number in {*ids} & {*control}}
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before = len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
    for number in {*ids} - {*names}:
        if not 0 <= number < len(tokenizer):
            names[number] = f"(no token: {number})"
            continue
        text = tokenizer.decode([*anchor, number], clean_up_tokenization_spaces=False)[before:]
        names[number] = str(tokenizer.convert_ids_to_tokens(number)) if "\ufffd" in text else text
    return [names[number] for number in ids]


def write_page(path: Path, content: str) -> None:
    """Writes the page and says where it is."""
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: it cannot be written: {error.strerror}") from None
    print(f"wrote {path}", file=sys.stderr)


# --- doctor -----------------------------------------------------------------------------------------------------------


def profiles_of(config: DataDoctorConfig, source: Source, limits: SampleLimits) -> tuple[list[Profile], list[Finding]]:
    """Returns the profile of each split, and a note where there is no split `test`."""
    splits = list(dict.fromkeys(config.splits)) or own_splits(source.section)
    profiles = [source.profile(split, limits) for split in splits]
    if config.splits or EXTRA_SPLIT in splits:
        return profiles, []
    try:
        return [*profiles, source.profile(EXTRA_SPLIT, limits)], []
    except (DataError, PluginError) as error:
        why = str(error).splitlines()[0]
        return profiles, [Finding(NOTE, f"no split {EXTRA_SPLIT} was looked at ({why})")]


def profiles_text(source: Source, profiles: Sequence[Profile]) -> str:
    """Returns how many rows and tokens each split has, and how long the samples of the first are."""
    reason = profiles[0].limits.reason.removeprefix("--")
    rows = [
        [
            profile.split,
            f"{profile.rows:,}",
            f"{profile.tokens:,}",
            share_text(profile.supervised, profile.tokens),
            share_text(profile.overlong, profile.rows),
        ]
        for profile in profiles
    ]
    table = table_text(["split", "rows", "tokens", "supervised", f"longer than {reason}"], rows)
    return f"{source.name}\n\n{table}\n\n{profiles[0].split}, {lengths_text(profiles[0].lengths)}".rstrip(", ")


def plans_text(config: DataDoctorConfig, profiles: Sequence[Profile]) -> list[str]:
    """Returns a table of an epoch as set, with batches filled in other ways, and of a validation as set."""
    settings = BatchSettings(
        config.batching_strategy,
        config.context_length,
        config.batch_size_training,
        config.gradient_accumulation_steps,
        config.seed,
        config.group_by_length,
    )
    validating = replace(settings, batch_rows=config.val_batch_size, window_batches=1, seed=None, group_by_length=False)
    tables = []
    for profile, chosen in zip(profiles[:2], (settings, validating), strict=False):
        plans = batch_plans(profile.kept_lengths, chosen)[: None if chosen is settings else 1]
        names = [f"{plan.name}{'' if place else ' (as set)'}" for place, plan in enumerate(plans)]
        rows = [
            [name, f"{plan.rows:,}", f"{plan.steps:,}", percent(plan.useful_share), percent(plan.fill)]
            for name, plan in zip(names, plans, strict=True)
        ]
        title = (
            f"an epoch of {profile.split}: {len(profile.kept_lengths):,} samples, {profile.kept_tokens:,} tokens, "
            f"{profile.kept_supervised:,} supervised; context_length {config.context_length:,}, "
            f"rows a step {chosen.batch_rows * chosen.window_batches:,}"
        )
        tables += [f"{title}\n{table_text(PLAN_HEADER, rows)}"] if plans else []
    return tables


def overlaps_text(overlaps: Sequence[Overlap]) -> list[str]:
    """Returns a table of what splits share, in rows of the later split."""
    if not overlaps:
        return []
    header = ["rows that stand in", "whole row", "question", "normalised", "near", "a run of 13", "numbers and answer"]
    rows = []
    for pair in overlaps:
        counts = [pair.same_rows, pair.same_questions, pair.normalised_questions, pair.near, pair.touched]
        numbers = "-" if pair.same_numbers is None else share_text(pair.same_numbers, pair.rows)
        shares = [share_text(number, pair.rows) for number in counts]
        rows.append([f"{pair.split} in {pair.reference}", *shares, numbers])
    return [table_text(header, rows)]
