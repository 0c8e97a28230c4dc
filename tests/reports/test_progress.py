"""Laws of the progress display, on a real terminal's stream and on a plain one."""

import io
import re
import threading
from typing import Any

import pytest
from rich.console import Console

from llmrecipes.reports.progress import WINDOW_RECORDS, Speed, TrainingProgress


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "useful_tokens": 812, "seconds": 2.0, **more}


FULL = {"loss": 1.2344, "learning_rate": 1e-3, "useful_tokens": 1624, "memory_bytes": int(1.9 * 2**30)}
START = {"kind": "start", "total_steps": 100}


def plain() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=40), file


def terminal(width: int = 100) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=width, legacy_windows=False), file


def words(screen: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)


def test_without_a_terminal_each_record_is_one_plain_line() -> None:
    console, file = plain()
    with TrainingProgress(console) as progress:
        for record in (START, step(19, **FULL), step(20, **FULL)):
            progress(record)
        progress({"kind": "evaluation", "step": 20, "eval_loss": 1.2, "eval_perplexity": 3.3201, "eval_tokens": 9500})
        progress.notice("saved [b]here[/b]\x1b[2J")
        progress({"kind": "end"})
    assert file.getvalue().splitlines() == [
        "step 19/100  loss 1.234  lr 1.0e-03  812 tok/s  1.9 GiB  2m42s left",
        "step 20/100  loss 1.234  lr 1.0e-03  812 tok/s  1.9 GiB  2m40s left",
        "step 20/100  validation loss 1.2  perplexity 3.32  9,500 tokens",
        "saved [b]here[/b][2J",
    ]


def test_what_a_record_lacks_is_left_out() -> None:
    console, file = plain()
    progress = TrainingProgress(console)
    progress(START)
    progress({"kind": "step", "step": 1, "loss": float("nan"), "learning_rate": None})
    progress({"kind": "step", "step": 2, "tokens_per_second": 55.0})
    assert file.getvalue().splitlines() == ["step 1/100  loss nan", "step 2/100  55 tok/s"]


def test_quiet_lines_are_thinned_and_the_last_step_is_shown() -> None:
    console, file = plain()
    progress = TrainingProgress(console, quiet_every=40)
    progress(START)
    for number in range(1, 101):
        progress(step(number))
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["40/100", "80/100", "100/100"]


def test_a_terminal_gets_a_bar_with_the_figures_and_notices_above_it() -> None:
    console, file = terminal()
    with TrainingProgress(console) as progress:
        progress(START)
        progress(step(1, **FULL))
        progress.notice("saved x")
        progress(step(100, **FULL))
    screen = words(file.getvalue())
    assert "━" in screen
    assert "saved x\n" in screen
    assert "\x1b[?25h" in file.getvalue()  # the cursor is back
    last = screen.rstrip().splitlines()[-1]
    assert "step 100/100" in last
    assert "loss 1.234  lr 1.0e-03  812 tok/s  1.9 GiB" in last
    assert "left" not in last


def test_a_bar_is_closed_when_the_run_fails() -> None:
    console, file = terminal()
    with pytest.raises(ZeroDivisionError), TrainingProgress(console) as progress:
        progress(START)
        raise ZeroDivisionError
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


def test_a_fast_run_is_not_slowed_by_drawing_every_step() -> None:
    console, file = terminal()
    with TrainingProgress(console) as progress:
        progress({"kind": "start", "total_steps": 100_000})
        for number in range(1, 2001):
            progress(step(number))
    assert words(file.getvalue()).count("step ") < 200
    assert "step 2000/100000" in words(file.getvalue())


@pytest.mark.parametrize("build", [plain, terminal])
def test_no_thread_runs_beside_the_training(build: Any) -> None:
    before = threading.active_count()
    with TrainingProgress(build()[0]) as progress:
        progress(START)
        progress(step(1))
        assert threading.active_count() == before


def test_a_second_run_starts_anew() -> None:
    console, file = terminal()
    with TrainingProgress(console) as progress:
        progress(START)
        progress(step(7))
        progress({"kind": "start", "total_steps": 5})
        progress(step(1, seconds=4.0))
    last = words(file.getvalue()).rstrip().splitlines()[-1]
    assert "step 1/5" in last
    assert "203 tok/s  16s left" in last


def test_speed_is_that_of_the_last_records_only() -> None:
    speed = Speed()
    assert speed.tokens_per_second is None
    speed.add(step(1, useful_tokens=10, seconds=1000.0))
    for number in range(2, WINDOW_RECORDS + 2):
        speed.add(step(number, useful_tokens=100, seconds=0.5))
    assert speed.tokens_per_second == pytest.approx(200)
    assert speed.seconds_left(10) == pytest.approx(5)


def test_time_left_is_that_of_the_steps_left_also_where_most_steps_are_not_told() -> None:
    speed = Speed()
    assert speed.seconds_left(90) is None
    for number in (10, 20, 30):
        speed.add(step(number))
    assert speed.seconds_left(70) == pytest.approx(140)
