"""Everything that can be wrong with a run's input is one line that names flag and file, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrecipes.command import guarded
from llmrecipes.run import finetune as module

Command = Callable[..., int]
Edit = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def refused(finetune: Command, refusal: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Runs a fine-tuning that must fail cleanly; returns its one line."""
    return lambda **flags: refusal(lambda: finetune(tmp_path / "out", **flags))


# --- the model folder -------------------------------------------------------------------------------------------------


def config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def weights(change: Callable[[Tensors], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def without(*names: str) -> Edit:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def holding(name: str, content: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content) and None


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits] and None


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BROKEN_EARLY: dict[str, tuple[Edit, str]] = {
    "missing": (shutil.rmtree, "--model_name {model}: no such folder"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()] and None, "it has no config.json"),
    "a file": (lambda folder: shutil.rmtree(folder) or folder.touch(), "{model}: this is a file"),
    "no weights": (without("model.safetensors"), "no weights (*.safetensors) in it"),
    "only pickles": (
        both(without("model.safetensors"), holding("pytorch_model.bin", b"x")),
        "pickles (pytorch_model.bin), which can run code",
    ),
    "cut short": (cut, "model.safetensors: broken or cut short at "),
    "no bytes": (holding("model.safetensors", b""), "model.safetensors: broken or cut short at 0 bytes"),
    "shard missing": (
        holding("model.safetensors.index.json", b'{"weight_map": {"a": "model-2.safetensors"}}'),
        "1 of 1 weight files are missing: model-2.safetensors",
    ),
    "index": (holding("model.safetensors.index.json", b"{}"), "no weight_map in it"),
    "config broken": (holding("config.json", b"{"), "config.json: not valid JSON"),
    "config a list": (holding("config.json", b"[]"), "config.json: expected a JSON object"),
    "config without type": (holding("config.json", b"{}"), "no model_type in it"),
    "unknown type": (config(model_type="nothing"), "its config.json cannot be read"),
    "heads": (config(num_attention_heads=5), "not a multiple of the number of attention heads (5)"),
    "text for a number": (config(hidden_size="x"), "'hidden_size' expected int"),
    "code": (config(model_type="own", auto_map={"AutoConfig": "evil.C"}), "its config.json cannot be read"),
    "quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "stored quantized already"),
    "no tokenizer": (without("tokenizer.json"), "no tokenizer can be read from it (it has no tokenizer.json)"),
    "tokenizer broken": (holding("tokenizer.json", b"{"), "no tokenizer can be read from it"),
    "adapter": (holding("adapter_config.json", b"{}"), "this folder holds an adapter, not a plain model"),
    "small vocabulary": (config(vocab_size=20), "an id outside the model's vocabulary of 20"),
    "few positions": (config(max_position_embeddings=5), "longer than the model's 5 positions"),
}


@pytest.mark.parametrize("name", BROKEN_EARLY)
def test_a_broken_model_folder_is_told_before_the_model_loads(
    name: str, refused: Callable[..., str], model_folder: Path, tmp_path: Path, no_model_loads: None
) -> None:
    edit, message = BROKEN_EARLY[name]
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')")
    edit(model)
    line = refused(model_name=model)
    assert message.replace("{model}", str(model)) in line
    assert not (tmp_path / "evil").exists()


