"""Laws of decoding, on a tiny Llama in float32."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast

from llmrecipes.errors import DataError
from llmrecipes.generation.decoding import _answer_text, _pieces, generate_texts, left_padded, stream_text
from llmrecipes.generation.settings import GenerationSettings

PROMPTS = [[1, 70, 71, 72], [1, 90], [1, 40, 41, 42, 43, 44, 45, 46, 47], [1, 90, 91], [200], [1, 2, 2, 60]]
SETTINGS = GenerationSettings(max_new_tokens=16)
VARIANTS = [
    SETTINGS,
    replace(SETTINGS, repetition_penalty=1.7),
    replace(SETTINGS, min_length=14),
    replace(SETTINGS, min_new_tokens=6),
    replace(SETTINGS, use_cache=False),
]


def reference_ids(model: Any, prompt: Sequence[int], settings: GenerationSettings) -> list[int]:
    """Greedy decoding as the textbook has it: one forward over everything for each token, no batch, no cache."""
    ids = list(prompt)
    model.eval()
    while len(ids) - len(prompt) < settings.max_new_tokens:
        with torch.no_grad():
            scores = model(torch.tensor([ids]), use_cache=False).logits[0, -1].clone()
        seen = torch.tensor(sorted(set(ids)))
        penalized = torch.where(scores[seen] > 0, 1 / settings.repetition_penalty, settings.repetition_penalty)
        scores[seen] *= penalized
        if len(ids) < max(settings.min_length or 0, len(prompt) + settings.min_new_tokens):
            scores[list(settings.stop_token_ids)] = -torch.inf
        token = int(scores.argmax())
        if token in settings.stop_token_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def common_token(model: Any) -> int:
    """A token that the model says early in some answers, so that it makes a stop that matters."""
    first = [reference_ids(model, prompt, SETTINGS)[1] for prompt in PROMPTS]
    return first[0]


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_greedy_answer_is_the_textbook_one_in_every_batch(
    model: Any, tokenizer: Any, settings: GenerationSettings, batch_size: int
) -> None:
    settings = replace(settings, stop_token_ids=(2, common_token(model)))
    expected = [_answer_text(tokenizer, reference_ids(model, prompt, settings)) for prompt in PROMPTS]
    assert generate_texts(model, tokenizer, PROMPTS, settings, batch_size) == expected
    assert len(set(expected)) > 3


def test_a_batch_too_large_for_the_memory_is_answered_in_halves(model: Any, tokenizer: Any) -> None:
    expected = generate_texts(model, tokenizer, PROMPTS, SETTINGS, batch_size=1)
    most = [2]

    def small_memory(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > most[0]:
            raise torch.OutOfMemoryError("not enough")

    model.get_input_embeddings().register_forward_pre_hook(small_memory)
    assert generate_texts(model, tokenizer, PROMPTS, SETTINGS, batch_size=16) == expected
    most[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        generate_texts(model, tokenizer, PROMPTS, SETTINGS, batch_size=16)


@pytest.mark.parametrize("least", [{"min_new_tokens": 5}, {"min_length": 9}])
def test_each_prompt_has_its_own_least_length(model: Any, tokenizer: Any, least: dict[str, Any]) -> None:
    firsts = {reference_ids(model, prompt, SETTINGS)[0] for prompt in PROMPTS}
    likely = {token for prompt in PROMPTS for token in reference_ids(model, prompt, SETTINGS)}
    settings = replace(SETTINGS, stop_token_ids=tuple(firsts | likely))
    assert set(generate_texts(model, tokenizer, PROMPTS, settings)) == {""}
    settings = replace(settings, **least)
    expected = [reference_ids(model, prompt, settings) for prompt in PROMPTS]
    assert len(expected[0]) != len(expected[2]) or "min_new_tokens" in least
    texts = [_answer_text(tokenizer, ids) for ids in expected]
    assert generate_texts(model, tokenizer, PROMPTS, settings) == texts


def test_a_batch_ends_when_all_its_rows_have_stopped(model: Any, tokenizer: Any) -> None:
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    firsts = {reference_ids(model, prompt, replace(SETTINGS, max_new_tokens=1))[0] for prompt in PROMPTS}
    forwards.clear()
    generate_texts(model, tokenizer, PROMPTS, replace(SETTINGS, stop_token_ids=tuple(firsts)))
    assert len(forwards) == 1


@pytest.mark.parametrize(("use_cache", "widths"), [(True, [2, 1, 1]), (False, [2, 3, 4])])
def test_the_cache_is_used_as_told(model: Any, tokenizer: Any, use_cache: bool, widths: list[int]) -> None:
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, _i, output: seen.append(output.shape[1]))
    generate_texts(model, tokenizer, [[1, 90]], replace(SETTINGS, max_new_tokens=3, use_cache=use_cache))
    assert seen == widths


def test_a_row_is_padded_with_what_it_has() -> None:
    ids, mask = left_padded([[7, 8, 9], [5]], torch.device("cpu"))
    assert ids.tolist() == [[7, 8, 9], [5, 5, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_an_answer_ends_before_its_first_stop(model: Any, tokenizer: Any) -> None:
    prompt = PROMPTS[0]
    ids = reference_ids(model, prompt, SETTINGS)
    stop = next(token for place, token in enumerate(ids) if place > 2 and token not in ids[:place])
    cut = generate_texts(model, tokenizer, [prompt], replace(SETTINGS, stop_token_ids=(stop,)))
    assert cut == [_answer_text(tokenizer, ids[: ids.index(stop)])]
    without = generate_texts(model, tokenizer, [prompt], SETTINGS)
    assert without == [_answer_text(tokenizer, ids)]


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_model_folders_generation_config_changes_nothing(
    model: Any, tokenizer: Any, do_sample: bool, capfd: pytest.CaptureFixture[str], recwarn: Any
) -> None:
    settings = replace(SETTINGS, do_sample=do_sample, stop_token_ids=(2,))
    model.generation_config = GenerationConfig()
    plain = generate_texts(model, tokenizer, PROMPTS, settings)
    folder: dict[str, Any] = {
        "do_sample": True,
        "temperature": 9.0,
        "top_p": 0.1,
        "top_k": 3,
        "min_p": 0.9,
        "repetition_penalty": 3.0,
    }
    folder |= {"max_length": 7, "min_length": 3, "no_repeat_ngram_size": 1, "suppress_tokens": [60], "num_beams": 3}
    folder |= {"eos_token_id": list(range(4, 200)), "pad_token_id": 0, "use_cache": False, "max_time": 1e-9}
    theirs = GenerationConfig(**folder)
    model.generation_config = theirs
    capfd.readouterr()
    recwarn.clear()
    assert generate_texts(model, tokenizer, PROMPTS, settings) == plain
    streamed = "".join(stream_text(model, tokenizer, PROMPTS[0], settings))
    assert [streamed] == generate_texts(model, tokenizer, PROMPTS[:1], settings)
    assert model.generation_config is theirs
    assert capfd.readouterr() == ("", "")
    assert not [warning for warning in recwarn if "generat" in str(warning.message)]


def test_a_draw_repeats_with_its_seed_and_leaves_the_random_state_alone(model: Any, tokenizer: Any) -> None:
    settings = replace(SETTINGS, do_sample=True, temperature=2.0, top_k=0)
    before = torch.get_rng_state()
    first = generate_texts(model, tokenizer, PROMPTS, settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert generate_texts(model, tokenizer, PROMPTS, settings) == first
    assert generate_texts(model, tokenizer, PROMPTS, replace(settings, seed=1)) != first
    assert generate_texts(model, tokenizer, PROMPTS, replace(settings, temperature=0.01)) != first


def test_a_draw_from_the_likeliest_token_alone_is_the_greedy_answer(model: Any, tokenizer: Any) -> None:
    greedy = generate_texts(model, tokenizer, PROMPTS, SETTINGS)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert generate_texts(model, tokenizer, PROMPTS, replace(SETTINGS, do_sample=True, **narrow)) == greedy


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_keeps_its_mode(model: Any, tokenizer: Any, fails: bool) -> None:
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    seen: list[bool] = []

    def on_batch(done: int) -> None:
        seen.append(model.training)
        if fails:
            raise RuntimeError("stop here")

    if fails:
        with pytest.raises(RuntimeError, match="stop here"):
            generate_texts(model, tokenizer, PROMPTS, SETTINGS, 4, on_batch)
    else:
        generate_texts(model, tokenizer, PROMPTS, SETTINGS, 4, on_batch)
    assert seen == [False] * (1 if fails else 2)
    assert [module.training for module in model.modules()] == modes


def test_on_batch_is_told_how_many_are_done(model: Any, tokenizer: Any) -> None:
    done: list[int] = []
    generate_texts(model, tokenizer, PROMPTS, SETTINGS, 4, done.append)
    assert done == [4, 6]
    assert generate_texts(model, tokenizer, [], SETTINGS) == []


def test_text_is_decoded_untidied_and_without_control_tokens() -> None:
    backend = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2, ",": 3, "b": 4, ".": 5}, unk_token="<s>"))
    backend.pre_tokenizer = WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=True
    )
    assert _answer_text(words, [0, 2, 3, 4, 5, 1]) == "a , b ."


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 5], []], r"prompt 2 of 2 is empty"),
        ([[1] * 81], r"81 tokens"),
        ([[1] * 85], r"85 tokens .* 16 more.* 96 positions.*--max_new_tokens 11 or less"),
        ([[1] * 100], r"100 tokens .*shorten it$"),
        ([[1, 260]], r"token id 260.* 0 to 259"),
        ([[1, -3]], r"token id -3"),
    ],
)
def test_a_prompt_the_model_cannot_take_is_named(
    model: Any, tokenizer: Any, prompts: list[list[int]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        generate_texts(model, tokenizer, prompts, SETTINGS)
    with pytest.raises(DataError):
        stream_text(model, tokenizer, prompts[-1], SETTINGS)  # at the call, not at the first piece


def test_a_prompt_that_just_fits_is_taken(model: Any, tokenizer: Any) -> None:
    assert len(generate_texts(model, tokenizer, [[1] * 80], SETTINGS)) == 1


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_stream_joined_is_the_finished_text(model: Any, tokenizer: Any, prompt: list[int]) -> None:
    for settings in (*VARIANTS, replace(SETTINGS, do_sample=True, temperature=3.0)):
        settings = replace(settings, stop_token_ids=(2, common_token(model)), max_new_tokens=30)
        pieces = list(stream_text(model, tokenizer, prompt, settings))
        assert "".join(pieces) == generate_texts(model, tokenizer, [prompt], settings)[0]
        assert "" not in pieces


def fed(tokenizer: Any, ids: Sequence[int], stops: Sequence[int] = ()) -> list[str]:
    """The pieces of an answer whose tokens are given."""

    def run(feed: Any) -> None:
        feed.put(torch.tensor([[1]]))
        for token in ids:
            feed.put(torch.tensor([token]))
        feed.end()

    return list(_pieces(tokenizer, run, stops))


@given(st.lists(st.integers(min_value=0, max_value=259), max_size=24))
def test_any_bytes_stream_as_they_decode(tokenizer: Any, ids: list[int]) -> None:
    assert "".join(fed(tokenizer, ids)) == _answer_text(tokenizer, ids)


@given(st.text(alphabet="a字😀é\n ", max_size=8), st.integers(min_value=0, max_value=3))
def test_any_text_streams_whole_characters_even_where_it_is_cut(
    tokenizer: Any, fallback_tokenizer: Any, text: str, cut: int
) -> None:
    data = text.encode()
    data = data[: len(data) - cut]
    whole = data.decode(errors="ignore")
    for reader, ids in (
        (fallback_tokenizer, [3 + byte for byte in data]),
        (tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"][: len(data)]),
    ):
        assert "".join(fed(reader, ids)) == _answer_text(reader, ids) == whole


def test_a_piece_comes_before_the_end(tokenizer: Any) -> None:
    release = threading.Event()

    def run(feed: Any) -> None:
        feed.put(torch.tensor([[1]]))
        feed.put(torch.tensor(tokenizer("h")["input_ids"]))
        assert release.wait(10)
        feed.put(torch.tensor(tokenizer("i")["input_ids"]))

    pieces = _pieces(tokenizer, run, ())
    assert next(pieces) == "h"
    release.set()
    assert list(pieces) == ["i"]


def test_what_the_model_raises_reaches_the_reader(model: Any, tokenizer: Any) -> None:
    model.train()
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError("third forward")

    model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="third forward"):
        list(stream_text(model, tokenizer, PROMPTS[0], SETTINGS))
    assert model.training


def slow_forwards(model: Any) -> list[float]:
    """Makes each forward take a while; returns the list that grows with each."""
    times: list[float] = []

    def wait(*_: Any) -> None:
        time.sleep(0.02)
        times.append(time.monotonic())

    model.register_forward_hook(wait)
    return times


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "llmrecipes-stream"]


def test_leaving_the_stream_stops_the_model(model: Any, tokenizer: Any) -> None:
    model.train()
    forwards = slow_forwards(model)
    pieces = stream_text(model, tokenizer, [1, 90], replace(SETTINGS, max_new_tokens=80))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert len(forwards) < 80
    assert not stream_threads()
    assert model.training


def test_ctrl_c_stops_the_stream(model: Any, tokenizer: Any) -> None:
    forwards = slow_forwards(model)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        list(stream_text(model, tokenizer, [1, 90], replace(SETTINGS, max_new_tokens=90)))
    timer.join()
    assert 0 < len(forwards) < 90
    assert not stream_threads()


def test_the_stream_runs_under_the_callers_autocast(model: Any, tokenizer: Any) -> None:
    seen: list[torch.dtype] = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(stream_text(model, tokenizer, [1, 90], SETTINGS))
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    list(stream_text(model, tokenizer, [1, 90], SETTINGS))
    assert set(seen) == {torch.float32}


def test_an_adapter_is_heard(model: Any, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = generate_texts(model, tokenizer, PROMPTS, SETTINGS)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.base_model.model.generation_config = GenerationConfig(num_beams=2, max_length=3)
    assert generate_texts(adapted, tokenizer, PROMPTS, SETTINGS) == plain
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert generate_texts(adapted, tokenizer, PROMPTS, SETTINGS) != plain
    with adapted.disable_adapter():
        assert generate_texts(adapted, tokenizer, PROMPTS, SETTINGS) == plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_keeps_the_same_laws(model: Any, tokenizer: Any) -> None:
    model.to("cuda")
    settings = replace(SETTINGS, do_sample=True, temperature=2.0, min_length=12, stop_token_ids=(2,))
    before = torch.cuda.get_rng_state()
    first = generate_texts(model, tokenizer, PROMPTS, settings)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.cuda.manual_seed(99)
    assert generate_texts(model, tokenizer, PROMPTS, settings) == first
    streamed = "".join(stream_text(model, tokenizer, PROMPTS[0], settings))
    assert [streamed] == generate_texts(model, tokenizer, PROMPTS[:1], settings)
