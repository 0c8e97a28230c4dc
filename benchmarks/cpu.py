"""How fast a training step is on a CPU: llmrecipes beside a plain transformers + peft loop on the same samples.

    recipes/quickstart.sh                        # once: fetches the demo model and writes the data
    python benchmarks/cpu.py                     # some 10 minutes on 2 cores
    python benchmarks/cpu.py --rounds 1 --steps 2 --context_length 700      # any flag of the fine-tuning, too

The plain loop is what one would write first: shuffled batches of as many samples, padded to the longest, logits of
every position, `model(..., labels=...).loss`, PyTorch's AdamW as it comes. Both sides learn the same samples with the
same LoRA; the trainer has the config's optimizer. Each side is a process of its own, and only one runs at a time; they
take turns, so that what else the machine does slows all of them; but measure on a quiet one, the plain loop's threads
take it ill when another program has a core. The first step of every turn is left out. Ratios are of time on the clock
and of CPU time.
"""

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
import transformers

from llmrecipes.batch import Sample
from llmrecipes.command import parse_flags
from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import RunConfig
from llmrecipes.environment import prepare_environment, usable_cores
from llmrecipes.kernels.attention import document_layout
from llmrecipes.models.adapters import attach_trained
from llmrecipes.models.loading import load_model, load_tokenizer, resolve_model
from llmrecipes.reports.memory import peak_memory_bytes
from llmrecipes.run.finetune import build_loaders, build_updater, resolve_plugins
from llmrecipes.run.preparing import run_lanes, run_precision, set_seeds
from llmrecipes.run.speed import apply_attention
from llmrecipes.training.loop import train_step
from llmrecipes.training.loss import loss_sum
from llmrecipes.training.schedules import Progress

Result = TypeVar("Result")

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"

SIDES = {
    "plain, float32": (torch.float32, False),
    "plain, bfloat16 weights": (torch.bfloat16, False),
    "plain, bfloat16 autocast": (torch.bfloat16, True),
    "llmrecipes": None,
}
"""Name of a side -> (type of the plain loop's base, whether it runs under autocast); None is the trainer itself."""


@dataclass(frozen=True)
class Step:
    """One optimizer step as it was measured."""

    seconds: float
    cpu_seconds: float
    """of all threads"""
    useful_tokens: int
    supervised_tokens: int
    loss: float
    """mean over the supervised tokens, before the step"""


def our_steps(config: RunConfig, steps: int) -> Iterator[Step]:
    """Yields steps of the trainer, each of one window."""
    plugins, precision, source = resolve_plugins(config, None), run_precision(config), resolve_model(config)
    set_seeds(config.seed)
    tokenizer, lanes = load_tokenizer(config, source), run_lanes(config, source, precision)
    loaders = build_loaders(config, tokenizer, plugins, source, document_layout(precision), lanes)
    base = load_model(config, source, precision)
    apply_attention(base, config)
    model = attach_trained(base, config, precision)
    updater = build_updater(model, config, plugins, precision, loss_sum)
    windows = list(itertools.islice(loaders.training.windows(0), steps))
    for number, window in enumerate(windows):
        progress = Progress(number, steps, warmup_steps=0, epoch=0, gamma=1.0)
        metrics, seconds, cpu_seconds = measured(lambda: train_step(model, window, updater, progress, lanes))  # noqa: B023
        yield Step(seconds, cpu_seconds, metrics.useful_tokens, metrics.supervised_tokens, metrics.loss)


