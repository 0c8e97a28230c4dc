"""Laws of the command line: what is typed arrives as typed, and all that is wrong is told at once, soon and in lines.

Few tests start a process, since each costs; the others call what the process would call.
"""

import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrecipes import __main__ as one_command
from llmrecipes import __version__, command, evaluation, finetuning, inference, merging, plan
from llmrecipes.command import COMMANDS, guarded, joined, launch, parse_flags, run_command
from llmrecipes.config.loading import BARE, Loaded, leaves_of
from llmrecipes.data.__main__ import main as data_main
from llmrecipes.errors import ConfigError, DataError, LlmRecipesError, TrainingError

ROOT = Path(__file__).resolve().parents[1]
MAINS: dict[str, Callable[..., int]] = {
    "finetuning": finetuning.main,
    "inference": inference.main,
    "evaluation": evaluation.main,
    "merging": merging.main,
    "plan": plan.main,
}
NEEDED = ["--model_name", "m", "--output_dir", "o"]


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Starts `python WORDS` in a folder, the checkout importable."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, input=""
    )


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Loaded[Any], str | None]]:
    """What the function of `llmrecipes.run` was called with, which is replaced by a note of that."""
    calls: list[tuple[Loaded[Any], str | None]] = []

    def note(loaded: Loaded[Any], config_path: str | None) -> int:
        calls.append((loaded, config_path))
        return 0

    for name, entry in COMMANDS.items():
        monkeypatch.setitem(COMMANDS, name, command.Command(entry.schema, __name__, "note"))
    monkeypatch.setattr(sys.modules[__name__], "note", note, raising=False)
    return calls


