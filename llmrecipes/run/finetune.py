"""Fine-tuning, station by station: cheap before dear, so that what is wrong is said before the model loads."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from llmrecipes.batch import Layout, Sample, attention_window, document_spans
from llmrecipes.config.loading import Loaded
from llmrecipes.config.schema import RunConfig
from llmrecipes.config.show import flat_config, value_of
from llmrecipes.data.health import quick_findings
from llmrecipes.data.loaders import Collator, Loader, padded_batch
from llmrecipes.data.preprocessors import dataset_section, load_preprocessor
from llmrecipes.errors import ConfigError, PluginError, TrainingError, first_line
from llmrecipes.kernels.attention import document_layout
from llmrecipes.kernels.calibration import exact_matmuls
from llmrecipes.models.adapters import attach_trained, checked_base, count_parameters
from llmrecipes.models.folders import is_local, local_path
from llmrecipes.models.loading import load_model, load_tokenizer, resolve_model
from llmrecipes.models.quantization import rows_unrounded
from llmrecipes.plugins import Plugin, plugin_folders, resolve_function
from llmrecipes.precision import Precision, device_name, out_of_memory_told
from llmrecipes.prompt_contract import prompt_contract
from llmrecipes.reports.format import duration
from llmrecipes.reports.memory import peak_memory_bytes
from llmrecipes.reports.plan import Plan, plan_text
from llmrecipes.reports.progress import TrainingProgress
from llmrecipes.reports.summary import summary_text
from llmrecipes.reports.trackers import TRACKERS, check_tracker, redacted
from llmrecipes.run.blackbox import BlackBox
from llmrecipes.run.closing import closing_summary
from llmrecipes.run.keeping import Keeper, describer, plugin_notices
from llmrecipes.run.measuring import ceiling, operation_counter, profiled
from llmrecipes.run.memory import check_fit, fit_memory
from llmrecipes.run.output import ResultWriter, check_output_dir, disk_told
from llmrecipes.run.preparing import (
    determinism_told,
    load_split,
    precision_notices,
    run_lanes,
    run_precision,
    set_deterministic,
    set_seeds,
)
from llmrecipes.run.resuming import goes_on_within
from llmrecipes.run.speed import Fused, apply_attention, calibrated, fuse_layers
from llmrecipes.run.stopping import EXIT_STOPPED, SaveRequest, StoppedEarlyError
from llmrecipes.training.loop import Hooks, TrainPlan, TrainResult, train
from llmrecipes.training.optimizers import OPTIMIZERS
from llmrecipes.training.probe import check_no_leak
from llmrecipes.training.schedules import SCHEDULES, warmup_steps
from llmrecipes.training.updater import Health, LossSum, Updater

Tracker = Callable[[dict[str, Any]], None]

SMALLER = "a smaller --batch_size_training or --context_length, or --quantization 4bit"

PROBED_TOKENS = 512
"""Size of the packed row that the leak probe looks at, if its first two samples are no longer."""


@dataclass(frozen=True)
class Plugins:
    """The functions that the config's names stand for."""

    preprocessor: Plugin
    collator: Callable[[Any], Collator] | None
    optimizer: Callable[..., Any]
    schedule: Callable[..., float]
    trackers: Mapping[str, Tracker]


@dataclass(frozen=True)
class Loaders:
    """Batches of both splits, and what the data had to say."""

    training: Loader
    validation: Loader | None
    notices: tuple[str, ...]
    lanes: int
    """batches of a window that are computed side by side"""


def finetune(loaded: Loaded[RunConfig], config_path: str | None) -> int:
    """Runs one fine-tuning from config to saved result; returns the exit code."""
    try:
        with Keeper(loaded.config) as keeper:
            return stations(loaded, config_path, keeper)
    except StoppedEarlyError as told:
        print(f"error: stopped by {told} before the first step, so there was nothing to save", file=sys.stderr)
        return EXIT_STOPPED


