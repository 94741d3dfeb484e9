"""Drawing tokens: exact on a distribution that can be enumerated, and what a sample depends on."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny_models import DIMS, make_text, randomise

from models.ar_prior.config import ArPriorConfig, TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.sampling import (
    guide_logits,
    initial_tokens,
    iterate_embeddings,
    sample_component,
    sample_tokens,
    token_probs,
)
from models.diffusion.noise import NoiseSource
from models.rows import concat_rows
from models.text import TextEncoding

PLAIN = TokenSamplerConfig()
NUM_COMPONENTS = 3


@pytest.fixture(scope="module")
def prior() -> ArPrior:
    torch.manual_seed(0)
    config = ArPriorConfig(
        width=16, depth=2, num_heads=4, num_components=NUM_COMPONENTS, num_buckets=3, num_dot_buckets=2
    )
    model = ArPrior(config, DIMS).eval()
    randomise(model)
    with torch.no_grad():
        model.component_in.weight.mul_(20)  # so that what was drawn before matters
        model.dot_in.weight.mul_(20)
        model.out.weight.mul_(4)
    model.null_text.set(make_text((2,)))
    return model


def chi_square_p(observed: list[int], expected: list[float]) -> float:
    """How likely counts are at least as far from what is expected as these, by Pearson's test."""
    statistic = sum((count - mean) ** 2 / mean for count, mean in zip(observed, expected, strict=True))
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def draw(prior: ArPrior, text: TextEncoding, seeds: list[int], config: TokenSamplerConfig) -> torch.Tensor:
    state = initial_tokens(prior, text, NoiseSource.from_seeds(seeds, "test"), config)
    for _ in range(prior.num_components):
        sample_component(prior, state, config)
    return state.tokens


def enumerated(prior: ArPrior, config: TokenSamplerConfig, dot: int) -> dict[tuple[int, ...], float]:
    """Probability of every sequence: the product of its conditionals, each from one uncached pass."""
    every = list(itertools.product(range(3), repeat=NUM_COMPONENTS))
    tokens, size = torch.tensor(every), len(every)
    text = concat_rows([make_text((4,))] * size)
    with torch.no_grad():
        cond = prior(tokens, torch.full((size,), dot), prior.encode_condition(text))
        null = prior.null_text.encoding(size)
        uncond = prior(tokens, torch.full((size,), 2), prior.encode_condition(null))
    logits = uncond + config.guidance_scale * (cond - uncond)
    probs = token_probs(logits.flatten(0, 1), config).view(size, NUM_COMPONENTS, 3)
    actual = probs.gather(2, tokens[:, :, None])[:, :, 0].prod(1)
    return dict(zip(every, actual.tolist(), strict=True))


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        TokenSamplerConfig(guidance_scale=1.7, temperature=0.8),
        TokenSamplerConfig(top_k=2),
        TokenSamplerConfig(top_p=0.8, guidance_scale=0.5),
    ],
    ids=["plain", "guided", "top_k", "top_p"],
)
def test_sequences_are_sampled_as_often_as_the_product_of_their_conditionals_says(
    prior: ArPrior, config: TokenSamplerConfig
) -> None:
    count = 4000
    expected = enumerated(prior, config, dot=1)  # the top half of two buckets is the second
    assert sum(expected.values()) == pytest.approx(1, abs=1e-6)
    tokens = draw(prior, concat_rows([make_text((4,))] * count), list(range(count)), config)
    histogram = [0] * len(expected)
    place = {sequence: number for number, sequence in enumerate(expected)}
    for sequence in tokens.tolist():
        histogram[place[tuple(sequence)]] += 1
    likely = [i for i, probability in enumerate(expected.values()) if probability * count >= 5]
    probs = list(expected.values())
    assert not [i for i, p in enumerate(probs) if p == 0 and histogram[i]]
    rest = (count - sum(histogram[i] for i in likely), count - count * sum(probs[i] for i in likely))
    observed = [histogram[i] for i in likely] + ([rest[0]] if rest[1] > 1 else [])
    target = [probs[i] * count for i in likely] + ([rest[1]] if rest[1] > 1 else [])
    assert len(likely) >= 4
    scale = sum(observed) / sum(target)
    assert chi_square_p(observed, [value * scale for value in target]) > 0.001


