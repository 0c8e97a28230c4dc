"""Chat templates: the turns of a conversation to the pieces of one sample, its answers marked as supervised.

    turns = [Turn("user", "Which?"), Turn("assistant", "This.", supervised=True)]
    template = template_of("llama2")
    template.check(tokenizer)
    sample = encode_sample(tokenizer, template.pieces(tokenizer, template.arranged(turns)))

Control tokens come from the template alone; what a turn spells out stays text. The answers are marked as they are laid
down, or by comparing rendered texts, never by searching for tokens.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from llmrecipes.data.rendering import TokenizerTemplate
from llmrecipes.data.turns import ASSISTANT, SYSTEM, TEMPLATE_FLAG, TOOL, USER, Turn, control_tokens, either
from llmrecipes.errors import ConfigError, DataError, did_you_mean
from llmrecipes.prompts import Piece, control_id, end_piece


class Template(Protocol):
    """How a conversation is laid out for a model."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Plain texts that tell one turn from the next; control tokens are not among them."""

    @property
    def alternates(self) -> bool:
        """Whether `arranged` joins neighbouring turns of one role."""

    def check(self, tokenizer: Any) -> None:
        """Raises `ConfigError` where the tokenizer cannot write this template."""

    def arranged(self, turns: Sequence[Turn]) -> list[Turn]:
        """Returns the turns as the template can take them; raises `DataError` where it cannot."""

    def pieces(self, tokenizer: Any, turns: Sequence[Turn]) -> list[Piece]:
        """Returns the pieces of arranged turns, ending with the last turn's end; raises `DataError`."""

    def learned(self, turns: Sequence[Turn]) -> list[bool]:
        """Returns whether each supervised stretch of `pieces` is to be learned.

        One that is not is marked all the same, so that it is tokenized by itself: the ids depend on no `train_on`.
        """


# --- templates of fixed texts -----------------------------------------------------------------------------------------

SLOT = re.compile(r"(\{(?:system|prompt|input)\})")


@dataclass(frozen=True)
class FramedTemplate:
    """Fixed texts around each turn, with `{prompt}` for its content.

    With `alternates`, questions and answers take turns and `{system}` has its place in the first question; without, any
    turn may follow any other.
    """

    user: str
    answer: str = ""
    """text that an answer follows, behind the frame of the question"""
    end: str = ""
    """control token that ends an answer; empty: the tokenizer's end of sequence"""
    system: str = ""
    between: str = ""
    """what stands between the end of a turn and the next; where they alternate, between answer and question"""
    controls: tuple[str, ...] = ()
    """parts of the texts that are control tokens"""
    marks: tuple[str, ...] = ()
    """parts of the texts that tell one turn from the next and are no control tokens"""
    alternates: bool = False
    strips: bool = False
    """blanks around a content are taken off, as the reference implementation does"""
    opening: str = ""
    """said in the system prompt's place where a conversation has none"""
    user_with_input: str = ""
    opening_with_input: str = ""

    def check(self, tokenizer: Any) -> None:
        """Raises `ConfigError` where a control token is missing, or fixed text would be one."""
        try:
            for control in self.controls:
                control_id(tokenizer, control)
            if not self.end:
                end_piece(tokenizer)
        except DataError as error:
            raise ConfigError(f"{TEMPLATE_FLAG}: {error}; choose another one of {', '.join(TEMPLATES)}") from None
        plain = [piece.text for frame in self._frames() for piece in self._filled(frame) if not piece.control]
        for token in sorted(control_tokens(tokenizer).special, reverse=True):
            if any(token in text for text in plain):
                raise ConfigError(
                    f"{TEMPLATE_FLAG}: this template writes {token!r} as text, and it is one control token of this "
                    f"tokenizer, so its model was taught another layout: use {TEMPLATE_FLAG} tokenizer"
                )

    def arranged(self, turns: Sequence[Turn]) -> list[Turn]:
        """Returns the turns, neighbours of one role joined by a blank line where questions and answers alternate."""
        for number, turn in enumerate(turns, start=1):
            if turn.role == TOOL:
                raise DataError(
                    f"turn {number} is a tool's, which the template has no place for; try {TEMPLATE_FLAG} tokenizer"
                )
        if not self.alternates:
            return list(turns)
        joined = [_joined(list(group)) for _, group in itertools.groupby(turns, key=lambda turn: turn.role)]
        roles = [turn.role for turn in joined]
        if SYSTEM in roles[1:]:
            raise DataError("a system turn behind other turns, and the template has a place for it at the start only")
        if roles[roles[0] == SYSTEM :][:1] != [USER]:
            raise DataError("no user turn at the start, where the template must have one; try chatml or llama3")
        if roles[0] == SYSTEM and "{system}" not in self.user:
            raise DataError("a system turn, and --chat_dataset.prompt_format has no {system}")
        return joined

    def pieces(self, tokenizer: Any, turns: Sequence[Turn]) -> list[Piece]:
        """Returns the pieces of arranged turns, every answer with its end marked."""
        end = Piece(self.end, supervised=True, control=True) if self.end else end_piece(tokenizer)
        system = ""
        if self.alternates:
            system, turns = self._system_text(turns)
        made: list[Piece] = []
        for turn in turns:
            made += self._filled(self.between) if made and not (self.alternates and turn.role == ASSISTANT) else []
            content = self._content(turn)
            if turn.role == ASSISTANT:
                made += [*self._filled(self.answer), Piece(content, supervised=True), end]
            else:
                made += self._filled(self._frame(turn), system=system, prompt=content, input=turn.input)
                system = ""
        return made

    def learned(self, turns: Sequence[Turn]) -> list[bool]:
        """Returns whether each answer is to be learned; all of them are marked."""
        return [turn.supervised for turn in turns if turn.role == ASSISTANT]

    def _system_text(self, turns: Sequence[Turn]) -> tuple[str, Sequence[Turn]]:
        """Returns what fills `{system}`, and the turns without the system's own."""
        if turns[0].role == SYSTEM:
            content, turns = self._content(turns[0]), turns[1:]
        else:
            content = self.opening_with_input if turns[0].input and self.opening_with_input else self.opening
        return (self.system.replace("{prompt}", content) if content else ""), turns

    def _frame(self, turn: Turn) -> str:
        if turn.role == SYSTEM:
            return self.system
        return self.user_with_input if turn.input and self.user_with_input else self.user

    def _content(self, turn: Turn) -> str:
        content = turn.content
        if turn.input and "{input}" not in self._frame(turn):
            content = f"{content}\n{turn.input}"
        return content.strip() if self.strips else content

    def _filled(self, frame: str, **contents: str) -> list[Piece]:
        """Returns a frame's parts as pieces, its slots filled."""
        pieces = []
        for part in re.split(either(("{system}", "{prompt}", "{input}", *self.controls)), frame):
            text = contents.get(part[1:-1], "") if SLOT.fullmatch(part) else part
            if text:
                pieces.append(Piece(text, control=part in self.controls))
        return pieces

    def _frames(self) -> Iterator[str]:
        return (frame for frame in (self.user, self.answer, self.system, self.between, self.user_with_input) if frame)


