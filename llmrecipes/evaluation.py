"""Score the base model, the tuned one or both on a split of a data set.

python -m llmrecipes.evaluation --model_name MODEL --peft_model ADAPTER --dataset NAME
"""

import sys

from llmrecipes.command import launch, run_command


def main(**flags: object) -> int:
    """Runs the command from Python, flags as keyword arguments; returns the exit code."""
    return run_command("evaluation", flags)


if __name__ == "__main__":
    sys.exit(launch("evaluation", sys.argv[1:]))
