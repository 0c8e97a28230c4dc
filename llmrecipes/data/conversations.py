"""Rows of any common layout, told apart by their columns, to conversations; a conversation to a sample.

    layout = layout_of(rows[0])
    conversation = read_conversation(rows[0], layout)
    samples = encode_conversations(tokenizer, template, [conversation], "assistant")

Every fault is one `DataError` that says which turn or column it is in.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llmrecipes.data.rows import BadRowError, Met, Row, bad_rows
from llmrecipes.data.templates import Template
from llmrecipes.data.turns import ASSISTANT, SYSTEM, TOOL, USER, Turn, control_tokens, either, learned
from llmrecipes.errors import DataError, did_you_mean
from llmrecipes.prompts import IGNORED_LABEL, Piece, control_id, encode_samples, end_piece, start_ids

TEXT = "text"
"""Role of the one turn of a row of plain text."""

ROLES = {
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("user", "human"), USER),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), ASSISTANT),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), TOOL),
}
"""What OpenAI's, ShareGPT's and others' rows call a role, in small letters."""

CHATS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt")
QUESTIONS = ("instruction", "prompt", "question", "input")
INPUTS = ("input", "context")
ANSWERS = ("output", "completion", "response", "answer")
TEXT_COLUMNS = ("text",)

UNREAD_COLUMNS = ("history", "tools", "images")
UNREAD_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""What would change a conversation's meaning if it were passed over."""


@dataclass(frozen=True)
class Conversation:
    """The turns of one row. `place`: where it stands, for messages."""

    turns: tuple[Turn, ...]
    place: str

    @property
    def is_text(self) -> bool:
        """Whether it is plain text, all of it to be learned."""
        return self.turns[0].role == TEXT

    def teaches(self, train_on: str) -> bool:
        """Whether anything of it is supervised."""
        return self.is_text or train_on == "all" or bool(learned(self.turns, train_on))

    @property
    def has_neighbours(self) -> bool:
        """Whether one role has two turns in a row."""
        return any(one.role == other.role for one, other in itertools.pairwise(self.turns))

    def spelled_out(self, marks: re.Pattern[str]) -> str | None:
        """Returns the first of `marks` that stands in it as text, or None."""
        found = (marks.search(turn.content) for turn in self.turns)
        return next((match[0] for match in found if match), None)

    @property
    def question(self) -> str:
        """What is asked, up to the last answer, in small letters and single blanks: what no two splits may share."""
        answers = [place for place, turn in enumerate(self.turns) if turn.role == ASSISTANT]
        asked = self.turns[: answers[-1] or None] if answers else self.turns
        return "\n".join(" ".join(f"{turn.role} {turn.content} {turn.input}".casefold().split()) for turn in asked)


@dataclass(frozen=True)
class Layout:
    """How the rows of one file are read. `columns`: those of the first row that are read."""

    name: str
    columns: tuple[str, ...]
    turns: Callable[[Row], list[Turn]]

    @property
    def is_text(self) -> bool:
        """Whether its rows are texts to go on with, which no template lays out."""
        return self.columns == TEXT_COLUMNS


def layout_of(row: Row) -> Layout:
    """Returns the layout that the columns of a file's first row are known by; raises `DataError` for others."""
    chat, question, answer = (_first(row, names) for names in (CHATS, QUESTIONS, ANSWERS))
    system = _first(row, SYSTEMS)
    if chat:
        return Layout(f"chats in {chat!r}", _named(system, chat), partial(_chat_turns, chat, system))
    if question and answer:
        about = _first(row, [name for name in INPUTS if name != question])
        columns = _named(system, question, about, answer)
        return Layout(f"{question} -> {answer}", columns, partial(_answered_turns, question, about, answer, system))
    if "text" in row:
        return Layout("plain text", TEXT_COLUMNS, lambda row: [Turn(TEXT, _text(row, "text"), supervised=True)])
    raise BadRowError(
        row.place,
        f"no layout is known with the columns {', '.join(map(repr, list(row)[:12])) or 'none'}: expected 'messages', "
        "'conversations', 'instruction' and 'output', 'prompt' and 'completion', or 'text'; for others write a "
        "preprocessor, --dataset custom_dataset",
    )


