"""Other projects beside ours in the GPU benchmark: the same samples and the same model, each trained as its users do.

    python benchmarks/gpu.py --peers                     # every peer that is installed, beside every row
    python benchmarks/gpu.py --peers trl,unsloth-max --rows samsum-bf16

`plain` is the loop that one would write first; `trl` is TRL's SFTTrainer with Liger's kernels where they are installed;
`unsloth` is Unsloth as its notebooks call it, `unsloth-max` with packing and nothing recomputed. What they let their
users choose is set to the fastest that their documentation names and the machine has: short samples are packed, none
is recomputed where the row keeps all, FlashAttention is used where it is installed. Their clocks run from the first
forward of a step to the end of its update: what they do between two steps (batches, records) is not held against them.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from llmrecipes.batch import Sample
from llmrecipes.config.schema import RunConfig
from llmrecipes.environment import cache_folder
from llmrecipes.errors import ConfigError
from llmrecipes.models.adapters import attach_trained, lora
from llmrecipes.precision import Precision
from llmrecipes.prompts import IGNORED_LABEL
from llmrecipes.reports.memory import peak_memory_bytes
from llmrecipes.run.preparing import run_precision

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

FIRST_ID = 10
"""The samples' random ids begin here; below are what a tokenizer calls padding, beginning and end."""

PADDED_SAMPLES = 16
"""of SAMSum's lengths in a padded batch of the plain loop"""

MASKED_TOKENS = 4096
"""in a packed row where attention needs a mask of tokens x tokens: of longer rows it would compute mostly nothing"""


@dataclass(frozen=True)
class Work:
    """A row of the table, as every side is given it."""

    config: RunConfig
    shape: Mapping[str, Any]
    """what describes the model to transformers"""
    base: Callable[[RunConfig], Any]
    """builds it on the run's device, stored as a config says"""
    samples: Sequence[Sample]
    steps: int
    warm_up: int

    @property
    def step_tokens(self) -> int:
        """Useful tokens of an optimizer step."""
        config = self.config
        return config.context_length * config.batch_size_training * config.gradient_accumulation_steps

    @property
    def alike(self) -> bool:
        """Whether every sample fills a row: there is nothing to pad or to pack."""
        return len({len(sample.input_ids) for sample in self.samples}) == 1

    @property
    def recomputed(self) -> bool:
        """Whether a peer has to recompute its layers: for the row's purpose, or since the whole model trains."""
        return not self.config.use_peft or self.config.activation_memory in ("recompute", "offload")


@dataclass(frozen=True)
class Side:
    """Something that trains."""

    told: str
    packages: Sequence[str]
    """that it needs, as they are imported; the first one before all others"""
    steps: Callable[[Work], Iterator[dict[str, Any]]]
    """yields the measured steps, then what it came to"""


