"""Write an adapter and its base as one plain model folder.

python -m llmrecipes.merging --model_name MODEL --peft_model ADAPTER --output_dir FOLDER
"""

import sys

from llmrecipes.command import launch, run_command


def main(**flags: object) -> int:
    """Runs the command from Python, flags as keyword arguments; returns the exit code."""
    return run_command("merging", flags)


if __name__ == "__main__":
    sys.exit(launch("merging", sys.argv[1:]))
