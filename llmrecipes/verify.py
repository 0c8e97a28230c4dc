"""Check that checkpoints, adapters and models are still what was written.

python -m llmrecipes.verify outputs/my-run
"""

import sys
from collections.abc import Sequence

from llmrecipes.command import guarded
from llmrecipes.errors import ConfigError
from llmrecipes.run.verify import verify

USAGE = "usage: python -m llmrecipes.verify FOLDER ...   (an output folder, a checkpoint, an adapter or a model)"


def main(words: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return 0
    return guarded(lambda: run(words))


def run(words: Sequence[str]) -> int:
    """Checks the folders named; raises `LlmRecipesError`."""
    flags = [word for word in words if word.startswith("-")]
    if flags or not words:
        raise ConfigError(f"verify: {f'{flags[0]} is not a flag' if flags else 'no folder given'}; {USAGE}")
    return verify(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
