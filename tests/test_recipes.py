"""Every config resolves, every recipe runs from start to end with a tiny model, from a folder that is not the checkout.

Whether a model learns is not asked here: a Llama of some 100,000 random weights makes two steps.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import RunConfig
from llmrecipes.data.preprocessors import DATASETS
from llmrecipes.plugins import load_plugin, shipped_folder
from llmrecipes.prompts import encode_prompt

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
COMMANDS = [path for path in RECIPES if path.name != "environment.sh"]

Run = Callable[..., str]


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


# --- what stands in the files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_a_config_loads_and_its_header_tells_purpose_and_command(path: Path) -> None:
    loaded = load_config(RunConfig, {"config": str(path)})
    assert loaded.config.output_dir
    header = path.read_text().split("\n\n")[0]
    for word in ("# Purpose: ", "# Command: "):
        assert word in header, f"{path.name}: no {word!r} above the first blank line"
    for command in re.findall(r"recipes/\w+\.sh", header):
        assert (ROOT / command).is_file(), f"{path.name} tells of {command}, which is not there"


@pytest.mark.parametrize("path", COMMANDS, ids=names(COMMANDS))
def test_a_recipe_is_executable_strict_and_tells_purpose_cost_and_result(path: Path) -> None:
    text = path.read_text()
    assert path.stat().st_mode & 0o111
    assert text.startswith("#!/usr/bin/env bash\n# Purpose: ")
    assert "\n# Cost: " in text
    assert "\n# Expect: " in text
    assert "\nset -euo pipefail\n" in text


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_bash_can_read_the_recipe(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_a_fine_tuning_recipe_names_its_own_quantization_first_and_every_other() -> None:
    for path in RECIPES:
        text = path.read_text()
        chosen = re.search(r"^QUANTIZATION=\$\{QUANTIZATION:-(\w+)\}$", text, re.MULTILINE)
        listed = re.search(r"QUANTIZATION \((.*?)\)", text)
        if not path.name.startswith("finetune_") or chosen is None:
            continue
        assert listed and set(listed[1].split(", ")) == {"4bit", "8bit", "fp8", "none"}, path.name
        assert listed[1].split(", ")[0] == chosen[1], path.name
        assert f"({chosen[1].replace('bit', '-bit')}, LoRA)" in text, path.name


def test_every_config_has_its_recipe_and_both_name_the_same_model_and_output() -> None:
    recipes = {path: path.read_text() for path in RECIPES}
    for config in CONFIGS:
        users = [text for text in recipes.values() if f'"$configs/{config.name}"' in text]
        assert users, f"no recipe runs configs/{config.name}"
        said = yaml.safe_load(config.read_text())
        for text in users:
            defaults = dict(re.findall(r"^(\w+)=\$\{\1:?-(.*)\}$", text, re.MULTILINE))
            model = re.search(r"^demo_model=(.*)$", text, re.MULTILINE)
            assert defaults["MODEL_NAME"].replace("$demo_model", model[1] if model else "") == said["model_name"]
            assert defaults["OUTPUT_DIR"] == said["output_dir"]
            assert defaults.get("QUANTIZATION", said.get("quantization")) == said.get("quantization")


# --- the recipes, run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-layer Llama with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run_recipe(tiny_model: Path, tmp_path: Path) -> Run:
    """Runs a recipe in an empty folder with this Python and the tiny model; returns its two outputs together."""

    def run(recipe: str, *flags: str, **variables: str) -> str:
        base = {
            "PYTHON": sys.executable,
            "MODEL_NAME": str(tiny_model),
            "EVAL_SAMPLES": "3",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [str(ROOT / "recipes" / recipe), *flags],
            cwd=tmp_path,
            env=os.environ | base | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def executable(path: Path, body: str) -> Path:
    """Returns the path of a shell script made of `body`, to stand in for Python."""
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def check_adapter(folder: Path) -> None:
    """Raises where `folder` is not an adapter as fine-tuning leaves it."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "run.yaml", "prompt.json"):
        assert (folder / name).is_file(), f"{folder} has no {name}: {sorted(item.name for item in folder.iterdir())}"


