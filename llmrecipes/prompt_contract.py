"""How a model was prompted in training, kept beside its weights, so that inference can do the same.

The template is not declared but found: what all training prompts begin with, and what they all end with.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from llmrecipes.batch import Sample
from llmrecipes.errors import ModelError
from llmrecipes.prompts import start_ids

FILE_NAME = "prompt.json"

EXAMINED_SAMPLES = 200
"""Samples whose prompts are compared, spread over the training split."""


@dataclass(frozen=True)
class PromptContract:
    """What training prompts had in common, and what ends an answer."""

    prefix: str
    """text that every prompt begins with, start token left out"""
    suffix: str
    """text that every prompt ends with, right before the answer"""
    example: str
    """one whole training prompt"""
    start_token: str
    """the token before it, `<s>`; empty where the tokenizer has none"""
    stop_token_ids: tuple[int, ...]
    stop_tokens: tuple[str, ...]
    ends_supervised: bool
    """whether any training answer ends with a stop token, so that the model could learn to stop"""

    def mismatch(self, prompt: str) -> str | None:
        """Returns how a prompt differs in form from the training prompts, or None."""
        prompt = prompt.removeprefix(self.start_token)
        for place, found, wanted in (
            ("end", prompt[-len(self.suffix) :] if self.suffix else "", self.suffix),
            ("begin", prompt[: len(self.prefix)], self.prefix),
        ):
            if found != wanted:
                told = found if place == "begin" else prompt[-len(self.suffix) - 8 :]
                return f"training prompts {place} with {wanted!r}, this one {place}s with {told!r}"
        return None

    def save(self, folder: Path) -> None:
        """Writes prompt.json into a folder."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=2)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def load_contract(folder: Path) -> PromptContract | None:
    """Returns the contract that fine-tuning left in a folder, or None where there is none."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        return _contract(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"{path}: not the prompt.json that fine-tuning writes ({told}); mend or remove it") from None


def _contract(content: Any) -> PromptContract:
    """Returns the contract that a prompt.json holds; keys of later versions are left alone."""
    values = {item.name: content[item.name] for item in fields(PromptContract)}
    for name, kind in (("stop_token_ids", int), ("stop_tokens", str)):
        if not all(isinstance(stop, kind) for stop in values[name]):
            raise TypeError(f"{name} is no list of {kind.__name__}")
        values[name] = tuple(values[name])
    for name in ("prefix", "suffix", "example", "start_token"):
        if not isinstance(values[name], str):
            raise TypeError(f"{name} is no text")
    return PromptContract(**values)


def prompt_contract(tokenizer: Any, samples: Sequence[Sample]) -> PromptContract:
    """Returns what a training split's prompts have in common; needs one sample at least."""
    step = max(1, len(samples) // EXAMINED_SAMPLES)
    examined = samples[::step]
    start = start_ids(tokenizer)
    prompts = [_text(tokenizer, sample.prompt_ids, start) for sample in examined]
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
    last_ids = {sample.answer_ids[-1] for sample in examined}
    stops = sorted((last_ids & special) | ({tokenizer.eos_token_id} - {None}))
    contract = PromptContract(
        prefix=_common_start(prompts),
        suffix=_common_start([prompt[::-1] for prompt in prompts])[::-1],
        example=prompts[0],
        start_token=tokenizer.bos_token if start else "",
        stop_token_ids=tuple(stops),
        stop_tokens=tuple(tokenizer.convert_ids_to_tokens(stops)),
        ends_supervised=bool(last_ids & special),
    )
    # Where all prompts are alike there is no telling which part of them is the template.
    return contract if len(set(prompts)) > 1 else replace(contract, prefix="", suffix="")


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    length = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(length, len(last))]


def _text(tokenizer: Any, ids: list[int], start: list[int]) -> str:
    own = ids[len(start) :] if ids[: len(start)] == start else ids
    return str(tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False))
