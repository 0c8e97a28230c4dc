"""Answers of a model to prompts given as token ids, all at once or as a stream for a terminal.

A greedy answer depends on its prompt alone: not on its neighbours in the batch, not on the pad token, and not on the
`generation_config.json` that lies in the model's folder.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from llmrecipes.errors import DataError
from llmrecipes.generation.settings import GenerationSettings

UNDECODED = "\ufffd"
"""What a tokenizer decodes the bytes of an unfinished character to."""


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """Returns the answer to each prompt, in the order of the prompts, without prompt and stop token.

    Prompts run longest first; a batch that does not fit the memory is answered in halves. After each `on_batch` is told
    how many prompts are answered so far. The model's train or eval modes, its generation config and the random
    state are what they were when this returns or raises. Raises `DataError` before the first batch for a prompt that
    the model cannot take.
    """
    check_prompts(model, prompts, settings)
    longest_first = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    texts = [""] * len(prompts)
    with _generating(model, settings):
        for start in range(0, len(prompts), batch_size):
            places = longest_first[start : start + batch_size]
            answers = _answers_in_pieces(model, [prompts[place] for place in places], settings)
            for place, answer in zip(places, answers, strict=True):
                texts[place] = _answer_text(tokenizer, answer)
            if on_batch is not None:
                on_batch(start + len(places))
    return texts


def _answers_in_pieces(model: Any, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[list[int]]:
    """Returns the answers' ids, prompts halved, and halved again, where the memory does not suffice for all at once."""
    try:
        return list(_answer_ids(model, prompts, settings))
    except torch.OutOfMemoryError:
        if len(prompts) == 1:
            raise
    gc.collect()
    middle = len(prompts) // 2
    parts = (prompts[:middle], prompts[middle:])
    return [answer for part in parts for answer in _answers_in_pieces(model, part, settings)]


def stream_text(model: Any, tokenizer: Any, prompt_ids: Sequence[int], settings: GenerationSettings) -> Iterator[str]:
    """Returns an iterator over the pieces of the answer as they come; joined they are what `generate_texts` returns.

    No piece ends within a character. The model runs in a thread, under the caller's autocast; what it raises is
    raised here, and leaving the iterator early (`close`, Ctrl-C) stops it after the token it is at. (Where a
    tokenizer takes back a character it has already decoded, as for invalid UTF-8, the pieces keep it.) Raises
    `DataError` at once for a prompt that the model cannot take.
    """
    check_prompts(model, [prompt_ids], settings)
    kind = model.device.type
    autocast = torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))

    def run(feed: "_TokenFeed") -> None:
        with autocast, _generating(model, settings):
            _answer_ids(model, [prompt_ids], settings, feed)

    return _pieces(tokenizer, run, settings.stop_token_ids)


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> None:
    """Raises `DataError` naming the first prompt that is empty, too long for the model or outside its vocabulary."""
    positions = getattr(model.config, "max_position_embeddings", None)
    vocabulary = model.config.vocab_size
    for number, prompt in enumerate(prompts, start=1):
        name = f"prompt {number} of {len(prompts)}"
        if len(prompt) == 0:
            raise DataError(f"{name} is empty; expected at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise DataError(
                f"{name} has the token id {max(prompt) if min(prompt) >= 0 else min(prompt)}, and the model knows 0 to "
                f"{vocabulary - 1}; use the tokenizer that belongs to the model"
            )
        if positions is not None and len(prompt) + settings.max_new_tokens > positions:
            room = positions - len(prompt)
            remedy = f"shorten it or pass --max_new_tokens {room} or less" if room > 0 else "shorten it"
            raise DataError(
                f"{name} has {len(prompt)} tokens and --max_new_tokens asks for {settings.max_new_tokens} more, but "
                f"the model has only {positions} positions (max_position_embeddings); {remedy}"
            )


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `(input_ids, attention_mask)`, both int64 [prompts, longest], with the padding on the left.

    A row is padded with its own first token. The mask hides it from the model; what looks at bare ids, as a
    repetition penalty does, then sees no token that the prompt has not got.
    """
    longest = max(len(prompt) for prompt in prompts)
    gaps = [longest - len(prompt) for prompt in prompts]
    ids = [[prompt[0]] * gap + list(prompt) for prompt, gap in zip(prompts, gaps, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _answer_ids(
    model: Any, prompts: Sequence[Sequence[int]], settings: GenerationSettings, feed: "_TokenFeed | None" = None
) -> list[list[int]]:
    """Returns the new tokens of each prompt, up to its first stop token; `feed` is told them as they come."""
    input_ids, attention_mask = left_padded(prompts, model.device)
    width = input_ids.shape[1]
    least = [max(settings.min_new_tokens, (settings.min_length or 0) - len(prompt)) for prompt in prompts]
    early = _NoEarlyStop(settings.stop_token_ids, least, width)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=_generation_config(settings),
        logits_processor=LogitsProcessorList([early] if settings.stop_token_ids and max(least) > 0 else []),
        stopping_criteria=StoppingCriteriaList([feed] if feed is not None else []),
        streamer=feed,
    )
    return [_until_stop(row, settings.stop_token_ids) for row in output[:, width:].tolist()]


def _generation_config(settings: GenerationSettings) -> GenerationConfig:
    """Returns the settings in transformers' words; the shape of the draw is left out where nothing is drawn."""
    draw = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    stops = list(settings.stop_token_ids)
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.do_sample,
        repetition_penalty=settings.repetition_penalty,
        use_cache=settings.use_cache,
        num_beams=1,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else None,  # fills the rows that have stopped; all behind the stop is cut
        **(draw if settings.do_sample else {}),
    )


