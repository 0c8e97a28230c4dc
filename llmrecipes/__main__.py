"""One command for all: `llmrecipes plan|finetuning|inference|evaluation|merging|verify|data ...`."""

import sys

from llmrecipes import __version__
from llmrecipes.command import COMMANDS, launch
from llmrecipes.data.__main__ import main as data_main
from llmrecipes.errors import did_you_mean
from llmrecipes.verify import main as verify_main

WHAT = {
    "plan": "what a fine-tuning would take on a GPU that need not be here",
    "finetuning": "fine-tune a model on a data set",
    "inference": "answer one prompt",
    "evaluation": "score the base model and the tuned one",
    "merging": "adapter and base as one model folder",
    "verify": "check that what was saved is still what was written",
    "data": "make, view, check and examine data",
}


def main() -> int:
    """Runs the command named first on the command line; returns the exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("--help", "-h"):
        print("usage: llmrecipes COMMAND [--flag value ...]   (llmrecipes COMMAND --help lists its flags)\n")
        print("\n".join(f"  {name:12} {what}" for name, what in WHAT.items()))
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] == "data":
        return data_main(words[1:])
    if words[0] == "verify":
        return verify_main(words[1:])
    if words[0] not in COMMANDS:
        print(
            f"error: {words[0]} is not a command, only {', '.join(WHAT)}{did_you_mean(words[0], WHAT)}", file=sys.stderr
        )
        return 2
    return launch(words[0], words[1:])


if __name__ == "__main__":
    sys.exit(main())
