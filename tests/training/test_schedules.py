"""Laws of the learning-rate schedules."""

import pytest

from llmrecipes.training.schedules import SCHEDULES, Progress, learning_rate_factor, warmup_steps


def factors(name: str, steps: int = 100, warm: int = 10) -> list[float]:
    return [
        learning_rate_factor(SCHEDULES[name], Progress(step, steps, warm, epoch=step // 50, gamma=0.5))
        for step in range(steps)
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_from_nearly_nothing_to_the_peak(name: str) -> None:
    found = factors(name)
    assert found[0] == pytest.approx(0.1)
    assert found[9] == pytest.approx(1.0)
    assert found[:10] == sorted(found[:10])
    assert max(found) == pytest.approx(1.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_defined_for_a_run_of_warm_up_alone(name: str) -> None:
    assert all(0 < factor <= 1 for factor in factors(name, steps=5, warm=5))


def test_linear_and_cosine_end_near_zero_and_constant_stays() -> None:
    assert factors("linear")[-1] == pytest.approx(1 / 90)
    assert factors("cosine")[-1] < 1e-3
    assert factors("constant")[-1] == 1.0


def test_linear_passes_the_middle_at_half() -> None:
    assert factors("linear")[55] == pytest.approx(0.5)
    assert factors("cosine")[55] == pytest.approx(0.5)


def test_step_multiplies_by_gamma_each_epoch() -> None:
    found = factors("step", warm=0)
    assert found[49] == 1.0 and found[50] == 0.5


def test_a_warm_up_ratio_is_rounded_up() -> None:
    assert warmup_steps(100, 0, 0.03) == 3
    assert warmup_steps(101, 0, 0.03) == 4
    assert warmup_steps(100, 7, 0.0) == 7