def test_dot_product_is_sampled_from_the_top_half(prior: ArPrior) -> None:
    text = concat_rows([make_text((4,))] * 400)
    noise = NoiseSource.from_seeds(list(range(400)))
    assert initial_tokens(prior, text, noise, PLAIN).dot.tolist() == [1] * 400
    noise = NoiseSource.from_seeds(list(range(400)))
    whole = initial_tokens(prior, text, noise, replace(PLAIN, min_dot_quantile=0.0)).dot.float().mean()
    assert float(whole) == pytest.approx(0.5, abs=0.1)


def test_dot_product_and_components_have_random_numbers_of_their_own() -> None:
    prior = ArPrior(
        ArPriorConfig(width=8, depth=1, num_heads=2, num_components=2, num_buckets=3, num_dot_buckets=6), DIMS
    )
    state = initial_tokens(prior, concat_rows([make_text((4,))] * 600), NoiseSource.from_seeds(list(range(600))), PLAIN)
    sample_component(prior, state, PLAIN)  # untrained: every token is as likely
    together = torch.bincount(state.dot * 3 + state.tokens[:, 0], minlength=18).view(6, 3)
    assert together[:3].sum() == 0
    assert chi_square_p(together[3:].flatten().tolist(), [600 / 9] * 9) > 0.001


def test_guided_chains_hide_the_dot_product_from_the_unconditional_half(prior: ArPrior) -> None:
    state = initial_tokens(prior, make_text((3, 7)), NoiseSource.from_seeds([1, 2]), replace(PLAIN, guidance_scale=2.0))
    assert state.dot.tolist() == [2, 1, 2, 1]


def test_guided_chains_set_the_null_caption_before_their_own(prior: ArPrior) -> None:
    text, null = make_text((3, 7)), prior.null_text.encoding(1)
    state = initial_tokens(prior, text, NoiseSource.from_seeds([1, 2]), replace(PLAIN, guidance_scale=2.0))
    with torch.no_grad():
        actual = prior.next_logits(state.cache, state.dot, torch.zeros(4, dtype=torch.int64))
        blank = torch.zeros(1, NUM_COMPONENTS, dtype=torch.int64)
        expected = [
            prior(blank, torch.tensor([dot]), prior.encode_condition(one))[:, 0]
            for one, dot in ((null, 2), (text[:1], 1), (null, 2), (text[1:], 1))
        ]
    torch.testing.assert_close(actual, torch.cat(expected), rtol=0, atol=1e-5)
    assert (actual[1] - actual[3]).abs().max() > 1e-3


def test_guidance_of_one_is_no_guidance(prior: ArPrior) -> None:
    cond, uncond = torch.randn(4, 9), torch.randn(4, 9)
    torch.testing.assert_close(guide_logits(uncond, cond, 1.0), cond)
    text, seeds = make_text((3, 7, 5, 4)), [1, 2, 3, 4]
    nearly = replace(PLAIN, guidance_scale=1 + 1e-7)
    assert torch.equal(draw(prior, text, seeds, PLAIN), draw(prior, text, seeds, nearly))


def test_a_sample_depends_on_its_seed_and_caption_and_not_on_its_batch(prior: ArPrior) -> None:
    text, seeds = make_text((3, 7, 5, 3)), [5, 6, 7, 8]
    for config in (PLAIN, TokenSamplerConfig(guidance_scale=2.0)):
        *_, together = iterate_embeddings(prior, text, NoiseSource.from_seeds(seeds), config)
        for row in range(4):
            *_, alone = iterate_embeddings(prior, text[row : row + 1], NoiseSource.from_seeds([seeds[row]]), config)
            torch.testing.assert_close(alone, together[row : row + 1])
    many = draw(prior, concat_rows([make_text((4,))] * 50), list(range(50)), PLAIN)
    assert len(many.unique(dim=0)) > 5


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_chains_that_start_late_join_those_under_way(prior: ArPrior, guidance: float) -> None:
    config = replace(PLAIN, guidance_scale=guidance)
    text, seeds = make_text((3, 7)), [1, 2]
    expected = draw(prior, text, seeds, config)
    states = [
        initial_tokens(prior, text[i : i + 1], NoiseSource.from_seeds([seeds[i]], "test"), config) for i in (0, 1)
    ]
    sample_component(prior, states[0], config)
    joined = concat_rows(states)
    assert joined.position.tolist() == [1, 0]
    for _ in range(NUM_COMPONENTS - 1):
        sample_component(prior, joined, config)
    per_chain = len(joined.dot) // 2
    last = joined.part(slice(per_chain, None), slice(1, None))
    sample_component(prior, last, config)
    assert torch.equal(joined.tokens, expected)
    assert joined.position.tolist() == [NUM_COMPONENTS] * 2