def test_the_quickstart_tunes_and_compares_and_its_second_call_reuses_all(run_recipe: Run, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "output"
    places = {"DATA_DIR": str(data), "OUTPUT_DIR": str(output)}
    run_recipe("quickstart.sh", "--max_train_step", "2", "--context_length", "512", **places)
    check_adapter(output)
    assert (tmp_path / "output-report.md").read_text().count("|") > 8, "no table in the report"
    log = tmp_path / "log"
    stand_in = executable(tmp_path / "stand-in", 'printf "%s\\n" "$2" >> "$LOG"')
    run_recipe("quickstart.sh", **places, PYTHON=str(stand_in), LOG=str(log))
    assert log.read_text().split() == ["llmrecipes.evaluation"]


def test_the_quickstart_puts_a_stopped_run_aside_and_begins_anew(run_recipe: Run, tmp_path: Path) -> None:
    output, log = tmp_path / "output", tmp_path / "log"
    output.mkdir()
    (output / "run.yaml").write_text("half a run")
    (output / "adapter_model.safetensors").write_text("half a run")
    stand_in = executable(tmp_path / "stand-in", 'printf "%s\\n" "$2" >> "$LOG"')
    run_recipe(
        "quickstart.sh", OUTPUT_DIR=str(output), DATA_DIR=str(tmp_path / "data"), PYTHON=str(stand_in), LOG=str(log)
    )
    assert log.read_text().split() == ["llmrecipes.data", "llmrecipes.finetuning", "llmrecipes.evaluation"]
    (aside,) = tmp_path.glob("output-*")
    assert (aside / "run.yaml").read_text() == "half a run"
    assert not output.exists()


def test_the_arithmetic_recipes_make_data_tune_compare_and_ask(run_recipe: Run, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "output"
    rows = ("--train_rows", "64", "--validation_rows", "8", "--test_rows", "8")
    run_recipe("create_arithmetic_data.sh", *rows, DATA_DIR=str(data))
    assert sorted(path.name for path in data.iterdir()) == [
        f"arithmetic_{split}.csv" for split in ("test", "train", "validation")
    ]
    flags = ("--max_train_step", "2", "--context_length", "512")
    run_recipe("finetune_arithmetic.sh", *flags, DATA_DIR=str(data), OUTPUT_DIR=str(output))
    check_adapter(output)
    assert (tmp_path / "output-report.md").is_file()
    run_recipe("infer_arithmetic.sh", "--max_new_tokens", "4", PEFT_MODEL=str(output))


def test_the_samsum_recipes_tune_compare_and_ask(run_recipe: Run, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "output"
    data.mkdir()
    for split in ("train", "validation", "test"):
        rows = [
            {"id": f"{split}{row}", "dialogue": f"Ada: {row} eggs?\nBo: yes, {split}", "summary": f"Bo has {row} eggs."}
            for row in range(12)
        ]
        (data / f"{split}.json").write_text(json.dumps(rows))
    flags = ("--max_train_step", "2", "--context_length", "256")
    run_recipe("finetune_samsum.sh", *flags, DATA_DIR=str(data), OUTPUT_DIR=str(output), QUANTIZATION="none")
    check_adapter(output)
    assert "rouge" in (tmp_path / "output-report.md").read_text().lower()
    run_recipe("infer_samsum.sh", "--max_new_tokens", "4", PEFT_MODEL=str(output), QUANTIZATION="none")


def test_the_guanaco_recipe_draws_chats_tunes_asks_and_merges(run_recipe: Run, tmp_path: Path) -> None:
    raw, output = tmp_path / "raw.jsonl", tmp_path / "output"
    chats = [f"### Human: What comes after {row}?### Assistant: {row + 1}." for row in range(24)]
    raw.write_text("".join(json.dumps({"text": chat}) + "\n" for chat in chats))
    places = {"SOURCE": str(raw), "DATA_DIR": str(tmp_path / "data"), "OUTPUT_DIR": str(output), "TRAIN_ROWS": "20"}
    run_recipe(  # paging needs a GPU
        "finetune_guanaco_qlora.sh", "--max_train_step", "2", "--optimizer", "adamw", **places, QUESTIONS="Who?"
    )
    check_adapter(output)
    drawn = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "data").iterdir()}
    assert drawn == {"guanaco_train.jsonl": 20, "guanaco_validation.jsonl": 2, "guanaco_test.jsonl": 2}
    assert list(output.rglob("events.out.tfevents*")), "no TensorBoard file"
    merged = tmp_path / "output-merged"
    assert (merged / "config.json").is_file()
    assert list(merged.glob("*.safetensors"))
    assert not (merged / "adapter_config.json").exists()


# --- prompts ----------------------------------------------------------------------------------------------------------


def asked_by(recipe: str, run_recipe: Run, folder: Path, **variables: str) -> str:
    """Returns the prompt that a recipe hands to the inference command, read by a stand-in for Python."""
    asked = folder / "asked"
    stand_in = executable(
        folder / "stand-in",
        "while (($#)); do case $1 in\n"
        '--prompt_file) cat "$2" > "$ASKED" ;; --prompt) printf %s "$2" > "$ASKED" ;;\n'
        "esac; shift; done",
    )
    run_recipe(recipe, PYTHON=str(stand_in), ASKED=str(asked), **variables)
    return asked.read_bytes().decode()


def trained_prompt(dataset: str, row: dict[str, str], tokenizer: Any, folder: Path) -> list[int]:
    """Returns the ids before the answer of the one sample that a preprocessor makes of `row`."""
    (folder / "train.json").write_text(json.dumps([row]))
    section = SimpleNamespace(dataset=dataset, data_path=str(folder), train_split="train")
    preprocess = load_plugin(DATASETS[dataset], "dataset", "", [shipped_folder("custom_datasets")])
    (sample,) = preprocess(section, tokenizer, "train")
    return [token for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label == -100]


ASKED = {
    "infer_arithmetic.sh": (
        "arithmetic_dataset",
        {"INSTRUCTION": "Find the sum.", "INPUT": "3 and 4"},
        {"instruction": "Find the sum.", "input": "3 and 4", "output": "3 + 4 = 7"},
    ),
    "infer_samsum.sh": (
        "samsum_dataset",
        {"DIALOGUE": "Ada: 100 % sure\\n?\n\nBo: yes"},
        {"dialogue": "Ada: 100 % sure\\n?\n\nBo: yes", "summary": "Bo is sure."},
    ),
    "finetune_guanaco_qlora.sh": (
        "guanaco_dataset",
        {"QUESTIONS": "Is 5 % much?", "DATA_DIR": "/"},
        {"text": "### Human: Is 5 % much?### Assistant: It depends."},
    ),
}


@pytest.mark.parametrize("recipe", ASKED)
def test_a_recipe_asks_with_the_ids_that_training_saw(
    recipe: str, run_recipe: Run, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    dataset, variables, row = ASKED[recipe]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    asked = asked_by(recipe, run_recipe, tmp_path, **variables)
    (tmp_path / "data").mkdir()
    assert encode_prompt(tokenizer, asked) == trained_prompt(dataset, row, tokenizer, tmp_path / "data")


# --- slurm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (143, True), (2, False)])
def test_a_slurm_job_is_queued_again_where_it_was_stopped_and_only_there(
    code: int, requeued: bool, tmp_path: Path
) -> None:
    executable(tmp_path / "srun", f'echo "$@" > "{tmp_path}/ran"; sleep 0.3; exit {code}')
    executable(tmp_path / "scontrol", f'echo "$@" > "{tmp_path}/asked"')
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHON": "py"}
    with subprocess.Popen([str(ROOT / "recipes/slurm.sh"), "--lr", "1"], env=variables, cwd=tmp_path) as job:
        while not (tmp_path / "ran").exists():
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=20) == code
    assert (tmp_path / "ran").read_text() == "py -m llmrecipes.finetuning --resume auto --save_steps 500 --lr 1\n"
    assert (tmp_path / "asked").exists() == requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 7\n"
