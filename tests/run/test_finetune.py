"""Laws of a whole fine-tuning: what it computes, what it leaves behind, that it can be done again."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmrecipes.command import run_command
from llmrecipes.errors import ConfigError, PluginError, TrainingError
from llmrecipes.run import preparing

Command = Callable[..., int]
Losses = Callable[[Path], list[float]]
Records = Callable[..., list[dict[str, Any]]]

IDS = torch.arange(20, 32)[None]

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
"""To write it anew after a change that is meant: delete it, run this file once, and look at the difference in git."""

GOLDEN_RUNS: dict[str, dict[str, Any]] = {
    "lora, padding": {
        "lora_config.lora_dropout": 0.05,
        "gradient_accumulation_steps": 2,
        "batch_size_training": 2,
        "lr": 1e-3,
    },
    "lora, packing": {"batching_strategy": "packing", "context_length": 16, "batch_size_training": 1, "lr": 1e-3},
    "llama_adapter, clipped": {
        "peft_method": "llama_adapter",
        "llama_adapter_config.adapter_layers": 2,
        "lora_config.lora_dropout": None,
        "gradient_clipping": True,
    },
    "full, cosine": {
        "use_peft": None,
        "lora_config.lora_dropout": None,
        "lr": 1e-3,
        "gamma": None,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
    },
}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_the_losses_are_the_golden_ones(name: str, finetune: Command, losses: Losses, tmp_path: Path) -> None:
    finetune(tmp_path / "out", **GOLDEN_RUNS[name])
    found = losses(tmp_path / "out")
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if name not in golden:
        GOLDEN.write_text(json.dumps({**golden, name: found}, indent=2) + "\n")
        pytest.fail(f"{GOLDEN} had no losses of this run; they are written now, look at them")
    assert found == pytest.approx(golden[name], rel=1e-5)


def test_the_same_command_gives_the_same_run_and_another_seed_another(
    finetune: Command, losses: Losses, tmp_path: Path
) -> None:
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        finetune(tmp_path / name, seed=seed, **{"lora_config.lora_dropout": 0.1})
    first, again, other = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "again", "other")
    )
    assert losses(tmp_path / "first") == losses(tmp_path / "again")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert losses(tmp_path / "first")[1:] != losses(tmp_path / "other")[1:]
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_batch_size_and_accumulation_leave_the_whole_curve_equal(
    finetune: Command, losses: Losses, tmp_path: Path
) -> None:
    # Windows of 5 out of 12 samples: the last one of an epoch is short.
    for rows, batches in ((5, 1), (1, 5), (2, 3)):
        flags = {"batch_size_training": rows, "gradient_accumulation_steps": batches, "num_epochs": 3, "lr": 1e-3}
        finetune(tmp_path / str(rows), **flags)
    assert len(losses(tmp_path / "5")) == 9
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "5"), rel=1e-5)
    assert len(losses(tmp_path / "2")) == 6  # windows of six: another run, so that the equality above says something
    assert losses(tmp_path / "2")[0] != pytest.approx(losses(tmp_path / "5")[0], rel=1e-5)


def test_batches_side_by_side_leave_the_curve_equal_and_are_told(
    finetune: Command, losses: Losses, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Windows of 8 out of 12 samples: the last one of an epoch is short.
    flags = {"batch_size_training": 4, "gradient_accumulation_steps": 2, "num_epochs": 3, "lr": 1e-3}
    told = {}
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            finetune(tmp_path / str(threads), **flags)
        finally:
            torch.set_num_threads(1)
        told[threads] = " ".join(capsys.readouterr().out.split())
        assert losses(tmp_path / str(threads)) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
    assert "side by side" not in told[1]
    assert "2 batches side by side" in told[2] and "4 batches side by side" in told[4]


@pytest.mark.parametrize(
    "flags",
    [{"lora_config.lora_dropout": 0.1}, {"use_peft": None, "lora_config.lora_dropout": None}, {"quantization": "8bit"}],
    ids=["dropout", "full", "quantized"],
)
def test_batches_go_one_by_one_where_threads_would_share_what_changes(
    flags: dict[str, Any], finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(2)
    try:
        finetune(tmp_path / "out", max_train_step=1, **flags)
    finally:
        torch.set_num_threads(1)
    assert "side by side" not in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("fast", [None, False], ids=["by document", "under a mask"])
@pytest.mark.parametrize("method", ["lora", "llama_adapter"])
def test_a_packed_epoch_is_the_padded_one(
    method: str, fast: bool | None, finetune: Command, losses: Losses, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"peft_method": method, "num_epochs": 4, "lr": 1e-3, "use_fast_kernels": fast}
    if method == "llama_adapter":
        flags |= {"lora_config.lora_dropout": None, "llama_adapter_config.adapter_layers": 2, "lr": 0.1}
    finetune(tmp_path / "padded", batch_size_training=12, **flags)
    finetune(tmp_path / "packed", batching_strategy="packing", context_length=100, **flags)
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-4)
    assert losses(tmp_path / "packed")[-1] < losses(tmp_path / "packed")[0] - 0.1


PREPROCESSOR = (
    "from llmrecipes.prompts import Piece, encode_sample, end_piece\n"
    "def sums(config, tokenizer, split):\n"
    "    end = end_piece(tokenizer)\n"
    "    return [encode_sample(tokenizer, [Piece(f'{n}='), Piece('x', supervised=True), end]) for n in range(12)]\n"
)


def test_workers_change_nothing(finetune: Command, losses: Losses, tmp_path: Path) -> None:
    flags = {"lora_config.lora_dropout": 0.1, "num_epochs": 1}
    finetune(tmp_path / "none", **flags)
    finetune(tmp_path / "two", num_workers_dataloader=2, **flags)
    assert losses(tmp_path / "none") == losses(tmp_path / "two")


@pytest.mark.parametrize(
    "storage", [{}, {"quantization": "4bit"}, {"quantization": "fp8"}], ids=["plain", "4bit", "fp8"]
)
def test_a_validation_changes_nothing_of_the_training_behind_it(
    storage: dict[str, str], finetune: Command, losses: Losses, tmp_path: Path
) -> None:
    flags = {"lora_config.lora_dropout": 0.1, **storage}
    finetune(tmp_path / "without", **flags)
    finetune(tmp_path / "with", run_validation=True, eval_steps=1, **flags)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


# --- what trains ------------------------------------------------------------------------------------------------------


def test_lora_changes_only_the_adapter(
    finetune: Command, model_folder: Path, in_memory: list[Any], tmp_path: Path
) -> None:
    finetune(tmp_path / "out", **{"lora_config.target_modules": "all-linear"})
    (model,) = in_memory
    before = load_file(model_folder / "model.safetensors")
    after = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(saved) == len(trained) == 2 * 2 * 7
    assert all(saved[name].abs().max() > 0 for name in saved if "lora_B" in name)


METHODS: dict[str, dict[str, Any]] = {
    "r 4, alpha 2": {"lora_config.r": 4, "lora_config.lora_alpha": 2},
    "all-linear": {"lora_config.target_modules": "all-linear"},
    "two modules": {"lora_config.target_modules": "k_proj,down_proj"},
    "dropout": {"lora_config.lora_dropout": 0.3},
    "rslora": {"lora_config.use_rslora": True},
    "dora": {"lora_config.use_dora": True},
    "bias all": {"lora_config.bias": "all"},
    "bias lora_only": {"lora_config.bias": "lora_only"},
    "llama_adapter": {"peft_method": "llama_adapter", "llama_adapter_config.adapter_layers": 2},
    "prefix": {"peft_method": "prefix", "prefix_config.num_virtual_tokens": 5},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_plain_peft_loads_what_it_saved(
    name: str, finetune: Command, losses: Losses, biased_folder: Path, in_memory: list[Any], tmp_path: Path
) -> None:
    flags = dict(METHODS[name])
    if "peft_method" in flags:
        flags["lora_config.lora_dropout"] = None
    folder = tmp_path / "out"
    finetune(folder, model_name=biased_folder, num_epochs=4, **flags)
    found = losses(folder)
    assert sum(found[-3:]) < sum(found[:3])
    plain = AutoModelForCausalLM.from_pretrained(biased_folder, dtype=torch.float32)
    assert not torch.allclose(logits(plain), logits(in_memory[0]), atol=1e-3)
    loaded = PeftModel.from_pretrained(plain, folder)
    assert torch.allclose(logits(loaded), logits(in_memory[0]), atol=1e-5)


def test_the_adapter_says_what_the_flags_said(finetune: Command, tmp_path: Path) -> None:
    flags = {"r": 4, "lora_alpha": 2, "lora_dropout": 0.25, "bias": "lora_only", "use_rslora": True, "use_dora": True}
    flags = {f"lora_config.{name}": value for name, value in flags.items()}
    finetune(tmp_path / "out", **flags, **{"lora_config.target_modules": "[k_proj, down_proj]"})
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for name, value in flags.items():
        assert said[name.split(".")[1]] == value
    assert set(said["target_modules"]) == {"k_proj", "down_proj"}


def test_biases_train_where_they_are_asked_to(
    finetune: Command, biased_folder: Path, in_memory: list[Any], tmp_path: Path
) -> None:
    before = load_file(biased_folder / "model.safetensors")
    changed = {}
    for bias in ("none", "all", "lora_only"):
        finetune(tmp_path / bias, model_name=biased_folder, **{"lora_config.bias": bias})
        after = {
            name.replace(".base_layer", ""): value
            for name, value in in_memory[-1].get_base_model().state_dict().items()
        }
        changed[bias] = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        "none": set(),
        "lora_only": {"q_proj", "v_proj"},
        "all": {"q_proj", "k_proj", "v_proj", "o_proj"},
    }


def test_full_fine_tuning_changes_every_weight_and_plain_transformers_loads_it(
    finetune: Command, model_folder: Path, in_memory: list[Any], tmp_path: Path
) -> None:
    finetune(tmp_path / "out", use_peft=None, lr=1e-3, **{"lora_config.lora_dropout": None})
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(plain), logits(in_memory[0]), atol=1e-5)


def test_frozen_layers_stay_and_the_others_train(finetune: Command, model_folder: Path, tmp_path: Path) -> None:
    finetune(tmp_path / "out", use_peft=None, lr=1e-3, freeze_layers=True, **{"lora_config.lora_dropout": None})
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "out"))
    frozen = {name for name in before if name.startswith("model.layers.0.")}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen and frozen


def test_continuing_an_adapter_begins_where_it_ended(
    finetune: Command, tuned: Path, losses: Losses, records: Records, tmp_path: Path
) -> None:
    whole = {"batch_size_training": 12, "num_epochs": 1, "lora_config.lora_dropout": None}
    validated = {"run_validation": True, "custom_dataset.test_split": "train", "val_batch_size": 12}
    finetune(tmp_path / "first", **validated)
    ended = records(tmp_path / "first", "evaluation")[-1]
    finetune(tmp_path / "second", from_peft_checkpoint=tmp_path / "first", **whole)
    finetune(tmp_path / "fresh", **whole)
    assert losses(tmp_path / "second")[0] == pytest.approx(ended["eval_loss"], abs=1e-5)
    assert losses(tmp_path / "fresh")[0] > losses(tmp_path / "second")[0] + 0.01


@pytest.mark.parametrize(("matrix_units", "told"), [(True, 0), (False, 1)])
def test_a_cpu_that_only_emulates_bfloat16_is_told(
    matrix_units: bool,
    told: int,
    finetune: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(preparing, "computes_bf16", lambda device: matrix_units)
    assert finetune(tmp_path / "out", mixed_precision=True, max_train_step=1) == 0
    assert finetune(tmp_path / "float32", mixed_precision=False, max_train_step=1) == 0
    assert capsys.readouterr().out.count("only emulates bf16") == told


# --- precision, optimizers --------------------------------------------------------------------------------------------

PRECISIONS = {
    "float32": ({"mixed_precision": False}, torch.float32, torch.float32),
    "bfloat16": ({"mixed_precision": True}, torch.bfloat16, torch.float32),
    "float16": ({"mixed_precision": None, "use_fp16": True}, torch.float16, torch.float32),
    "pure bfloat16": ({"mixed_precision": None, "pure_bf16": True}, torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_what_trains_is_float32_and_the_frozen_base_keeps_its_own_type(
    name: str, finetune: Command, losses: Losses, in_memory: list[Any], tmp_path: Path
) -> None:
    flags, base, trained = PRECISIONS[name]
    finetune(tmp_path / "out", num_epochs=4, **flags)
    (model,) = in_memory
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {base}
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {trained}
    found = losses(tmp_path / "out")
    assert sum(found[-3:]) < sum(found[:3])


@pytest.mark.parametrize("name", PRECISIONS)
def test_full_fine_tuning_learns_in_every_precision(
    name: str, finetune: Command, losses: Losses, in_memory: list[Any], tmp_path: Path
) -> None:
    flags, _, trained = PRECISIONS[name]
    finetune(tmp_path / "out", use_peft=None, num_epochs=4, lr=1e-3, **{"lora_config.lora_dropout": None}, **flags)
    assert {parameter.dtype for parameter in in_memory[0].parameters()} == {trained}
    found = losses(tmp_path / "out")
    assert sum(found[-3:]) < sum(found[:3])


def test_full_fine_tuning_in_bfloat16_does_not_round_the_weights_it_starts_from(
    finetune: Command, model_folder: Path, tmp_path: Path
) -> None:
    finetune(
        tmp_path / "out", use_peft=None, mixed_precision=True, lr=1e-12, max_train_step=1,
        **{"lora_config.lora_dropout": None},
    )  # fmt: skip
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "out"))
    assert all(torch.allclose(before[name], after[name], atol=1e-9, rtol=0) for name in before)


@pytest.mark.parametrize("name", ["adamw", "adamw_fused", "adamw_8bit", "adafactor", "sgd"])
def test_every_optimizer_that_runs_here_learns(name: str, finetune: Command, losses: Losses, tmp_path: Path) -> None:
    finetune(tmp_path / "out", optimizer=name, num_epochs=10)
    found = losses(tmp_path / "out")
    assert sum(found[-3:]) < sum(found[:3])


def test_an_optimizer_and_a_schedule_of_ones_own(finetune: Command, records: Records, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def mine(parameters, config):\n    return torch.optim.SGD(parameters, lr=config.lr)\n"
        "def halved(progress):\n    return 0.5\n"
        "def nothing(parameters, config):\n    return None\n"
    )
    own = {"optimizer": f"{tmp_path}/mine.py:mine", "lr_scheduler": f"{tmp_path}/mine.py:halved", "gamma": None}
    finetune(tmp_path / "out", **own)
    assert {record["learning_rate"] for record in records(tmp_path / "out")} == {0.005}
    with pytest.raises(PluginError, match="returned NoneType, not an Optimizer"):
        finetune(tmp_path / "none", **{**own, "optimizer": f"{tmp_path}/mine.py:nothing"})
    assert not (tmp_path / "none").exists()


# --- how long, how often ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 6, 7])
def test_training_ends_after_max_train_step_also_at_the_end_of_an_epoch(
    steps: int, finetune: Command, records: Records, tmp_path: Path
) -> None:
    finetune(tmp_path / "out", num_epochs=3, max_train_step=steps, run_validation=True)
    assert [record["step"] for record in records(tmp_path / "out")] == list(range(1, steps + 1))
    assert records(tmp_path / "out", "evaluation")[-1]["step"] == steps
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_gamma_multiplies_the_learning_rate_each_epoch(finetune: Command, records: Records, tmp_path: Path) -> None:
    finetune(tmp_path / "out", num_epochs=3, gamma=0.5)
    rates = [record["learning_rate"] for record in records(tmp_path / "out")]
    assert rates == pytest.approx([0.01] * 3 + [0.005] * 3 + [0.0025] * 3)


def test_a_short_validation_has_as_many_batches_and_rows_as_are_asked_for(
    finetune: Command, records: Records, tmp_path: Path
) -> None:
    finetune(tmp_path / "out", run_validation=True, max_eval_step=1, val_batch_size=5)
    # The first five of the validation split: 7, 8, 9, 10 and 11, each with its end.
    assert {record["eval_tokens"] for record in records(tmp_path / "out", "evaluation")} == {5 * 2 + 2}


def test_batches_of_like_length_are_other_batches(finetune: Command, losses: Losses, tmp_path: Path) -> None:
    for grouped in (False, True):
        finetune(tmp_path / str(grouped), group_by_length=grouped, batch_size_training=3)
    assert losses(tmp_path / "False") != losses(tmp_path / "True")


def test_batches_are_prepared_by_as_many_processes_as_are_asked_for(finetune: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        PREPROCESSOR + "import os, pathlib, torch\n"
        "def get_data_collator(tokenizer):\n"
        "    def collate(rows):\n"
        "        with pathlib.Path(__file__).with_name('seen.txt').open('a') as file:\n"
        "            file.write(f'{os.getpid()}\\n')\n"
        "        width = max(len(row['input_ids']) for row in rows)\n"
        "        padded = {'input_ids': 0, 'labels': -100, 'attention_mask': 0}\n"
        "        fill = lambda key, row: row[key] + [padded[key]] * (width - len(row[key]))\n"
        "        return {key: torch.tensor([fill(key, row) for row in rows]) for key in padded}\n"
        "    return collate\n"
    )
    for workers, processes in ((0, 1), (2, 3)):
        (tmp_path / "seen.txt").unlink(missing_ok=True)
        own = {"custom_dataset.file": f"{tmp_path}/mine.py:sums", "num_epochs": 1}
        finetune(tmp_path / str(workers), num_workers_dataloader=workers, **own)
        # The first batch is tried out here before the model loads; the workers make the rest.
        assert len(set((tmp_path / "seen.txt").read_text().split())) == processes


def test_logging_steps_thins_the_records_and_keeps_the_last(
    finetune: Command, records: Records, tmp_path: Path
) -> None:
    finetune(tmp_path / "out", num_epochs=3, logging_steps=4)
    assert [record["step"] for record in records(tmp_path / "out")] == [4, 8, 9]


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_best_and_last_are_both_kept(finetune: Command, records: Records, in_memory: list[Any], tmp_path: Path) -> None:
    # Validated against wrong answers, learning the right ones makes it worse: the best step comes early.
    wrong = {"run_validation": True, "custom_dataset.test_split": "wrong", "val_batch_size": 12, "eval_steps": 3}
    folder = tmp_path / "out"
    finetune(folder, num_epochs=20, **wrong)
    curve = {record["step"]: record["eval_loss"] for record in records(folder, "evaluation")}
    best = min(curve, key=lambda step: curve[step])
    assert best < 60 and curve[best] < curve[60] - 0.1
    kept = {name: evaluated(finetune, records, tmp_path / f"again-{name}", folder / name) for name in ("", "last")}
    assert kept == {"": pytest.approx(curve[best], abs=1e-5), "last": pytest.approx(curve[60], abs=1e-5)}
    held = {"prompt.json", "tokenizer.json", "adapter_config.json", "adapter_model.safetensors"}
    assert held <= {path.name for path in folder.iterdir()} and held <= {
        path.name for path in (folder / "last").iterdir()
    }


def evaluated(finetune: Command, records: Records, folder: Path, adapter: Path) -> float:
    """The loss of an adapter on the wrong answers, before training anything of note."""
    finetune(
        folder, from_peft_checkpoint=adapter, max_train_step=1, lr=1e-12, run_validation=True, val_batch_size=12,
        **{"custom_dataset.test_split": "wrong", "lora_config.lora_dropout": None},
    )  # fmt: skip
    (record,) = records(folder, "evaluation")
    return float(record["eval_loss"])


def test_no_last_folder_where_the_last_step_is_the_best(finetune: Command, tmp_path: Path) -> None:
    finetune(tmp_path / "out", run_validation=True, val_batch_size=6)
    assert not (tmp_path / "out" / "last").exists()
    finetune(tmp_path / "none")
    assert not (tmp_path / "none" / "last").exists()
    assert (tmp_path / "none" / "adapter_model.safetensors").is_file()


def test_save_steps_leaves_folders_that_load(
    finetune: Command, model_folder: Path, in_memory: list[Any], tmp_path: Path
) -> None:
    finetune(tmp_path / "out", save_steps=2, keep_last=0)
    assert sorted(path.name for path in (tmp_path / "out").glob("step-*")) == [
        "step-000002",
        "step-000004",
        "step-000006",
    ]
    seen = []
    for name in ("step-000002", "step-000006", ""):
        plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        seen.append(logits(PeftModel.from_pretrained(plain, tmp_path / "out" / name)))
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)
    assert torch.equal(seen[1], seen[2])


def test_without_save_model_no_weights_are_written(finetune: Command, tmp_path: Path) -> None:
    finetune(tmp_path / "out", save_model=False, run_validation=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.yaml", "metrics.jsonl", "status.json"}


def test_nothing_but_weights_and_settings_without_metrics(finetune: Command, tmp_path: Path) -> None:
    finetune(tmp_path / "out", save_metrics=False)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_gradients_that_go_bad_end_the_run_and_the_weights_before_them_are_kept(
    finetune: Command, tmp_path: Path
) -> None:
    (tmp_path / "bad.py").write_text(
        "import torch\n"
        "def bad(parameters, config):\n"
        "    for parameter in parameters:\n"
        "        parameter.register_hook(lambda gradient: gradient * float('nan'))\n"
        "    return torch.optim.SGD(parameters, lr=config.lr)\n"
    )
    with pytest.raises(TrainingError, match="not finite 3 times"):
        finetune(tmp_path / "out", optimizer=f"{tmp_path}/bad.py:bad")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(saved) == 8 and all(value.isfinite().all() for value in saved.values())


# --- who is told ------------------------------------------------------------------------------------------------------


def test_metrics_hold_every_figure_of_a_step(finetune: Command, records: Records, tmp_path: Path) -> None:
    finetune(tmp_path / "out", run_validation=True)
    first = records(tmp_path / "out")[0]
    assert {"step", "epoch", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory_bytes"} <= set(
        first
    )
    epoch = records(tmp_path / "out")[
        :3
    ]  # `<s>a+b=c</s>`, of which `c</s>` is supervised; three answers have two digits
    assert sum(record["supervised_tokens"] for record in epoch) == 12 * 2 + 3
    assert sum(record["useful_tokens"] for record in epoch) == 12 * 7 + 3
    last = records(tmp_path / "out", "evaluation")[-1]
    assert last["eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]))
    assert last["eval_tokens"] == 6 * 2 + 3


def test_tensorboard_files_hold_the_losses(finetune: Command, losses: Losses, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finetune(tmp_path / "out", report_to="tensorboard", run_validation=True)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(tmp_path / "out"))
    assert len(events.Scalars("eval/loss")) == 2


def test_a_tracker_of_ones_own_is_told_everything(finetune: Command, tmp_path: Path) -> None:
    (tmp_path / "tracker.py").write_text(
        "import json, pathlib\n"
        "def told(record):\n"
        "    with pathlib.Path(__file__).with_name('told.txt').open('a') as file:\n"
        "        file.write(record['kind'] + '\\n')\n"
    )
    finetune(tmp_path / "out", report_to=f"{tmp_path}/tracker.py:told", num_epochs=1, run_validation=True)
    assert (tmp_path / "told.txt").read_text().split() == ["start", "step", "step", "step", "evaluation", "end"]


def test_why_samples_are_not_kept_is_told_once_for_all_splits(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(tmp_path / "out", run_validation="true", num_epochs="1") == 0
    told = "sums.py:sums: its samples are made anew in each run: it reads no file by load_split or load_rows"
    assert capsys.readouterr().out.count(told) == 1
    assert finetune(tmp_path / "off", run_validation="true", num_epochs="1", data_cache="off") == 0
    assert "made anew" not in capsys.readouterr().out


def test_the_plan_and_the_summary_say_where_everything_is(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp4 = {"quantization": "4bit", "quantization_config.quant_type": "fp4"}
    finetune(tmp_path / "out", run_validation=True, eval_steps=2, **fp4)
    shown = capsys.readouterr().out
    plan, summary = shown.split("step 1/6")[0], shown.split("done  ")[1]
    for word in ("LoRA, r 8", "12 for training, 6 for validation", "kept in 4bit", "CPU"):
        assert word in plan
    for word in (str(tmp_path / "out" / "run.yaml"), "metrics.jsonl", "llmrecipes.inference", "llmrecipes.merging"):
        assert word in summary
    assert "--quantization 4bit --quantization_config.quant_type fp4 --prompt 2+0=" in summary


# --- again ------------------------------------------------------------------------------------------------------------


def test_run_yaml_reproduces_the_run_from_another_folder(
    finetune: Command, losses: Losses, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "data.py").write_text(
        "from pathlib import Path\n"
        "from llmrecipes.prompts import Piece, encode_sample, end_piece\n"
        "def rows(config, tokenizer, split):\n"
        "    lines = Path(config.data_path).read_text().split()\n"
        "    end = end_piece(tokenizer)\n"
        "    return [encode_sample(tokenizer, [Piece(line, supervised=True), end]) for line in lines]\n"
    )
    (here / "mine.py").write_text(
        "import torch\n"
        "def mine(parameters, config):\n    return torch.optim.SGD(parameters, lr=config.lr)\n"
        "def quiet(record):\n    pass\n"
    )
    (here / "words.txt").write_text("one two three four five six")
    (here / "model").symlink_to(model_folder)
    monkeypatch.chdir(here)
    flags = {
        "model_name": "./model",
        "tokenizer_name": "./model",
        "custom_dataset.file": "data.py:rows",
        "custom_dataset.data_path": "words.txt",
        "optimizer": "mine.py:mine",
        "report_to": "tensorboard,mine.py:quiet",
        "lora_config.lora_dropout": 0.1,
    }
    finetune(Path("first"), **flags)
    finetune(Path("second"), from_peft_checkpoint="first", **{**flags, "lora_config.lora_dropout": None})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("first", "second"):
        again_flags = {"config": str(here / name / "run.yaml"), "output_dir": f"{name}-again"}
        with pytest.raises(ConfigError, match="lies neither below"):
            run_command("finetuning", again_flags)
        assert run_command("finetuning", {**again_flags, "allow_outside_plugins": "true"}) == 0
        assert losses(Path(f"{name}-again")) == losses(here / name)
        again, before = (
            load_file(folder / "adapter_model.safetensors") for folder in (Path(f"{name}-again"), here / name)
        )
        assert all(torch.equal(again[key], before[key]) for key in before)


def test_an_adapter_of_another_method_is_not_continued(finetune: Command, tuned: Path, tmp_path: Path) -> None:
    flags = {"peft_method": "prefix", "from_peft_checkpoint": tuned, "lora_config.lora_dropout": None}
    with pytest.raises(
        ConfigError, match=r"it holds a LORA adapter, and --peft_method is prefix; give --peft_method lora"
    ):
        finetune(tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_large_features_of_an_8bit_base_are_no_leak(finetune: Command, model_folder: Path, tmp_path: Path) -> None:
    # LLM.int8() rounds a token otherwise where any token of its batch is large in some column.
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[::8] = 4.0
    shutil.copytree(model_folder, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    flags = {"model_name": str(tmp_path / "model"), "quantization": "8bit", "mixed_precision": "false"}
    finetune(tmp_path / "out", batching_strategy="packing", context_length=100, num_epochs=1, **flags)
