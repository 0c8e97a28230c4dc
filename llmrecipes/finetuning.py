"""Fine-tune a model on a data set.

python -m llmrecipes.finetuning --config configs/quickstart.yaml
"""

import sys

from llmrecipes.command import launch, run_command


def main(**flags: object) -> int:
    """Runs the command from Python, flags as keyword arguments; returns the exit code."""
    return run_command("finetuning", flags)


if __name__ == "__main__":
    sys.exit(launch("finetuning", sys.argv[1:]))
