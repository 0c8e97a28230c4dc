"""Text to token ids, the one way for training, inference and evaluation.

A sample is a list of `Piece`s. Neighbouring plain pieces of the same supervision are tokenized as one string, so a
prompt has the ids that it has when it is typed at inference; the mask follows the pieces and is never found by
searching for tokens. Text never becomes a control token: only a piece marked `control` does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import length_hint
from typing import Any, NamedTuple, overload

from llmrecipes.errors import DataError

IGNORED_LABEL = -100
"""The label of a token that is not supervised: PyTorch's `cross_entropy(ignore_index=-100)`."""

Encoded = dict[str, list[int]]
"""`{input_ids, labels, attention_mask}` of one sample, three lists of one length."""

SAMPLES_AT_ONCE = 1000
"""Samples whose texts are tokenized in one call, on all cores: more gain nothing, and their texts lie in memory."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a sample's text. `control`: the text is exactly one control token, such as `</s>`."""

    text: str
    supervised: bool = False
    control: bool = False


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a prompt given as text, exactly as given, with exactly one BOS where the model has one.

    Control tokens spelled out in `text` are read as such: whoever types a prompt may write `<s>` or `<|im_start|>`.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = start_ids(tokenizer)
    return ids if start and ids[:1] == start else start + ids


def encode_sample(tokenizer: Any, pieces: Sequence[Piece]) -> Encoded:
    """Returns `{input_ids, labels, attention_mask}` of one sample: three lists of one length.

    The ids open with the tokenizer's own start token (never two, none where it has none); labels are the ids of
    supervised pieces and `IGNORED_LABEL` elsewhere.
    """
    return encode_samples(tokenizer, [pieces])[0]


class Lasting:
    """What can be gone through any number of times and is made anew each time, so that nobody need hold all of it."""

    def filled(self) -> "Lasting":
        """Returns the pairs, blank ones and those that are no text told with their place where it is known."""
        return self


@overload
def encode_pairs(tokenizer: Any, pairs: Lasting) -> "EncodedSamples":
    """Of rows as `load_split` gives them: made one by one, when they are gone through."""


@overload
def encode_pairs(tokenizer: Any, pairs: Iterable[tuple[str, str]]) -> list[Encoded]:
    """Of all else: made at once."""


def encode_pairs(tokenizer: Any, pairs: Any) -> "EncodedSamples | list[Encoded]":
    """Returns the samples of (prompt, answer) texts: the prompt masked, the answer and the end token supervised.

    Of rows as `load_split` gives them, a blank prompt or answer is a bad row.
    """
    end = end_piece(tokenizer)
    told: Any = pairs.filled() if isinstance(pairs, Lasting) else pairs

    def pieces() -> Iterator[list[Piece]]:
        for prompt, answer in told:
            yield [Piece(prompt), Piece(answer, supervised=True), end]

    made = EncodedSamples(tokenizer, pieces, pairs)
    return made if isinstance(pairs, Lasting) else list(made)


@overload
def encode_samples(tokenizer: Any, samples: Lasting) -> "EncodedSamples":
    """Of rows as `load_split` gives them: made one by one, when they are gone through."""


@overload
def encode_samples(tokenizer: Any, samples: Iterable[Sequence[Piece]]) -> list[Encoded]:
    """Of all else: made at once."""


def encode_samples(tokenizer: Any, samples: Any) -> "EncodedSamples | list[Encoded]":
    """Returns what `encode_sample` gives for each, several times as fast: texts go to the tokenizer in thousands."""
    made = EncodedSamples(tokenizer, lambda: iter(samples), samples)
    return made if isinstance(samples, Lasting) else list(made)


@dataclass(frozen=True)
class EncodedSamples:
    """Samples that are tokenized as they are gone through, any number of times; `list(...)` holds all at once."""

    tokenizer: Any
    pieces: Callable[[], Iterator[Sequence[Piece]]]
    source: object
    """what the pieces are made of: it may know how many there are"""

    def __iter__(self) -> Iterator[Encoded]:
        start = start_ids(self.tokenizer)
        waiting = self.pieces()
        while chunk := list(islice(waiting, SAMPLES_AT_ONCE)):
            runs = [_runs(pieces) for pieces in chunk]
            plain = ["".join(run.texts) for sample in runs for run in sample if not run.control]
            ids = iter(_plain_ids(self.tokenizer, plain))
            for sample in runs:
                yield _joined(self.tokenizer, sample, ids, start)

    def __length_hint__(self) -> int:
        return length_hint(self.source)


class _Run(NamedTuple):
    """Neighbouring pieces of one kind."""

    supervised: bool
    control: bool
    texts: list[str]


def _runs(pieces: Sequence[Piece]) -> list[_Run]:
    told = [piece for piece in pieces if piece.text]  # an empty piece joins its neighbours, it does not part them
    grouped = groupby(told, key=lambda piece: (piece.supervised, piece.control))
    return [_Run(*kind, [piece.text for piece in run]) for kind, run in grouped]


def _joined(tokenizer: Any, runs: Sequence[_Run], plain_ids: Iterator[list[int]], start: list[int]) -> Encoded:
    input_ids: list[int] = []
    labels: list[int] = []
    for run in runs:
        ids = [control_id(tokenizer, text) for text in run.texts] if run.control else next(plain_ids)
        input_ids += ids
        labels += ids if run.supervised else [IGNORED_LABEL] * len(ids)
    if input_ids[: len(start)] != start:
        input_ids = start + input_ids
        labels = [IGNORED_LABEL] * len(start) + labels
    return {"input_ids": input_ids, "labels": labels, "attention_mask": [1] * len(input_ids)}


def end_piece(tokenizer: Any) -> Piece:
    """Returns the supervised end-of-sequence token that an answer closes with, so that the model learns to stop."""
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer has no end-of-sequence token, so a model could never learn to stop")
    return Piece(tokenizer.eos_token, supervised=True, control=True)


def _plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    return list(tokenizer(texts, **options)["input_ids"])


def start_ids(tokenizer: Any) -> list[int]:
    """Returns `[bos_token_id]` where the tokenizer opens every text with it, else `[]`."""
    if tokenizer.bos_token_id is None or list(tokenizer("")["input_ids"])[:1] != [tokenizer.bos_token_id]:
        return []
    return [tokenizer.bos_token_id]


def control_id(tokenizer: Any, token: str) -> int:
    """Returns the id of one control token; raises `DataError` where the vocabulary lacks it."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or (token_id == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise DataError(f"the tokenizer has no token {token!r}, which the prompt template needs")
    return int(token_id)