def plain_steps(config: RunConfig, steps: int, dtype: torch.dtype, autocast: bool) -> Iterator[Step]:
    """Yields steps of the plain loop, on the samples of the trainer's first windows."""
    plugins, source = resolve_plugins(config, None), resolve_model(config)
    tokenizer = load_tokenizer(config, source)
    set_seeds(config.seed)
    loader = build_loaders(config, tokenizer, plugins, source, document_layout(run_precision(config))).training
    windows = loader.window_rows(0)[:steps]
    samples = [loader.samples[index] for index in sorted(itertools.chain(*itertools.chain(*itertools.chain(*windows))))]
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    lora = config.lora_config
    targets = "all-linear" if lora.target_modules == ["all-linear"] else lora.target_modules
    adapter = peft.LoraConfig(
        r=lora.r, lora_alpha=int(lora.lora_alpha), lora_dropout=lora.lora_dropout, target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(model, adapter).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)

    def step(inputs: Mapping[str, torch.Tensor]) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        if config.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(trained, config.gradient_clipping_threshold)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    for batch in equal_parts(samples, len(windows)):
        inputs = collate([{"input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in batch])
        loss, seconds, cpu_seconds = measured(lambda: step(inputs))  # noqa: B023
        useful, supervised = sum(len(s.input_ids) for s in batch), sum(s.supervised_tokens for s in batch)
        yield Step(seconds, cpu_seconds, useful, supervised, loss)


def measured(function: Callable[[], Result]) -> tuple[Result, float, float]:
    """Returns (result, seconds on the clock, seconds of CPU time) of a call."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - clock, time.process_time() - cpu


def equal_parts(samples: Sequence[Sample], parts: int) -> list[Sequence[Sample]]:
    """Returns the samples in `parts` batches of the same number, up to one."""
    edges = [len(samples) * part // parts for part in range(parts + 1)]
    return [samples[start:end] for start, end in itertools.pairwise(edges)]


def side_steps(side: str, config: RunConfig, steps: int) -> Iterator[Step]:
    """Yields the measured steps of one side."""
    plain = SIDES[side]
    return our_steps(config, steps) if plain is None else plain_steps(config, steps, *plain)


def turn(side: str, words: Sequence[str], environment: Mapping[str, str]) -> tuple[list[Step], int]:
    """Returns (steps without the first, peak bytes) of a side, run in a process of its own."""
    command = [sys.executable, __file__, f"--side={side}", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return [Step(**step) for step in told["steps"]][1:], told["peak_bytes"]


def table(steps: Mapping[str, Sequence[Step]], peak_bytes: Mapping[str, int]) -> str:
    """Returns the figures as a Markdown table; ratios say how many times faster the last side is than each."""
    ours = list(steps.values())[-1]
    lines = [
        "| | useful tok/s | supervised tok/s | s a step | CPU s a step | ratio | ratio, CPU time | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side, own in steps.items():
        useful = median(step.useful_tokens / step.seconds for step in own)
        supervised = median(step.supervised_tokens / step.seconds for step in own)
        seconds, cpu_seconds = median(step.seconds for step in own), median(step.cpu_seconds for step in own)
        ratio = median(step.useful_tokens / step.seconds for step in ours) / useful
        of_cpu = median(s.cpu_seconds / s.useful_tokens for s in own) / median(
            s.cpu_seconds / s.useful_tokens for s in ours
        )
        lines.append(
            f"| {side} | {useful:.0f} | {supervised:.0f} | {seconds:.2f} | {cpu_seconds:.2f} | {ratio:.2f} | "
            f"{of_cpu:.2f} | {peak_bytes[side] / 2**30:.1f} |"
        )
    return "\n".join(lines)


def median(values: Iterable[float]) -> float:
    """Returns the median."""
    return statistics.median(values)


def machine() -> str:
    """Returns what was measured on, and with what."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return f"{date.today()}, {len(usable_cores())} cores of {name}, load {os.getloadavg()[0]:.1f} before; {versions}"


def main(words: Sequence[str]) -> None:
    """Measures all sides and prints the table; with --side, one turn of one side, as JSON."""
    flags = {"config": str(QUICKSTART), **parse_flags(words)}
    side, rounds, steps = flags.pop("side", ""), int(flags.pop("rounds", "3")), int(flags.pop("steps", "4"))
    config = load_config(RunConfig, flags).config
    if side:
        found = [asdict(step) for step in side_steps(side, config, steps + 1)]
        print(json.dumps({"steps": found, "peak_bytes": peak_memory_bytes("cpu")}))
        return
    print(machine(), flush=True)
    plain = dict(os.environ)  # a plain loop has the environment as it is
    prepare_environment()
    measured_steps: dict[str, list[Step]] = {side: [] for side in SIDES}
    peaks = dict.fromkeys(SIDES, 0)
    for _ in range(rounds):
        for side in SIDES:
            found_steps, peak = turn(side, words, plain if SIDES[side] else os.environ)
            measured_steps[side] += found_steps
            peaks[side] = max(peaks[side], peak)
            print(f"{side}: {[round(step.seconds, 2) for step in found_steps]} s", file=sys.stderr, flush=True)
    print(table(measured_steps, peaks))


if __name__ == "__main__":
    main(sys.argv[1:])
