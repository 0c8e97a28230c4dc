"""Guanaco: chats of people with an assistant, in many languages and often of several turns.

    llmrecipes data create guanaco --source openassistant_best_replies_train.jsonl     (or without --source: the hub)
    python -m llmrecipes.finetuning --dataset guanaco_dataset --guanaco_dataset.data_path data/guanaco \\
        --model_name MODEL --output_dir OUTPUT

Source: OpenAssistant Conversations (Köpf et al., 2023, https://arxiv.org/abs/2304.07327; Apache-2.0), the best
replies as chosen for Guanaco (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314). A row's `text` is read in
both layouts in which it goes round, and gives the same ids in both:

    ### Human: Which is the tallest?### Assistant: Everest.### Human: Where is it?### Assistant: In Nepal.
    <s>[INST] Which is the tallest? [/INST] Everest. </s><s>[INST] Where is it? [/INST] In Nepal. </s>

The model sees the second, the Llama-2 chat template without a system prompt, with one start token for all turns.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from llmrecipes.config.options import option
from llmrecipes.data.files import load_hub, load_rows, load_split, save_rows
from llmrecipes.data.rows import Row, Rows, text
from llmrecipes.errors import ConfigError, DataError
from llmrecipes.prompts import EncodedSamples, Piece, encode_samples, end_piece

HUB = "timdettmers/openassistant-guanaco"
"""Has the splits train and test."""

ROLE_MARK = re.compile(r"(?<!^#)(?<!^##)(?<!^###)### ?(Human|Assistant):", re.MULTILINE)
"""Often glued to the text before it, as in `Is it like C#### Assistant: No`; `#### Human: a species` is a heading."""
TURN_BREAK = re.compile(r"</s>\s*(?:<s>)?\s*(?=\[INST\])")


class Turn(NamedTuple):
    """What was asked and what was answered; None where the chat ends with the question."""

    question: str
    answer: str | None


def get_preprocessed_guanaco(dataset_config: Any, tokenizer: Any, split: str) -> EncodedSamples:
    """Returns the split's samples: the questions masked, every answer with its end token supervised.

    A question at the end of a chat has no answer to learn from, so it is left out, and so is a chat of nothing else.
    """
    rows = load_split(dataset_config, split, ("text",), hub_name=HUB)
    chats = _answered(rows, f"guanaco, {split}")
    return encode_samples(tokenizer, chats.map(lambda turns: _pieces(tokenizer, turns)))


def turns_of(row: Row) -> list[Turn]:
    """Returns the turns of a row in either layout; raises `DataError` where it has none, or a blank one inside."""
    content = text(row, "text").strip()
    turns = _template_turns(content) if re.match(r"(<s>)?\s*\[INST\]", content) else _marked_turns(content)
    if not turns:
        raise DataError(f"{row.place}: expected a text that begins with '### Human:' or '<s>[INST]': {content!r:.60}")
    if len(turns) > 1 and not turns[-1].answer:
        turns[-1] = Turn(turns[-1].question, None)
    for number, turn in enumerate(turns, start=1):
        if not turn.question or turn.answer == "":
            raise DataError(f"{row.place}: turn {number} has a blank {'answer' if turn.question else 'question'}")
    return turns


def _marked_turns(content: str) -> list[Turn]:
    """Splits at `### Human:` and `### Assistant:` where that role's turn has come.

    Any other heading is content, and so is the mark of the role that is speaking already.
    """
    marks: list[re.Match[str]] = []
    for mark in ROLE_MARK.finditer(content):
        if mark[1] == ("Assistant" if len(marks) % 2 else "Human"):
            marks.append(mark)
    if not marks or marks[0].start() > 0:
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(content)]
    parts: list[str | None] = [content[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
    parts += [None] * (len(parts) % 2)
    return [Turn(str(question), answer) for question, answer in zip(parts[::2], parts[1::2], strict=True)]


def _template_turns(content: str) -> list[Turn]:
    """Splits `<s>[INST] question [/INST] answer </s>`, any number of times; the last `</s>` may be missing."""
    turns = []
    for exchange in TURN_BREAK.split(content.removeprefix("<s>").removesuffix("</s>")):
        question, mark, answer = exchange.strip().removeprefix("[INST]").partition("[/INST]")
        turns.append(Turn(question.strip(), answer.strip() if mark else None))
    return turns


def _answered(rows: Rows[Row], title: str) -> Rows[list[Turn]]:
    """Returns the chats without the questions that have no answer; once gone through, logs how many those were."""

    def read() -> Iterator[list[Turn]]:
        total = questions = answered = 0
        for turns in rows.map(turns_of):
            total += 1
            questions += turns[-1].answer is None
            kept = turns[:-1] if turns[-1].answer is None else turns
            if kept:
                answered += 1
                yield kept
        if not answered:
            raise DataError(f"{title}: no row of {total} holds an answer")
        if questions:
            reason = "a question at the end, left out since it has no answer to learn from"
            logging.getLogger("llmrecipes").warning(
                "%s: %d of %d chats have %s; %d have nothing else", title, questions, total, reason, total - answered
            )

    return Rows(read, rows.place, rows.estimate)


def _pieces(tokenizer: Any, turns: Sequence[Turn]) -> list[Piece]:
    pieces = []
    for question, answer in turns:
        pieces += [Piece(f"[INST] {question} [/INST]"), Piece(str(answer), supervised=True), end_piece(tokenizer)]
    return pieces


@dataclass(frozen=True)
class GuanacoData:
    """llmrecipes data create guanaco: a smaller set in the Llama-2 chat template, divided in three."""

    source: str = option("", "file with a `text` column in either layout; empty: the hub's train split")
    output_dir: str = option("data/guanaco", "folder to write the three files to")
    train_rows: int = option(1000, "chats of the train split", at_least=1)
    validation_rows: int = option(100, "chats of the validation split", at_least=1)
    test_rows: int = option(100, "chats of the test split", at_least=1)
    seed: int = option(42, "the same seed chooses the same chats")


def create_data(config: GuanacoData) -> str:
    """Writes guanaco_train.jsonl, guanaco_validation.jsonl and guanaco_test.jsonl and returns what was written.

    Many chats open with the same question and differ in the replies: all of those go to one split.
    """
    if config.source:
        rows = load_rows(Path(config.source).expanduser(), ("text",))
    else:
        rows = load_hub(HUB, "train", ("text",), way_out="--source FILE")
    chats: dict[str, set[str]] = {}  # by opening question
    for turns in _answered(rows, "guanaco"):
        formatted = "".join(f"<s>[INST] {question} [/INST] {answer} </s>" for question, answer in turns)
        if _template_turns(formatted) == turns:  # else it spells out `[/INST]` and could not be read back
            chats.setdefault(turns[0].question, set()).add(formatted)
    openings = sorted(chats)
    Random(config.seed).shuffle(openings)
    folder = Path(config.output_dir).expanduser()
    splits = _divide([sorted(chats[opening]) for opening in openings], config)
    save_rows({folder / f"guanaco_{name}.jsonl": [{"text": chat} for chat in splits[name]] for name in splits})
    counts = ", ".join(f"{name} {len(splits[name])}" for name in splits)
    found = f"the source has {sum(map(len, chats.values()))} different chats with {len(openings)} opening questions"
    return f"Wrote {folder}/guanaco_*.jsonl: {counts} chats; {found}, and no opening question is in two splits."


def _divide(groups: Sequence[Sequence[str]], config: GuanacoData) -> dict[str, list[str]]:
    """Returns the chats of each split; no group is in two. What a split has no more room for is left out."""
    splits = {}
    rest = iter(groups)
    for name in ("validation", "test", "train"):
        wanted = getattr(config, f"{name}_rows")
        chosen: list[str] = []
        while len(chosen) < wanted:
            group = next(rest, None)
            if group is None:
                total = sum(map(len, groups))
                raise ConfigError(
                    f"the source has {total} different chats with {len(groups)} different opening questions, too few "
                    f"for --{name}_rows {wanted} after the splits before it: ask for fewer rows"
                )
            chosen += group[: wanted - len(chosen)]
        splits[name] = chosen
    return splits