def test_top_k_keeps_the_k_likeliest_in_their_proportions() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    full, cut = token_probs(logits, PLAIN), token_probs(logits, replace(PLAIN, top_k=5))
    assert ((cut > 0).sum(1) == 5).all()
    assert (full.masked_fill(cut == 0, 1).amin(1) >= full.masked_fill(cut > 0, 0).amax(1)).all()
    ratio = (cut / full)[cut > 0].view(20, 5)
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, 5))
    torch.testing.assert_close(cut.sum(1), torch.ones(20, dtype=torch.float64))
    ties = token_probs(torch.zeros(1, 8), replace(PLAIN, top_k=3))
    assert int((ties > 0).sum()) == 3


def test_top_p_keeps_the_smallest_likeliest_set_that_reaches_p() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 2
    full = token_probs(logits, PLAIN)
    for top_p in (1e-6, 0.3, 0.9, 1.0):
        cut = token_probs(logits, replace(PLAIN, top_p=top_p))
        nucleus = full.masked_fill(cut == 0, 0)
        assert (nucleus.sum(1) >= top_p - 1e-9).all()
        least = nucleus.masked_fill(cut == 0, 2).amin(1)
        assert ((nucleus.sum(1) - least < top_p) | (top_p == 1)).all()
        torch.testing.assert_close(cut, nucleus / nucleus.sum(1, keepdim=True))
    assert ((token_probs(logits, replace(PLAIN, top_p=1e-6)) > 0).sum(1) == 1).all()
    even = token_probs(torch.zeros(1, 4), replace(PLAIN, top_p=0.5))
    assert int((even > 0).sum()) == 2  # two reach it; the third is one too many
    both = token_probs(logits, replace(PLAIN, top_k=4, top_p=0.9))
    assert ((both > 0).sum(1) <= 4).all()


def test_temperature_sharpens_and_flattens() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    torch.testing.assert_close(token_probs(logits, replace(PLAIN, temperature=0.5)), (2 * logits).double().softmax(-1))
    assert token_probs(logits, replace(PLAIN, temperature=1e3)).max() < 0.334
    assert token_probs(logits, replace(PLAIN, top_k=1))[0].tolist() == [0, 0, 1]


def test_sample_tokens_inverts_the_cumulative_probability() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64).expand(4, -1)
    uniform = torch.tensor([0.0, 0.2499999, 0.25, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(probs, uniform).tolist() == [1, 1, 3, 3]
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(1, 6, generator=generator, dtype=torch.float64)
    uniform = torch.rand(20_000, generator=generator, dtype=torch.float64)
    counts = torch.bincount(sample_tokens(probs.expand(20_000, -1), uniform), minlength=6)
    assert chi_square_p(counts.tolist(), (probs[0] / probs.sum() * 20_000).tolist()) > 0.001


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.0), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("guidance_scale", -1.0)],
)
def test_sampler_config_refuses_the_impossible(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(PLAIN, **{field: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"num_buckets": 1}, "num_buckets"),
        ({"max_pca_error": 0.0}, "max_pca_error"),
        ({"num_buckets": 4, "sampler": TokenSamplerConfig(top_k=5)}, "top_k = 5 is above num_buckets = 4"),
        ({"text_drop_prob": 2.0}, "text_drop_prob"),
    ],
)
def test_config_refuses_the_impossible(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ArPriorConfig(**fields)
