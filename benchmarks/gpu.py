"""How fast a training step is on a GPU: a model of Llama-2-7B's shape, made on the device from a seed.

    python benchmarks/gpu.py                                   # all rows, some 6 minutes on an H200
    python benchmarks/gpu.py --rows samsum-bf16,samsum-4bit --steps 10
    python benchmarks/gpu.py --rows packed-4bit --peers        # beside it all that is installed of peers.py
    python benchmarks/gpu.py --rows packed-4bit --peers trl,unsloth
    python benchmarks/gpu.py --rows single-4bit-small --activation_memory recompute      # any flag of the fine-tuning

Each row is a process of its own: what the trainer does between model and update, by the trainer's own functions, on
samples that have SAMSum's lengths under Llama-2's tokenizer (or all the same) and random tokens. Tokens are useful
ones, padding is never counted; times are medians; warm-up, which compiles the kernels and rehearses, is told apart.
TFLOP/s count what has to be computed and nothing that is computed again; the ceiling is a large bfloat16 matmul of
the same run.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import peft
import torch
import transformers
from peers import PEERS, Side, Work, as_if_trained, chosen_peers, peer_versions

from llmrecipes.batch import Sample
from llmrecipes.command import guarded, parse_flags
from llmrecipes.config.loading import BARE, load_config
from llmrecipes.config.schema import RunConfig
from llmrecipes.data.loaders import Loader
from llmrecipes.environment import prepare_environment
from llmrecipes.kernels.attention import document_layout
from llmrecipes.models.adapters import attach_trained
from llmrecipes.models.float8 import Float8Linear
from llmrecipes.precision import Precision
from llmrecipes.reports.memory import peak_memory_bytes
from llmrecipes.run.measuring import ceiling
from llmrecipes.run.memory import fit_memory
from llmrecipes.run.preparing import run_precision, set_seeds
from llmrecipes.run.speed import apply_attention, calibrated, fuse_layers
from llmrecipes.training.loop import train_step
from llmrecipes.training.optimizers import OPTIMIZERS
from llmrecipes.training.schedules import SCHEDULES, Progress
from llmrecipes.training.updater import Updater

SHARES = (*(share / 20 for share in range(20)), 0.98, 0.99, 0.999, 1)
PROMPTS = (
    31, 51, 62, 72, 82, 91, 101, 112, 124, 139, 154, 170, 187, 206, 227, 249, 274, 307, 351, 427, 518, 586, 803, 1189,
)  # fmt: skip
ANSWERS = (2, 11, 13, 15, 17, 18, 20, 21, 23, 25, 26, 28, 31, 33, 36, 38, 42, 46, 52, 62, 71, 77, 87, 96)
"""Tokens that such shares of SAMSum's training split stay below, under Llama-2's tokenizer: 14,731 samples, of which
a prompt has 185.7 tokens on average and an answer 30.0."""

LORA = {"use_peft": "true", "lora_config.r": "16", "lora_config.target_modules": "all-linear"}
LORA |= {"lora_config.lora_dropout": "0", "gradient_clipping": "true"}
FOUR_BIT = {"quantization": "4bit"}
NESTED = {**FOUR_BIT, "quantization_config.use_double_quant": "true"}

SHAPE: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One workload."""

    told: str
    sample_tokens: int
    """0: SAMSum's lengths"""
    flags: Mapping[str, str]
    """of the fine-tuning"""


def packed(rows: int, tokens: int, accumulated: int = 1, **more: str) -> dict[str, str]:
    """Returns the flags of a batch of `rows` packed rows."""
    names = ("batch_size_training", "context_length", "gradient_accumulation_steps")
    return dict(zip(names, map(str, (rows, tokens, accumulated)), strict=True)) | more


ROWS = {
    "samsum-bf16": Row("SAMSum, bf16", 0, LORA | packed(1, 16384)),
    "samsum-4bit": Row("SAMSum, NF4", 0, LORA | FOUR_BIT | packed(1, 16384)),
    "samsum-fp8": Row("SAMSum, fp8", 0, LORA | {"quantization": "fp8"} | packed(1, 16384)),
    "packed-bf16": Row("4 x 4,096, bf16", 4096, LORA | packed(4, 4096)),
    "packed-4bit": Row("4 x 4,096, NF4", 4096, LORA | FOUR_BIT | packed(4, 4096)),
    "long-bf16": Row("1 x 16,384, bf16", 16384, LORA | packed(1, 16384)),
    "long-4bit": Row("1 x 16,384, NF4", 16384, LORA | FOUR_BIT | packed(1, 16384)),
    "full-bf16": Row("4 x 4,096, whole model, bf16", 4096, {"pure_bf16": "true", **packed(4, 4096)}),
    "single-4bit": Row(
        "1 x 4,096, 4 accumulated, NF4, all kept", 4096,
        LORA | NESTED | packed(1, 4096, 4, activation_memory="keep"),
    ),
    "single-4bit-small": Row(
        "the same, least memory", 4096,
        LORA | NESTED | packed(1, 4096, 4, activation_memory="offload", optimizer="adamw_8bit"),
    ),
}  # fmt: skip


