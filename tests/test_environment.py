"""What a container allows is read from its control groups; threads keep to it, and to the cores of the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrecipes import environment
from llmrecipes.environment import cpu_quota, prepare_environment

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def own_cgroups(tmp_path: Path) -> Path:
    """What the kernel tells of a process in the group /pod/box."""
    file = tmp_path / "cgroup"
    file.write_text("1:cpu:/\n0::/pod/box\n")
    return file


def written(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def test_the_quota_is_the_smallest_of_the_group_and_those_above(tmp_path: Path, own_cgroups: Path) -> None:
    root = tmp_path / "groups"
    written(root / "pod" / "box", "cpu.max", "max 100000\n")
    assert cpu_quota(root, own_cgroups) is None
    written(root / "pod", "cpu.max", "150000 100000\n")
    assert cpu_quota(root, own_cgroups) == 1.5
    written(root / "pod" / "box", "cpu.max", "50000 100000\n")
    assert cpu_quota(root, own_cgroups) == 0.5


def test_in_a_container_that_sees_its_own_group_as_the_root_that_one_counts(tmp_path: Path, own_cgroups: Path) -> None:
    written(tmp_path / "groups", "cpu.max", "200000 100000\n")
    assert cpu_quota(tmp_path / "groups", own_cgroups) == 2


def test_groups_of_version_1_are_read_and_minus_1_is_no_limit(tmp_path: Path, own_cgroups: Path) -> None:
    folder = tmp_path / "groups" / "cpu"
    written(folder, "cpu.cfs_period_us", "100000\n")
    written(folder, "cpu.cfs_quota_us", "-1\n")
    assert cpu_quota(tmp_path / "groups", own_cgroups) is None
    written(folder, "cpu.cfs_quota_us", "300000\n")
    assert cpu_quota(tmp_path / "groups", own_cgroups) == 3


@pytest.mark.parametrize("text", ["", "200000", "many few\n", "0 100000\n", "100000 0\n"])
def test_what_cannot_be_read_is_no_limit(text: str, tmp_path: Path, own_cgroups: Path) -> None:
    written(tmp_path / "groups", "cpu.max", text)
    assert cpu_quota(tmp_path / "groups", own_cgroups) is None
    assert cpu_quota(tmp_path / "groups", tmp_path / "no such file") is None


@pytest.mark.parametrize(
    ("quota", "cores", "threads"), [(1.5, 4, "2"), (0.5, 4, "1"), (4.0, 4, None), (8.0, 4, None), (None, 4, None)]
)
def test_threads_are_as_many_as_the_quota_allows(
    quota: float | None, cores: int, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
    monkeypatch.setattr(environment, "usable_cores", lambda: set(range(cores)))
    monkeypatch.setattr(os, "environ", {})
    prepare_environment()
    assert os.environ.get("OMP_NUM_THREADS") == threads
    os.environ["OMP_NUM_THREADS"] = "7"
    prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system knows no affinity")
def test_a_process_bound_to_one_core_computes_in_one_thread() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from llmrecipes.environment import prepare_environment; prepare_environment()\n"
        "import torch; print(torch.get_num_threads())"
    )
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize(("chosen", "told"), [({}, "absent"), ({"USE_HUB_KERNELS": "1"}, "fetches")])
def test_no_library_fetches_kernels_unless_the_user_says_so(chosen: dict[str, str], told: str, tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("get_kernel = 'fetches'")
    code = (
        "import importlib.util\n"
        "from llmrecipes.environment import prepare_environment; prepare_environment()\n"
        "try: from kernels import get_kernel\n"
        "except ImportError: get_kernel = 'absent'\n"
        "assert (importlib.util.find_spec('kernels') is None) == (get_kernel == 'absent')\n"
        "print(get_kernel)"
    )
    kept = {name: value for name, value in os.environ.items() if name != "USE_HUB_KERNELS"}
    kept["PYTHONPATH"] = os.pathsep.join([str(tmp_path), kept.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | chosen, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == told