def read_conversation(row: Row, layout: Layout) -> Conversation:
    """Returns the conversation of a row, one turn at least; raises `DataError` naming turn or column."""
    for column in UNREAD_COLUMNS:
        if row.get(column):
            raise DataError(f"column {column!r} holds {row[column]!r:.40}, which is not read here: take it out")
    turns = tuple(layout.turns(row))
    if not turns:
        raise DataError("the conversation has no turns")
    return Conversation(turns, row.place)


def encode_conversations(
    tokenizer: Any, template: Template, conversations: Sequence[Conversation], train_on: str
) -> list[dict[str, list[int]]]:
    """Returns `{input_ids, labels, attention_mask}` of each conversation; all of them must teach something.

    `train_on`: assistant (every answer with its end token), last (the last one) or all (questions, too). It decides on
    labels alone, not on ids. Conversations that the template has no place for are bad rows.
    """
    bad, met = bad_rows(), Met()
    laid_out: list[tuple[Conversation, list[Piece], list[bool]]] = []
    for conversation in conversations:
        with bad.at(conversation.place, met):
            laid_out.append((conversation, *_laid_out(tokenizer, template, conversation, train_on)))
    start = start_ids(tokenizer)
    samples = []
    encoded = encode_samples(tokenizer, [pieces for _, pieces, _ in laid_out])
    for (conversation, pieces, answers), sample in zip(laid_out, encoded, strict=True):
        with bad.at(conversation.place, met):
            _check_no_smuggling(tokenizer, sample["input_ids"], pieces, start)
            if conversation.is_text or train_on == "all":
                sample["labels"] = [IGNORED_LABEL] * len(start) + sample["input_ids"][len(start) :]
            elif not all(answers):
                sample["labels"] = _without_stretches(sample["labels"], answers)
            samples.append(sample)
    return samples


def _laid_out(
    tokenizer: Any, template: Template, conversation: Conversation, train_on: str
) -> tuple[list[Piece], list[bool]]:
    """Returns a conversation's pieces, and whether each supervised stretch of them is to be learned."""
    if conversation.is_text:
        return [Piece(conversation.turns[0].content, supervised=True), end_piece(tokenizer)], [True]
    turns = learned(template.arranged(conversation.turns), train_on)
    pieces = template.pieces(tokenizer, turns)
    _check_loose_controls(tokenizer, turns, pieces)
    return control_tokens(tokenizer).without_eaten_blanks(pieces), template.learned(turns)


def _without_stretches(labels: Sequence[int], kept: Sequence[bool]) -> list[int]:
    """Returns the labels with those stretches of supervised tokens ignored that are not kept."""
    made: list[int] = []
    wanted = iter(kept)
    for supervised, run in itertools.groupby(labels, key=lambda label: label != IGNORED_LABEL):
        stretch = list(run)
        made += stretch if supervised and next(wanted) else [IGNORED_LABEL] * len(stretch)
    return made


# --- reading ----------------------------------------------------------------------------------------------------------


def _chat_turns(column: str, system: str | None, row: Row) -> list[Turn]:
    """Returns the turns of a list of messages, behind the system prompt of a column of its own."""
    messages = row.get(column)
    if isinstance(messages, str):  # as a CSV file must have it
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise DataError(f"column {column!r} is no JSON list: {error}") from None
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"column {column!r} holds {messages!r:.40}, expected a list of turns")
    turns = [_turn(message, number) for number, message in enumerate(messages, start=1)]
    return [*_system_turns(row, system), *(turn for turn in turns if turn.content.strip())]