def llama(config: RunConfig) -> Any:
    """Returns a model of Llama-2-7B's shape on the run's device, random weights, stored as the config says."""
    precision = run_precision(config)
    described = transformers.LlamaConfig(**SHAPE)
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(described)
    torch.manual_seed(0)
    rotary = type(model.model.rotary_emb)(described).to(precision.device)
    for name, module in model.named_modules():
        for kind, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=precision.compute, device=precision.device)
            made = made.fill_(1) if "norm" in name else made.normal_(std=0.02)
            setattr(module, kind, torch.nn.Parameter(made, requires_grad=False))
        if config.quantization and "layers" in name and isinstance(module, torch.nn.Linear):
            model.set_submodule(name, in_8_bits(module) if config.quantization == "fp8" else in_4_bits(module, config))
    model.model.rotary_emb = rotary
    return model


def in_8_bits(linear: torch.nn.Linear) -> Float8Linear:
    """Returns a `Float8Linear` of a linear layer's weights."""
    made = Float8Linear(linear)
    made.weight = made.stored(linear.weight.data)
    return made


def in_4_bits(linear: torch.nn.Linear, config: RunConfig) -> Any:
    """Returns a `Linear4bit` of a linear layer's weights."""
    nested = config.quantization_config.use_double_quant
    library: Any = bitsandbytes.nn
    made = library.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta"
    )
    weight = library.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=nested)
    made.weight = weight.to(linear.weight.device)
    return made


def samples_of(row: Row, tokens: int) -> list[Sample]:
    """Returns random samples of the row's lengths, so many tokens of them; answers or, where alike, all supervised."""
    generator = np.random.default_rng(0)
    samples: list[Sample] = []
    while tokens > 0:
        place, other, alike = generator.random(3)  # long dialogues have long summaries: a correlation of 0.68
        prompt = int(np.interp(place, SHARES, PROMPTS))
        answer = int(np.interp(place if alike < 0.6 else other, SHARES, ANSWERS))
        prompt, answer = (0, row.sample_tokens) if row.sample_tokens else (prompt, answer)
        ids = generator.integers(10, 32000, prompt + answer).astype(np.int32)
        labels = ids.copy()
        labels[:prompt] = -100
        samples.append(Sample(ids, labels, len(samples)))
        tokens -= len(ids)
    return samples


def work_of(row: Row, config: RunConfig, steps: int, warm_up: int) -> Work:
    """Returns the row as the sides are given it."""
    tokens = config.context_length * config.batch_size_training * config.gradient_accumulation_steps
    return Work(config, SHAPE, llama, samples_of(row, tokens * (steps + warm_up + 2)), steps, warm_up)


