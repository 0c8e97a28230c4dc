"""Base and tuned model answer the same questions; the answers are scored and set side by side."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from llmrecipes.batch import Sample
from llmrecipes.config.loading import Loaded
from llmrecipes.config.schema import EvaluationConfig
from llmrecipes.data.preprocessors import load_preprocessor
from llmrecipes.errors import DataError
from llmrecipes.generation.decoding import generate_texts
from llmrecipes.generation.settings import GenerationSettings
from llmrecipes.models.adapters import adapter_switched_off, load_adapter
from llmrecipes.models.folders import check_adapter_folder, local_path
from llmrecipes.models.loading import load_model, resolve_model
from llmrecipes.plugins import Plugin, plugin_folders, resolve_function
from llmrecipes.precision import Precision, out_of_memory_told
from llmrecipes.reports.comparison import Example, compare, comparison_markdown
from llmrecipes.reports.metrics import METRICS
from llmrecipes.reports.progress import counted
from llmrecipes.run.output import check_output_file
from llmrecipes.run.preparing import (
    adapter_notices,
    answering_precision,
    answering_tokenizer,
    check_prompts_early,
    contract_of,
    generation_settings,
    load_split,
    sample_limits,
    set_seeds,
    stop_token_ids,
)


def evaluate(loaded: Loaded[EvaluationConfig], config_path: str | None) -> int:
    """Prints a Markdown table of scores with 95 % intervals, and examples; returns the exit code."""
    config = loaded.config
    folders = plugin_folders(config_path)
    preprocessor = load_preprocessor(config, folders)
    metrics = [resolve_function(name, "metric", METRICS, folders) for name in config.metric]
    settings = generation_settings(config)
    precision = answering_precision(config)
    if config.peft_model:
        check_adapter_folder(local_path(config.peft_model), "peft_model")
    report = check_output_file(config.output_file, "output_file") if config.output_file else None
    source = resolve_model(config)
    told = adapter_notices(config, source)
    tokenizer = answering_tokenizer(config, source)
    samples, notices = asked_samples(config, tokenizer, preprocessor, source)
    prompts = [sample.prompt_ids for sample in samples]
    check_prompts_early(config, source, prompts, settings)
    for notice in (*loaded.notices, *notices, *told):
        print(f"note: {notice}", file=sys.stderr)
    model = load_model(config, source, precision)
    if config.peft_model:
        model = load_adapter(model, config.peft_model, "peft_model")
    settings = replace(settings, stop_token_ids=stop_token_ids(model, tokenizer, contract_of(config)))
    answers = all_answers(config, model, tokenizer, prompts, settings, precision)
    references = [decoded(tokenizer, sample.answer_ids).strip() for sample in samples]
    examples = [
        Example(decoded(tokenizer, prompt), reference, given)
        for prompt, reference, given in zip(prompts, references, zip(*answers.values(), strict=True), strict=True)
    ]
    comparisons = compare(metrics, references, list(answers.values()))
    text = comparison_markdown(list(answers), comparisons, examples[: config.examples])
    print(text)
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(text + "\n", encoding="utf-8")
    return 0


def asked_samples(
    config: EvaluationConfig, tokenizer: Any, preprocessor: Plugin, source: str
) -> tuple[list[Sample], list[str]]:
    """Returns the samples that are asked, and notices; prompts that leave no room to answer are dropped if so told."""
    store, notices = load_split(config, tokenizer, preprocessor, config.split, source)
    samples = list(store)
    if config.overlong == "drop":
        longest = sample_limits(config, source).longest - config.max_new_tokens
        fitting = [sample for sample in samples if len(sample.prompt_ids) <= longest]
        if len(fitting) < len(samples):
            told = f"dropped {len(samples) - len(fitting)} samples whose prompt leaves no room for --max_new_tokens"
            notices = [*notices, told]
        if not fitting:
            raise DataError(f"--max_new_tokens {config.max_new_tokens}: no prompt leaves room for that many")
        samples = fitting
    return samples[: config.max_samples or None], notices


def all_answers(
    config: EvaluationConfig,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    precision: Precision,
) -> dict[str, list[str]]:
    """Returns the answers of each model compared: the base is the tuned model with its adapter switched off."""
    sides = ["tuned"] if config.peft_model else ["base"]
    if config.peft_model and config.compare_base:
        sides = ["base", "tuned"]
    answers = {}
    for side in sides:
        switched_off = config.peft_model is not None and side == "base"
        set_seeds(config.seed)
        with (
            adapter_switched_off(model) if switched_off else nullcontext(),
            precision.autocast(),
            torch.inference_mode(),
            out_of_memory_told("generating", "a smaller --batch_size or --max_new_tokens, or --quantization 4bit"),
            counted(f"{side} model answers", len(prompts)) as on_batch,
        ):
            texts = generate_texts(model, tokenizer, prompts, settings, config.batch_size, on_batch)
        answers[side] = [text.strip() for text in texts]
    return answers


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """Returns the text of ids without control tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
