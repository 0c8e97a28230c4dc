"""The process's environment variables: the one place where they are read or set."""

import math
import os
import re
import sys
from pathlib import Path

SECRET = re.compile(r"(^|_)(TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|AUTHORIZATION)(_|$)", re.IGNORECASE)

SHORTEST_SECRET = 8
"""Characters below which a value is too common a text to be looked for."""

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def prepare_environment() -> None:
    """Sets what libraries read when they are first imported; whatever the user has set stands.

    Threads that wait for each other sleep instead of spinning: on two cores, one of them taken by another program, a
    training step of the demo model takes 6 to 8 s with this and 57 s without (GNU libgomp, OpenMP 5.0 section 6.7).
    OpenMP knows the cores that the process may run on, but not how much of them its container may use.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # transformers would otherwise fetch kernels, which are code, from the hub; bitsandbytes 0.50 does so on some CPUs
    # while it is imported, where the package `kernels` is installed, and no variable of its own forbids it.
    if os.environ.setdefault("USE_HUB_KERNELS", "0") == "0":
        sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # as if it were not installed
    quota = cpu_quota()
    if quota is not None and math.ceil(quota) < len(usable_cores()):
        os.environ.setdefault("OMP_NUM_THREADS", str(math.ceil(quota)))


def prepare_determinism() -> None:
    """Gives cuBLAS a workspace of its own for each stream, without which it may differ from run to run.

    Read when the first matrix product is computed on a GPU (docs.nvidia.com/cuda/cublas, results reproducibility).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def secrets() -> list[str]:
    """Returns the values of the variables that are secrets by their name, the longest first; short ones are none."""
    found = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST_SECRET}
    return sorted(found, key=len, reverse=True)


def usable_cores() -> set[int]:
    """Returns the cores that the process may run on; empty where the system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def cpu_quota(cgroups: Path = CGROUPS, own_cgroups: Path = OWN_CGROUPS) -> float | None:
    """Returns how many cores' worth of time the process's control groups allow (Docker's --cpus), None for all.

    Version 2: cpu.max of the process's group and of each above. Version 1: the container's own group.
    """
    try:
        lines = own_cgroups.read_text().splitlines()
    except OSError:
        return None
    own = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    folders = [cgroups / own, *(cgroups / own).parents]
    quotas = [_quota(folder / "cpu.max") for folder in folders if folder.is_relative_to(cgroups)]
    quotas.append(_quota(cgroups / "cpu/cpu.cfs_quota_us", cgroups / "cpu/cpu.cfs_period_us"))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(*files: Path) -> float | None:
    """Returns microseconds allowed over microseconds of the period, the files' two words; `max` and -1 are no limit."""
    try:
        allowed, period = (int(word) for file in files for word in file.read_text().split())
    except (OSError, ValueError):
        return None
    return allowed / period if allowed > 0 and period > 0 else None


def cache_folder() -> Path:
    """Returns where converted models are kept: $LLMRECIPES_CACHE, else ~/.cache/llmrecipes."""
    return Path(os.environ.get("LLMRECIPES_CACHE", "~/.cache/llmrecipes")).expanduser()
