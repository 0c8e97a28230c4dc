"""What a run is going to do, told before it begins."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmrecipes.reports.format import count, duration, gib, percent, printable

_GAP = 2


@dataclass(frozen=True)
class Plan:
    """All that a user would want to know before waiting for it; None where no estimate is made."""

    model_name: str
    total_parameters: int
    trainable_parameters: int
    base_precision: str
    """How the base's weights are kept: `bfloat16`, `4bit nf4`"""
    method: str
    """Such as `LoRA, r 8, alpha 32, on q_proj and v_proj`"""
    train_samples: int
    validation_samples: int
    useful_tokens_per_epoch: int
    supervised_tokens_per_epoch: int
    steps: int
    tokens_per_step: float
    """Useful tokens, on average"""
    device: str
    precision: str
    """What is computed in: `bf16`"""
    kernels: str
    output_dir: str
    memory_bytes: int | None = None
    seconds: float | None = None
    notices: tuple[str, ...] = ()
    """What was decided for the user, and why"""


def plan_text(plan: Plan) -> str:
    """Returns the plan as a block of aligned lines without a line feed at the end."""
    trained = _share(plan.trainable_parameters, plan.total_parameters)
    supervised = _share(plan.supervised_tokens_per_epoch, plan.useful_tokens_per_epoch)
    validation = f", {count(plan.validation_samples)} for validation" if plan.validation_samples else ", no validation"
    rows = [
        ("model", f"{plan.model_name}: {count(plan.total_parameters)} parameters, kept in {plan.base_precision}"),
        ("method", plan.method),
        ("trained", f"{count(plan.trainable_parameters)} parameters{trained}"),
        ("samples", f"{count(plan.train_samples)} for training{validation}"),
        (
            "tokens",
            f"{count(plan.useful_tokens_per_epoch)} an epoch; the loss counts "
            f"{count(plan.supervised_tokens_per_epoch)} of them{supervised}",
        ),
        ("steps", f"{count(plan.steps)}, of about {count(plan.tokens_per_step)} tokens each"),
        ("device", f"{plan.device}, computing in {plan.precision}"),
        ("kernels", plan.kernels),
        *([("memory", f"about {gib(plan.memory_bytes)}")] if plan.memory_bytes is not None else []),
        *([("time", f"about {duration(plan.seconds)}")] if plan.seconds is not None else []),
        ("output", plan.output_dir),
        *(("note", notice) for notice in plan.notices),
    ]
    return aligned(rows)


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Returns (label, text) rows as lines with the texts below each other; further lines of a text are indented."""
    width = max((len(label) for label, _ in rows), default=0) + _GAP
    lines = []
    for label, text in rows:
        first, *others = printable(text).split("\n")
        lines += [f"{label:<{width}}{first}".rstrip(), *(f"{'':<{width}}{line}".rstrip() for line in others)]
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f" ({percent(part / whole)})" if whole else ""
