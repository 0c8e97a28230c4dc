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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrecipes.data.conversations import (
    BadRows,
    Conversation,
    encode_conversations,
    layout_of,
    marks_pattern,
    read_conversation,
)
from llmrecipes.data.mixing import Source, drawn, held_out, sources_of
from llmrecipes.data.templates import Template, template_of
from llmrecipes.data.turns import ASSISTANT
from llmrecipes.errors import ConfigError, DataError

Sample = dict[str, list[int]]

log = logging.getLogger("llmrecipes")


def get_preprocessed_chat(dataset_config: Any, tokenizer: Any, split: str) -> list[Sample]:
    """Returns the split's samples: what `train_on` names is supervised, with the token that ends each answer.

    A question at the end of a chat has no answer to learn from, so it is left out, and so is a chat of nothing else.
    """
    config = dataset_config
    template = template_of(config.template, config.prompt_format)
    template.check(tokenizer)
    bad = BadRows(config.skip_bad_rows)
    sources = sources_of(config.data_path)
    chats = [_chats(source, config, split, bad) for source in sources]
    if config.validation_rows:
        chats = _divided(chats, config, split)
    if template.alternates:
        _say(split, _neighbours(chats))
    _say(split, _spelled_out(tokenizer, template, chats))
    samples = [encode_conversations(tokenizer, template, part, config.train_on, bad) for part in chats]
    bad.check()
    _say(split, bad.notice)
    if split == config.train_split and sources[0].weight is not None:
        samples = _mixed(sources, samples, config.seed, split)
    return [sample for part in samples for sample in part]


def _chats(source: Source, config: Any, split: str, bad: BadRows) -> list[Conversation]:
    """Returns the conversations of one source that teach something; says what is left out."""
    rows = source.rows(config, _read_split(source, config, split))
    layout = layout_of(rows[0])
    log.info("chat, %s: %s: %d rows read as %s", split, source.path, len(rows), layout.name)
    read = []
    for row in rows:
        with bad.at(row.place):
            read.append(read_conversation(row, layout))
    bad.check()
    chats = [chat for chat in read if chat.teaches(config.train_on)]
    if not chats:
        raise DataError(f"{source.path}, {split}: no row of {len(rows)} holds an answer to learn")
    if chats[0].is_text:
        _say(
            split, f"{source.path} is plain text: every token is supervised, without a template (continued pretraining)"
        )
    else:
        _say(split, _unanswered(source, len(read) - len(chats), chats if config.train_on != "all" else ()))
    return chats


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


def _divided(chats: Sequence[Sequence[Conversation]], config: Any, split: str) -> list[list[Conversation]]:
    """Returns each source's conversations that are held out, or those that are left to train on."""
    if split not in (config.train_split, config.test_split):
        return [list(part) for part in chats]
    every = [(place, chat) for place, part in enumerate(chats) for chat in part]
    held, train = held_out([chat.question for _, chat in every], config.validation_rows, config.seed)
    twins = len(every) - len(held) - len(train)
    if split == config.train_split and twins:
        _say(split, f"held out {len(held)} chats; left out {twins} more that ask the same as one of them")
    chosen = [every[index] for index in (train if split == config.train_split else held)]
    return [[chat for at, chat in chosen if at == place] for place in range(len(chats))]


def _mixed(sources: Sequence[Source], samples: Sequence[list[Sample]], seed: int, split: str) -> list[list[Sample]]:
    """Returns the samples drawn of each source by its weight; says how many."""
    sizes = [len(part) for part in samples]
    draws = drawn(sizes, [source.weight or 0 for source in sources], seed)
    for source, size, draw in zip(sources, sizes, draws, strict=True):
        least, most = len(draw) // size, -(-len(draw) // size)
        often = (
            f"{size - len(draw)} not used"
            if not least
            else f"each {least if least == most else f'{least} or {most}'} times"
        )
        _say(split, f"{source.path}: {len(draw)} samples drawn of {size} ({often}), the same in every epoch")
    return [[part[index] for index in draw] for part, draw in zip(samples, draws, strict=True)]


# --- what is said -----------------------------------------------------------------------------------------------------


def _say(split: str, notice: str | None) -> None:
    if notice:
        log.warning("chat, %s: %s", split, notice)


def _unanswered(source: Source, without: int, chats: Sequence[Conversation]) -> str | None:
    """Returns what is left out for want of an answer, or None."""
    cut = sum(chat.turns[-1].role != ASSISTANT for chat in chats)
    told = [f"{without} chats without an answer"] if without else []
    told += [f"the turns behind the last answer of {cut} chats"] if cut else []
    return f"{source.path}: left out {' and '.join(told)}" if told else None


def _neighbours(chats: Sequence[Sequence[Conversation]]) -> str | None:
    count = sum(chat.has_neighbours for part in chats for chat in part)
    return f"in {count} chats, turns of one role in a row are joined by a blank line" if count else None


def _spelled_out(tokenizer: Any, template: Template, chats: Sequence[Sequence[Conversation]]) -> str | None:
    """Returns a notice of control tokens and marks that stand in the chats as text, or None."""
    marks = marks_pattern(tokenizer, template)
    found = Counter(mark for part in chats for chat in part if (mark := chat.spelled_out(marks)))
    told = ", ".join(f"{mark!r} in {count}" for mark, count in found.most_common(3))
    return f"texts that spell out what the template or tokenizer marks turns with stay text: {told}" if told else None
