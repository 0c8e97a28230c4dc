"""What no single command's tests prove of the cases of `tests/test_cases.py`: faults of input, from end to end.

`refusal` holds each to the same promise: one short line that names what is wrong and what to do, and nothing changed.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

Command = Callable[..., int]
Refusal = Callable[[Callable[[], int]], str]

# --- config files -----------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)

CONFIGS: dict[str, tuple[str, str]] = {
    "a key that is none": ("lr: 1\nlrr: 2\n", "run.yaml:2: lrr is not a key of this command; did you mean --lr?"),
    "a key twice": ("lr: 1\nlr: 2\n", "run.yaml:2: lr stands here a second time"),
    "a python tag": ("lr: !!python/object/apply:os.system [ls]\n", "run.yaml:1: "),
    "a key that is no text": ("on: 1\n", "run.yaml:1: on"),
    "aliases of aliases": (BOMB, "run.yaml"),
    "a secret": ("run_validation: ${oc.env:HF_TOKEN}\n", "run.yaml:1: "),
    "a plug-in elsewhere": ("custom_dataset.file: ../../../x.py:f\n", "run.yaml:1: custom_dataset.file names"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_meant(
    name: str, finetune: Command, refusal: Refusal, tmp_path: Path, no_model_loads: None
) -> None:
    text, message = CONFIGS[name]
    (tmp_path / "run.yaml").write_text(text)
    without = {"lr": None, "run_validation": None, "custom_dataset.file": None}
    assert message in refusal(lambda: finetune(tmp_path / "out", config=tmp_path / "run.yaml", **without))


# --- code in places where none is expected ----------------------------------------------------------------------------


def test_a_pickle_is_never_opened(
    finetune: Command, refusal: Refusal, model_folder: Path, tmp_path: Path, no_model_loads: None
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    hostile = f"cos\nsystem\n(S'touch {tmp_path / 'evil'}'\ntR."
    (tmp_path / "model" / "pytorch_model.bin").write_text(hostile)
    line = refusal(lambda: finetune(tmp_path / "out", model_name=tmp_path / "model"))
    assert "pickles (pytorch_model.bin), which can run code" in line and "convert them once to safetensors" in line


def test_code_of_a_model_folder_waits_for_the_flag_and_asks_nobody(
    finetune: Command, refusal: Refusal, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    no_model_loads: None,
) -> None:  # fmt: skip
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "evil.C"}}))
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("it asked"))
    line = refusal(lambda: finetune(tmp_path / "out", model_name=tmp_path / "model"))
    assert f"--model_name {tmp_path / 'model'}" in line and "--trust_remote_code" in line


# --- data -------------------------------------------------------------------------------------------------------------

HEAD = "dialogue,summary\n"

DATA: dict[str, tuple[str, bytes, str]] = {
    "a field too many": ("train.csv", f"{HEAD}a,b\na,b,c\n".encode(), "train.csv:3: 3 fields, header has 2"),
    "Latin-1": ("train.csv", f"{HEAD}a,caf\u00e9\n".encode("latin-1"), "train.csv:2: byte 22 (0xe9): no UTF-8"),
    "a column of another name": ("train.csv", b"dialog,summary\na,b\n", "no column 'dialogue'"),
    "no rows": ("train.csv", HEAD.encode(), "train.csv:1: a header and no rows"),
    "broken JSON": ("train.jsonl", b'{"dialogue": "a", "summary": "b"}\n{"dialogue": \n', "train.jsonl:2:"),
    "no answer": ("train.csv", f"{HEAD}a,b\na, \n".encode(), "train.csv:3: column 'summary' is blank"),
    "no data": ("test.csv", f"{HEAD}a,b\n".encode(), "no file for the split 'train'"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_read(
    name: str, finetune: Command, refusal: Refusal, tmp_path: Path, no_model_loads: None
) -> None:
    file, content, message = DATA[name]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / file).write_bytes(content)
    flags = {"dataset": "samsum_dataset", "custom_dataset.file": None, "data_path": tmp_path / "data"}
    assert message in refusal(lambda: finetune(tmp_path / "out", **flags))


PLUG_INS: dict[str, tuple[str, str]] = {
    "every label masked": ("[{'input_ids': [5, 6], 'labels': [-100, -100]}]", "row 0: no supervised token"),
    "no sample": ("[]", "no samples in it"),
    "no validation": ("[ROW] if split == 'train' else []", "rows.py:rows, split validation: no samples in it"),
    "an id that the model has not": ("[{'input_ids': [5, 999], 'labels': [5, 999]}]", "the model's vocabulary of 260"),
    "nothing": ("None", "expected a sequence of rows, each with input_ids and labels, but it returned None"),
    "an error": ("config.no_such_key", "rows.py:3: in rows: AttributeError: "),
    "a file that is not there": ("open('nowhere.csv')", "rows.py:3: in rows: FileNotFoundError: "),
}


@pytest.mark.parametrize("name", PLUG_INS)
def test_a_plug_in_without_samples(
    name: str, finetune: Command, refusal: Refusal, tmp_path: Path, no_model_loads: None
) -> None:
    made, message = PLUG_INS[name]
    row = "ROW = {'input_ids': [5, 6], 'labels': [5, 6]}"
    (tmp_path / "rows.py").write_text(f"{row}\ndef rows(config, tokenizer, split):\n    return {made}\n")
    flags = {"custom_dataset.file": f"{tmp_path / 'rows.py'}:rows", "run_validation": True}
    assert message in refusal(lambda: finetune(tmp_path / "out", **flags))


# --- adapters ---------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def shortened(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def sick(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0] = float("inf")
    save_file(tensors, path)


ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (shortened, "adapter_model.safetensors: broken or cut short at "),
    "infinity": (sick, "holds NaN or infinity; take another copy of the adapter"),
    "layers that the base has not": (settings(target_modules=["query"]), "the adapter does not fit this base model"),
    "layers that it was not trained on": (settings(target_modules=["q_proj", "up_proj"]), "have no counterpart"),
    "another rank": (settings(r=3), "the adapter does not fit this base model"),
    "a kind that nobody knows": (settings(peft_type="NONE"), "the adapter does not fit this base model"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_not_what_it_says(
    name: str, infer: Command, refusal: Refusal, tuned: Path, tmp_path: Path
) -> None:
    edit, message = ADAPTERS[name]
    shutil.copytree(tuned, tmp_path / "adapter")
    edit(tmp_path / "adapter")
    line = refusal(lambda: infer("2+3=", peft_model=str(tmp_path / "adapter")))
    assert f"--peft_model {tmp_path / 'adapter'}" in line and message in line


@pytest.mark.parametrize("command", ["infer", "evaluate", "merge"])
def test_an_adapter_is_no_model(
    command: str, infer: Command, evaluate: Command, merge: Command, refusal: Refusal, tuned: Path, tmp_path: Path,
    no_model_loads: None,
) -> None:  # fmt: skip
    commands: dict[str, Callable[[], int]] = {
        "infer": lambda: infer("2+3=", model_name=str(tuned)),
        "evaluate": lambda: evaluate(model_name=str(tuned)),
        "merge": lambda: merge(tuned, tmp_path / "out", model_name=str(tuned)),
    }
    line = refusal(commands[command])
    assert f"--model_name {tuned}: this folder holds an adapter, not a plain model" in line and "--peft_model" in line


def test_nothing_is_merged_into_a_quantized_base(
    merge: Command, refusal: Refusal, tuned: Path, model_folder: Path, tmp_path: Path, no_model_loads: None
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": stored}))
    line = refusal(lambda: merge(tuned, tmp_path / "out", model_name=str(tmp_path / "model")))
    assert "stored quantized already; give the unquantized model" in line


@pytest.mark.parametrize("content", [b"GGUF\x03\0\0\0", b"<!doctype html>"], ids=["cut short", "a web page"])
@pytest.mark.parametrize("storage", [{}, {"quantization": "4bit"}], ids=["plain", "4bit"])
def test_a_gguf_file_that_is_none(
    content: bytes, storage: dict[str, str], finetune: Command, refusal: Refusal, tmp_path: Path, no_model_loads: None
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert f"{path}: " in refusal(lambda: finetune(tmp_path / "out", model_name=path, **storage))
