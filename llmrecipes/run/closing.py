"""What a fine-tuning says when it is over: where everything is, and commands that use it."""

from pathlib import Path

from llmrecipes.config.schema import RunConfig
from llmrecipes.prompt_contract import PromptContract
from llmrecipes.reports.memory import peak_memory_bytes
from llmrecipes.reports.summary import Summary
from llmrecipes.reports.trackers import METRICS_FILE
from llmrecipes.run.output import command_line
from llmrecipes.run.preparing import run_precision, storage, storage_flags
from llmrecipes.training.loop import TrainResult

LONGEST_EXAMPLE = 300
"""Characters of a prompt that is still printed as a command to copy."""


def closing_summary(
    config: RunConfig, folder: Path, result: TrainResult, contract: PromptContract, seconds: float
) -> Summary:
    """Returns where everything is and what to try next."""
    kind = "adapter" if config.use_peft else "model"
    saved = [(f"{kind}, last", str(folder / "last"))] if (folder / "last").is_dir() else []
    saved = [(kind, str(folder)), *saved] if config.save_model else []
    saved += [("metrics", str(folder / METRICS_FILE))] if config.save_metrics else []
    return Summary(
        saved=(*saved, ("settings", str(folder / "run.yaml"))),
        steps=result.steps,
        seconds=seconds,
        useful_tokens=result.useful_tokens,
        final_loss=result.last_loss if result.steps else None,
        best_eval_loss=result.best_loss,
        best_step=result.best_step or None,
        memory_bytes=peak_memory_bytes(run_precision(config).device),
        next_commands=tuple(next_commands(config, folder, contract)) if config.save_model else (),
    )


def next_commands(config: RunConfig, folder: Path, contract: PromptContract) -> list[str]:
    """Returns commands that use the result."""
    if config.use_peft:
        model = ["--model_name", config.model_name, "--peft_model", str(folder)]
    else:
        model = ["--model_name", str(folder)]
    model += ["--trust_remote_code"] if config.trust_remote_code else []
    model += ["--model_revision", config.model_revision] if config.use_peft and config.model_revision else []
    prompt = example_prompt(contract)
    commands = [["python", "-m", "llmrecipes.inference", *model, *storage_flags(storage(config)), "--prompt", prompt]]
    if config.use_peft and config.peft_method == "lora":
        commands.append(["python", "-m", "llmrecipes.merging", *model, "--output_dir", f"{folder}-merged"])
    return [command_line(words) for words in commands]


def example_prompt(contract: PromptContract | None) -> str:
    """Returns a prompt of the training, or `...` where there is none that is fit for a command line."""
    example = contract.example if contract else ""
    return example if 0 < len(example.strip()) < LONGEST_EXAMPLE else "..."
