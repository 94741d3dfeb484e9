"""The diffusion prior: conditioning, dropping, and its cache."""

from dataclasses import replace

import pytest
import torch
from tiny_models import DIMS, make_text

from models.clip_config import END_TOKEN, START_TOKEN, ClipDims
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.rows import concat_rows, take_rows


@pytest.fixture
def prior() -> Prior:
    torch.manual_seed(0)
    model = Prior(PriorConfig(width=16, depth=3, num_heads=4), DIMS).eval()
    torch.nn.init.normal_(model.out.weight)
    model.null_text.set(make_text((2,)))
    return model


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, DIMS.embed_dim, generator=generator), torch.arange(size) * 7


def test_prior_predicts_zero_before_training() -> None:
    model = Prior(PriorConfig(width=16, depth=1, num_heads=4), DIMS)
    x, t = batch(2)
    assert not model(x, t, model.encode_condition(model.null_text.encoding(2))).any()


def test_prior_scale_is_that_of_the_paper_at_its_width() -> None:
    model = Prior(PriorConfig(width=16, depth=1, num_heads=4), ClipDims(embed_dim=1024, text_width=8))
    z_image = torch.nn.functional.normalize(torch.randn(3, 1024), dim=-1)
    torch.testing.assert_close(model.scale(z_image), 17.2 * z_image)
    model.z_mean.fill_(0.25)
    torch.testing.assert_close(model.scale(z_image), 17.2 * (z_image - 0.25))
    torch.testing.assert_close(model.unscale(model.scale(z_image)), z_image)


def test_prior_hands_on_embeddings_of_length_one_that_products_rank_as_cosines_do() -> None:
    model = Prior(PriorConfig(width=16, depth=1, num_heads=4), DIMS)
    model.z_mean.fill_(0.1)
    generator = torch.Generator().manual_seed(0)
    z_text = torch.nn.functional.normalize(torch.randn(1, DIMS.embed_dim, generator=generator), dim=-1)
    others = torch.randn(2, DIMS.embed_dim, generator=generator) * 0.2
    near, far = z_text + others[:1], 4 * (z_text + 3 * others[1:])  # far in angle, and long, as under strong guidance
    candidates = torch.cat([near, far])
    products = (candidates @ z_text.T).flatten()
    cosines = torch.nn.functional.cosine_similarity(candidates, z_text)
    assert products.argmax() != cosines.argmax()  # or there is nothing to see
    embeddings = model.unscale(model.scale(candidates))
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close((embeddings @ z_text.T).flatten(), cosines)


def test_prior_cached_condition_gives_the_same_output(prior: Prior) -> None:
    text = make_text((3, 7))
    x, t = batch(2)
    plain = prior(x, t, prior.encode_condition(text))
    cached = prior(x, t, prior.encode_condition(text, cache=True))
    torch.testing.assert_close(cached, plain, rtol=0, atol=1e-5)


def test_prior_output_does_not_depend_on_padding(prior: Prior) -> None:
    text = make_text((3, 5))
    x, t = batch(2)
    garbage = replace(text, hidden=text.hidden.masked_fill(~text.mask[..., None], 9.0))
    plain = prior(x, t, prior.encode_condition(text))
    for other in (garbage, text.padded(9)):
        torch.testing.assert_close(prior(x, t, prior.encode_condition(other)), plain, rtol=0, atol=1e-5)


def test_prior_reads_caption_timestep_and_noised_embedding(prior: Prior) -> None:
    text, (x, t) = make_text((3, 7)), batch(2)
    condition = prior.encode_condition(text)
    plain = prior(x, t, condition)
    hidden = replace(text, hidden=text.hidden + 1)
    pooled = replace(text, pooled=text.pooled + 1)
    others = [
        prior(x, t, prior.encode_condition(hidden)),
        prior(x, t, prior.encode_condition(pooled)),
        prior(x, t + 1, condition),
        prior(x + 1, t, condition),
    ]
    assert all((other != plain).all(1).all() for other in others)


def test_prior_dropped_caption_is_the_empty_one(prior: Prior) -> None:
    x, t = batch(2)
    keep = torch.tensor([True, False])
    mixed = prior(x, t, prior.encode_condition(make_text((3, 7)), keep=keep))
    undropped = prior(x, t, prior.encode_condition(make_text((3, 7))))
    null = prior(x, t, prior.encode_condition(prior.null_text.encoding(2)))
    torch.testing.assert_close(mixed[0], undropped[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], null[1], rtol=0, atol=1e-5)
    assert (mixed[1] != undropped[1]).all()


@pytest.mark.parametrize("cache", [False, True])
def test_prior_conditions_can_be_joined_and_split(prior: Prior, cache: bool) -> None:
    x, t = batch(3)
    parts = [
        prior.encode_condition(make_text((3,), width=4), cache=cache),
        prior.encode_condition(make_text((7, 5)), cache=cache),
    ]
    joined = concat_rows(parts)
    apart = torch.cat([prior(x[:1], t[:1], parts[0]), prior(x[1:], t[1:], parts[1])])
    torch.testing.assert_close(prior(x, t, joined), apart, rtol=0, atol=1e-5)
    torch.testing.assert_close(prior(x[1:], t[1:], take_rows(joined, slice(1, None))), apart[1:], rtol=0, atol=1e-5)


def test_concatenated_captions_keep_each(prior: Prior) -> None:
    x, t = batch(2)
    short, long = make_text((3,), width=4), make_text((7,))
    joined = prior(x, t, prior.encode_condition(concat_rows([short, long])))
    torch.testing.assert_close(joined[:1], prior(x[:1], t[:1], prior.encode_condition(short)), rtol=0, atol=1e-5)


def test_prior_reads_its_query_at_the_last_place(prior: Prior) -> None:
    (x, t), condition = batch(2), prior.encode_condition(make_text((3, 7)))
    before = prior(x, t, condition)
    prior.query.data += torch.randn(prior.query.shape)
    assert (prior(x, t, condition) - before).abs().max() > 1e-3


def test_null_caption_is_a_start_and_an_end(prior: Prior) -> None:
    assert prior.null_text.encoding(3).tokens.tolist() == [[START_TOKEN, END_TOKEN]] * 3


def test_null_text_refuses_a_caption_with_words() -> None:
    model = Prior(PriorConfig(width=16, depth=1, num_heads=4), DIMS)
    with pytest.raises(ValueError, match="one caption of two tokens"):
        model.null_text.set(make_text((4,)))


def test_null_text_is_kept_with_the_weights(prior: Prior) -> None:
    other = Prior(prior.config, DIMS)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.null_text.hidden, prior.null_text.hidden)
    assert prior.null_text.hidden.any()


def test_prior_learns_to_copy_the_pooled_caption() -> None:
    torch.manual_seed(0)
    model = Prior(PriorConfig(width=32, depth=2, num_heads=4), DIMS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        text = make_text((7,) * 16)
        x = torch.randn(16, DIMS.embed_dim)
        output = model(x, torch.full((16,), 999), model.encode_condition(text))
        loss = (output - text.pooled).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
