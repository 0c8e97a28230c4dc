"""The plan and the summary say what they are given, aligned and safe to print."""

from dataclasses import fields, replace
from typing import Any

from llmrecipes.reports.plan import Plan, aligned, plan_text
from llmrecipes.reports.summary import Summary, summary_text

PLAN = Plan(
    model_name="models/stories15M",
    total_parameters=24_400_000,
    trainable_parameters=97_280,
    base_precision="4bit nf4",
    method="LoRA, r 8, alpha 32, on q_proj and v_proj",
    train_samples=9500,
    validation_samples=500,
    useful_tokens_per_epoch=1_250_000,
    supervised_tokens_per_epoch=240_000,
    steps=300,
    tokens_per_step=4096.0,
    device="NVIDIA H200",
    precision="bf16",
    kernels="rms_norm, rope",
    output_dir="runs/x",
    memory_bytes=3 * 2**30,
    seconds=250.0,
    notices=("8bit, since --quantization has no value", "two\nlines"),
)


def test_the_plan_reads_as_one_aligned_block() -> None:
    assert plan_text(PLAN).splitlines() == [
        "model    models/stories15M: 24.4 M parameters, kept in 4bit nf4",
        "method   LoRA, r 8, alpha 32, on q_proj and v_proj",
        "trained  97,280 parameters (0.4 %)",
        "samples  9,500 for training, 500 for validation",
        "tokens   1.2 M an epoch; the loss counts 240,000 of them (19.2 %)",
        "steps    300, of about 4,096 tokens each",
        "device   NVIDIA H200, computing in bf16",
        "kernels  rms_norm, rope",
        "memory   about 3.0 GiB",
        "time     about 4m10s",
        "output   runs/x",
        "note     8bit, since --quantization has no value",
        "note     two",
        "         lines",
    ]


def test_estimates_that_are_not_made_are_not_shown() -> None:
    text = plan_text(replace(PLAN, memory_bytes=None, seconds=None, notices=(), validation_samples=0))
    labels = [line.split()[0] for line in text.splitlines()]
    assert not {"memory", "time", "note"} & set(labels)
    assert "no validation" in text


def test_every_field_of_the_plan_has_a_say() -> None:
    for field in fields(Plan):
        value: Any = getattr(PLAN, field.name)
        other: Any = value * 3 if isinstance(value, int | float) else type(value)(["zebra"])
        assert plan_text(replace(PLAN, **{field.name: other})) != plan_text(PLAN), field.name


def test_an_empty_model_divides_nothing_by_zero() -> None:
    zero = replace(PLAN, total_parameters=0, useful_tokens_per_epoch=0, supervised_tokens_per_epoch=0)
    assert "%" not in plan_text(zero)


def test_names_cannot_act_on_the_terminal() -> None:
    assert "\x1b" not in plan_text(replace(PLAN, model_name="a\x1b[2J", notices=("\x1b]0;x\x07",)))
    assert "\x1b" not in summary_text(Summary((("adapter", "\x1b"),), 1, 1.0, 1, next_commands=("\x1b",)))


def test_no_rows_are_no_text() -> None:
    assert aligned([]) == ""


def test_the_summary_tells_what_was_done_and_what_to_try() -> None:
    summary = Summary(
        saved=(("adapter", "runs/x"), ("tokenizer", "runs/x")),
        steps=300,
        seconds=250.0,
        useful_tokens=203_000,
        final_loss=1.23456,
        best_eval_loss=1.3,
        best_step=200,
        memory_bytes=2 * 2**30,
        next_commands=("python -m llmrecipes.inference --model_name runs/x",),
    )
    assert summary_text(summary).splitlines() == [
        "done             300 steps in 4m10s, 812 tok/s",
        "loss             1.2346 at the end",
        "validation loss  1.3000 at best at step 200",
        "memory           2.0 GiB at most",
        "adapter          runs/x",
        "tokenizer        runs/x",
        "",
        "To go on:",
        "  python -m llmrecipes.inference --model_name runs/x",
    ]


def test_a_run_that_saved_nothing_says_so() -> None:
    assert summary_text(Summary(saved=(), steps=0, seconds=0.0, useful_tokens=0)).splitlines() == [
        "done   0 steps in 0.0s",
        "saved  nothing",
    ]
