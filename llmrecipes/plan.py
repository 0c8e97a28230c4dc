"""What a fine-tuning would take on a GPU that need not be here.

python -m llmrecipes.plan --config configs/quickstart.yaml --card h200
"""

import sys

from llmrecipes.command import launch, run_command


def main(**flags: object) -> int:
    """Runs the command from Python, flags as keyword arguments; returns the exit code."""
    return run_command("plan", flags)


if __name__ == "__main__":
    sys.exit(launch("plan", sys.argv[1:]))