def stations(loaded: Loaded[RunConfig], config_path: str | None, keeper: Keeper) -> int:
    """Runs the stations of one fine-tuning; returns the exit code."""
    config = loaded.config
    plugins = resolve_plugins(config, config_path)
    precision = run_precision(config)
    check_fit(config, precision.device)
    build_optimizer(config, plugins, [torch.nn.Parameter(torch.zeros(1, device=precision.device))])
    source = resolve_model(config)
    base, told = checked_base(config, source)
    inputs = (config.model_name, config.tokenizer_name, config.from_peft_checkpoint)
    folder = check_output_dir(config.output_dir, config.overwrite_output_dir, inputs, goes_on_within(config))
    keeper.open(folder)
    tokenizer = load_tokenizer(config, source)
    set_seeds(config.seed)
    set_deterministic(config.deterministic)
    lanes = run_lanes(config, source, precision)
    loaders = build_loaders(config, tokenizer, plugins, source, document_layout(precision), lanes)
    functions = (plugins.preprocessor, plugins.optimizer, plugins.schedule, *plugins.trackers.values())
    describe = describer(config, loaders.training, loaders.validation, functions, base, precision)
    if keeper.finished(describe):
        return 0
    contract = prompt_contract(tokenizer, loaders.training.samples)
    model = load_model(config, source, precision, dtype=None if config.use_peft else precision.trained)
    kernels = [apply_attention(model, config)]
    model = attach_trained(model, config, precision)
    fused, warming = fuse_layers(model, config, precision), time.perf_counter()
    kernels += [fused.told, calibrated(fused, model, loaders.training, precision, config.quantization_config.compute)]
    kernels += [prove_no_leak(model, config, loaders, precision, fused)]
    updater = build_updater(model, config, plugins, precision, fused.loss)
    fitted = fit_memory(config, model, loaders.training, updater, fused)
    loaders = replace(loaders, training=fitted.training)
    kernels += [fitted.told, f"{lanes} batches side by side" if lanes > 1 else ""]
    kernels += [f"warmed up in {duration(time.perf_counter() - warming)}" if fitted.peak_bytes else ""]
    plan = replace(train_plan(config, loaders), operations=operation_counter(model, config, precision))
    profiled(config, loaders.training, plan.steps)
    notices = [*told, *precision_notices(precision), *keeper.notices(describe), *plugin_notices(functions)]
    notices += [*loaded.notices, *loaders.notices]
    shown = shown_plan(config, loaders, model, precision, plan, kernels, notices)
    seconds = fitted.batch_seconds and plan.steps * loaders.training.window_batches * fitted.batch_seconds
    print(plan_text(replace(shown, memory_bytes=fitted.peak_bytes, seconds=seconds)), flush=True)
    writer = ResultWriter(folder, model, tokenizer, contract, base, config.save_model)
    keeper.keep(writer, updater, describe)
    keeper.restore(writer, updater)
    keeper.claim(folder, loaded, values_from_anywhere(config, plugins))
    started = time.perf_counter()
    result = run_training(config, plugins, loaders, updater, plan, keeper, writer)
    print(summary_text(closing_summary(config, folder, result, contract, time.perf_counter() - started)))
    return keeper.ended(result)


def resolve_plugins(config: RunConfig, config_path: str | None) -> Plugins:
    """Returns the functions behind the config's names; a typo fails here, before anything is read."""
    folders = plugin_folders(config_path)
    preprocessor = load_preprocessor(config, folders)
    collator = preprocessor.sibling("get_data_collator")
    if config.batching_strategy == "packing":
        check_packing(config, preprocessor, collator)
    names = [*(["jsonl"] if config.save_metrics else []), *config.report_to, *(["wandb"] if config.use_wandb else [])]
    for name in names:
        check_tracker(name)
    trackers = {name: resolve_function(name, "report_to", TRACKERS, folders) for name in names}
    optimizer = resolve_function(config.optimizer, "optimizer", OPTIMIZERS, folders)
    schedule = resolve_function(config.lr_scheduler, "lr_scheduler", SCHEDULES, folders)
    return Plugins(preprocessor, collator, optimizer, schedule, trackers)


def check_packing(config: RunConfig, preprocessor: Plugin, collator: object) -> None:
    """Raises `ConfigError` where several samples cannot share a row."""
    if collator is not None:
        raise ConfigError(
            f"--batching_strategy packing: {preprocessor.path.name} brings get_data_collator, which builds padded "
            "batches; use --batching_strategy padding"
        )
    if config.use_peft and config.peft_method == "prefix":
        raise ConfigError(
            "--batching_strategy packing: a prefix stands before a row, and in a packed row only one sample would see "
            "it; use --batching_strategy padding"
        )


