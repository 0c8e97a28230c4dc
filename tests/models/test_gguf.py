"""A .gguf file becomes the model it was written from, once, or a one-line error."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import InferenceConfig
from llmrecipes.errors import HardwareError, ModelError
from llmrecipes.models import gguf as module
from llmrecipes.models.gguf import convert_gguf, gguf_folder
from llmrecipes.models.identity import base_of
from llmrecipes.models.loading import resolve_model

Kind = GGMLQuantizationType
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, "he", "ll", "hell"]
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""A Llama layer's parts: transformers' name -> GGUF's."""


def build_llama() -> Any:
    """Returns a Llama of two layers with random float32 weights, input and output embeddings tied."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        **shape, num_key_value_heads=2, vocab_size=len(TOKENS), max_position_embeddings=128, tie_word_embeddings=True
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns a q or k matrix in llama.cpp's row order: rotary pairs side by side (`permute` in its converter)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_tensors(model: Any) -> dict[str, np.ndarray]:
    """Returns a Llama's weights under GGUF's names and in its layout."""
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = interleaved(weight, 4 if theirs == "attn_q" else 2)
            tensors[f"blk.{layer}.{theirs}.weight"] = weight
    return tensors


def write_gguf(
    path: Path,
    model: Any,
    *,
    kind: Kind = Kind.F32,
    tokenizer: bool = True,
    without: str = "",
    architecture: str = "llama",
) -> Path:
    """Writes a model as a .gguf file with its matrices in `kind`, as llama.cpp's converter lays it out."""
    config = model.config
    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
        writer.add_token_merges(["h e", "l l", "he ll"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template(TEMPLATE)
    for name, tensor in gguf_tensors(model).items():
        if name != without:
            stored = kind if tensor.ndim > 1 else Kind.F32
            writer.add_tensor(name, quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama() -> Any:
    return build_llama()


@pytest.fixture(scope="module")
def packed(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", llama, kind=Kind.Q8_0)


@pytest.fixture(scope="module")
def converted(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_folder(packed, tmp_path_factory.mktemp("cache") / "not" / "there" / "yet")


def test_a_plain_file_gives_the_very_model_it_was_written_from(llama: Any, tmp_path: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "a.gguf", llama), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.float32
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, llama(ids).logits)


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)])
def test_a_file_of_half_numbers_keeps_every_bit(llama: Any, tmp_path: Path, kind: Kind, dtype: torch.dtype) -> None:
    convert_gguf(write_gguf(tmp_path / "a.gguf", llama, kind=kind), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").model.layers[1].mlp.up_proj.weight
    assert again.dtype == dtype
    assert torch.equal(again, llama.model.layers[1].mlp.up_proj.weight.to(dtype))


def test_a_packed_file_gives_its_unpacked_weights_rounded_once(llama: Any, converted: Path) -> None:
    again = AutoModelForCausalLM.from_pretrained(converted, dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        path = f"model.layers.1.{name}.weight"
        original = llama.get_parameter(path).detach().numpy()
        unpacked = dequantize(quantize(original, Kind.Q8_0), Kind.Q8_0)
        assert torch.equal(again.get_parameter(path), torch.from_numpy(unpacked).bfloat16()), name


def test_the_folder_is_an_ordinary_model_that_trains_and_saves(converted: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    ids = torch.arange(10)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)


def test_the_tokenizer_comes_along_with_its_chat_template(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.is_fast
    assert tokenizer.tokenize("hello") == ["hell", "o"]
    assert tokenizer.decode(tokenizer("3 + 4")["input_ids"], skip_special_tokens=True) == "3 + 4"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "<s>hi</s>"


def test_same_content_is_converted_once_under_any_name(
    packed: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "another name.gguf"
    copy.write_bytes(packed.read_bytes())
    monkeypatch.setattr(module, "load_gguf", None)
    assert gguf_folder(copy, converted.parent) == converted
    assert [item.name for item in converted.parent.iterdir()] == [converted.name]


def test_a_patch_in_the_middle_is_another_model(packed: Path, converted: Path, tmp_path: Path) -> None:
    content = bytearray(packed.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    patched = tmp_path / packed.name
    patched.write_bytes(content)
    assert gguf_folder(patched, converted.parent) != converted


def test_who_loses_a_race_takes_the_winners_folder(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = module.load_gguf

    def overtaken(source: Path, dtype: torch.dtype) -> tuple[Any, Any]:
        monkeypatch.setattr(module, "load_gguf", load)
        winner.append((gguf_folder(source, tmp_path) / "model.safetensors").stat().st_ino)
        return load(source, dtype)

    winner: list[int] = []
    monkeypatch.setattr(module, "load_gguf", overtaken)
    folder = gguf_folder(packed, tmp_path)
    assert (folder / "model.safetensors").stat().st_ino == winner[0]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_write_that_fails_because_the_winner_came_in_between_is_no_failure(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(self: Any, folder: Path, **options: Any) -> None:
        (tmp_path / "out").mkdir()
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", overtaken)
    convert_gguf(packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_cleared_marks_make_any_model_read_from_a_gguf_savable(packed: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    module.clear_quantizer_marks(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_a_conversion_that_dies_while_writing_leaves_nothing(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, folder: Path, **options: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(HardwareError, match=r"out: the model converted from .* cannot be written \(.*No space left"):
        convert_gguf(packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 3, 20, 2000, 30_000, -1])
def test_a_file_cut_short_is_told(packed: Path, tmp_path: Path, kept: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(packed.read_bytes()[:kept])
    expected = (
        r"cut\.gguf: broken, cut short at \d+ bytes.*fetch it again$" if kept not in (0, 3) else "not a GGUF file"
    )
    refused(cut, tmp_path, expected)


def test_garbage_is_told(tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_bytes(b"<!doctype html>" * 99)
    refused(
        tmp_path / "page.gguf", tmp_path, r"page\.gguf: not a GGUF file \(it begins with b'<!do', expected b'GGUF'\)$"
    )
    (tmp_path / "noise.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + np.random.default_rng(0).bytes(5000))
    refused(tmp_path / "noise.gguf", tmp_path, "noise.gguf: broken")


def test_a_wrong_name_is_told_with_its_neighbours(packed: Path, tmp_path: Path) -> None:
    refused(packed.with_name("tiny.gguf"), tmp_path, r"tiny\.gguf: no such file; there is tiny\.Q8_0\.gguf$")
    refused(tmp_path / "no" / "x.gguf", tmp_path, r"x\.gguf: no such file; give the path of a \.gguf file$")
    refused(tmp_path, tmp_path, "no such file")


def test_a_missing_tensor_is_never_made_up(llama: Any, tmp_path: Path) -> None:
    lacking = write_gguf(tmp_path / "a.gguf", llama, without="blk.1.ffn_up.weight")
    refused(lacking, tmp_path, r"a\.gguf: 1 tensors are missing .*model\.layers\.1\.mlp\.up_proj\.weight$")


def test_a_file_without_tokenizer_or_of_a_strange_kind_is_told(llama: Any, tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "a.gguf", llama, tokenizer=False), tmp_path, r"a\.gguf: its tokenizer cannot be read")
    refused(write_gguf(tmp_path / "b.gguf", llama, architecture="clip"), tmp_path, r"b\.gguf: .*clip.* not supported")


def test_one_part_of_several_is_told(tmp_path: Path) -> None:
    writer = GGUFWriter(str(tmp_path / "a-00001-of-00003.gguf"), "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "a-00001-of-00003.gguf", tmp_path, "one of 3 parts; join them first: llama-gguf-split --merge")


def test_a_vocabulary_alone_is_told(tmp_path: Path) -> None:
    writer = GGUFWriter(str(tmp_path / "vocab.gguf"), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "vocab.gguf", tmp_path, "a GGUF without weights")


def test_an_adapter_of_it_knows_its_base_by_the_file_under_any_name(packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(packed.read_bytes())
    found = []
    for path in (packed, copy):
        options = load_config(InferenceConfig, {"model_name": str(path)}).config
        found.append(base_of(options, resolve_model(options)))
    assert found[0].fingerprint == found[1].fingerprint and found[0].name != found[1].name
    assert hashlib.sha256(packed.read_bytes()).hexdigest().startswith(found[0].weights) and found[0].weights


def test_a_new_layout_takes_no_old_folder(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "convert_gguf", lambda source, target: target.mkdir(parents=True))
    first = gguf_folder(packed, tmp_path)
    monkeypatch.setattr(module, "LAYOUT", module.LAYOUT + 1)
    assert gguf_folder(packed, tmp_path) != first


def refused(source: Path, cache: Path, message: str) -> None:
    """Asserts that a file is refused in one line and that nothing was made of it."""
    before = set(cache.iterdir())
    with pytest.raises(ModelError, match=message) as caught:
        gguf_folder(source, cache)
    assert "\n" not in str(caught.value)
    assert set(cache.iterdir()) == before