def _turn(message: Any, number: int) -> Turn:
    """Returns one message as a turn; of the blank ones only a system's is let through."""
    if not isinstance(message, Mapping):
        raise DataError(f"turn {number} is {message!r:.40}, expected an object with role and content")
    keys = ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")
    for key in keys:
        if key not in message:
            names = ", ".join(map(repr, list(message)[:8])) or "nothing"
            raise DataError(f"turn {number} has {names}, expected 'role' and 'content' (or 'from' and 'value')")
    for key in UNREAD_KEYS:
        if message.get(key):
            raise DataError(f"turn {number} has {key!r}, which no template here writes: take it out")
    role = ROLES.get(str(message[keys[0]]).lower())
    if role is None:
        given = str(message[keys[0]])
        raise DataError(
            f"turn {number} has the unknown role {given!r:.40}, expected system, user (human), assistant (gpt) or tool"
            f"{did_you_mean(given.lower(), ROLES)}"
        )
    content = _content(message[keys[1]], f"turn {number} ({role})")
    if role != SYSTEM and not content.strip():
        raise DataError(f"turn {number} ({role}) is blank")
    return Turn(role, content, supervised=role == ASSISTANT and _weight(message, number) == 1)


def _content(value: Any, place: str) -> str:
    """Returns the text of a message, which OpenAI's layout may have in parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(_content(part.get("text"), place) for part in value)
    raise DataError(f"{place} holds {value!r:.60}, expected text")


def _weight(message: Mapping[str, Any], number: int) -> int:
    """Returns OpenAI's `weight` of an answer: 0 leaves it out of the loss."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"turn {number} has the weight {weight!r:.20}, expected 0 or 1")
    return 0 if weight == 0 else 1


def _answered_turns(question: str, about: str | None, answer: str, system: str | None, row: Row) -> list[Turn]:
    extra = _text(row, about, optional=True) if about else ""
    asked = Turn(USER, _text(row, question), input=extra if extra.strip() else "")
    return [*_system_turns(row, system), asked, Turn(ASSISTANT, _text(row, answer), supervised=True)]


def _system_turns(row: Row, column: str | None) -> list[Turn]:
    content = _text(row, column, optional=True) if column else ""
    return [Turn(SYSTEM, content)] if content.strip() else []


def _text(row: Row, column: str, *, optional: bool = False) -> str:
    """Returns the text of a column; an optional one may be missing, null or blank."""
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        found = "is missing" if column not in row else f"holds {value!r:.40}, expected text"
        raise DataError(f"column {column!r} {found}")
    if not value.strip() and not optional:
        raise DataError(f"column {column!r} is blank")
    return value


def _first(row: Row, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _named(*columns: str | None) -> tuple[str, ...]:
    return tuple(column for column in columns if column)


# --- control tokens ---------------------------------------------------------------------------------------------------


def _check_loose_controls(tokenizer: Any, turns: Sequence[Turn], pieces: Sequence[Piece]) -> None:
    """Raises `DataError` where a turn spells out a token that the template uses and that is not marked special.

    `split_special_tokens` leaves such tokens alone, so that text would become control.
    """
    loose = {piece.text for piece in pieces if piece.control} - control_tokens(tokenizer).special
    for number, turn in enumerate(turns, start=1):
        for token in sorted(loose):
            if token in turn.content or token in turn.input:
                raise DataError(
                    f"turn {number} ({turn.role}) spells out {token!r}, which this tokenizer takes for a control token "
                    "wherever it stands: take it out, or add it to the tokenizer as a special token"
                )


def _check_no_smuggling(tokenizer: Any, ids: Sequence[int], pieces: Sequence[Piece], start: list[int]) -> None:
    """Raises `DataError` where the ids hold other special tokens than the template wrote and the start."""
    special_ids = control_tokens(tokenizer).special_ids
    written = [control_id(tokenizer, piece.text) for piece in pieces if piece.control]
    expected = [token for token in written if token in special_ids]
    found = [token for token in ids if token in special_ids]
    if found not in (expected, start + expected):
        raise DataError("its text turns into a control token, though it was to stay text: take control tokens out")


def marks_pattern(tokenizer: Any, template: Template) -> re.Pattern[str]:
    """Returns what finds the control tokens and the template's marks where a turn spells them out."""
    return re.compile(either((*sorted(control_tokens(tokenizer).special), *template.marks)))
