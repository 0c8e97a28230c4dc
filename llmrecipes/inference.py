"""Answer one prompt with a base model or a tuned one.

python -m llmrecipes.inference --model_name MODEL --peft_model ADAPTER --prompt TEXT
"""

import sys

from llmrecipes.command import launch, run_command


def main(**flags: object) -> int:
    """Runs the command from Python, flags as keyword arguments; returns the exit code."""
    return run_command("inference", flags)


if __name__ == "__main__":
    sys.exit(launch("inference", sys.argv[1:]))
