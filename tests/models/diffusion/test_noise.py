"""Noise that depends on the seed of its item alone."""

import pytest
import torch

from models.diffusion.noise import NoiseSource, derive_seed


def test_noise_of_an_item_does_not_depend_on_its_batch() -> None:
    together = NoiseSource.from_seeds([7, 8, 9])
    alone = NoiseSource.from_seeds([8])
    for shape in ((3, 4, 4), (5,)):
        assert torch.equal(together.normal(shape)[1], alone.normal(shape)[0])


def test_noise_streams_and_seeds_differ_and_repeat() -> None:
    prior = NoiseSource.from_seeds([1], "prior").normal((8,))
    assert not torch.allclose(prior, NoiseSource.from_seeds([1], "decoder").normal((8,)))
    assert not torch.allclose(prior, NoiseSource.from_seeds([2], "prior").normal((8,)))
    assert torch.equal(prior, NoiseSource.from_seeds([1], "prior").normal((8,)))
    assert 0 <= derive_seed(-3, "x") < 2**63


def test_added_noise_sources_keep_their_generators() -> None:
    source, reference = NoiseSource.from_seeds([1, 2]), NoiseSource.from_seeds([1, 2])
    source.normal((4,))
    reference.normal((4,))
    both = source + NoiseSource.from_seeds([3])
    assert len(both) == 3
    expected = torch.cat([reference.normal((4,)), NoiseSource.from_seeds([3]).normal((4,))])
    assert torch.equal(both.normal((4,)), expected)


def test_uniform_numbers_are_finer_than_single_precision() -> None:
    actual = NoiseSource.from_seeds([1, 2]).uniform(100)
    assert actual.shape == (2, 100)
    assert (actual != actual.float()).float().mean() > 0.9
    assert 0 <= actual.min() < 0.1
    assert 0.9 < actual.max() < 1


def test_noise_holds_the_same_numbers_in_every_type() -> None:
    wide = NoiseSource.from_seeds([1]).normal((6,), dtype=torch.float64)
    assert torch.equal(wide.float(), NoiseSource.from_seeds([1]).normal((6,)))


def test_noise_refuses_a_batch_of_another_size() -> None:
    for size in (1, 3):
        with pytest.raises(ValueError, match=f"{size} items, but noise for 2"):
            NoiseSource.from_seeds([1, 2]).normal_like(torch.zeros(size, 4))
