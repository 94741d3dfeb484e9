"""Which timesteps a batch is noised to: proportions, weights, and what a resumed run needs."""

import pytest
import torch

from models.diffusion.timesteps import LossAwareTimesteps, UniformTimesteps
from models.sample_random import SampleRandom


def warmed(losses: list[float], history: int = 3, uniform_prob: float = 0.001) -> LossAwareTimesteps:
    draws = LossAwareTimesteps(len(losses), history=history, uniform_prob=uniform_prob)
    for _ in range(history):
        draws.update(torch.arange(len(losses)), torch.tensor(losses))
    return draws


def test_uniform_samples_reach_every_timestep_with_weight_one() -> None:
    t, weights = UniformTimesteps(5).draw(SampleRandom.of_samples(0, range(2000)))
    assert torch.bincount(t, minlength=5).min() > 320
    assert bool((weights == 1).all())


def test_loss_aware_samples_are_uniform_until_every_timestep_has_losses() -> None:
    draws = LossAwareTimesteps(4, history=2)
    for _ in range(5):
        draws.update(torch.tensor([0, 1, 2]), torch.tensor([100.0, 1.0, 1.0]))
    draws.update(torch.tensor([3]), torch.tensor([1.0]))
    assert draws.probabilities().tolist() == [0.25] * 4
    draws.update(torch.tensor([3]), torch.tensor([1.0]))
    assert draws.probabilities()[0] > 0.9


def test_loss_aware_probabilities_follow_the_root_mean_square_loss() -> None:
    draws = LossAwareTimesteps(2, history=2, uniform_prob=0.01)
    draws.update(torch.tensor([0, 0, 1, 1]), torch.tensor([3.0, 4.0, 1.0, 1.0]))
    root = 12.5**0.5
    assert draws.probabilities().tolist() == pytest.approx(
        [0.99 * root / (root + 1) + 0.005, 0.99 / (root + 1) + 0.005]
    )


def test_loss_aware_history_forgets_the_oldest_loss() -> None:
    draws = warmed([1.0, 1.0], history=2, uniform_prob=0.0)
    draws.update(torch.tensor([0, 0, 0]), torch.tensor([9.0, 3.0, 3.0]))
    assert draws.probabilities().tolist() == pytest.approx([0.75, 0.25])


def test_loss_aware_history_passes_over_a_loss_that_is_not_finite() -> None:
    draws = warmed([1.0, 3.0], history=2, uniform_prob=0.0)
    draws.update(torch.tensor([0, 1]), torch.tensor([torch.nan, torch.inf]))
    assert draws.probabilities().tolist() == pytest.approx([0.25, 0.75])


def test_loss_aware_weights_leave_the_expected_loss_unchanged() -> None:
    losses = torch.tensor([8.0, 1.0, 0.5, 0.1])
    t, weights = warmed(losses.tolist()).draw(SampleRandom.of_samples(0, range(40_000)))
    assert (weights * losses[t]).mean().item() == pytest.approx(losses.mean().item(), rel=0.01)
    assert torch.bincount(t, minlength=4)[0] > 30_000  # 8 / 9.6 of the draws


def test_loss_aware_state_resumes_with_the_same_samples() -> None:
    draws = warmed([5.0, 1.0, 2.0])
    resumed = LossAwareTimesteps(3, history=3)
    resumed.load_state_dict(draws.state_dict())
    draws.update(torch.tensor([1]), torch.tensor([50.0]))  # the state is a copy
    assert resumed.probabilities()[0] > 0.6
    with pytest.raises(ValueError, match="losses"):
        LossAwareTimesteps(4, history=3).load_state_dict(draws.state_dict())
