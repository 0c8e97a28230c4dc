"""Soaks: random faults by the hundred, told in figures. `make soak`; SOAK=0.1 does a tenth of each."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import COMMON, RUNS, assert_equal, at_write, begun, count_writes, disk_full, ended, forked, killed

from llmrecipes import verify
from llmrecipes.command import guarded
from llmrecipes.run.manifest import check_folder, checkpoints

pytestmark = pytest.mark.soak

Command = Callable[..., int]

SHARE = float(os.environ.get("SOAK", "1"))


def rounds(full: int) -> int:
    return max(1, round(full * SHARE))


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints past pytest's capturing."""

    def show(text: str) -> None:
        with capfd.disabled():
            print(f"\n{text}", flush=True)

    return show


@pytest.fixture(scope="module")
def reference(finetune: Command, warm: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An undisturbed run of each kind."""
    done = {}
    for name, flags in RUNS.items():
        done[name] = tmp_path_factory.mktemp("reference") / "out"
        assert forked(lambda flags=flags, name=name: finetune(done[name], **{**COMMON, **flags})) == 0
    return done


@pytest.mark.parametrize("name", RUNS)
def test_fifty_kills_at_random_moments(
    name: str, finetune: Command, reference: dict[str, Path], tmp_path: Path, told: Callable[[str], None]
) -> None:
    flags, draw, inside, kills = {**COMMON, **RUNS[name]}, random.Random(name), 0, 0
    began = time.perf_counter()
    assert forked(lambda: finetune(tmp_path / "timed", **flags)) == 0
    whole = time.perf_counter() - began
    began = time.perf_counter()
    folder = tmp_path / "out"
    for number in range(rounds(50)):
        child = begun(lambda: finetune(folder, **flags))
        time.sleep(draw.uniform(0.1, 0.95) * whole)
        os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
        kills += ended(child) == -signal.SIGKILL
        inside += bool(list(folder.glob(".tmp-*")) or (folder / ".result").exists())
        if number % 5 == 4 or number == rounds(50) - 1:
            assert forked(lambda: finetune(folder, **flags)) == 0
            assert_equal(folder, reference[name])
            shutil.rmtree(folder)
    told(f"kill -9, {name}: {kills} kills, {inside} of them inside a write; {time.perf_counter() - began:.0f} s; equal")


@pytest.mark.parametrize("fault", ["kill", "full disk"])
@pytest.mark.parametrize("name", ["lora with dropout", "full"])
def test_every_write_point(
    name: str, fault: str, finetune: Command, reference: dict[str, Path], tmp_path: Path, told: Callable[[str], None]
) -> None:
    flags = {**COMMON, **RUNS[name]}
    (tmp_path / "count").mkdir()
    writes = count_writes(finetune, tmp_path / "count" / "out", flags)
    began = time.perf_counter()
    points = sorted(random.Random(name).sample(range(1, writes + 1), rounds(writes)))
    for point in points:
        folder = tmp_path / "out"

        def run(point: int = point, folder: Path = folder) -> int:
            at_write(point, folder, killed if fault == "kill" else disk_full, lasting=fault != "kill")
            return guarded(lambda: finetune(folder, **flags))

        code = forked(run)
        # What is suppressed (status.json) leaves nothing to stop for when no write follows.
        assert code == (-signal.SIGKILL if fault == "kill" else 2) or (fault != "kill" and point > writes - 6), point
        for checkpoint in checkpoints(folder)[1:] if folder.is_dir() else []:
            check_folder(checkpoint)
        assert forked(lambda folder=folder: finetune(folder, **flags)) == 0, point
        assert_equal(folder, reference[name])
        shutil.rmtree(folder)
    told(f"{fault} at {len(points)} of {writes} writes, {name}: {time.perf_counter() - began:.0f} s; equal")


def test_five_hundred_spoiled_checkpoints(
    finetune: Command, reference: dict[str, Path], tmp_path: Path, told: Callable[[str], None]
) -> None:
    name, draw, kinds = "lora with dropout", random.Random(5), Counter[str]()
    flags = {**COMMON, **RUNS[name]}
    began = time.perf_counter()
    newest = checkpoints(reference[name])[0].name
    harmless = 0
    for number in range(rounds(500)):
        shutil.copytree(reference[name], tmp_path / "out")
        (tmp_path / "out" / "status.json").unlink()
        kind = spoil(tmp_path / "out" / newest, draw)
        kinds[kind] += 1
        found = verify.main([str(tmp_path / "out" / newest)]) == 2
        if not found:
            manifest = [
                json.loads((folder / newest / "manifest.json").read_text())
                for folder in (tmp_path / "out", reference[name])
            ]
            assert manifest[0]["files"] == manifest[1]["files"], kind
            harmless += 1
        if number % 10 == 0:
            assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
            assert_equal(tmp_path / "out", reference[name])
        shutil.rmtree(tmp_path / "out")
    assert harmless <= max(1, rounds(500) // 20)
    told(f"spoiled: {sum(kinds.values())} ({dict(kinds)}), {harmless} of them harmless (a manifest's text), the others "
         f"found; {time.perf_counter() - began:.0f} s")  # fmt: skip


def spoil(folder: Path, draw: random.Random) -> str:
    """Changes one thing in a folder and returns what."""
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "cut", "grow", "rename", "remove", "empty"])
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind in ("cut", "grow", "empty"):
        path.write_bytes({"cut": content[: draw.randrange(len(content))], "grow": content + b"\0", "empty": b""}[kind])
    elif kind == "rename":
        path.rename(path.with_name(path.name + "x"))
    else:
        path.unlink()
    return kind


MIXED = '''
import json, os, random, signal
import torch
from llmrecipes.prompts import Piece, encode_sample, end_piece

ROWS = 40

def sick(module, arguments, output):
    """Four rows are more than the memory holds; the row with ! in it comes to nothing."""
    if type(module).__name__ == "Embedding":
        if len(arguments[0]) > 2:
            raise torch.OutOfMemoryError("not enough for four rows")
        if module.training and (arguments[0] == marker[0]).any():
            return output * float("nan")

marker = []

def sums(config, tokenizer, split):
    if not marker:
        marker.append(tokenizer.convert_tokens_to_ids("!"))
        torch.nn.modules.module.register_module_forward_hook(sick)
    end = end_piece(tokenizer)
    texts = [f"{n}+1=" if n != 13 else "13+1!" for n in range(ROWS)]
    return [
        encode_sample(tokenizer, [Piece(text), Piece(str(n + 1), supervised=True), end]) for n, text in enumerate(texts)
    ]

def fault(record):
    """Now and then a signal; kill -9 where the environment says so."""
    if record["kind"] != "step":
        return
    if record["step"] == int(os.environ.get("TERM_AT", 0)):
        os.kill(os.getpid(), signal.SIGTERM)
    if record["step"] == int(os.environ.get("KILL_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    if record["step"] % 97 == 0:
        open(os.path.join(os.environ["OUT"], "save-now"), "w").close()
'''


def test_two_thousand_steps_of_mixed_faults(
    finetune: Command, warm: None, tmp_path: Path, told: Callable[[str], None]
) -> None:
    (tmp_path / "mixed.py").write_text(MIXED)
    steps = rounds(2000) // 10 * 10
    flags: dict[str, Any] = {
        **COMMON, "lora_config.lora_dropout": 0.2, "custom_dataset.file": f"{tmp_path / 'mixed.py'}:sums",
        "num_epochs": 1000, "max_train_step": steps, "save_steps": 50, "eval_steps": 200, "save_on": "save-now",
        "val_batch_size": 4,
        "report_to": f"{tmp_path / 'mixed.py'}:fault",
    }  # fmt: skip
    began = time.perf_counter()
    os.environ["OUT"] = str(tmp_path / "whole")
    assert forked(lambda: finetune(tmp_path / "whole", **flags)) == 0
    os.environ["OUT"] = str(tmp_path / "out")
    draw, ends = random.Random(3), Counter[int]()
    places = sorted(draw.sample(range(5, steps - 5), 20 if steps > 200 else 4))
    for number, place in enumerate(places):
        os.environ["TERM_AT" if number % 2 else "KILL_AT"] = str(place)
        ends[forked(lambda: finetune(tmp_path / "out", **flags))] += 1
        for name in ("TERM_AT", "KILL_AT"):
            os.environ.pop(name, None)
    assert set(ends) <= {143, -signal.SIGKILL} and sum(ends.values()) == len(places)
    assert forked(lambda: finetune(tmp_path / "out", **flags)) == 0
    shutil.rmtree(tmp_path / "out" / "last", ignore_errors=True)
    shutil.rmtree(tmp_path / "whole" / "last", ignore_errors=True)
    assert_equal(tmp_path / "out", tmp_path / "whole")
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    numbers = [record["step"] for record in records if record["kind"] == "step"]
    assert numbers == list(range(1, steps + 1))  # none lost, none twice: ten steps of four are each sample once
    skipped = [record["rows"] for record in records if record.get("skipped")]
    assert len(skipped) == steps // 10 and all(13 in rows for rows in skipped)
    told(f"mixed: {steps} steps, {len(skipped)} skipped, {dict(ends)}; {time.perf_counter() - began:.0f} s; equal")


QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
DEMO_MODEL = Path(os.environ.get("DEMO_MODEL", "models/SmolLM2-135M-Instruct.Q4_1.gguf")).absolute()


@pytest.mark.skipif(not DEMO_MODEL.is_file(), reason="the demo model is not there: make quickstart, or set DEMO_MODEL")
def test_an_interrupted_quickstart_is_the_undisturbed_one(tmp_path: Path, told: Callable[[str], None]) -> None:
    steps = rounds(60)

    def command(folder: str) -> list[str]:
        flags = {
            "config": QUICKSTART, "model_name": DEMO_MODEL, "output_dir": folder, "max_train_step": steps,
            "arithmetic_dataset.data_path": "data", "save_steps": 10, "max_eval_step": 2, "resume": "auto",
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in flags.items()]
        return [sys.executable, "-m", "llmrecipes.finetuning", *words]

    subprocess.run([sys.executable, "-m", "llmrecipes.data", "create", "arithmetic", "--output_dir=data"],
                   cwd=tmp_path, check=True)  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command("whole"), cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - began
    draw, kills = random.Random(1), 0
    while True:
        run = subprocess.Popen(command("cut"), cwd=tmp_path, stdout=subprocess.DEVNULL)
        try:
            code = run.wait(draw.uniform(0.4, 0.8) * whole if kills < 2 else None)
        except subprocess.TimeoutExpired:
            run.kill()
            code = run.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert_equal(tmp_path / "cut", tmp_path / "whole")
    told(f"quickstart, {steps} steps of the real model: {kills} kills -9, equal to the bit; {whole:.0f} s undisturbed")
