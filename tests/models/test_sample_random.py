"""Random numbers of samples: their distributions, their independence, and that they belong to samples alone."""

import pytest
import torch
from torch import Tensor

from models.layers.dropout import SampleDropout, dropouts_of, set_dropout_random
from models.sample_random import SampleRandom, keep_mask

NUM = 1024
RANDOM = SampleRandom.of_samples(5, range(NUM))


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """Between the rows of two (B, D) tensors of standard normal numbers, in standard deviations of chance."""
    return (a @ b.T) / a.shape[1] ** 0.5


def test_normal_numbers_are_normal() -> None:
    numbers = RANDOM.normal("noise", (3, 10, 10)).double().flatten()
    error = numbers.numel() ** -0.5
    for power, (moment, spread) in {1: (0, 1), 2: (1, 2**0.5), 3: (0, 15**0.5), 4: (3, 96**0.5)}.items():
        assert (numbers**power).mean().item() == pytest.approx(moment, abs=4 * spread * error)
    expected = torch.distributions.Normal(0.0, 1.0).cdf(numbers.sort().values)
    gap = (expected - torch.linspace(0, 1, len(numbers), dtype=torch.float64)).abs().max()
    assert gap < 1.63 * error  # Kolmogorov and Smirnov, 1 %


def test_uniform_numbers_fill_the_unit_interval() -> None:
    numbers = RANDOM.uniform("level", 300)
    counts = torch.histc(numbers, 100, 0, 1)
    chi_square = ((counts - numbers.numel() / 100) ** 2 / (numbers.numel() / 100)).sum()
    assert 60 < chi_square < 145  # 99 degrees of freedom
    assert numbers.min() >= 0
    assert numbers.max() < 1


def test_samples_places_steps_and_streams_are_independent() -> None:
    numbers = RANDOM.normal("noise", (400,))
    others = {
        "step": SampleRandom.of_samples(6, range(NUM)).normal("noise", (400,)),
        "stream": RANDOM.normal("x", (400,)),
    }
    own = _correlations(numbers, numbers)[~torch.eye(NUM, dtype=torch.bool)]
    places = _correlations(numbers.T, numbers.T)[~torch.eye(400, dtype=torch.bool)]
    for values in (own, places, *(_correlations(numbers, other).flatten() for other in others.values())):
        assert values.std().item() == pytest.approx(1, abs=0.02)
        assert values.abs().max() < 6.5


def test_numbers_belong_to_a_sample_and_not_to_the_batch() -> None:
    part = SampleRandom.of_samples(5, range(100, 107))
    assert torch.equal(part.normal("noise", (2, 3)), RANDOM.normal("noise", (2, 3))[100:107])
    assert torch.equal(part.rows(slice(2, 4)).uniform("level"), RANDOM.uniform("level")[102:104])
    assert torch.equal(part.integers("timestep", 1000), RANDOM.integers("timestep", 1000)[100:107])
    assert torch.equal(part.seeds("bsr"), RANDOM.seeds("bsr")[100:107])
    assert len(set(RANDOM.seeds("bsr").tolist())) == NUM
    like = torch.empty(7, 3, dtype=torch.float64)
    assert part.normal_like("noise", like).dtype == torch.float64


def test_masks_drop_the_share_that_they_are_asked_for() -> None:
    keys = RANDOM.keys_of(["dropout/0", "dropout/1"], "cpu")
    masks = [keep_mask(of_stream, 0.1, 333) for of_stream in keys]
    for mask in masks:
        assert mask.double().mean().item() == pytest.approx(0.9, abs=0.003)
    both = (masks[0] & masks[1]).double().mean().item()
    assert both == pytest.approx(0.81, abs=0.004)
    neighbours = (masks[0][:, :-1] & masks[0][:, 1:]).double().mean().item()  # two values of one word, too
    assert neighbours == pytest.approx(0.81, abs=0.004)


@pytest.mark.parametrize("shape", [(8, 6, 4, 4), (8, 5, 6)])
def test_dropout_belongs_to_a_sample_and_leaves_the_mean(shape: tuple[int, ...]) -> None:
    network = torch.nn.Sequential(SampleDropout(0.25), torch.nn.Identity(), SampleDropout(0.0)).train()
    dropouts, x = dropouts_of(network), torch.ones(shape)
    assert dropouts == [network[0]]
    results: list[Tensor] = []
    for samples in (range(8), range(3, 8)):
        set_dropout_random(dropouts, SampleRandom.of_samples(1, samples), x.device)
        results.append(network(x[: len(samples)]))
        if x.ndim == 4:
            network(x[: len(samples)].to(memory_format=torch.channels_last))  # another order of the same share
    assert torch.equal(results[0][3:], results[1])
    assert results[0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert (results[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.1)
    assert torch.equal(network.eval()(x), x)
