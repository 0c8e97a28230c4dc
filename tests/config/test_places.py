"""Laws of where a config file may have plug-ins lie: a stranger's text must not name any program on the machine."""

from pathlib import Path

import pytest

from llmrecipes.config.loading import load_config
from llmrecipes.config.schema import RunConfig
from llmrecipes.errors import ConfigError

FLAGS = {"model_name": "m", "output_dir": "o", "dataset": "custom_dataset"}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in a folder of its own, while the current folder is another."""
    for name in ("configs/inner", "here", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "configs" / "run.yaml"


def load(path: Path, line: str, **flags: str) -> RunConfig:
    path.write_text(f"{line}\n")
    return load_config(RunConfig, {**FLAGS, **flags, "config": str(path)}).config


@pytest.mark.parametrize(
    "name",
    ["mine.py", "mine.py:get", "inner/mine.py", "{0}/configs/mine.py:get", "{0}/here/mine.py", "inner/../mine.py:get"],
)
def test_beside_and_below_are_allowed(name: str, config: Path, tmp_path: Path) -> None:
    name = name.format(tmp_path)
    assert load(config, f"custom_dataset.file: {name}").custom_dataset.file == name


@pytest.mark.parametrize("name", ["{0}/elsewhere/mine.py:get", "../elsewhere/mine.py", "~/mine.py:get", "/tmp/x.py"])
@pytest.mark.parametrize("key", ["custom_dataset.file", "optimizer", "lr_scheduler", "report_to"])
def test_elsewhere_is_told_with_file_and_line(key: str, name: str, config: Path, tmp_path: Path) -> None:
    name = name.format(tmp_path)
    file_name = name.removesuffix(":get")
    name = name if key == "custom_dataset.file" or name.endswith(":get") else f"{name}:get"
    value = f"[{name}]" if key == "report_to" else name
    extra = {} if key == "custom_dataset.file" else {"custom_dataset.file": "mine.py"}
    extra |= {"gamma": "1"} if key == "lr_scheduler" else {}
    with pytest.raises(ConfigError) as caught:
        load(config, f"{key}: '{value}'" if key != "report_to" else f"{key}: {value}", **{
            key_: flag for key_, flag in extra.items() if key_ != "gamma"
        })  # fmt: skip
    assert str(caught.value) == (
        f"{config}:1: {key} names {file_name}, which lies neither below the config's folder nor below this; give it as "
        f"a flag, --{key}, or allow it with --allow_outside_plugins"
    )


def test_a_link_that_leads_elsewhere_is_elsewhere(config: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "mine.py").write_text("")
    (config.parent / "mine.py").symlink_to(tmp_path / "elsewhere" / "mine.py")
    with pytest.raises(ConfigError, match="lies neither"):
        load(config, "custom_dataset.file: mine.py")


def test_a_flag_may_name_any_and_the_user_may_allow_it(config: Path, tmp_path: Path) -> None:
    name = f"{tmp_path}/elsewhere/mine.py"
    assert load(config, "lr: 1e-3", **{"custom_dataset.file": name}).custom_dataset.file == name
    assert load(config, f"custom_dataset.file: {name}", allow_outside_plugins="true").custom_dataset.file == name


def test_a_file_cannot_allow_itself(config: Path) -> None:
    with pytest.raises(ConfigError, match="allow_outside_plugins"):
        load(config, "custom_dataset.file: /tmp/x.py\nallow_outside_plugins: true")


def test_the_shipped_sets_may_be_named_from_anywhere(config: Path) -> None:
    shipped = Path(__file__).parents[2] / "custom_datasets" / "samsum.py"
    assert load(config, f"custom_dataset.file: {shipped}").custom_dataset.file == str(shipped)
