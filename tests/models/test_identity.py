"""Laws of identity: a base is known by what is in its files, wherever they lie and however they are cut and loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import InferenceConfig
from llmrecipes.models.identity import INDEX, SINGLE, Base, base_of, check_base, load_base

Change = Callable[[Path], object]


def base(name: str | Path, source: str | Path | None = None, **flags: str) -> Base:
    """The identity of a model as a command finds it."""
    options = load_config(InferenceConfig, {"model_name": str(name), **flags}).config
    return base_of(options, str(source or name))


def rewritten(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**dict(reversed(told.items())), **changes}, indent=4))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE)

    return edit


def cut(folder: Path) -> None:
    """Cuts the weights into two files, and leaves a third beside them that belongs to neither."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).rename(folder / "consolidated.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[1::2], "b.safetensors": names[::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {name: file for file, held in files.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))


THE_SAME: dict[str, Change] = {
    "a copy": lambda folder: None,
    "cut into files": cut,
    "written by another release": rewritten(transformers_version="9.9", torch_dtype="float16", _name_or_path="x"),
    "another tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
}
OTHERS: dict[str, tuple[Change, str]] = {
    "one tensor": (
        weights(lambda w: w["model.layers.1.mlp.up_proj.weight"].mul_(1.01)), "other weights"
    ),
    "another type": (weights(lambda w: w.update({k: v.half() for k, v in w.items()})), "other weights"),
    "two swapped": (
        weights(
            lambda w: w.update(
                {
                    "model.layers.0.mlp.up_proj.weight": w["model.layers.1.mlp.up_proj.weight"],
                    "model.layers.1.mlp.up_proj.weight": w["model.layers.0.mlp.up_proj.weight"],
                }
            )
        ),
        "other weights",
    ),
    "a setting": (rewritten(rms_norm_eps=0.1), "another config.json"),
    "both": (
        lambda folder: (rewritten(rms_norm_eps=0.1)(folder), weights(lambda w: w.popitem())(folder)),
        "other weights and another config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THE_SAME)
def test_what_does_not_make_another_model(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    THE_SAME[name](tmp_path / "model")
    for flags in ({}, {"quantization": "4bit"}, {"quantization": "8bit"}):
        assert base(tmp_path / "model", **flags).fingerprint == base(tiny_folder).fingerprint


@pytest.mark.parametrize("name", OTHERS)
def test_what_makes_another_model(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    change, told = OTHERS[name]
    shutil.copytree(tiny_folder, tmp_path / "model")
    change(tmp_path / "model")
    first, other = base(tiny_folder), base(tmp_path / "model")
    assert first.fingerprint != other.fingerprint and other.difference(first) == told


def test_a_base_is_read_as_it_was_saved(tiny_folder: Path, tmp_path: Path) -> None:
    saved = base(tiny_folder)
    saved.save(tmp_path)
    assert load_base(tmp_path, "peft_model") == saved and saved.weights and saved.config and not saved.revision
    assert load_base(tiny_folder, "peft_model") is None


def test_a_gguf_file_is_known_by_its_hash_whoever_converted_it(tiny_folder: Path, tmp_path: Path) -> None:
    sources = [tmp_path / "a" / "gguf1-0123", tmp_path / "b" / "gguf2-0123"]
    for source in sources:
        shutil.copytree(tiny_folder, source)
    rewritten(rms_norm_eps=0.1)(sources[1])
    (tmp_path / "m.gguf").touch()
    first, second = (base(tmp_path / "m.gguf", source) for source in sources)
    assert first == second and first.weights == "0123"
    assert base(tmp_path / "m.gguf", tmp_path / "gguf1-4567").fingerprint != first.fingerprint


@pytest.mark.parametrize("change", [lambda folder: None, cut], ids=["one file", "several"])
def test_a_hub_model_is_known_by_its_files_in_the_cache(
    change: Change, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(tiny_folder, place / "snapshots" / commit)
        change(place / "snapshots" / commit)
    rewritten(rms_norm_eps=0.1)(place / "snapshots" / ("b" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    found = base("org/name")
    assert found.revision == "a" * 40 and found.fingerprint == base(tiny_folder).fingerprint
    assert base("org/name", model_revision="b" * 40).fingerprint != found.fingerprint


def test_a_hub_model_that_is_not_here_is_known_by_its_name_and_compared_with_none(tmp_path: Path) -> None:
    unknown = base("org/nowhere", model_revision="v1")
    assert unknown.fingerprint == "org/nowhere@v1" and not unknown.weights
    unknown.save(tmp_path)
    for name, notices in (("org/nowhere", 0), ("org/elsewhere", 1)):
        options = load_config(InferenceConfig, {"model_name": name, "model_revision": "v1"}).config
        assert len(check_base(str(tmp_path), "peft_model", options, name, allowed=False)) == notices