def our_steps(work: Work) -> Iterator[dict[str, Any]]:
    """Yields the trainer's steps, then what it came to."""
    config, warm_up = work.config, work.warm_up
    precision = run_precision(config)
    set_seeds(config.seed)
    base = llama(config)
    texts = [apply_attention(base, config)]
    model = as_if_trained(attach_trained(base, config, precision))
    fused = fuse_layers(model, config, precision)
    loader = Loader(
        work.samples, "packing", config.context_length, config.batch_size_training,
        config.gradient_accumulation_steps, seed=0, layout=document_layout(precision), fixed_shapes=True,
    )  # fmt: skip
    started = time.perf_counter()
    texts += [fused.told, calibrated(fused, model, loader, precision, config.quantization_config.compute)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[config.optimizer](trained, config)
    updater = Updater(model, optimizer, SCHEDULES["constant"], precision, 1.0, fused.loss)
    fitted = fit_memory(config, model, loader, updater, fused)
    windows = fitted.training.windows(0)
    if precision.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[Any] = []
    warm = 0.0
    for number in range(warm_up + work.steps):
        window = next(windows)
        begin = now(precision)
        metrics = train_step(model, window, updater, Progress(number, 1000, 0, 0, 1.0))
        times.append((begin, now(precision), metrics, sum(batch.attention_pairs for batch in window)))
        if number == warm_up - 1:
            assert metrics.loss > 0  # waits for the step
            warm = time.perf_counter() - started
    assert metrics.loss > 0
    shape = fused.shape
    assert shape is not None
    for begin, end, metrics, pairs in times[warm_up:]:
        operations = shape.operations(metrics.useful_tokens, metrics.supervised_tokens, pairs, not config.use_peft)
        yield {
            "seconds": between(begin, end), "useful": metrics.useful_tokens,
            "supervised": metrics.supervised_tokens, "operations": operations, "loss": metrics.loss,
        }  # fmt: skip
    yield {
        "told": "; ".join(text for text in [*texts, fitted.told] if text), "warm": warm,
        "peak": peak_memory_bytes(precision.device), "rehearsed": fitted.peak_bytes,
    }  # fmt: skip


def now(precision: Precision) -> Any:
    """Returns a mark of the time at which the device gets here."""
    if precision.device.type != "cuda":
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def between(begin: Any, end: Any) -> float:
    """Returns the seconds between two marks."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


OURS = "llmrecipes"
SIDES = {OURS: Side(OURS, (), our_steps)} | PEERS


def measured(side: str, name: str, steps: int, words: Sequence[str]) -> dict[str, Any]:
    """Returns the figures of one row, measured in a process of its own."""
    path = Path(__file__)
    program = f"import sys, runpy; sys.path.insert(0, {str(path.parent)!r}); "
    for package in SIDES[side].packages[:1]:
        program += f"import {package}; "  # Unsloth changes what is imported after it
    program += f"runpy.run_path({str(path)!r}, run_name='__main__')"
    command = [sys.executable, "-c", program, f"--side={side}", f"--rows={name}", f"--steps={steps}", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(side: str, name: str, found: Mapping[str, Any]) -> str:
    """Returns a row of the table."""
    head = f"| {ROWS[name].told} | {SIDES[side].told} |"
    if "error" in found:
        return f"{head} {found['error']} |"
    steps, end = found["steps"], found["end"]
    rates = [step["useful"] / step["seconds"] for step in steps]
    supervised = statistics.median(step["supervised"] / step["seconds"] for step in steps)
    work = statistics.median(step["operations"] / step["seconds"] for step in steps)
    share = f"{work / 1e12:.0f} ({work / found['ceiling']:.0%})" if work else ""
    spread = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
    peak = f"{end['peak'] / 2**30:.1f}" + (f" ({end['rehearsed'] / 2**30:.1f})" if end["rehearsed"] else "")
    return f"{head} {spread} | {supervised:,.0f} | {share} | {peak} | {end['warm']:.0f} |"


def main(words: Sequence[str]) -> int:
    """Measures the rows and prints a table; with --side, one row of one side, as JSON. Returns the exit code."""
    flags: dict[str, str] = dict(parse_flags(words))
    side, names = flags.pop("side", ""), flags.pop("rows", ",".join(ROWS)).split(",")
    steps, wanted = int(flags.pop("steps", "8")), flags.pop("peers", None)
    if side:
        row = ROWS[names[0]]
        prepare_environment()
        config = load_config(RunConfig, {"model_name": "7B", "output_dir": "unused", **row.flags, **flags}).config
        *told, end = SIDES[side].steps(work_of(row, config, steps, 3))
        print(json.dumps({"steps": told, "end": end, "ceiling": ceiling(run_precision(config))}))
        return 0
    peers = [] if wanted is None else chosen_peers("all" if wanted == BARE else wanted)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(
        f"{date.today()}, {torch.cuda.get_device_name()}; {versions}{peer_versions(peers)}; {steps} steps a row",
        flush=True,
    )
    print("| workload | | useful tok/s (least to most) | supervised tok/s | TFLOP/s (of bf16's ceiling) | peak GiB "
          "(rehearsed) | warm-up, s |\n|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    own = [word for name, value in flags.items() for word in (f"--{name}={value}",)]
    for name in names:
        for side in [OURS, *peers]:
            found = measured(side, name, steps, own)
            print(line(side, name, found), flush=True)
            if found.get("end", {}).get("told"):
                print(f"{name}, {side}: {found['end']['told']}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sys.exit(guarded(lambda: main(sys.argv[1:])))
