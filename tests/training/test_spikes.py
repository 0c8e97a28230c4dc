"""Laws of spikes: what is far above the last steps is told, whatever else is not; a look at a state changes nothing."""

import math
import random

from llmrecipes.training.spikes import FEWEST_STEPS, Spikes


def fed(sigma: float = 6.0, steps: int = 64) -> Spikes:
    spikes, draw = Spikes(sigma), random.Random(0)
    for _ in range(steps):
        assert spikes.judge(draw.gauss(2.0, 0.1), draw.gauss(1.0, 0.1)) is None
    return spikes


def test_a_loss_or_norm_far_above_the_others_is_a_spike() -> None:
    assert "loss 4, " in (fed().judge(4.0, 1.0) or "")
    assert "gradient norm 9, " in (fed().judge(2.0, 9.0) or "")
    assert fed().judge(2.3, 1.3) is None
    assert fed().judge(-5.0, 0.0) is None


def test_a_spike_is_not_remembered_as_usual() -> None:
    spikes = fed()
    assert all(spikes.judge(4.0, 1.0) for _ in range(200))
    assert spikes.judge(2.0, 1.0) is None


def test_too_few_steps_sigma_zero_and_what_is_no_number_are_no_spikes() -> None:
    assert fed(steps=FEWEST_STEPS - 1).judge(100.0, 1.0) is None
    assert fed(steps=FEWEST_STEPS).judge(100.0, 1.0) is not None
    assert Spikes(0.0).judge(100.0, 1.0) is None
    for bad in (math.nan, math.inf):
        spikes = fed()
        assert spikes.judge(bad, 1.0) is None and spikes.judge(1.0, bad) is None
        assert spikes.plain() == fed().plain()


def test_what_is_remembered_comes_back_to_the_bit() -> None:
    spikes, other = fed(), Spikes(6.0)
    other.restore(spikes.plain())
    assert other.plain() == spikes.plain()
    assert other.judge(4.0, 1.0) == spikes.judge(4.0, 1.0)
