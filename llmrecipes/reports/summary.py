"""What a run has done, told when it is over, and what to try next."""

from dataclasses import dataclass

from llmrecipes.reports.format import count, duration, gib, printable
from llmrecipes.reports.plan import aligned


@dataclass(frozen=True)
class Summary:
    """How a run ended; None where the run has no such figure."""

    saved: tuple[tuple[str, str], ...]
    """(what, where): `("adapter", "runs/x")`"""
    steps: int
    seconds: float
    useful_tokens: int
    final_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    memory_bytes: int | None = None
    next_commands: tuple[str, ...] = ()


def summary_text(summary: Summary) -> str:
    """Returns the closing block: aligned figures, then the commands to try, one a line, ready to be copied."""
    seconds = summary.seconds
    speed = f", {count(summary.useful_tokens / seconds)} tok/s" if seconds > 0 else ""
    at = f" at step {summary.best_step}" if summary.best_step is not None else ""
    rows = [
        ("done", f"{count(summary.steps)} steps in {duration(seconds)}{speed}"),
        *([("loss", f"{summary.final_loss:.4f} at the end")] if summary.final_loss is not None else []),
        *(
            [("validation loss", f"{summary.best_eval_loss:.4f} at best{at}")]
            if summary.best_eval_loss is not None
            else []
        ),
        *([("memory", f"{gib(summary.memory_bytes)} at most")] if summary.memory_bytes else []),
        *((what, where) for what, where in summary.saved),
        *([("saved", "nothing")] if not summary.saved else []),
    ]
    text = aligned(rows)
    if summary.next_commands:
        text += "\n\nTo go on:\n" + "\n".join(f"  {printable(command)}" for command in summary.next_commands)
    return text