def build_loaders(
    config: RunConfig, tokenizer: Any, plugins: Plugins, source: str, layout: Layout, lanes: int = 1
) -> Loaders:
    """Returns both splits, read and checked; `layout` tells the device where documents are.

    A batch is cut into `lanes` of a window, which holds the same rows: neither its gradient nor the memory changes.
    """
    section = dataset_section(config)
    collator = plugins.collator(tokenizer) if plugins.collator else None
    preprocessor = plugins.preprocessor
    samples, notices = load_split(config, tokenizer, preprocessor, section.train_split, source)
    training = Loader(
        samples=samples,
        strategy=config.batching_strategy,
        row_tokens=config.context_length,
        batch_rows=config.batch_size_training // lanes,
        window_batches=config.gradient_accumulation_steps * lanes,
        seed=config.seed,
        group_by_length=config.group_by_length,
        grouped_rows=config.batch_size_training,
        workers=config.num_workers_dataloader,
        collator=collator,
        layout=layout,
        fixed_shapes=layout is document_spans and config.batching_strategy == "packing",
    )
    if not config.run_validation:
        return Loaders(training, None, (*notices, *quick_findings({"train": training}, tokenizer)), lanes)
    samples, more = load_split(config, tokenizer, preprocessor, section.test_split, source)
    validation = Loader(
        samples=samples,
        strategy=config.batching_strategy,
        row_tokens=config.context_length,
        batch_rows=config.val_batch_size,
        workers=config.num_workers_dataloader,
        collator=collator,
        layout=layout,
    )
    found = quick_findings({"train": training, "validation": validation}, tokenizer)
    return Loaders(training, validation, tuple(dict.fromkeys((*notices, *more, *found))), lanes)


def build_optimizer(config: RunConfig, plugins: Plugins, parameters: Sequence[torch.nn.Parameter]) -> Optimizer:
    """Returns the optimizer; tried on one number first, it tells what is wrong before the model loads."""
    optimizer = plugins.optimizer(parameters, config)
    if not isinstance(optimizer, Optimizer):
        raise PluginError(f"--optimizer {config.optimizer}: it returned {type(optimizer).__name__}, not an Optimizer")
    return optimizer


def prove_no_leak(model: Any, config: RunConfig, loaders: Loaders, precision: Precision, fused: Fused) -> str:
    """Raises `TrainingError` where packed samples see each other; returns what was proven, for the plan."""
    if config.batching_strategy != "packing" or not config.leak_probe:
        return ""
    row: list[Sample] = []
    tokens = 0
    for index in loaders.training.rows(0)[0]:
        sample = loaders.training.samples[index]
        tokens += len(sample.input_ids)
        row += [sample] if len(row) < 2 or tokens <= PROBED_TOKENS else []
    if len(row) < 2:
        return ""
    if attention_window(model.config):  # lost, it would be missed only by a sample that is longer
        row.append(loaders.training.samples[int(np.argmax(loaders.training.lengths))])
    try:
        with out_of_memory_told("leak probe", SMALLER), rows_unrounded(model):
            batch = padded_batch([row], loaders.training.layout)
            moved = check_no_leak(model, batch, precision, lambda: exact_matmuls(fused.layers))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"--batching_strategy packing: this model takes no packed rows ({first_line(error)}); use "
            "--batching_strategy padding"
        ) from None
    return f"packed samples do not see each other (probe of {len(row)}: {moved:.1g})"


