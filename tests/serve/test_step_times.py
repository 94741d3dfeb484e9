import pytest

from pipeline.serve.step_times import StepTimes


def line(counts: list[int], fixed_s: float, picture_s: float) -> StepTimes:
    times = StepTimes()
    for count in counts:
        times.add(count, fixed_s + picture_s * count)
    return times


def test_step_times_find_what_a_step_costs_and_what_each_picture_adds() -> None:
    times = line([1, 16, 4, 2, 9, 1, 16, 8], 0.010, 0.004)
    assert times.of(12) == pytest.approx(0.058)
    assert times.share(16, 16) == pytest.approx(1)
    assert times.share(1, 16) == pytest.approx((0.074 / 16) / 0.014)
    assert line([1, 8, 4, 3], 0.0, 0.1).share(1, 16) == pytest.approx(1)  # nothing is gained by waiting for others


def test_step_times_follow_a_change_of_the_machine() -> None:
    times = line([1, 16] * 5, 0.010, 0.004)
    for _ in range(60):
        times.add(8, 1.0)
    assert times.of(8) == pytest.approx(1.0, rel=0.02)


def test_step_times_of_one_size_or_of_noise_stay_possible() -> None:
    assert StepTimes().share(4, 16) == 0.25
    same = line([4] * 10, 0.1, 0.0)
    assert same.of(4) < same.of(8) < 2 * same.of(4)
    falling = StepTimes()
    for count, time_s in ((1, 1.0), (16, 0.1), (1, 1.1), (16, 0.1)):
        falling.add(count, time_s)
    assert falling.of(1) > 0
    assert falling.of(16) >= falling.of(1)
