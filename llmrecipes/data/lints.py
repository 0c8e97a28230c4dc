"""What is probably wrong with a sample, though training would take it: start and end tokens, masks, templates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrecipes.batch import Sample
from llmrecipes.prompts import IGNORED_LABEL, start_ids

Flags = npt.NDArray[np.bool_]

END_PLACES = 3
"""Supervised tokens, counted from the last, among which the end token may stand: templates may break a line after it"""

TEMPLATE_TOKENS = 64
"""Tokens before the answer in which the tokenizer's own template would show."""

NO_START = "no start token"
TWO_STARTS = "two start tokens"
NO_END = "no end token"
END_IGNORED = "end token not supervised"
ALL_SUPERVISED = "prompt supervised"
NOTHING_SUPERVISED = "nothing supervised"

LINTS = {
    NO_START: "the tokenizer opens every text with its start token, and this one has none",
    TWO_STARTS: "a template wrote the start token and the tokenizer another one",
    NO_END: "the answer does not end with an end token, so the model does not learn to stop",
    END_IGNORED: "the end token is there, but its label is -100, so the model does not learn to stop",
    ALL_SUPERVISED: "every token is supervised, so prompts are learned as well (right for plain text only)",
    NOTHING_SUPERVISED: "all labels are -100, so there is nothing to learn",
}
"""Name -> what it means; the order is that of the report."""

PROBE = "3f0c9d"
"""Words of a user that no template holds."""

CONTROL_TOKENS = (
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
"""Control tokens of well-known models: text that spells one out was most likely meant for another tokenizer."""


@dataclass(frozen=True)
class Marks:
    """A tokenizer's ids that samples are checked for."""

    start: int | None
    """what the tokenizer opens every text with, where it does"""
    bos: int | None
    """the start token, whether or not the tokenizer puts it there by itself"""
    ends: tuple[int, ...]
    """what may close an answer: the end token and every other control token but start, unknown and padding"""


def marks_of(tokenizer: Any) -> Marks:
    """Returns the ids that samples of this tokenizer are checked for."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    others = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
    ends = (special - others) | ({tokenizer.eos_token_id} - {None})
    return Marks(next(iter(start_ids(tokenizer)), None), tokenizer.bos_token_id, tuple(sorted(ends)))


def lint_flags(samples: Sequence[Sample], marks: Marks) -> Mapping[str, Flags]:
    """Returns for every lint which of the samples it concerns, bool [samples]; samples must hold a token each.

    Neighbours of one row number are pieces of one row (`--overlong split`): only the first needs a start, the last
    an end.
    """
    lengths = np.array([len(sample.input_ids) for sample in samples])
    ids = np.concatenate([sample.input_ids for sample in samples])
    supervised = np.concatenate([sample.labels for sample in samples]) != IGNORED_LABEL
    starts = np.cumsum(lengths) - lengths
    learned = supervised.copy()
    learned[starts] = False  # a first token has nothing before it to be predicted from
    counts = np.add.reduceat(learned.astype(np.int64), starts)
    rows = np.array([sample.row for sample in samples])
    continued = np.concatenate([rows[1:] == rows[:-1], [False]])
    opened = ~np.concatenate([[False], continued[:-1]])
    closed, ignored = _endings(ids, learned, starts, marks)
    second = ids[np.minimum(starts + 1, len(ids) - 1)]
    return {
        NO_START: opened & (marks.start is not None) & (ids[starts] != (marks.start or 0)),
        TWO_STARTS: (lengths > 1) & (marks.bos is not None) & (ids[starts] == marks.bos) & (second == marks.bos),
        NO_END: (counts > 0) & ~continued & ~closed & ~ignored,
        END_IGNORED: (counts > 0) & ~continued & ~closed & ignored,
        ALL_SUPERVISED: (lengths > 1) & (counts == lengths - 1),
        NOTHING_SUPERVISED: counts == 0,
    }


def sample_lints(sample: Sample, tokenizer: Any, marks: Marks) -> list[str]:
    """Returns what is probably wrong with one sample, in words."""
    found = [f"{name}: {LINTS[name]}" for name, flags in lint_flags([sample], marks).items() if flags[0]]
    return found + [fault for fault in (template_fault(sample, tokenizer), spelled_fault(sample, tokenizer)) if fault]


def template_fault(sample: Sample, tokenizer: Any) -> str | None:
    """Returns how the prompt ends unlike the tokenizer's own chat template, or None; without a template always None."""
    wanted = answer_opening(tokenizer)
    if not wanted or not sample.supervised_tokens:
        return None
    prompt = sample.prompt_ids
    if len(prompt) < 2:  # plain text
        return None
    found = str(tokenizer.decode(prompt[-TEMPLATE_TOKENS:], skip_special_tokens=False)).rstrip()
    if found.endswith(wanted):
        return None
    return f"template: the tokenizer's own opens an answer with {wanted!r}, here it is {found[-len(wanted) :]!r}"


def answer_opening(tokenizer: Any) -> str:
    """Returns the text that the tokenizer's chat template puts between a user's words and the answer; "" for none."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROBE}], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a foreign template may fail in any way, and then it is no measure
        return ""
    return str(rendered).rpartition(PROBE)[2].strip()


def spelled_fault(sample: Sample, tokenizer: Any) -> str | None:
    """Returns which control tokens the sample spells out in plain letters, or None."""
    text = str(tokenizer.decode(sample.input_ids.tolist(), skip_special_tokens=True))
    names = dict.fromkeys([*tokenizer.all_special_tokens, *CONTROL_TOKENS])
    spelled = [name for name in names if name in text]
    if not spelled:
        return None
    return f"template: {', '.join(spelled)} is spelled out as plain text, and is no control token here"


def _endings(ids: npt.NDArray[Any], learned: Flags, starts: npt.NDArray[Any], marks: Marks) -> tuple[Flags, Flags]:
    """Returns for each sample whether an end token is supervised at its end, and whether one stands there ignored."""
    places = np.arange(len(ids))
    is_end = np.isin(ids, marks.ends)
    last = np.maximum.reduceat(np.where(learned, places, -1), starts)
    closed = np.zeros(len(starts), dtype=bool)
    for back in range(END_PLACES):
        place = np.maximum(last - back, 0)
        closed |= (last - back >= starts) & learned[place] & is_end[place]
    ignored_end = np.maximum.reduceat(np.where(is_end & ~learned, places, -1), starts)
    return closed, ignored_end > last