def as_if_trained(model: Any) -> Any:
    """Gives LoRA's second matrices, which start as 0, what some training would: else half of the work is trivial."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    return model


def plain_steps(work: Work) -> Iterator[dict[str, Any]]:
    """A loop over transformers + peft + bitsandbytes: padded batches, gradient checkpointing."""
    config, precision = work.config, run_precision(work.config)
    base = work.base(config)
    base.set_attn_implementation("sdpa")
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = as_if_trained(attach_trained(base, config, precision)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr)
    samples = iter(work.samples)
    rows = config.batch_size_training if work.alike else PADDED_SAMPLES
    started, warm = time.perf_counter(), 0.0
    for number in range(work.warm_up + work.steps):
        batch: list[Sample] = []
        while sum(len(sample.input_ids) for sample in batch) < work.step_tokens * 0.95:
            batch.append(next(samples))
        begin = time.perf_counter()
        loss = torch.zeros(())
        for start in range(0, len(batch), rows):
            inputs = padded(batch[start : start + rows], precision.device)
            with precision.autocast():
                loss = model(**inputs).loss
            (loss / -(-len(batch) // rows)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told = loss.item()  # waits for the step
        if number == work.warm_up - 1:
            warm = time.perf_counter() - started
        if number >= work.warm_up:
            useful, supervised = sum(len(s.input_ids) for s in batch), sum(s.supervised_tokens for s in batch)
            seconds = time.perf_counter() - begin
            yield {"seconds": seconds, "useful": useful, "supervised": supervised, "operations": 0, "loss": told}
    yield {"told": "", "warm": warm, "peak": peak_memory_bytes(precision.device), "rehearsed": None}


def padded(batch: Sequence[Sample], device: torch.device) -> dict[str, torch.Tensor]:
    """Returns samples as a padded batch, the way a data collator makes it."""
    width = max(len(sample.input_ids) for sample in batch)
    inputs = {name: torch.full((len(batch), width), fill) for name, fill in (("input_ids", 0), ("labels", -100))}
    inputs["attention_mask"] = torch.zeros(len(batch), width, dtype=torch.long)
    for number, sample in enumerate(batch):
        size = len(sample.input_ids)
        inputs["input_ids"][number, :size] = torch.from_numpy(sample.input_ids)
        inputs["labels"][number, :size] = torch.from_numpy(sample.labels)
        inputs["attention_mask"][number, :size] = 1
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def trl_steps(work: Work) -> Iterator[dict[str, Any]]:
    """TRL's SFTTrainer: short samples packed best-fit, alike ones in plain batches."""
    config, precision = work.config, run_precision(work.config)
    flash = importlib.util.find_spec("flash_attn") is not None
    liger = precision.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    base = work.base(config)
    base.set_attn_implementation("flash_attention_2" if flash else "sdpa")
    base.is_loaded_in_4bit = config.quantization == "4bit"  # as from_pretrained says it: TRL's adapters are bf16 then
    base.requires_grad_(not config.use_peft)
    options: dict[str, Any] = {
        "gradient_checkpointing": work.recomputed, "use_liger_kernel": liger,
        "activation_offloading": config.activation_memory == "offload",
        "per_device_train_batch_size": config.batch_size_training,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "max_length": config.context_length,
    }  # fmt: skip
    if not work.alike:
        row = config.context_length if flash else min(MASKED_TOKENS, config.context_length)
        options |= {"packing": True, "max_length": row, "gradient_accumulation_steps": work.step_tokens // row}
        options["per_device_train_batch_size"] = 1
    model = {"model": base, "processing_class": tokenizer()}
    if config.use_peft:
        adapter = lora(config)
        adapter.target_modules = set(targets(config))
        model["peft_config"] = adapter
    yield from sft_steps(work, model, options)


def unsloth_steps(work: Work) -> Iterator[dict[str, Any]]:
    """Unsloth as its notebooks call it: layers recomputed from inputs on the host, padding left out by itself."""
    length = statistics.mean(len(sample.input_ids) for sample in work.samples)
    samples = work.config.batch_size_training if work.alike else round(work.step_tokens / length)
    yield from unsloth_trained(work, {}, {"per_device_train_batch_size": samples})


def unsloth_max_steps(work: Work) -> Iterator[dict[str, Any]]:
    """Unsloth with packing and nothing recomputed; alike samples in plain batches, whose blocks it compiles."""
    options = {"per_device_train_batch_size": work.config.batch_size_training}
    options |= {"padding_free": False} if work.alike else {"packing": True}
    yield from unsloth_trained(work, {"checkpoint_skip_layers": "max"}, options)


def unsloth_trained(work: Work, kept: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the steps of TRL's SFTTrainer as Unsloth changes it; `kept` says which layers are not recomputed."""
    from unsloth import FastLanguageModel

    config = work.config
    loader: Any = FastLanguageModel
    model, words = loader.from_pretrained(
        str(model_folder(work)), max_seq_length=config.context_length, dtype=torch.bfloat16,
        load_in_4bit=config.quantization == "4bit", full_finetuning=not config.use_peft,
    )  # fmt: skip
    if config.use_peft:
        adapter = config.lora_config
        model = loader.get_peft_model(
            model, r=adapter.r, lora_alpha=int(adapter.lora_alpha), lora_dropout=adapter.lora_dropout,
            target_modules=targets(config), use_gradient_checkpointing="unsloth", **kept,
        )  # fmt: skip
    accumulated = {"gradient_accumulation_steps": config.gradient_accumulation_steps}
    more = accumulated | {"max_length": config.context_length} | dict(options)
    yield from sft_steps(work, {"model": model, "processing_class": words}, more)


def targets(config: RunConfig) -> list[str]:
    """Returns the names of the layers that LoRA adapts."""
    chosen = config.lora_config.target_modules
    return list(PROJECTIONS) if chosen == ["all-linear"] else chosen


def model_folder(work: Work) -> Path:
    """Returns the folder of the work's model in bf16, written once for all rows: Unsloth takes no model object."""
    name = hashlib.sha256(json.dumps(dict(work.shape), sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder() / f"benchmark-{name}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            made = Path(place) / "model"
            work.base(replace(work.config, quantization=None)).save_pretrained(made)
            tokenizer().save_pretrained(made)
            made.rename(folder)
    return folder


def tokenizer() -> Any:
    """Returns a tokenizer that the trainers can ask for its special tokens; the samples are ids already."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sft_steps(work: Work, model: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the steps of TRL's SFTTrainer on the work's samples."""
    import datasets
    import trl

    config, precision = work.config, run_precision(work.config)
    library: Any = trl
    rows = [
        {
            "input_ids": sample.input_ids.tolist(),
            "completion_mask": (sample.labels != IGNORED_LABEL).astype(int).tolist(),
        }
        for sample in work.samples
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = library.SFTConfig(
            output_dir=folder, max_steps=work.warm_up + work.steps, learning_rate=config.lr, max_grad_norm=1.0,
            lr_scheduler_type="constant", bf16=True, use_cpu=precision.device.type == "cpu", report_to="none",
            optim="adamw_8bit" if config.optimizer == "adamw_8bit" else "adamw_torch_fused", save_strategy="no",
            logging_steps=1, disable_tqdm=True, completion_only_loss=True, **options,
        )  # fmt: skip
        trainer = library.SFTTrainer(args=arguments, train_dataset=datasets.Dataset.from_list(rows), **model)
        as_if_trained(trainer.model)
        found = dict(options) | {"padding_free": getattr(trainer.data_collator, "padding_free", False)}
        told = ", ".join(f"{name} {value}" for name, value in found.items())
        yield from trainer_steps(trainer, work, precision, told)


def trainer_steps(trainer: Any, work: Work, precision: Precision, told: str) -> Iterator[dict[str, Any]]:
    """Yields the steps of a transformers Trainer, trained to its end, then what it came to."""
    clock = StepClock(precision.device)
    trainer.add_callback(clock)
    trainer.training_step = clock.counting(trainer.training_step)
    if precision.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train()
    for begin, end, counts, loss in clock.steps[work.warm_up :]:
        useful, supervised = (sum(int(count) for count in kind) for kind in zip(*counts, strict=True))
        yield {"seconds": end - begin, "useful": useful, "supervised": supervised, "operations": 0, "loss": loss}
    warm = clock.steps[work.warm_up - 1][1] - started
    yield {"told": told, "warm": warm, "peak": peak_memory_bytes(precision.device), "rehearsed": None}


class StepClock(transformers.TrainerCallback):
    """Notes when a Trainer's optimizer steps begin and end, what they are trained on, and their losses."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[tuple[float, float, list[tuple[torch.Tensor, torch.Tensor]], float]] = []
        self.begin = self.end = 0.0
        self.counts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def counting(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the Trainer's step that also counts useful and supervised tokens, without waiting for the device."""

        def counted(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            supervised = inputs["labels"][..., 1:] != IGNORED_LABEL
            self.counts.append(((inputs["input_ids"] >= FIRST_ID).sum(), supervised.sum()))
            return training_step(model, inputs, *rest, **named)

        return counted

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts = []
        self.begin = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end = self.now()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.steps.append((self.begin, self.end, self.counts, float(logs["loss"])))


PEERS = {
    "plain": Side("transformers + peft", (), plain_steps),
    "trl": Side("TRL", ("trl",), trl_steps),
    "unsloth": Side("Unsloth", ("unsloth", "trl"), unsloth_steps),
    "unsloth-max": Side("Unsloth, nothing recomputed", ("unsloth", "trl"), unsloth_max_steps),
}


def chosen_peers(names: str) -> list[str]:
    """Returns the peers of a list such as `trl,unsloth`, or all that are installed; raises for one that is not."""
    missing = {
        name: absent
        for name, side in PEERS.items()
        if (absent := [package for package in side.packages if importlib.util.find_spec(package) is None])
    }
    if names == "all":
        return [name for name in PEERS if name not in missing]
    chosen = names.split(",")
    for name in chosen:
        if name not in PEERS:
            raise ConfigError(f"--peers {name}: expected some of {','.join(PEERS)}")
        if name in missing:
            raise ConfigError(f"--peers {name}: {missing[name][0]} is not installed; pip install {missing[name][0]}")
    return chosen


def peer_versions(names: Sequence[str]) -> str:
    """Returns the versions of what the peers train with, such as `, trl 1.15.0`."""
    packages = dict.fromkeys(package for name in names for package in reversed(PEERS[name].packages))
    if "trl" in packages and importlib.util.find_spec("liger_kernel"):
        packages["liger_kernel"] = None
    return "".join(f", {package} {importlib.metadata.version(package)}" for package in packages)