def _joined(turns: Sequence[Turn]) -> Turn:
    if len({turn.supervised for turn in turns}) > 1:
        raise DataError("neighbouring assistant turns of weight 0 and 1, which the template would make one turn")
    return replace(turns[0], content="\n\n".join(turn.content for turn in turns))


PLAIN_FORMAT = "{prompt}\n\n"


def plain_template(prompt_format: str) -> FramedTemplate:
    """Returns the template of a user's own format; raises `ConfigError` where it has no `{prompt}`."""
    said = f"--chat_dataset.prompt_format {prompt_format!r}"
    counts = Counter(SLOT.findall(prompt_format))
    if counts["{prompt}"] != 1 or max(counts.values()) > 1:
        raise ConfigError(f"{said}: expected {{prompt}} once; {{system}} and {{input}} may stand in it once as well")
    if "\\n" in prompt_format:
        raise ConfigError(f"{said}: a backslash and an n are no line break; in a shell write $'{{prompt}}\\n'")
    return FramedTemplate(user=prompt_format, system="{prompt}", alternates=True)


# --- the table --------------------------------------------------------------------------------------------------------

TEMPLATES: dict[str, Template] = {
    # Touvron et al. (2023), https://arxiv.org/abs/2307.09288; chat_completion in
    # https://github.com/meta-llama/llama/blob/main/llama/generation.py, with one start token for all turns
    "llama2": FramedTemplate(
        user="[INST] {system}{prompt} [/INST]",
        system="<<SYS>>\n{prompt}\n<</SYS>>\n\n",
        marks=("[INST]", "[/INST]", "<<SYS>>"),
        alternates=True,
        strips=True,
    ),
    # https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py, ChatFormat
    "llama3": FramedTemplate(
        user="<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>",
        answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{prompt}<|eot_id|>",
        controls=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strips=True,
    ),
    # https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
    "chatml": FramedTemplate(
        user="<|im_start|>user\n{prompt}<|im_end|>",
        answer="<|im_start|>assistant\n",
        end="<|im_end|>",
        system="<|im_start|>system\n{prompt}<|im_end|>",
        between="\n",
        controls=("<|im_start|>", "<|im_end|>"),
    ),
    # Taori et al., "Stanford Alpaca" (2023), https://github.com/tatsu-lab/stanford_alpaca; it knows one turn only
    "alpaca": FramedTemplate(
        user="{system}### Instruction:\n{prompt}\n\n### Response:",
        user_with_input="{system}### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:",
        system="{prompt}\n\n",
        between="\n\n",
        marks=("### Instruction:", "### Input:", "### Response:"),
        alternates=True,
        opening="Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.",
        opening_with_input="Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.",
    ),
    # https://github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md, version 1.1 and later
    "vicuna": FramedTemplate(
        user="{system}USER: {prompt} ASSISTANT:",
        system="{prompt} ",
        marks=("USER:", "ASSISTANT:"),
        alternates=True,
        opening="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.",
    ),
    "plain": plain_template(PLAIN_FORMAT),
    "tokenizer": TokenizerTemplate(),
}


def template_of(name: str, prompt_format: str = PLAIN_FORMAT) -> Template:
    """Returns the template of a name; `prompt_format` is that of `plain`. Raises `ConfigError` for another name."""
    if name not in TEMPLATES:
        raise ConfigError(f"{TEMPLATE_FLAG} {name}: not one of {', '.join(TEMPLATES)}{did_you_mean(name, TEMPLATES)}")
    return plain_template(prompt_format) if name == "plain" else TEMPLATES[name]
