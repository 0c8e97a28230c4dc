"""A tiny Llama that can learn twelve sums by heart in a second, and the commands to do so, run in this process."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import COMMON, RUNS, forked

from llmrecipes.command import guarded, run_command

PREPROCESSOR = '''
"""Twelve sums of one and two digits; the split `wrong` has every answer one too high."""

from llmrecipes.prompts import Piece, encode_sample, end_piece


def sums(dataset_config, tokenizer, split):
    more = {"train": 0, "validation": 0, "wrong": 1}[split]
    pairs = [(a, b) for a in (2, 5, 9) for b in range(4)][6 if split == "validation" else 0 :]
    return [
        encode_sample(tokenizer, [Piece(f"{a}+{b}="), Piece(str(a + b + more), supervised=True), end_piece(tokenizer)])
        for a, b in pairs
    ]
'''

PLAIN = {"device": "cpu", "mixed_precision": "false"}
"""What every command is given, so that the tests are the same on every machine."""

BRIEF = {
    **PLAIN,
    "dataset": "custom_dataset",
    "batching_strategy": "padding",
    "context_length": "64",
    "num_epochs": "2",
    "lr": "0.01",
    "gamma": "1",
    "run_validation": "false",
    "use_peft": "true",
    "lora_config.lora_dropout": "0",
}
"""A run of six steps."""

THOROUGH = {
    "num_epochs": "30",
    "lora_config.target_modules": "all-linear",
    "lr_scheduler": "cosine",
    "gamma": "None",
}
"""With these on top the tiny Llama knows all sums."""

Command = Callable[..., int]

CANARY = "hf_" + "Canary0123456789Canary"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """A tiny model gains nothing from a second thread, and on a busy machine loses a lot by waiting for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose random weights are large enough for an adapter to make something of them."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("able") / "model"
    shutil.copytree(tiny_folder, folder)
    changes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.3}
    small = AutoModelForCausalLM.from_pretrained(tiny_folder).config.to_dict()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**small, **changes, "head_dim": None})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def biased_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a Llama with biases in its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("biased") / "model"
    shutil.copytree(model_folder, folder)
    settings = {**LlamaConfig.from_pretrained(model_folder).to_dict(), "attention_bias": True}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The preprocessor as `--custom_dataset.file` takes it."""
    path = tmp_path_factory.mktemp("data") / "sums.py"
    path.write_text(PREPROCESSOR)
    return f"{path}:sums"


@pytest.fixture(scope="session")
def finetune(model_folder: Path, sums_file: str) -> Command:
    """Fine-tunes into a folder; what is given goes on top of `BRIEF`, None takes a key out of it."""

    def run(output: Path, **flags: Any) -> int:
        given = {**BRIEF, "custom_dataset.file": sums_file, "model_name": str(model_folder), "output_dir": str(output)}
        given = {**given, **{key: str(value) for key, value in flags.items()}}
        return run_command("finetuning", {key: value for key, value in given.items() if value != "None"})

    return run


@pytest.fixture(scope="session")
def infer(model_folder: Path) -> Command:
    """Answers a prompt; None leaves it to the flags."""

    def run(prompt: str | None, /, **flags: Any) -> int:
        given = {**PLAIN, "model_name": str(model_folder), **flags}
        return run_command("inference", given if prompt is None else {**given, "prompt": prompt})

    return run


@pytest.fixture(scope="session")
def evaluate(model_folder: Path, sums_file: str) -> Command:
    """Scores all sums."""

    def run(**flags: Any) -> int:
        data = {"dataset": "custom_dataset", "custom_dataset.file": sums_file, "split": "train"}
        given = {**PLAIN, **data, "model_name": str(model_folder), "max_new_tokens": "5", **flags}
        return run_command("evaluation", given)

    return run


@pytest.fixture(scope="session")
def merge(model_folder: Path) -> Command:
    """Merges an adapter into the base."""

    def run(adapter: Path, output: Path, **flags: Any) -> int:
        given = {"model_name": str(model_folder), "peft_model": str(adapter), "output_dir": str(output), **flags}
        return run_command("merging", given)

    return run


@pytest.fixture(scope="session")
def thorough() -> dict[str, str]:
    """The flags with which the tiny Llama learns all sums."""
    return THOROUGH


@pytest.fixture(scope="session")
def tuned(finetune: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that knows all sums."""
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    assert finetune(folder, **THOROUGH) == 0
    return folder


@pytest.fixture(scope="session")
def records() -> Callable[..., list[dict[str, Any]]]:
    """Reads metrics.jsonl: the lines of one kind."""

    def read(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    return read


@pytest.fixture(scope="session")
def losses(records: Callable[..., list[dict[str, Any]]]) -> Callable[[Path], list[float]]:
    """Reads the training losses of a run."""
    return lambda folder: [record["loss"] for record in records(folder)]


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects the models that fine-tunings of this test end with."""
    from llmrecipes.run import finetune as module

    models: list[Any] = []
    train = module.run_training

    def run_training(*arguments: Any) -> Any:
        result = train(*arguments)
        models.append(arguments[-1].model)
        return result

    monkeypatch.setattr(module, "run_training", run_training)
    return models


@pytest.fixture
def no_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a test fail where a base model is read."""
    from llmrecipes.run import evaluate, finetune, infer, merge

    def refuse(*arguments: Any) -> None:
        pytest.fail("the model was loaded")

    for module in (evaluate, finetune, infer, merge):
        monkeypatch.setattr(module, "load_model", refuse)


@pytest.fixture
def refusal(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[], int]], str]:  # fmt: skip
    """Runs what must fail cleanly, and returns the one line that it says.

    That is: exit code 2, nothing else on the screen, no more than 300 characters besides the folders of the tests, no
    secret of the environment, and every file of the test as it was.
    """
    monkeypatch.setenv("HF_TOKEN", CANARY)

    def run(action: Callable[[], int]) -> str:
        before = files_below(tmp_path)
        capsys.readouterr()
        assert guarded(action) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        (line,) = shown.err.splitlines()
        assert line.startswith("error: ") and CANARY not in line
        bare = re.sub(rf"{re.escape(str(tmp_path_factory.getbasetemp()))}(/[^/\s:]+)?", "", line)
        assert len(bare) <= 300, f"{len(bare)} characters"
        assert files_below(tmp_path) == before
        return line

    return run


def files_below(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, files byte for byte."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def warm(finetune: Command, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Has this process import all that a run needs, so that none of its copies must."""
    assert finetune(tmp_path_factory.mktemp("warm") / "out", max_train_step=1, quantization="4bit") == 0


@pytest.fixture(scope="session")
def undisturbed(finetune: Command, warm: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of each kind that nothing happens to."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp("undisturbed") / "out"
            assert forked(lambda: finetune(done[name], **{**COMMON, **RUNS[name]})) == 0
        return done[name]

    return run
