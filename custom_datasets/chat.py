"""Chat: your own conversations, in any common layout and any chat template, without writing a preprocessor.

    python -m llmrecipes.finetuning --dataset chat_dataset --chat_dataset.data_path train.jsonl \\
        --chat_dataset.template llama2 --chat_dataset.validation_rows 100 --model_name MODEL --output_dir OUTPUT

The layout is known by the columns of the first row:

    {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]}     OpenAI
    {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]}         ShareGPT
    {"instruction": "Translate.", "input": "chat", "output": "cat"}                                      Alpaca
    {"prompt": "Which?", "completion": "This."}        or response, answer, output; instruction, question
    {"text": "Once upon a time."}                      every token is supervised: continued pretraining, no template

A column `system` or `system_prompt` is the system prompt. `data_path` is a file (CSV, JSON, JSON lines, parquet), a
folder with one file a split, `hub:NAME`, or several of these with weights: `a.jsonl=0.7,b.jsonl=0.3`.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from llmrecipes.data.conversations import (
    Conversation,
    encode_conversations,
    layout_of,
    marks_pattern,
    read_conversation,
)
from llmrecipes.data.mixing import HoldOut, Source, draw_counts, sources_of
from llmrecipes.data.rows import Rows, bad_rows
from llmrecipes.data.templates import Template, template_of
from llmrecipes.data.turns import ASSISTANT
from llmrecipes.errors import ConfigError, DataError
from llmrecipes.prompts import SAMPLES_AT_ONCE

Sample = dict[str, list[int]]

OWN_TEMPLATE = "tokenizer"
"""The template where the user names none."""

log = logging.getLogger("llmrecipes")


def get_preprocessed_chat(dataset_config: Any, tokenizer: Any, split: str) -> Rows[Sample]:
    """Returns the split's samples: what `train_on` names is supervised, with the token that ends each answer.

    A question at the end of a chat has no answer to learn from, so it is left out, and so is a chat of nothing else.
    """
    template = template_of(dataset_config.template, dataset_config.prompt_format)
    try:
        template.check(tokenizer)
    except ConfigError:
        if dataset_config.template != OWN_TEMPLATE or not _is_readable_text(dataset_config, split):
            raise
    sources, rows = _sources(dataset_config, split)
    if dataset_config.template != OWN_TEMPLATE and _is_text(rows):
        raise ConfigError(
            f"--chat_dataset.template {dataset_config.template} would have no effect: {dataset_config.data_path} is "
            "plain text (a column 'text'), which no template lays out; leave it out, or give chats"
        )
    chats = Chats(dataset_config, tokenizer, template, split, sources, rows)
    return Rows(chats.samples, dataset_config.data_path, lambda: sum(each.estimate() for each in rows))


def _sources(config: Any, split: str) -> tuple[list[Source], list[Rows[Any]]]:
    """Returns the sources that a split is read from, and the rows of each."""
    sources = sources_of(config.data_path)
    return sources, [source.rows(config, _read_split(source, config, split)) for source in sources]


def _is_text(rows: Sequence[Rows[Any]]) -> bool:
    """Returns whether all sources are plain text."""
    return all(layout_of(each.first).is_text for each in rows)


def _is_readable_text(config: Any, split: str) -> bool:
    try:
        return _is_text(_sources(config, split)[1])
    except DataError:
        return False


@dataclass
class Said:
    """What the user is told of a split's conversations, counted while they are gone through."""

    marks: Any = None
    """finds control tokens and the template's marks where a turn spells them out"""
    without: Counter[str] = field(default_factory=Counter)
    """source -> chats without an answer"""
    cut: int = 0
    alike: int = 0
    texts: int = 0
    found: Counter[str] = field(default_factory=Counter)

    def note(self, chat: Conversation) -> None:
        """Counts one conversation."""
        self.texts += chat.is_text
        self.cut += not chat.is_text and chat.turns[-1].role != ASSISTANT
        self.alike += chat.has_neighbours
        mark = chat.spelled_out(self.marks)
        self.found.update([mark] if mark else [])

    def unanswered(self, path: str, train_on: str) -> str | None:
        """Returns what of a source is left out for want of an answer, and begins to count the next one's."""
        cut, texts = self.cut, self.texts
        self.cut = self.texts = 0
        if texts:
            return f"{path} is plain text: every token is supervised, without a template (continued pretraining)"
        told = [f"{self.without[path]} chats without an answer"] if self.without[path] else []
        told += [f"the turns behind the last answer of {cut} chats"] if cut and train_on != "all" else []
        return f"{path}: left out {' and '.join(told)}" if told else None

    @property
    def neighbours(self) -> str | None:
        """A notice of turns that are joined, or None."""
        return f"in {self.alike} chats, turns of one role in a row are joined by a blank line" if self.alike else None

    @property
    def spelled(self) -> str | None:
        """A notice of control tokens and marks that stand in the chats as text, or None."""
        if not self.found:
            return None
        told = ", ".join(f"{mark!r} in {count}" for mark, count in self.found.most_common(3))
        return f"texts that spell out what the template or tokenizer marks turns with stay text: {told}"


