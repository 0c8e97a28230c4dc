"""The turns of a conversation, which of them are learned, and the tokens that no turn may write."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from llmrecipes.prompts import Piece

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"

TEMPLATE_FLAG = "--chat_dataset.template"
"""What the user names a template by, for messages."""


@dataclass(frozen=True)
class Turn:
    """What one side says. `supervised`: the model is to learn to say it, which holds for assistant turns only."""

    role: str
    content: str
    input: str = ""
    """what an instruction is about, where it stands apart: Alpaca's `input`"""
    supervised: bool = False


def learned(turns: Sequence[Turn], train_on: str) -> list[Turn]:
    """Returns the turns with those supervised that `train_on` chooses, cut behind the last of them.

    Under `all` none is: every token of the whole is supervised, whoever says it.
    """
    if train_on == "all":
        return [replace(turn, supervised=False) for turn in turns]
    answers = [place for place, turn in enumerate(turns) if turn.role == ASSISTANT]
    chosen = set(answers[-1:] if train_on == "last" else answers)
    marked = [replace(turn, supervised=turn.supervised and place in chosen) for place, turn in enumerate(turns)]
    while marked and not marked[-1].supervised:
        marked.pop()
    return marked


@dataclass(frozen=True)
class ControlTokens:
    """The tokens of one tokenizer that were added to its vocabulary as a whole."""

    special: frozenset[str]
    """those that `split_special_tokens` keeps out of a text that spells them out"""
    special_ids: frozenset[int]
    every: tuple[str, ...]
    """the special ones and all others that are not blank"""
    eat_right: frozenset[str]
    """those that take in the blanks behind them (Phi-3's do)"""
    eat_left: frozenset[str]
    doubles_blanks: bool
    """whether a blank is put before a text even where it begins with one"""

    def without_eaten_blanks(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Returns the pieces as they are once control tokens have taken in the blanks beside them, as in one text."""
        made = list(pieces)
        for hungry, step in ((self.eat_right, 1), (self.eat_left, -1)):
            for place, piece in enumerate(pieces):
                at = place + step
                eating = piece.control and piece.text in hungry
                while eating and 0 <= at < len(made) and not made[at].control:
                    text = made[at].text.lstrip() if step > 0 else made[at].text.rstrip()
                    made[at] = replace(made[at], text=text)
                    eating, at = not text, at + step
        return made


def control_tokens(tokenizer: Any) -> ControlTokens:
    """Returns the control tokens of a tokenizer."""
    return _control_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, _size: int) -> ControlTokens:
    added: Mapping[str, Any] = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    special = {*(text for text, token in added.items() if token.special), *tokenizer.all_special_tokens}
    ends = {tokenizer.bos_token, tokenizer.eos_token}
    # The unknown token may come of any text; where it is an end token as well, it does not.
    guarded = special if tokenizer.unk_token in ends else special - {tokenizer.unk_token}
    blank, text = (tokenizer.tokenize(given) for given in (" x", "x"))
    return ControlTokens(
        special=frozenset(special),
        special_ids=frozenset(tokenizer.convert_tokens_to_ids(sorted(guarded))),
        every=tuple(sorted({*(text for text in added if text.strip()), *special})),
        eat_right=frozenset(text for text, token in added.items() if token.rstrip),
        eat_left=frozenset(text for text, token in added.items() if token.lstrip),
        doubles_blanks=text[:1] != ["x"] and text != blank,
    )


@lru_cache(maxsize=256)
def either(texts: tuple[str, ...]) -> str:
    """Returns a regular expression of one group for any of the texts, the longest first."""
    return "(" + "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) + ")"
