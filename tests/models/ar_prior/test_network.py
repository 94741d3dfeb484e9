"""The autoregressive prior: its code, its conditioning, its cache, and that it learns a distribution that is known."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import DIMS, make_text, randomise

from models.ar_prior.config import ArPriorConfig
from models.ar_prior.network import ArPrior
from models.clip_config import ClipDims
from models.pca import PcaSums
from models.rows import take_rows

CONFIG = ArPriorConfig(width=16, depth=3, num_heads=4, num_components=5, num_buckets=7, num_dot_buckets=4)


def make(config: ArPriorConfig = CONFIG, dims: ClipDims = DIMS) -> ArPrior:
    torch.manual_seed(0)
    model = ArPrior(config, dims).eval()
    randomise(model)
    model.null_text.set(make_text((2,), dims=dims))
    return model


@pytest.fixture
def prior() -> ArPrior:
    return make()


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    tokens = torch.randint(CONFIG.num_buckets, (size, 5), generator=generator)
    return tokens, torch.randint(CONFIG.num_dot_buckets, (size,), generator=generator)


def embeddings(count: int, features: int = DIMS.embed_dim) -> torch.Tensor:
    x = torch.randn(count, features, generator=torch.Generator().manual_seed(1)) * 0.6 ** torch.arange(features)
    return torch.nn.functional.normalize(x + 0.4, dim=-1)


def test_prior_is_uniform_before_training() -> None:
    model = ArPrior(CONFIG, DIMS)
    tokens, dot = batch(2)
    assert not model(tokens, dot, model.encode_condition(make_text((3, 7)))).any()
    anywhere = torch.nn.functional.normalize(torch.randn(1000, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    assert model.tokenize(anywhere).unique().tolist() == [1, 2, 3, 4, 5]  # a bucket is 1.4 deviations, 7 are 10


def test_prior_without_a_number_of_components_has_room_for_all() -> None:
    assert ArPrior(ArPriorConfig(width=8, depth=1, num_heads=2), DIMS).num_components == DIMS.embed_dim
    with pytest.raises(ValueError, match="12 features"):
        ArPrior(ArPriorConfig(width=8, depth=1, num_heads=2, num_components=13), DIMS)


def test_tokens_hold_an_embedding_to_the_precision_of_a_bucket() -> None:
    z_image = embeddings(400)
    sums = PcaSums(DIMS.embed_dim)
    sums.update(z_image)
    pca = sums.pca().keep_by_energy(0.01)
    model = make(ArPriorConfig(width=8, depth=1, num_heads=2, num_components=len(pca.components)))
    model.set_code(pca, torch.linspace(0, 1, 65)[1:-1])
    tokens = model.tokenize(z_image)
    assert tokens.shape == (400, len(pca.components))
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < 1024
    exact = torch.nn.functional.normalize(pca.reconstruct(pca.project(z_image)), dim=-1)
    torch.testing.assert_close(model.detokenize(tokens), exact, rtol=0, atol=0.005)
    assert torch.cosine_similarity(model.detokenize(tokens), z_image).mean() > 0.99
    torch.testing.assert_close(model.detokenize(tokens).norm(dim=1), torch.ones(400))


def test_components_without_variance_are_tokens_too() -> None:
    z_image = embeddings(50)
    z_image[:, 6:] = 0
    z_image = torch.nn.functional.normalize(z_image, dim=-1)
    sums = PcaSums(DIMS.embed_dim)
    sums.update(z_image)
    model = make(ArPriorConfig(width=8, depth=1, num_heads=2))
    model.set_code(sums.pca(), torch.linspace(0, 1, 65)[1:-1])
    tokens = model.tokenize(z_image)
    assert int(tokens.min()) >= 0
    torch.testing.assert_close(model.detokenize(tokens), z_image, rtol=0, atol=0.005)


def test_dot_tokens_count_the_edges_below_and_hide_dropped_captions(prior: ArPrior) -> None:
    z_image = torch.nn.functional.one_hot(torch.tensor([0, 0, 0]), DIMS.embed_dim).float()
    z_text = torch.zeros_like(z_image)
    z_text[:, 0] = torch.tensor([-0.7, 0.3, 0.9])
    assert prior.dot_tokens(z_image, z_text).tolist() == [0, 2, 3]  # edges at -0.5, 0, 0.5
    assert prior.dot_tokens(z_image, z_text, torch.tensor([True, False, True])).tolist() == [0, 4, 3]


def test_tokens_are_the_same_in_half_precision() -> None:
    z_image = embeddings(400)
    sums = PcaSums(DIMS.embed_dim)
    sums.update(z_image)
    model = make(ArPriorConfig(width=8, depth=1, num_heads=2))
    model.set_code(sums.pca(), torch.linspace(0, 1, 65)[1:-1])
    with torch.autocast("cpu", torch.bfloat16):
        half = model.tokenize(z_image)
    assert torch.equal(half, model.tokenize(z_image))


def test_set_code_refuses_another_number_of_components(prior: ArPrior) -> None:
    sums = PcaSums(DIMS.embed_dim)
    sums.update(embeddings(50))
    with pytest.raises(ValueError, match="4 components and 4 dot buckets; this prior has 5 and 4"):
        prior.set_code(sums.pca().keep(4), torch.linspace(-1, 1, 5)[1:-1])


def test_forward_predicts_from_earlier_components_only(prior: ArPrior) -> None:
    tokens, dot = batch(3)
    prefix = prior.encode_condition(make_text((3, 7, 5)))
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % CONFIG.num_buckets
    before, after = prior(tokens, dot, prefix), prior(changed, dot, prefix)
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=1e-6)
    assert ((after[:, 3:] - before[:, 3:]).abs().amax(-1) > 1e-4).all()


def test_prior_reads_caption_and_dot_product(prior: ArPrior) -> None:
    tokens, dot = batch(2)
    text = make_text((3, 7))
    plain = prior(tokens, dot, prior.encode_condition(text))
    hidden = replace(text, hidden=text.hidden + 1)
    pooled = replace(text, pooled=text.pooled + 1)
    others = [
        prior(tokens, dot, prior.encode_condition(hidden)),
        prior(tokens, dot, prior.encode_condition(pooled)),
        prior(tokens, (dot + 1) % 4, prior.encode_condition(text)),
    ]
    assert all(((other - plain).abs().amax(-1) > 1e-4).all() for other in others)


def test_output_does_not_depend_on_padding(prior: ArPrior) -> None:
    tokens, dot = batch(2)
    text = make_text((3, 5))
    garbage = replace(text, hidden=text.hidden.masked_fill(~text.mask[..., None], 9.0))
    plain = prior(tokens, dot, prior.encode_condition(text))
    for other in (garbage, text.padded(9)):
        torch.testing.assert_close(prior(tokens, dot, prior.encode_condition(other)), plain, rtol=0, atol=1e-5)


def test_dropped_caption_is_the_null_caption(prior: ArPrior) -> None:
    tokens, dot = batch(2)
    keep = torch.tensor([True, False])
    mixed = prior(tokens, dot, prior.encode_condition(make_text((3, 7)), keep=keep))
    undropped = prior(tokens, dot, prior.encode_condition(make_text((3, 7))))
    null = prior(tokens, dot, prior.encode_condition(prior.null_text.encoding(2)))
    torch.testing.assert_close(mixed[0], undropped[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], null[1], rtol=0, atol=1e-5)
    assert (mixed[1] - undropped[1]).abs().max() > 1e-4


@pytest.mark.parametrize(("num_buckets", "num_dot_buckets"), [(7, 4), (7, 20)])
def test_cached_logits_are_those_of_one_pass(num_buckets: int, num_dot_buckets: int) -> None:
    prior = make(replace(CONFIG, num_buckets=num_buckets, num_dot_buckets=num_dot_buckets))
    tokens, dot = batch(3)[0], torch.tensor([0, num_dot_buckets - 1, num_dot_buckets])
    prefix = prior.encode_condition(make_text((3, 7, 5)))
    whole = prior(tokens, dot, prefix)
    cache, last = prior.start(prefix), dot
    for component in range(5):
        logits = prior.next_logits(cache, last, torch.full((3,), component))
        torch.testing.assert_close(logits, whole[:, component], rtol=0, atol=1e-5)
        last = tokens[:, component]


def test_cached_sequences_may_stand_at_different_components(prior: ArPrior) -> None:
    tokens, dot = batch(2)
    prefix = prior.encode_condition(make_text((3, 7)))
    whole = prior(tokens, dot, prefix)
    cache = prior.start(prefix)
    prior.next_logits(
        take_rows(cache, slice(1, 2)), dot[1:], torch.tensor([0])
    )  # a view: the second is one component ahead
    for component in range(4):
        last = torch.stack([dot[0] if component == 0 else tokens[0, component - 1], tokens[1, component]])
        logits = prior.next_logits(cache, last, torch.tensor([component, component + 1]))
        expected = torch.stack([whole[0, component], whole[1, component + 1]])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_training_finds_a_joint_distribution_that_is_known() -> None:
    """Two components of three values: cross entropy comes down to the entropy, and the joint to the true one."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[0.30, 0.02, 0.08], [0.05, 0.20, 0.05], [0.02, 0.03, 0.25]])
    config = ArPriorConfig(width=16, depth=1, num_heads=2, num_components=2, num_buckets=3, num_dot_buckets=1)
    torch.manual_seed(0)
    model = ArPrior(config, DIMS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    null, dot = model.null_text.encoding(512), torch.zeros(512, dtype=torch.int64)
    for _ in range(150):
        draws = torch.multinomial(truth.flatten(), 512, replacement=True, generator=generator)
        tokens = torch.stack([draws // 3, draws % 3], dim=1)
        logits = model(tokens, dot, model.encode_condition(null))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    every = torch.tensor(list(itertools.product(range(3), repeat=2)))
    with torch.no_grad():
        logits = model(every, torch.zeros(9, dtype=torch.int64), model.encode_condition(model.null_text.encoding(9)))
    log_probs = logits.log_softmax(-1).gather(2, every[:, :, None]).sum((1, 2))
    assert float(log_probs.exp().sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(log_probs.exp().view(3, 3), truth, rtol=0, atol=0.02)
    divergence = float((truth.flatten() * (truth.flatten().log() - log_probs)).sum())
    assert 0 <= divergence < 0.01
    assert math.isfinite(divergence)
