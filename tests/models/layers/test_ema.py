"""The moving average of weights."""

import torch

from models.layers.ema import AveragePairs, create_average, update_average


def make(value: float) -> torch.nn.BatchNorm1d:
    layer = torch.nn.BatchNorm1d(1)
    torch.nn.init.constant_(layer.weight, value)
    return layer


def test_average_forgets_its_start_quickly_then_follows_the_decay() -> None:
    network = make(1.0)
    average = create_average(network)
    torch.nn.init.constant_(network.weight, 3.0)
    update_average(AveragePairs.of(average, network), decay=0.5, num_updates=1)
    expected = 1.0 + (1 - 2 / 11) * 2.0
    torch.testing.assert_close(average.weight, torch.tensor([expected]))
    update_average(AveragePairs.of(average, network), decay=0.5, num_updates=1000)
    torch.testing.assert_close(average.weight, torch.tensor([(expected + 3.0) / 2]))


def test_average_is_frozen_and_apart_from_the_network() -> None:
    network = make(1.0).train()
    average = create_average(network)
    torch.nn.init.constant_(network.weight, 3.0)
    assert average.weight.item() == 1.0
    assert not average.weight.requires_grad
    assert not average.training
    assert network.training


def test_average_copies_whole_number_buffers() -> None:
    network = make(1.0)
    average = create_average(network)
    network.num_batches_tracked += 5
    update_average(AveragePairs.of(average, network), decay=0.9, num_updates=1)
    assert average.num_batches_tracked == 5


def test_an_average_that_may_skip_moves_or_stays_to_the_last_bit() -> None:
    network = torch.nn.Linear(40, 30)
    expected, before = create_average(network), create_average(network)
    torch.nn.init.normal_(network.weight)
    update_average(AveragePairs.of(expected, network), decay=0.3, num_updates=1000)
    for skips, weights in ((False, expected), (True, before)):
        average = create_average(before)
        update_average(AveragePairs.of(average, network), 0.3, 1000, skips=torch.tensor(skips))
        assert torch.equal(average.weight, weights.weight)
        assert torch.equal(average.bias, weights.bias)
