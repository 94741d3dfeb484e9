"""Noise schedules and lists of timesteps against formulas worked out here."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.diffusion.schedules import (
    alpha_bar_table,
    cosine_betas,
    fast27_timesteps,
    linear_betas,
    sampling_timesteps,
    section_timesteps,
    strided_timesteps,
)


def test_cosine_betas_are_ratios_of_squared_cosines_capped_at_0999() -> None:
    betas = cosine_betas(1000)
    assert betas.dtype == torch.float64

    def signal(i: int) -> float:
        return math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 17, 500, 998):
        assert betas[t].item() == pytest.approx(1 - signal(t + 1) / signal(t), rel=1e-9)
    assert betas[999].item() == 0.999
    assert int((betas == 0.999).sum()) == 1


def test_linear_betas_run_from_1e4_to_002_and_scale_with_the_length() -> None:
    betas = linear_betas(1000)
    assert betas[0].item() == pytest.approx(1e-4)
    assert betas[999].item() == pytest.approx(0.02)
    assert betas[500].item() == pytest.approx(1e-4 + (0.02 - 1e-4) * 500 / 999)
    half = alpha_bar_table("linear", 500)[-1].log().item()
    assert half == pytest.approx(alpha_bar_table("linear", 1000)[-1].log().item(), rel=0.01)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_alpha_bar_table_starts_clean_and_entry_t_plus_1_belongs_to_t(schedule: str) -> None:
    betas = {"cosine": cosine_betas, "linear": linear_betas}[schedule](50).tolist()
    table = alpha_bar_table(schedule, 50)  # type: ignore[arg-type]
    assert table.shape == (51,)
    product = 1.0
    for t, beta in enumerate(betas):
        assert table[t].item() == pytest.approx(product, rel=1e-12)  # the level before step t
        product *= 1 - beta
        assert table[t + 1].item() == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 1000, 4000])
def test_alpha_bar_table_falls_strictly_and_stays_positive(schedule: str, num_timesteps: int) -> None:
    table = alpha_bar_table(schedule, num_timesteps)  # type: ignore[arg-type]
    assert bool((table[1:] < table[:-1]).all())
    assert table[-1] > 0


@pytest.mark.parametrize("num_steps", [7, 25, 27, 50, 64, 250, 1000])
def test_strided_timesteps_equal_a_rounded_linspace(num_steps: int) -> None:
    expected = np.linspace(0, 999, num_steps).round()[::-1].astype(int).tolist()
    assert list(strided_timesteps(1000, num_steps)) == expected
    # the same by the arithmetic of diffusers' UnCLIPScheduler
    ratio = 999 / (num_steps - 1)
    assert list(strided_timesteps(1000, num_steps)) == (np.arange(num_steps) * ratio).round()[::-1].astype(int).tolist()


@given(
    st.integers(1, 1200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.sampled_from(["linspace", "trailing"]),
)
def test_strided_timesteps_start_at_the_noisiest_step_and_fall_strictly(sizes: tuple[int, int], spacing: str) -> None:
    num_timesteps, num_steps = sizes
    steps = strided_timesteps(num_timesteps, num_steps, spacing)  # type: ignore[arg-type]
    assert len(steps) == num_steps
    assert steps[0] == num_timesteps - 1
    assert all(b < a for a, b in pairwise(steps))
    assert steps[-1] >= 0
    if spacing == "linspace" and num_steps > 1:
        assert steps[-1] == 0


def test_strided_timesteps_trailing_keeps_one_distance_where_it_divides() -> None:
    assert strided_timesteps(1000, 4, "trailing") == (999, 749, 499, 249)
    assert strided_timesteps(10, 3, "trailing") == (9, 6, 2)  # else the nearest: 10, 6.67 and 3.33, less one


@pytest.mark.parametrize("num_steps", [0, 11])
def test_strided_timesteps_refuses_impossible_numbers(num_steps: int) -> None:
    with pytest.raises(ValueError, match="num_steps"):
        strided_timesteps(10, num_steps)


def test_section_timesteps_visit_both_ends_of_each_section() -> None:
    assert section_timesteps(100, (2, 1, 3, 5)) == tuple(reversed([0, 24, 25, 50, 62, 74, 75, 81, 87, 93, 99]))


def test_section_timesteps_give_the_remainder_to_the_first_sections() -> None:
    assert section_timesteps(10, (2, 2, 2)) == tuple(reversed([0, 3, 4, 6, 7, 9]))


def test_section_timesteps_refuses_more_steps_than_a_section_has() -> None:
    with pytest.raises(ValueError, match="section 1"):
        section_timesteps(10, (5, 6))


def test_fast27_is_glides_list_with_997_in_place_of_999() -> None:
    expected = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199]
    expected += [200 + t for t in expected]
    expected += [400, 500, 599, 600, 799, 800, 997]
    assert list(fast27_timesteps(1000)) == expected[::-1]
    assert len(fast27_timesteps(1000)) == 27


def test_fast27_starts_where_the_cosine_chain_is_noise() -> None:
    assert alpha_bar_table("cosine", 1000)[997 + 1] < 1e-4


def test_sampling_timesteps_reads_presets_and_sections() -> None:
    assert sampling_timesteps(1000, 25) == strided_timesteps(1000, 25)
    assert sampling_timesteps(1000, 27, "fast27") == fast27_timesteps(1000)
    assert sampling_timesteps(1000, 25, "trailing") == strided_timesteps(1000, 25, "trailing")
    assert sampling_timesteps(1000, 27, "10,10,3,2,2")[0] == 999
    with pytest.raises(ValueError, match="fast28"):
        sampling_timesteps(1000, 28, "fast28")
    with pytest.raises(ValueError, match="section 1"):
        sampling_timesteps(46, 27, "fast27")