def build_updater(model: Any, config: RunConfig, plugins: Plugins, precision: Precision, loss: LossSum) -> Updater:
    """Returns the optimizer step over just what trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    clip_norm = config.gradient_clipping_threshold if config.gradient_clipping else None
    health = Health(config.max_skipped_steps, config.spike_sigma, config.skip_spikes)
    optimizer = build_optimizer(config, plugins, trained)
    return Updater(model, optimizer, plugins.schedule, precision, clip_norm, loss, health)


def train_plan(config: RunConfig, loaders: Loaders) -> TrainPlan:
    """Returns how many steps the epochs come to, and when to look up."""
    steps = sum(len(loaders.training.window_rows(epoch)) for epoch in range(config.num_epochs))
    steps = min(steps, config.max_train_step) if config.max_train_step else steps
    return TrainPlan(
        epochs=config.num_epochs,
        steps=steps,
        warmup_steps=warmup_steps(steps, config.warmup_steps, config.warmup_ratio),
        gamma=config.gamma,
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        logging_steps=config.logging_steps,
        max_eval_batches=config.max_eval_step,
        lanes=loaders.lanes,
    )


def run_training(
    config: RunConfig,
    plugins: Plugins,
    loaders: Loaders,
    updater: Updater,
    plan: TrainPlan,
    keeper: Keeper,
    writer: ResultWriter,
) -> TrainResult:
    """Trains, showing progress and feeding the trackers; a signal ends it after the step at hand."""
    device, box, place = updater.precision.device, BlackBox(), keeper.place
    top = ceiling(updater.precision) if plan.operations else 0.0
    wishes = SaveRequest(config.save_on, writer.folder)
    with TrainingProgress() as progress, wishes as save, disk_told(writer.folder):

        def report(record: dict[str, Any]) -> None:
            record = {**record, "memory_bytes": peak_memory_bytes(device)}
            teraflops = record.pop("teraflops", None)
            if teraflops and record["step"] >= config.flop_counter_start:
                record |= {"teraflops": teraflops, "ceiling_share": 1e12 * teraflops / top}
            progress(record)
            box.record(record)
            for tracker in plugins.trackers.values():
                tracker(record)

        flat = redacted(flat_config(config))
        started = {"kind": "start", "output_dir": str(writer.folder), "config": flat, "total_steps": plan.steps}
        report({**started, "steps_done": place.step})
        hooks = Hooks(report, writer, keeper.checkpoint, keeper.stop, save, box.window)
        keeper.stop.begin()
        keeper.restore_random(device)
        try:
            with out_of_memory_told("training", SMALLER), determinism_told():
                windows = profiled(config, loaders.training, plan.steps)
                result = train(writer.model, windows, loaders.validation, updater, plan, hooks, place)
        except TrainingError as error:
            with suppress(ConfigError):  # steps that were skipped never reached these weights
                keeper.checkpoint(place)
                writer("last", place)
            saw = box.write(writer.folder, writer.model, writer.tokenizer, updater, error)
            raise TrainingError(f"{error}{saw}") from None
        report({"kind": "end", "step": result.steps, "stopped": result.stopped, "best_loss": result.best_loss})
    return result


def shown_plan(
    config: RunConfig,
    loaders: Loaders,
    model: Any,
    precision: Precision,
    plan: TrainPlan,
    kernels: Sequence[str],
    notices: Sequence[str],
) -> Plan:
    """Returns what the user is shown before the first step."""
    total, trained = count_parameters(model)
    training = loaders.training
    windows = len(training.window_rows(0))
    return Plan(
        model_name=config.model_name,
        total_parameters=total,
        trainable_parameters=trained,
        base_precision=config.quantization or str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        method=method_text(config),
        train_samples=len(training.samples),
        validation_samples=len(loaders.validation.samples) if loaders.validation else 0,
        useful_tokens_per_epoch=training.useful_tokens,
        supervised_tokens_per_epoch=training.supervised_tokens,
        steps=plan.steps,
        tokens_per_step=training.useful_tokens / windows,
        device=device_name(precision.device),
        precision=precision.name,
        kernels="; ".join(text for text in kernels if text),
        output_dir=config.output_dir,
        notices=tuple(notices),
    )


def method_text(config: RunConfig) -> str:
    """Returns what trains, in words."""
    if not config.use_peft:
        frozen = f", the first {config.num_freeze_layers} layers frozen" if config.freeze_layers else ""
        return f"full fine-tuning{frozen}"
    if config.from_peft_checkpoint:
        return f"{config.peft_method} adapter continued from {config.from_peft_checkpoint}"
    if config.peft_method != "lora":
        return config.peft_method
    lora = config.lora_config
    kind = "DoRA" if lora.use_dora else "LoRA"
    scale = "rank-stabilized alpha" if lora.use_rslora else "alpha"
    return f"{kind}, r {lora.r}, {scale} {lora.lora_alpha:g}, on {', '.join(lora.target_modules)}"


def values_from_anywhere(config: RunConfig, plugins: Plugins) -> dict[str, object]:
    """Returns the keys that name files, with full paths, so that run.yaml reproduces the run from any folder."""
    section = dataset_section(config)
    files = {
        "model_name": config.model_name if is_local(config.model_name) else "",
        "tokenizer_name": config.tokenizer_name if is_local(config.tokenizer_name or "org/name") else "",
        "from_peft_checkpoint": config.from_peft_checkpoint,
        f"{config.dataset}.data_path": section.data_path if local_path(section.data_path).exists() else "",
    }
    values: dict[str, object] = {key: str(local_path(name).absolute()) for key, name in files.items() if name}
    functions = {"optimizer": plugins.optimizer, "lr_scheduler": plugins.schedule}
    if config.dataset == "custom_dataset":
        functions["custom_dataset.file"] = plugins.preprocessor
    values |= {key: full_name(function, value_of(config, key)) for key, function in functions.items()}
    return values | {"report_to": [full_name(plugins.trackers[name], name) for name in config.report_to]}


def full_name(function: object, name: str) -> str:
    """Returns `/folder/file.py:function` for a plug-in, and the name itself for an entry of ours."""
    return f"{function.path}:{function.name}" if isinstance(function, Plugin) else name
