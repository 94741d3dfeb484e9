"""Timestep features."""

import math

import torch

from models.layers.embedding import timestep_features


def test_timestep_features_are_cosines_then_sines() -> None:
    features = timestep_features(torch.tensor([0, 3]), 8)
    frequencies = torch.tensor([10000.0 ** (-k / 4) for k in range(4)])
    assert features[0].tolist() == [1.0] * 4 + [0.0] * 4
    torch.testing.assert_close(features[1, :4], (3 * frequencies).cos())
    torch.testing.assert_close(features[1, 4:], (3 * frequencies).sin())
    assert math.isclose(features[1, 0].item(), math.cos(3), rel_tol=1e-6)


def test_timestep_features_tell_all_steps_apart() -> None:
    features = timestep_features(torch.arange(1000), 32)
    distances = torch.cdist(features, features).fill_diagonal_(1.0)
    assert distances.min() > 0.05
