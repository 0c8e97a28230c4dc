"""The tokenizer's own chat template, as pieces.

It is a Jinja program, rendered by the library that inference renders it by, so training sees what inference will.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmrecipes.data.inputs import note_unknown
from llmrecipes.data.turns import TEMPLATE_FLAG, Turn, control_tokens, either
from llmrecipes.errors import ConfigError, DataError
from llmrecipes.prompts import Piece


class TokenizerTemplate:
    """The chat template that the tokenizer brings along: a Jinja program, rendered with stand-ins for the contents.

    The contents take the stand-ins' places afterwards, so they are never read as control tokens. That this is what the
    template makes of the real contents is checked for each conversation.
    """

    marks: tuple[str, ...] = ()
    alternates = False

    def check(self, tokenizer: Any) -> None:
        """Raises `ConfigError` where the tokenizer brings no template."""
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"{TEMPLATE_FLAG} tokenizer: this tokenizer brings no chat template, as those of base models; name the "
                f"layout that the model is to learn, such as {TEMPLATE_FLAG} llama2"
            )

    def arranged(self, turns: Sequence[Turn]) -> list[Turn]:
        """Returns the turns as they are: the template itself decides what it takes."""
        return [
            replace(turn, content=f"{turn.content}\n{turn.input}", input="") if turn.input else turn for turn in turns
        ]

    def pieces(self, tokenizer: Any, turns: Sequence[Turn]) -> list[Piece]:
        """Returns the pieces of the rendered conversation, the answers to be learned marked."""
        stand_ins = [f"turn{number:05d}" for number in range(len(turns))]
        marked = [replace(turn, content=name) for turn, name in zip(turns, stand_ins, strict=True)]
        whole = rendered(tokenizer, marked)
        contents = _rendered_contents(whole, rendered(tokenizer, turns), turns, stand_ins)
        answers = [n for n, turn in enumerate(turns) if turn.supervised]
        spans = [_answer_span(tokenizer, marked, n, whole) for n in answers]
        controls = control_tokens(tokenizer).every
        last = max(whole.index(name) + len(name) for name in stand_ins)
        end = max([_first_end(whole, last, controls) or last, *(end for _, end in spans)])
        pieces = list(_cut(whole[:end], spans, contents, controls))
        return _with_one_blank(tokenizer, pieces)

    def learned(self, turns: Sequence[Turn]) -> list[bool]:
        """Returns true for each answer that is marked: earlier ones may not be answers as they were given."""
        return [True for turn in turns if turn.supervised]


DATED = "the tokenizer's chat template tells the date"


def tells_the_date(tokenizer: Any) -> bool:
    """Returns whether a chat template may write something else tomorrow, as Llama 3.1's does."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def rendered(tokenizer: Any, turns: Sequence[Turn], *, prompt: bool = False) -> str:
    """Returns what the tokenizer's template makes of turns; `prompt`: up to where an answer begins."""
    if tells_the_date(tokenizer):
        note_unknown(DATED)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # the template is somebody's program
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"the tokenizer's chat template refuses these turns: {said[:120]}") from None


def _rendered_contents(whole: str, real: str, turns: Sequence[Turn], stand_ins: Sequence[str]) -> dict[str, str]:
    """Returns what stands in each stand-in's place once the real contents are rendered: them, or them trimmed."""
    parts = re.split(either(tuple(stand_ins)), whole)
    for name, turn in zip(stand_ins, turns, strict=True):
        if parts.count(name) != 1:
            raise DataError(
                f"the tokenizer's chat template writes the {turn.role} turn {parts.count(name)} times instead of once"
            )
    contents: dict[str, str] = {}
    at = len(parts[0])
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        number = stand_ins.index(name)
        found = next((c for c in _trims(turns[number].content) if real.startswith(c + text, at)), None)
        if found is None:
            raise DataError(
                f"the tokenizer's chat template rewrites the content of turn {number + 1} ({turns[number].role}), "
                "so there is no telling what of it is to be learned; use another template"
            )
        contents[name] = found
        at += len(found) + len(text)
    if real[: len(parts[0])] != parts[0] or at != len(real):
        raise DataError("the tokenizer's chat template writes other text for these contents; use another template")
    return contents


def _trims(content: str) -> Iterator[str]:
    """Yields a content and what templates trim it to, the longest first."""
    yield content
    for blanks in ("\n", None):
        yield from (content.lstrip(blanks), content.rstrip(blanks), content.strip(blanks))


def _answer_span(tokenizer: Any, marked: Sequence[Turn], number: int, whole: str) -> tuple[int, int]:
    """Returns where an answer begins and ends in the rendered conversation, its end token included.

    It begins where the prompt for it ends, and ends with the first control token behind its content.
    """
    prompt = rendered(tokenizer, marked[:number], prompt=True)
    until = rendered(tokenizer, marked[: number + 1])
    name = marked[number].content
    turn = f"turn {number + 1}"
    if not until.startswith(prompt) or name not in until[len(prompt) :]:
        raise DataError(f"{turn}: the tokenizer's chat template does not continue its own prompt with this answer")
    end = _first_end(until, until.index(name) + len(name), control_tokens(tokenizer).every)
    if end is None:
        raise DataError(
            f"{turn}: the tokenizer's chat template writes no end token behind an answer, so a model could never learn "
            "to stop; use another template"
        )
    if not whole.startswith(until[:end]):
        raise DataError(
            f"{turn}: the tokenizer's chat template rewrites an answer once other turns follow it, so not all answers "
            "can be learned at once; use --chat_dataset.train_on last"
        )
    return len(prompt), end


def _first_end(text: str, start: int, controls: tuple[str, ...]) -> int | None:
    """Returns the end of the first control token at or behind `start`, or None."""
    found = re.compile(either(controls)).search(text, start) if controls else None
    return found.end() if found else None


def _cut(
    whole: str, spans: Sequence[tuple[int, int]], contents: Mapping[str, str], controls: tuple[str, ...]
) -> Iterator[Piece]:
    """Yields a rendered conversation as pieces: control tokens, contents and the text around them."""
    found = {match.span() for match in re.finditer(either((*contents, *controls)), whole)}
    edges = sorted({0, len(whole), *itertools.chain(*found), *itertools.chain(*spans)})
    for start, end in itertools.pairwise(edges):
        text = whole[start:end]
        supervised = any(first <= start < last for first, last in spans)
        control = (start, end) in found and text not in contents
        yield Piece(contents.get(text, text), supervised, control)


def _with_one_blank(tokenizer: Any, pieces: Sequence[Piece]) -> list[Piece]:
    """Takes the blank off an answer's front where the tokenizer puts one before every text anyway."""
    made = list(pieces)
    if control_tokens(tokenizer).doubles_blanks:
        for place, (before, piece) in enumerate(itertools.pairwise(pieces), start=1):
            if piece.supervised and not (before.supervised or before.control or piece.control):
                made[place] = replace(piece, text=piece.text.removeprefix(" "))
    return made