@dataclass
class Chats:
    """The conversations of one split. They are gone through twice where some are held out or sources are weighed."""

    config: Any
    tokenizer: Any
    template: Template
    split: str
    sources: Sequence[Source]
    rows: Sequence[Rows[Any]]
    said: Said = field(default_factory=Said)

    def samples(self) -> Iterator[Sample]:
        """Yields the samples of all sources; says at the end what was left out."""
        self.said = Said(marks=marks_pattern(self.tokenizer, self.template))
        hold_out = self._hold_out()
        draws = self._draws(hold_out)
        for place, source in enumerate(self.sources):
            counts = iter(draws[place]) if draws else repeat(1)
            for sample in self._encoded(place, hold_out, note=True):
                yield from repeat(sample, next(counts))
            self._say(self.said.unanswered(source.path, self.config.train_on))
        if self.template.alternates:
            self._say(self.said.neighbours)
        self._say(self.said.spelled)

    def _encoded(self, place: int, hold_out: HoldOut | None, *, note: bool) -> Iterator[Sample]:
        """Yields the samples of a source; `note`: what is said of its conversations is counted."""
        waiting = self._chosen(place, hold_out)
        while chats := list(islice(waiting, SAMPLES_AT_ONCE)):
            for chat in chats if note else ():
                self.said.note(chat)
            yield from encode_conversations(self.tokenizer, self.template, chats, self.config.train_on)

    def _usable(self, place: int, hold_out: HoldOut | None) -> int:
        """Returns how many samples a source has; where rows may be left out, only tokenizing tells which."""
        chats = self._encoded(place, hold_out, note=False) if bad_rows().allowed else self._chosen(place, hold_out)
        return sum(1 for _ in chats)

    def _chosen(self, place: int, hold_out: HoldOut | None) -> Iterator[Conversation]:
        """Yields the conversations of a source that this split is to have."""
        training = self.split == self.config.train_split
        for number, chat in enumerate(self._teaching(place)):
            if (
                hold_out is None
                or (training and not hold_out.asks(chat.question))
                or (not training and hold_out.has(chat.question, place, number))
            ):
                yield chat

    def _teaching(self, place: int) -> Iterator[Conversation]:
        """Yields the conversations of a source that teach something."""
        rows, source = self.rows[place], self.sources[place]
        layout = layout_of(rows.first)
        total = found = 0
        for chat in rows.map(lambda row: read_conversation(row, layout)):
            total += 1
            if chat.teaches(self.config.train_on):
                found += 1
                yield chat
        self.said.without[source.path] = total - found
        if not found:
            raise DataError(f"{source.path}, {self.split}: no row of {total} holds an answer to learn")

    def _hold_out(self) -> HoldOut | None:
        """Returns which conversations are held out to validate on, or None where every split has rows of its own."""
        divided = self.split in (self.config.train_split, self.config.test_split)
        if not self.config.validation_rows or not divided:
            return None
        questions = [(chat.question for chat in self._teaching(place)) for place in range(len(self.sources))]
        hold_out = HoldOut.of(questions, self.config.validation_rows, self.config.seed)
        if self.split == self.config.train_split and hold_out.twins:
            held = self.config.validation_rows
            self._say(f"held out {held} chats; left out {hold_out.twins} more that ask the same as one of them")
        return hold_out

    def _draws(self, hold_out: HoldOut | None) -> list[list[int]]:
        """Returns how often each conversation of each source is drawn; empty where every one is once."""
        if self.split != self.config.train_split or self.sources[0].weight is None:
            return []
        sizes = [self._usable(place, hold_out) for place in range(len(self.sources))]
        draws = draw_counts(sizes, [source.weight or 0 for source in self.sources], self.config.seed)
        for source, size, counts in zip(self.sources, sizes, draws, strict=True):
            least, most = min(counts), max(counts)
            often = (
                f"{size - sum(counts)} not used"
                if not least
                else f"each {least if least == most else f'{least} or {most}'} times"
            )
            self._say(f"{source.path}: {sum(counts)} samples drawn of {size} ({often}), the same in every epoch")
        return draws

    def _say(self, notice: str | None) -> None:
        if notice:
            log.warning("chat, %s: %s", self.split, notice)


def _read_split(source: Source, config: Any, split: str) -> str:
    """Returns the split to read: with `validation_rows` a single file's train split serves for both."""
    if not config.validation_rows or split not in (config.train_split, config.test_split):
        return split
    flag = "--chat_dataset.validation_rows"
    if config.train_split == config.test_split:
        raise ConfigError(f"{flag}: train_split and test_split are both {split!r}; give them different names")
    if Path(source.path).expanduser().is_dir():
        raise ConfigError(f"{flag}: {source.path} is a folder with one file per split; name the file, or leave it out")
    return str(config.train_split)
