"""The process's environment variables: the one place where they are read or set."""

import os
from pathlib import Path


def prepare_environment() -> None:
    """Sets what PyTorch reads when it is first imported; whatever the user has set stands.

    Threads that wait for each other sleep instead of spinning: on two cores, one of them taken by another program, a
    training step of the demo model takes 6 to 8 s with this and 57 s without (GNU libgomp, OpenMP 5.0 section 6.7).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # transformers would otherwise fetch kernels, which are code, from the hub.
    os.environ.setdefault("USE_HUB_KERNELS", "0")


def cache_folder() -> Path:
    """Returns where converted models are kept: $LLMRECIPES_CACHE, else ~/.cache/llmrecipes."""
    return Path(os.environ.get("LLMRECIPES_CACHE", "~/.cache/llmrecipes")).expanduser()
