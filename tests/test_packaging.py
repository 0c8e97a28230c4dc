"""What is installed is what the checkout holds: the wheel, the dependencies and their pins, the make targets."""

import ast
import configparser
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = {"configs": "*.yaml", "custom_datasets": "*.py", "recipes": "*.sh"}
MAKE_TARGETS = ["help", "environment", "quickstart", "test", "soak", "lint", "format", "lock", "clean"]


def declared(*extras: str) -> dict[str, Requirement]:
    """Returns the requirements of setup.cfg by canonical name, those of `extras` included."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)]
    requirements = [Requirement(line) for text in texts for line in text.split("\n") if line]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pins() -> dict[str, str]:
    """Returns constraints.txt as {canonical name: version}."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays as it is; the network is not needed."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("building a wheel needs setuptools and pip: pip install -e .[dev]")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    for name in ("llmrecipes", *SHIPPED):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*build, "-w", str(target), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("llmrecipes-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's files as an installation does."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_module_of_the_checkout_and_nothing_else(installed: Path) -> None:
    checkout = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llmrecipes").rglob("*.py")}
    wheel = {path.relative_to(installed).as_posix() for path in (installed / "llmrecipes").rglob("*.py")}
    shipped = {name for name in wheel if name.startswith("llmrecipes/shipped/")}
    forgotten = sorted({str(Path(name).parent).replace("/", ".") for name in checkout - wheel})
    assert not forgotten, f"add to `packages` in setup.cfg: {forgotten}"
    assert wheel - shipped == checkout
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"llmrecipes"}


@pytest.mark.parametrize("folder", SHIPPED)
def test_the_wheel_ships_the_folder_as_it_is(installed: Path, folder: str) -> None:
    checkout = {path.name: path.read_bytes() for path in (ROOT / folder).glob(SHIPPED[folder])}
    wheel = {path.name: path.read_bytes() for path in (installed / "llmrecipes" / "shipped" / folder).iterdir()}
    assert checkout, f"{folder} holds no {SHIPPED[folder]}"
    assert wheel == checkout


def test_recipes_stay_executable_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        modes = {
            item.filename: item.external_attr >> 16 for item in archive.infolist() if item.filename.endswith(".sh")
        }
    for name, mode in modes.items():
        assert bool(mode & 0o111) == bool((ROOT / "recipes" / Path(name).name).stat().st_mode & 0o111), name


def test_an_installation_outside_the_checkout_finds_what_it_ships(installed: Path, tmp_path: Path) -> None:
    code = f"from llmrecipes.plugins import shipped_folder\nfor name in {list(SHIPPED)}: print(shipped_folder(name))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(installed / "llmrecipes" / "shipped" / name) for name in SHIPPED]


def test_the_wheel_says_what_it_is(installed: Path) -> None:
    (info,) = installed.glob("llmrecipes-*.dist-info")
    metadata = Parser().parsestr((info / "METADATA").read_text())
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "llmrecipes = llmrecipes.__main__:main" in (info / "entry_points.txt").read_text()


@pytest.mark.parametrize("extras", [(), ("dev",)])
def test_every_dependency_is_pinned_to_a_version_that_setup_cfg_allows(extras: tuple[str, ...]) -> None:
    pinned = pins()
    for name, requirement in declared(*extras).items():
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pinned[name]), (
            f"constraints.txt: {name}=={pinned[name]}, but {requirement}"
        )


def test_pins_carry_no_local_build_and_stand_in_order() -> None:
    names = list(pins())
    assert names == sorted(names)
    for name, version in pins().items():
        assert re.fullmatch(r"[0-9]+(\.[0-9a-z]+)*", version), f"{name}=={version}"


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Returns a lock file as {canonical name: (version, count of hashes)}; every line of it must be of that form."""
    found = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / name).read_text().strip()):
        if not entry.startswith("#"):
            pattern = r"([a-z0-9-]+)==(\S+)( ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})*)"
            match = re.fullmatch(pattern, entry)
            assert match, f"{name}: {entry[:200]}"
            found[match[1]] = (match[2], match[4].count("--hash"))
    return found


ELSEWHERE = {"colorama", "httpx2-jsfetch"}
"""What Windows and a browser need, and no machine that the tests run on."""


def test_the_lock_is_of_the_pinned_versions_and_each_has_its_hashes() -> None:
    lock = locked("requirements.lock")
    assert {name: version for name, (version, _) in lock.items() if name not in ELSEWHERE} == pins(), "run `make lock`"
    for name, (_, hashes) in {**lock, **locked("requirements-cuda.lock")}.items():
        assert hashes > 0, name
    assert lock["torch"][1] > 10  # for each platform and Python
    assert all(name.startswith(("cuda-", "nvidia-")) for name in locked("requirements-cuda.lock"))


def imported_modules(folders: Iterable[str]) -> dict[str, str]:
    """Returns {top-level module: a file that imports it}, imports inside functions included."""
    found: dict[str, str] = {}
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found.update({name.split(".")[0]: str(path.relative_to(ROOT)) for name in names})
    return found


def test_every_imported_library_is_declared() -> None:
    own = {path.stem for path in (ROOT / "custom_datasets").glob("*.py")} | {"llmrecipes"}
    known = {*declared("export", "wandb"), "triton"}  # Triton comes with PyTorch where there is a GPU
    distributions = packages_distributions()
    for module, path in imported_modules(["llmrecipes", "custom_datasets"]).items():
        if module in sys.stdlib_module_names or module in own:
            continue
        names = {canonicalize_name(name) for name in distributions.get(module, [module])}
        assert names & known, f"{path} imports {module}, which setup.cfg does not declare"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", MAKE_TARGETS)
def test_a_make_target_resolves_and_is_listed(target: str) -> None:
    dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^make {target} +\S", listed, re.MULTILINE), listed


def test_ci_runs_lint_and_tests_in_its_own_environment() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert re.search(r"make VENV=\.ci-venv lint", text)
    assert re.search(r"make VENV=\.ci-venv test", text)
    assert script.stat().st_mode & 0o111
