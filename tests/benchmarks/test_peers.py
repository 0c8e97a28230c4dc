"""The GPU benchmark's peers: what each is given, how its steps are measured, and that it trains where installed."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import transformers
from peers import PEERS, Side, Work

from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import RunConfig
from llmrecipes.errors import ConfigError
from llmrecipes.models.adapters import attach_trained
from llmrecipes.run.preparing import run_precision

Built = Callable[[str], Work]

SMALL_RUN = """
import os, sys
for package in sys.argv[2:]:
    __import__(package)
sys.path += [os.environ["BENCHMARKS"], os.environ["TESTS"]]
import conftest, gpu, pytest
work = conftest.small_work.__wrapped__(pytest.MonkeyPatch())("samsum-bf16")
*steps, end = gpu.SIDES[sys.argv[1]].steps(work)
assert len(steps) == 1 and 9 < steps[0]["loss"] < 12, steps
assert 0 < steps[0]["supervised"] < steps[0]["useful"] <= 3000 and end["warm"] > 0, (steps, end)
"""


def test_no_side_starts_from_an_adapter_of_zeros(small_work: Built) -> None:
    work = small_work("samsum-bf16")
    model = attach_trained(work.base(work.config), work.config, run_precision(work.config))
    seconds = {name: value for name, value in model.named_parameters() if "lora_B" in name}
    assert len(seconds) == 14 and not any(value.any() for value in seconds.values())
    peers.as_if_trained(model)
    assert all(value.all() for value in seconds.values())


@pytest.mark.parametrize("name", ["trl", "unsloth"])
def test_a_peer_trains_where_it_is_installed(name: str, tmp_path: Path) -> None:
    for package in PEERS[name].packages:
        if peers.importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    tests = Path(__file__).parent
    environment = os.environ | {"BENCHMARKS": str(tests.parents[1] / "benchmarks"), "TESTS": str(tests)}
    environment |= {"TRITON_INTERPRET": "1", "LLMRECIPES_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SMALL_RUN, name, *PEERS[name].packages[:1]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_peer_that_is_not_installed_is_left_out_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Side("Absent", ("no_such_package",), peers.plain_steps)
    monkeypatch.setattr(peers, "PEERS", {"plain": PEERS["plain"], "absent": absent})
    assert peers.chosen_peers("all") == ["plain"]
    assert peers.chosen_peers("plain") == ["plain"]
    with pytest.raises(ConfigError, match="--peers absent: no_such_package is not installed; pip install"):
        peers.chosen_peers("plain,absent")
    with pytest.raises(ConfigError, match="--peers other: expected some of plain,absent"):
        peers.chosen_peers("other")


@pytest.fixture(params=["samsum-bf16", "packed-bf16"])
def trainer(request: pytest.FixtureRequest, small_work: Built, tmp_path: Path) -> tuple[Any, Work]:
    """transformers' own Trainer, which TRL's and Unsloth's are made of: a step is two padded batches of two samples."""
    work = small_work(request.param)
    model = work.base(work.config).requires_grad_(True)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=work.warm_up + work.steps, logging_steps=1, use_cpu=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, disable_tqdm=True, report_to="none",
        train_sampling_strategy="sequential",
    )  # fmt: skip

    def collated(batch: list[Any]) -> dict[str, torch.Tensor]:
        return peers.padded(batch, torch.device("cpu"))

    return transformers.Trainer(model, arguments, data_collator=collated, train_dataset=list(work.samples)), work


def test_a_trainers_step_counts_what_it_was_given_and_no_padding(trainer: tuple[Any, Work]) -> None:
    trained, work = trainer
    *steps, end = peers.trainer_steps(trained, work, run_precision(work.config), "as it comes")
    assert len(steps) == 1 and end["told"] == "as it comes"
    second = work.samples[4:8]
    assert steps[0]["useful"] == sum(len(sample.input_ids) for sample in second)
    assert steps[0]["supervised"] == sum(sample.supervised_tokens for sample in second)
    assert 9 < steps[0]["loss"] < 12
    assert steps[0]["seconds"] > 0 and end["warm"] > 0


def test_the_folder_holds_the_very_model_unquantized_and_is_written_once(
    small_work: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMRECIPES_CACHE", str(tmp_path))
    work = small_work("samsum-4bit")
    folder = peers.model_folder(work)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = work.base(replace(work.config, quantization=None)).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert 0 <= words.pad_token_id < peers.FIRST_ID

    def never(config: RunConfig) -> Any:
        raise AssertionError("built again")

    assert peers.model_folder(replace(work, base=never)) == folder
    assert list(tmp_path.iterdir()) == [folder]


def test_what_is_alike_fills_rows_and_what_the_row_keeps_is_not_recomputed(small_work: Built) -> None:
    assert small_work("packed-bf16").alike and not small_work("samsum-bf16").alike
    assert small_work("packed-bf16").step_tokens == 4 * 128
    recomputed = {name for name in ("samsum-4bit", "single-4bit", "single-4bit-small", "full-bf16")
                  if small_work(name).recomputed}  # fmt: skip
    assert recomputed == {"single-4bit-small", "full-bf16"}


def test_a_peer_adapts_the_layers_that_the_row_names() -> None:
    flags = {"model_name": "7B", "output_dir": "unused", "use_peft": "true", "lora_config.target_modules": "q_proj"}
    assert peers.targets(load_config(RunConfig, flags).config) == ["q_proj"]
    every = load_config(RunConfig, flags | {"lora_config.target_modules": "all-linear"}).config
    assert peers.targets(every) == list(peers.PROJECTIONS)