# --- words to flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--lr", "1e3"], {"lr": "1e3"}),
        (["--lr", "-1"], {"lr": "-1"}),
        (["--lr=1e3"], {"lr": "1e3"}),
        (["--a", "false"], {"a": "false"}),
        (["--a", "None"], {"a": "None"}),
        (["--a", "1,2"], {"a": "1,2"}),
        (["--a", "[1, 2]"], {"a": "[1, 2]"}),
        (["--a", "{b:c}"], {"a": "{b:c}"}),
        (["--a", "1.10"], {"a": "1.10"}),
        (["--a", "'quoted'"], {"a": "'quoted'"}),
        (["--a", ""], {"a": ""}),
        (["--a="], {"a": ""}),
        (["--a=b=c"], {"a": "b=c"}),
        (["--prompt", "-"], {"prompt": "-"}),
        (["--prompt", "--- a"], {"prompt": "--- a"}),
        (["--prompt=--a"], {"prompt": "--a"}),
        (["--prompt", "a --b\nc"], {"prompt": "a --b\nc"}),
        (["--a", "--b", "c"], {"a": BARE, "b": "c"}),
        (["--a", "--b"], {"a": BARE, "b": BARE}),
        (["--section.key", "x"], {"section.key": "x"}),
        (["--two-words", "x"], {"two_words": "x"}),
        (["--a", "1", "--a", "2"], {"a": "2"}),
        (["--verbose", "--trace", "--separator", "x"], {"verbose": BARE, "trace": BARE, "separator": "x"}),
        ([], {}),
    ],
)
def test_words_become_flags_as_typed(words: list[str], flags: dict[str, str]) -> None:
    assert parse_flags(words) == flags


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\0")))
def test_any_value_arrives_unchanged(value: str) -> None:
    assert parse_flags([f"--prompt={value}", "--seed", "1"]) == {"prompt": value, "seed": "1"}
    if not value.startswith("--"):
        assert parse_flags(["--prompt", value, "--seed", "1"]) == {"prompt": value, "seed": "1"}


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["train"], ["'train' belongs to no flag"]),
        (["--a", "b", "c", "-d", "e"], ["'c' belongs to no flag", "-d is not a flag", "'e' belongs to no flag"]),
        (["--a=b", "c"], ["'c' belongs to no flag"]),
        (["--", "--a"], ["-- is not a flag"]),
        (["--=x"], ["--=x is not a flag"]),
        (["-lr", "1"], ["-lr is not a flag", "'1' belongs to no flag"]),
        (["-"], ["'-' belongs to no flag"]),
    ],
)
def test_words_that_belong_to_no_flag_are_all_told(words: list[str], problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        joined(words)
    lines = str(caught.value).splitlines()
    assert [line.split(";")[0] for line in lines] == problems


def test_a_config_without_a_path_is_told() -> None:
    with pytest.raises(ConfigError, match="--config needs a value"):
        parse_flags(["--config", "--lr", "1"])


# --- flags to a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAINS)
def test_a_run_is_entered_only_once_every_flag_is_accepted(
    name: str, entered: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_name", "m", "--peft_model", "p"]
    words = NEEDED if name in ("finetuning", "plan") else [*words, "--output_dir", "o"] if name == "merging" else words
    assert launch(name, [*words, "--no_such_flag", "2"]) == 2
    assert not entered
    assert (
        capsys.readouterr().err
        == "error: --no_such_flag: no_such_flag is not a key of this command; --help lists all keys\n"
    )
    assert launch(name, words) == 0
    ((loaded, config_path),) = entered
    assert (loaded.config.model_name, loaded.origins["model_name"], config_path) == ("m", "--model_name", None)


def test_the_config_files_path_reaches_the_run(entered: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model_name: m\noutput_dir: o\nlr: 1\n")
    assert launch("finetuning", ["--config", str(path), "--lr", "2"]) == 0
    assert (entered[0][0].config.lr, entered[0][1]) == (2.0, str(path))


def test_every_command_can_be_called_from_python(entered: list[Any]) -> None:
    given: dict[str, dict[str, Any]] = {
        "finetuning": {"model_name": "m", "output_dir": "o", "use_peft": True, "lora_config": {"r": 4}, "lr": 0.5},
        "inference": {"model_name": "m", "prompt": "-"},
        "evaluation": {"model_name": "m", "metric": ["rouge"]},
        "merging": {"model_name": "m", "peft_model": "p", "output_dir": "o"},
        "plan": {"model_name": "m", "card": "H200"},
    }
    for name, main in MAINS.items():
        assert main(**given[name]) == 0
    configs = [loaded.config for loaded, _ in entered]
    assert (configs[0].lora_config.r, configs[0].lr, configs[1].prompt, configs[2].metric) == (4, 0.5, "-", ["rouge"])
    assert configs[4].card == "h200"


def test_from_python_an_error_is_an_exception() -> None:
    with pytest.raises(ConfigError, match="--lrr: lrr is not a key of this command; did you mean --lr?"):
        finetuning.main(lrr=2)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_shows_every_key_and_runs_nothing(
    name: str, word: str, entered: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(name, ["--no_such_flag", word]) == 0
    shown = capsys.readouterr().out
    assert f"usage: python -m llmrecipes.{name} " in shown
    for leaf in leaves_of(COMMANDS[name].schema):
        assert f"--{leaf.key} " in shown
    assert not entered


def test_print_config_shows_values_and_origins_and_runs_nothing(
    entered: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model_name: m\nlora_config:\n  r: 4\n")
    words = ["--config", str(path), "--output_dir", "1e3", "--use_peft", "--print_config", "--device", "cpu"]
    assert launch("finetuning", words) == 0
    shown = capsys.readouterr().out
    for line in (
        f"model_name: m  # {path}:1",
        f"  r: 4  # {path}:3",
        "output_dir: 1e3  # --output_dir",
        "lr: 0.0001  # default",
        "use_fast_kernels: true  # auto",
    ):
        assert f"\n{line}\n" in f"\n{shown}"
    assert not entered


@pytest.mark.parametrize(("value", "runs"), [("false", True), ("no", True), (False, True), (True, False)])
def test_print_config_is_a_boolean(value: object, runs: bool, entered: list[Any]) -> None:
    assert run_command("merging", {"model_name": "m", "peft_model": "p", "output_dir": "o", "print_config": value}) == 0
    assert bool(entered) is runs


def test_print_config_refuses_what_is_no_boolean(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("finetuning", ["--print_config", "file.yaml"]) == 2
    assert capsys.readouterr().err == "error: --print_config: expected true or false, found 'file.yaml'\n"


# --- errors to exit codes ---------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[[], int]:
    def run_and_fail() -> int:
        raise error

    return run_and_fail


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError("one\ntwo"), 2, "error: one\nerror: two\n"),
        (DataError("data.csv:3: bad"), 2, "error: data.csv:3: bad\n"),
        (TrainingError("loss"), 3, "error: loss\n"),
        (KeyboardInterrupt(), 130, "error: stopped by Ctrl-C\n"),
    ],
)
def test_what_the_user_can_mend_is_told_in_lines(
    error: BaseException, code: int, lines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(failing(error)) == code
    assert capsys.readouterr() == ("", lines)


def test_our_own_bugs_keep_their_traceback() -> None:
    with pytest.raises(KeyError):
        guarded(failing(KeyError("bug")))


def test_every_error_class_has_an_exit_code_of_its_owner() -> None:
    codes = {kind.__name__: kind.exit_code for kind in LlmRecipesError.__subclasses__()}
    assert codes.pop("TrainingError") == 3
    assert set(codes.values()) == {2}


# --- one command for all ----------------------------------------------------------------------------------------------


def one(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["llmrecipes", *words])
    return one_command.main()


def test_one_command_leads_to_all(
    entered: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert one(monkeypatch, "finetuning", *NEEDED) == 0
    assert len(entered) == 1
    for words in ([], ["--help"], ["-h"]):
        assert one(monkeypatch, *words) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in [*MAINS, "data"])
    assert one(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    for words in (["data"], ["data", "--help"], ["data", "create", "-h"]):
        assert one(monkeypatch, *words) == 0
        assert "usage: python -m llmrecipes.data " in capsys.readouterr().out


def test_an_unknown_command_is_told_with_its_likes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert one(monkeypatch, "finetunign", "--lr", "1") == 2
    assert capsys.readouterr().err == (
        "error: finetunign is not a command, only plan, finetuning, inference, evaluation, merging, verify, data; "
        "did you mean finetuning?\n"
    )


# --- data -------------------------------------------------------------------------------------------------------------

CREATOR = """
from dataclasses import dataclass
from llmrecipes.config.options import REQUIRED, option

@dataclass(frozen=True)
class Options:
    "makes words"
    word: str = option(REQUIRED, "the word")
    times: int = option(2, "how often", at_least=1)

def create_data(options: Options) -> str:
    return options.word * options.times
"""


@pytest.fixture
def creator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `data create words.py WORDS` on a file of this test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def create(*words: str, text: str = CREATOR) -> int:
        (tmp_path / "words.py").write_text(text)
        return data_main(["create", "words.py", *words])

    return create


def test_anybodys_file_can_create_data(creator: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert creator("--word", "1e3", "--times", "3") == 0
    assert capsys.readouterr().out == "1e31e31e3\n"
    assert creator("--help") == 0
    assert "--times int (default 2; at least 1)" in capsys.readouterr().out
    assert creator("--word", "a", "--print_config") == 0
    assert capsys.readouterr().out == "word: a  # --word\ntimes: 2  # default\n"
    assert creator("--tims", "0", "--times", "0") == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "did you mean --times?" in told[0] and "--times: 0 is too small" in told[1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "data create words.py: .*words.py has no function create_data, only none"),
        ("def create_data(options): ...", "create_data must take one argument, annotated with a dataclass"),
        ("def create_data(options: int): ...", "create_data must take one argument, annotated with a dataclass"),
        ("def create_data(a: 'Nothing'): ...", "in the annotations of create_data: NameError: name 'Nothing'"),
        (CREATOR.replace('option(2, "how often", at_least=1)', "0 / 0"), r"words.py:9: while .*: ZeroDivisionError"),
        (CREATOR.replace("times: int", "times: dict"), "option times must be str, int, float, bool or list"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    a: int\ndef create_data(a: A): ...", "default"),
        (CREATOR.replace("return options", "return 0 / 0 * options"), "words.py:12: in create_data: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_a_file_that_creates_data_is_one_line(
    creator: Callable[..., int], capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    assert creator("--word", "a", text=text) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert re.search(told, shown)


def test_wrong_data_commands_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in [
        (["create"], "data create: expected one of arithmetic, guanaco, or FILE.py"),
        (["create", "--output_dir", "x"], "data create: expected one of arithmetic, guanaco, or FILE.py"),
        (["creat", "arithmetic"], "data creat: not one of create, view, check, doctor; "),
        (["create", "arithmetik"], "data create arithmetik: not one of arithmetic, guanaco, and not FILE.py; did you"),
        (["create", "samsum.py"], "data create samsum.py: "),
        (["create", "nowhere/words.py"], "data create nowhere/words.py: no such file"),
        (["create", "arithmetic", "x"], "'x' belongs to no flag"),
    ]:
        assert data_main(words) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith(f"error: {told}") and shown.err.count("\n") == 1 and not shown.out


# --- processes --------------------------------------------------------------------------------------------------------


def test_wrong_flags_are_told_in_under_a_second_without_torch_and_nothing_is_written(tmp_path: Path) -> None:
    words = ["--lrr", "2", "--batch_size_training", "0", "--output_dir", "out", "--dataset", "custom_dataset"]
    spent = processor_seconds()
    done = run("-X", "importtime", "-m", "llmrecipes.finetuning", *words, folder=tmp_path)
    spent = processor_seconds() - spent
    timings = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    told = [line for line in done.stderr.splitlines() if line not in timings]
    assert done.returncode == 2
    assert len(told) == 2, told
    assert "did you mean --lr?" in told[0]
    assert "--batch_size_training: 0 is too small" in told[1]
    assert all(line.startswith("error: ") for line in told)
    imported = {line.split("|")[-1].strip() for line in timings}
    assert "llmrecipes.config.schema" in imported
    assert not imported & {"torch", "transformers", "numpy", "datasets", "peft"}
    assert spent < 1, f"{spent:.2f} s of processor time"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MAINS)
def test_a_command_is_a_module(name: str, tmp_path: Path) -> None:
    done = run("-m", f"llmrecipes.{name}", "--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"python -m llmrecipes.{name}: ")


def test_data_are_created_by_a_process(tmp_path: Path) -> None:
    sizes = ["--train_rows", "20", "--validation_rows", "5", "--test_rows", "5"]
    done = run("-m", "llmrecipes", "data", "create", "arithmetic", "--output_dir", "1e3", *sizes, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "1e3").iterdir()} == {
        f"arithmetic_{split}.csv" for split in ("train", "validation", "test")
    }
    done = run("-m", "llmrecipes.data", "create", "arithmetic", "--seed", "1.5", folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: --seed: expected a whole number, found '1.5'\n")