@contextmanager
def _generating(model: Any, settings: GenerationSettings) -> Iterator[None]:
    """Puts the model in eval mode and the random state at the seed; on leaving all is as it was, module by module.

    transformers fills every choice that a call leaves open from `model.generation_config`
    (`GenerationMixin._prepare_generation_config`, 5.23), so an empty one stands there meanwhile.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    configs = [(module, module.generation_config) for module in modules if "generation_config" in vars(module)]
    device = model.device
    chips = [] if device.type == "cpu" else list(range(torch.get_device_module(device).device_count()))
    chip_kind = "cuda" if device.type == "cpu" else device.type
    try:
        model.eval()
        for module, _ in configs:
            module.generation_config = GenerationConfig()
        with torch.random.fork_rng(devices=chips, device_type=chip_kind), torch.inference_mode():
            torch.default_generator.manual_seed(settings.seed)
            if chips:
                torch.get_device_module(device).manual_seed_all(settings.seed)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, config in configs:
            module.generation_config = config


def _until_stop(ids: Sequence[int], stop_token_ids: Sequence[int]) -> list[int]:
    """Returns the ids before the first stop token."""
    end = next((place for place, token in enumerate(ids) if token in stop_token_ids), len(ids))
    return list(ids[:end])


def _answer_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of an answer, control tokens left out.

    A last character that `max_new_tokens` cut in two is left out (UTF-8: at most 3 bytes of it can be there):
    with it a tokenizer with byte fallback, as Llama 2's, would lose the whole characters before it too.
    """
    for length in range(len(ids), max(len(ids) - 4, -1), -1):
        text = _decoded(tokenizer, ids[:length])
        if not text.endswith(UNDECODED):
            return text
    return _decoded(tokenizer, ids)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns what the model wrote and nothing tidied: the clean-up would turn ` ,` into `,`."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _pieces(tokenizer: Any, run: Callable[["_TokenFeed"], None], stop_token_ids: Sequence[int]) -> Iterator[str]:
    """Yields the text of the tokens that `run` feeds, each part as soon as no later token can change it."""
    feed = _TokenFeed()
    worker = Thread(target=_run_and_report, args=(run, feed), name="llmrecipes-stream", daemon=True)
    worker.start()
    ids: list[int] = []
    told = ""
    try:
        while (event := feed.events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            ids.append(event)
            text = _answer_text(tokenizer, _until_stop(ids, stop_token_ids)).rstrip(UNDECODED)
            if len(text) > len(told) and text.startswith(told):
                yield text[len(told) :]
                told = text
        text = _answer_text(tokenizer, _until_stop(ids, stop_token_ids))
        if len(text) > len(told) and text.startswith(told):
            yield text[len(told) :]
    finally:
        feed.cancelled.set()
        worker.join()


def _run_and_report(run: Callable[["_TokenFeed"], None], feed: "_TokenFeed") -> None:
    """Runs `run` and ends the feed with None, or with what it raised."""
    try:
        run(feed)
    except BaseException as problem:  # handed over whole: the thread that reads the feed raises it
        feed.events.put(problem)
    else:
        feed.events.put(None)


class _TokenFeed(StoppingCriteria):
    """Hands tokens from the thread of `generate` to the reader, and the reader's wish to stop back.

    `put` and `end` are what `generate` calls of a streamer; its first `put` is the prompt.
    """

    def __init__(self) -> None:
        self.events: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self.cancelled = Event()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.events.put(int(value))
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to do: the end is told by `_run_and_report`, when everything is restored."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Returns bool [rows]: stop now?"""
        return torch.full((input_ids.shape[0],), self.cancelled.is_set(), device=input_ids.device)


class _NoEarlyStop(LogitsProcessor):
    """Forbids the stop tokens in each row until it has its own least number of new tokens.

    transformers' own `min_length` counts the padding, so it would depend on the row's neighbours.
    """

    def __init__(self, stop_token_ids: Sequence[int], least_new_tokens: Sequence[int], prompt_width: int) -> None:
        self._stops = stop_token_ids
        self._least = least_new_tokens
        self._width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns the scores, float [rows, vocabulary], with -inf where a stop would come too early."""
        new_tokens = input_ids.shape[1] - self._width
        rows = [row for row, least in enumerate(self._least) if new_tokens < least]
        stops = [token for token in self._stops if token < scores.shape[-1]]
        allowed = scores.clone()
        if rows and stops:
            allowed[torch.tensor(rows)[:, None], torch.tensor(stops)] = -torch.inf
        return allowed