BROKEN_WEIGHTS: dict[str, tuple[Edit, str]] = {
    "missing tensor": (weights(lambda w: w.pop("model.norm.weight")), "1 missing tensors, such as model.norm.weight"),
    "extra tensor": (weights(lambda w: w.update(odd=torch.ones(2))), "1 unexpected tensors, such as odd"),
    "other shape": (
        weights(lambda w: w.update({"model.norm.weight": torch.ones(5)})),
        "1 mismatched tensors, such as model.norm.weight",
    ),
    "other shape of a linear layer": (
        weights(lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.ones(3, 64)})),
        "1 mismatched tensors, such as model.layers.1.mlp.up_proj.weight",
    ),
    "more layers": (config(num_hidden_layers=3), "9 missing tensors, such as model.layers.2"),
    "fewer layers": (config(num_hidden_layers=1), "9 unexpected tensors, such as model.layers.1"),
    "not a number": (
        weights(lambda w: w["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.nan)),
        "model.layers.1.mlp.up_proj.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize(
    "storage", [{}, *({"quantization": kind} for kind in ("8bit", "4bit", "fp8"))], ids=["plain", "8bit", "4bit", "fp8"]
)
@pytest.mark.parametrize("name", BROKEN_WEIGHTS)
def test_weights_that_are_not_those_of_the_config_are_told(
    name: str, storage: dict[str, str], refused: Callable[..., str], model_folder: Path, tmp_path: Path
) -> None:
    edit, message = BROKEN_WEIGHTS[name]
    shutil.copytree(model_folder, tmp_path / "model")
    edit(tmp_path / "model")
    line = refused(model_name=tmp_path / "model", **storage)
    assert f"--model_name {tmp_path / 'model'}: {message}" in line


def test_a_name_that_is_neither_here_nor_on_the_hub(refused: Callable[..., str], no_model_loads: None) -> None:
    for name in ("nowhere", "no/where", "a b"):
        assert f"--model_name {name}: its config.json cannot be read (no such folder is here" in refused(
            model_name=name
        )
    for name in ("./nowhere", "~no-such-user/x", "../../nowhere", "nowhere/"):
        assert f"--model_name {Path(name)}: no such folder" in refused(model_name=name)
    assert "--model_name is empty" in refused(model_name=" ")


def test_an_attention_that_a_config_names_is_not_fetched(
    finetune: Command, model_folder: Path, in_memory: list[Any], tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    config(_attn_implementation="evil/kernel", attn_implementation="evil/kernel")(tmp_path / "model")
    assert finetune(tmp_path / "out", model_name=tmp_path / "model", num_epochs=1) == 0
    assert "evil" not in str(in_memory[0].config._attn_implementation)


# --- the adapter ------------------------------------------------------------------------------------------------------

OTHER_BASES: dict[str, dict[str, Any]] = {
    "width": {"hidden_size": 32},
    "more layers": {"num_hidden_layers": 3},
    "fewer layers": {"num_hidden_layers": 1},
    "other weights": {},
}


USES = ("finetuning", "inference", "evaluation", "merging")


def other_base(base: Path, folder: Path, **changes: Any) -> Path:
    """A model of other random weights, which is all that differs unless a setting does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(base, folder)
    settings = {**LlamaConfig.from_pretrained(base).to_dict(), **changes}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**{**settings, **({"head_dim": None} if changes else {})})).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter_users(
    finetune: Command, infer: Command, evaluate: Command, merge: Command, tuned: Path, tmp_path: Path
) -> Callable[..., int]:
    """Puts the tuned adapter on a base, by each command that does."""

    def use(name: str, **flags: Any) -> int:
        if name == "finetuning":
            given = {"from_peft_checkpoint": tuned, "lora_config.lora_dropout": None, "num_epochs": 1, **flags}
            return finetune(tmp_path / "out", **given)
        if name == "merging":
            return merge(tuned, tmp_path / "out", **flags)
        return {"inference": lambda **given: infer("2+3=", **given), "evaluation": evaluate}[name](
            peft_model=str(tuned), **flags
        )

    return use


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", OTHER_BASES)
def test_an_adapter_of_another_base_is_told(
    name: str, use: str, adapter_users: Callable[..., int], tuned: Path, model_folder: Path, tmp_path: Path,
    no_model_loads: None, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = other_base(model_folder, tmp_path / "model", **OTHER_BASES[name])
    assert guarded(lambda: adapter_users(use, model_name=str(other))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    flag = "from_peft_checkpoint" if use == "finetuning" else "peft_model"
    assert line.startswith(f"error: --{flag} {tuned}: it was trained on the base {model_folder} (")
    assert f"and --model_name {other} (" in line and "another one: other weights" in line
    assert ("another config.json" in line) == (name != "other weights")
    assert line.endswith("give that base, or use this one all the same with --allow_base_mismatch")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", OTHER_BASES)
def test_another_base_may_be_allowed_if_its_shapes_fit(
    name: str, use: str, adapter_users: Callable[..., int], tuned: Path, model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = other_base(model_folder, tmp_path / "model", **OTHER_BASES[name])
    code = guarded(lambda: adapter_users(use, model_name=str(other), allow_base_mismatch="true"))
    shown = capsys.readouterr()
    if name == "other weights":
        assert code == 0
        assert "was trained on the base " in "".join(shown)
        return
    assert code == 2
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert f"{tuned}: the adapter " in line and ("size mismatch" in line or "trained on another base model" in line)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_names_no_base_is_used_and_that_is_told(
    infer: Command, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tuned, tmp_path / "adapter")
    (tmp_path / "adapter" / "base.json").unlink()
    assert infer("9+3=", peft_model=str(tmp_path / "adapter")) == 0
    shown = capsys.readouterr()
    assert shown.out == "12\n"
    assert f"note: --peft_model {tmp_path / 'adapter'}: it does not say which base it was trained on" in shown.err


def test_an_adapter_continued_on_another_base_is_of_that_one(
    adapter_users: Callable[..., int], model_folder: Path, tmp_path: Path
) -> None:
    other = other_base(model_folder, tmp_path / "model")
    assert adapter_users("finetuning", model_name=str(other), allow_base_mismatch="true") == 0
    assert json.loads((tmp_path / "out" / "base.json").read_text())["name"] == str(other)


BROKEN_ADAPTERS: dict[str, tuple[Edit, str]] = {
    "missing": (shutil.rmtree, "no such folder; give the folder that fine-tuning wrote"),
    "no config": (without("adapter_config.json"), "it has no adapter_config.json, so it is not an adapter folder"),
    "no weights": (without("adapter_model.safetensors"), "no weights (*.safetensors) in it"),
    "a pickle beside other weights": (
        both(
            lambda folder: (folder / "adapter_model.safetensors").rename(folder / "other.safetensors") and None,
            holding("adapter_model.bin", b"x"),
        ),
        "it has no adapter_model.safetensors",
    ),
    "cut short": (holding("adapter_model.safetensors", b"12345678"), "broken or cut short at 8 bytes"),
    "a base of two lines": (
        holding("base.json", b'{"name": "a\\nb", "revision": "", "config": "", "weights": ""}'),
        "base.json: not the base.json that fine-tuning writes",
    ),
    "a base that is none": (
        holding("base.json", b'{"name": 1}'),
        "base.json: not the base.json that fine-tuning writes",
    ),
    "another method": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}') and None,
        "it holds a IA3 adapter, and --peft_method is lora; expected one of LORA",
    ),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_a_broken_adapter_folder_is_told_before_the_model_loads(
    name: str, refused: Callable[..., str], tuned: Path, tmp_path: Path, no_model_loads: None
) -> None:
    edit, message = BROKEN_ADAPTERS[name]
    shutil.copytree(tuned, tmp_path / "adapter")
    edit(tmp_path / "adapter")
    line = refused(from_peft_checkpoint=tmp_path / "adapter", **{"lora_config.lora_dropout": None})
    assert f"--from_peft_checkpoint {tmp_path / 'adapter'}" in line and message in line


def test_an_adapter_with_a_weight_that_is_not_a_number_is_told(
    refused: Callable[..., str], tuned: Path, tmp_path: Path
) -> None:
    shutil.copytree(tuned, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    line = refused(from_peft_checkpoint=tmp_path / "adapter", **{"lora_config.lora_dropout": None})
    assert "holds NaN or infinity" in line


# --- flags that the machine, the model or the method cannot do --------------------------------------------------------

LINEARS = "its linear layers are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"

IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "no GPU": ({"device": "cuda"}, "--device cuda: this machine has 0 CUDA devices"),
    "no such device": ({"device": "gpu"}, "--device gpu: expected auto, cpu, cuda or cuda:N"),
    "paged": ({"optimizer": "paged_adamw_32bit"}, "--optimizer paged_adamw_32bit: paging needs a GPU"),
    "wandb": ({"use_wandb": True}, "the tracker wandb needs the package wandb"),
    "tracker": ({"report_to": "tensorbord"}, "--report_to tensorbord"),
    "seed": ({"seed": 2**64}, "--seed"),
    "packed prefix": (
        {"peft_method": "prefix", "batching_strategy": "packing", "lora_config.lora_dropout": None},
        "--batching_strategy packing: a prefix stands before a row",
    ),
    "context": (
        {"context_length": 6},
        "longer than --context_length 6 (longest 8 tokens; raise it",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_done_here_is_told_before_the_model_loads(
    name: str, refused: Callable[..., str], no_model_loads: None
) -> None:
    flags, message = IMPOSSIBLE[name]
    if (name == "no GPU" and torch.cuda.is_available()) or (name == "wandb" and has_wandb()):
        pytest.skip("it can be done here")
    assert message in refused(**flags)


def has_wandb() -> bool:
    from importlib.util import find_spec

    return find_spec("wandb") is not None


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "no such module": (
        {"lora_config.target_modules": "query"},
        f"target_modules query: this model has no such layers; {LINEARS}",
    ),
    "one of two": (
        {"lora_config.target_modules": "q_proj,v_prj"},
        "target_modules v_prj: this model has no such layers",
    ),
    "no linear": ({"lora_config.target_modules": "norm"}, "--peft_method lora: it does not fit this model"),
    "too many layers": (
        {"peft_method": "llama_adapter", "lora_config.lora_dropout": None},
        "--peft_method llama_adapter: it does not fit this model (ValueError: Config specifies more adapter layers",
    ),
    "too many frozen": (
        {"use_peft": None, "freeze_layers": True, "num_freeze_layers": 3, "lora_config.lora_dropout": None},
        "--num_freeze_layers 3: this model has 2 decoder layers",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_the_model_has_not_got_is_told_with_what_it_has(name: str, refused: Callable[..., str]) -> None:
    flags, message = UNFIT[name]
    assert message in refused(**flags)


@pytest.mark.parametrize("overlong", ["error", "truncate", "drop", "split"])
@pytest.mark.parametrize("strategy", ["padding", "packing"])
def test_samples_longer_than_the_models_positions(
    strategy: str, overlong: str, finetune: Command, refused: Callable[..., str], model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "long.py").write_text(
        "def rows(config, tokenizer, split):\n"
        "    return [{'input_ids': [1] + [5] * n, 'labels': [1] + [5] * n} for n in (10, 20, 300)]\n"
    )
    flags = {"custom_dataset.file": f"{tmp_path}/long.py:rows", "context_length": 4096, "batching_strategy": strategy}
    if overlong == "error":
        line = refused(**flags)
        assert "row 2: longer than the model's 128 positions (longest 301 tokens; " in line
        return
    assert finetune(tmp_path / "out", overlong=overlong, **flags) == 0
    shown = capsys.readouterr().out
    samples, tokens = {"truncate": (3, 11 + 21 + 128), "drop": (2, 11 + 21), "split": (5, 11 + 21 + 301)}[overlong]
    assert f"{samples} for training" in shown and f"{tokens} an epoch" in shown
    assert "longer than the model's 128 positions" in shown


def test_a_model_that_takes_no_packed_rows_is_told_what_to_do(
    refused: Callable[..., str], model_folder: Path, tmp_path: Path
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    shutil.copytree(model_folder, tmp_path / "bloom")
    settings = {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 260}
    BloomForCausalLM(BloomConfig(**settings)).save_pretrained(tmp_path / "bloom")
    flags = {"model_name": tmp_path / "bloom", "lora_config.target_modules": "all-linear"}
    line = refused(batching_strategy="packing", **flags)
    assert "--batching_strategy packing: this model takes no packed rows" in line


def test_the_end_of_the_memory_is_one_line(
    refused: Callable[..., str], finetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(*arguments: Any) -> None:
        torch.empty(2**50)

    monkeypatch.setattr(module, "train", full)
    assert guarded(lambda: finetune(tmp_path / "full")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: training: the memory does not suffice") and "--batch_size_training" in line
