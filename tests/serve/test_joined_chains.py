"""Chains that stand at different steps, and with other settings, share network calls: each is sampled as alone."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.ar_prior.config import ArPriorConfig, TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.stage import ArPriorStage
from models.cascade import Cascade
from models.decoder.stage import DecoderStage
from models.diffusion.config import SamplerConfig
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip
from models.pixels import to_uint8
from models.prior.stage import PriorStage
from models.request import SampleRequest
from models.stage import Z_IMAGE, Batch, Chain
from pipeline.serve.engine import Engine
from tests.models.tiny_models import CONVOLUTION, randomise, with_stages
from tests.tiny.pictures import almost_equal

PROMPTS = ["a red circle", "a large blue square above a small green star", "two", "a red circle"]
SEEDS = [1, 2, 3, 4]
REQUESTS = [SampleRequest(prompt, (seed,)) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmpp_2m", "heun"])
def test_joined_chains_sample_what_the_cascade_samples_alone(cascade: Cascade, method: Any) -> None:
    config = SamplerConfig(method=method, num_steps=5, guidance_scale=1.7)
    prior, *others = cascade.stages
    stages = [dataclasses.replace(stage, sampler=config) for stage in others]
    first = dataclasses.replace(prior, sampler=dataclasses.replace(config, clip_x0=False))
    check_staggered(Cascade(cascade.clip, [first, *stages]))


def test_requests_with_other_numbers_of_candidates_share_steps(cascade: Cascade) -> None:
    several = SampleRequest("two", (5,), num_candidates=3)
    check_staggered(cascade, [REQUESTS[0], several, REQUESTS[1]])
    prior = dataclasses.replace(cascade.stage("prior", PriorStage), num_candidates=3)
    expected = with_stages(cascade, prior).sample(["two"], [5])
    assert torch.equal(cascade.sample_request(several).z_image, expected.z_image)
    assert not torch.equal(cascade.sample(["two"], [5]).z_image, expected.z_image)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.7])
def test_joined_chains_sample_tokens_too(cascade: Cascade, guidance_scale: float) -> None:
    torch.manual_seed(1)
    prior = ArPrior(ArPriorConfig(width=16, depth=2, num_heads=2, num_components=9, num_buckets=16), cascade.clip.dims)
    randomise(prior)
    stage = ArPriorStage(prior, TokenSamplerConfig(guidance_scale=guidance_scale, top_k=8), "prior", num_candidates=2)
    check_staggered(with_stages(cascade, stage))


def test_joined_chains_are_guided_by_clip_as_the_cascade_is(cascade: Cascade) -> None:
    torch.manual_seed(3)
    prior, decoder, _ = cascade.stages
    config = NoisyClipConfig(image_px=cascade.sides_px["decoder"], tower=CONVOLUTION)
    tower = NoisyClip(config, cascade.clip.dims).requires_grad_(requires_grad=False)
    sampler = SamplerConfig(method="ddim", num_steps=4, guidance_scale=1.7, clip_guidance_scale=30.0)
    guided = dataclasses.replace(decoder, sampler=sampler, noisy_clip=tower)
    check_staggered(Cascade(cascade.clip, [prior, guided]))
    plain = dataclasses.replace(decoder, sampler=dataclasses.replace(sampler, clip_guidance_scale=0.0))
    one, other = (Cascade(cascade.clip, [prior, stage]).sample(["two"], [1]).images for stage in (guided, plain))
    assert (one.int() - other.int()).abs().max() > 1


def check_staggered(cascade: Cascade, requests: Sequence[SampleRequest] = REQUESTS) -> None:
    """Let a picture in at every third step, so that all stand at different steps; each is that of its request alone."""
    entering = [cascade.batch_of(one) for one in requests]
    sampled: list[Batch] = []
    chains: list[list[Chain]] = [[] for _ in cascade.stages]
    turn = 0
    with torch.inference_mode():
        while entering or any(chains):
            if entering and turn % 3 == 0:
                chains[0].append(cascade.stages[0].enter(entering.pop(0)))
            turn += 1
            for number, stage in enumerate(cascade.stages):
                if chains[number]:
                    stage.join(chains[number]).advance()
                for chain in [chain for chain in chains[number] if chain.finished]:
                    chains[number].remove(chain)
                    batch = chain.batch.with_values(**{stage.makes: stage.leave(chain)})
                    if number + 1 < len(cascade.stages):
                        chains[number + 1].append(cascade.stages[number + 1].enter(batch))
                    else:
                        sampled.append(batch)
    assert len(sampled) == len(requests)
    for batch in sampled:
        assert batch.request is not None
        alone = cascade.sample_request(batch.request)
        if Z_IMAGE in alone.values:
            torch.testing.assert_close(batch.values[Z_IMAGE], alone.z_image, atol=2e-4, rtol=1e-3)
        assert almost_equal(to_uint8(batch.values["pixels"]).numpy(), alone.images.numpy())


class LatentStage(DecoderStage):
    """A decoder of latents of 8 px, with an autoencoder of fixed weights behind it that returns 16 px."""

    @property
    def side_px(self) -> int:
        return 2 * self.network.config.image_px

    def finish(self, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        del batch
        weight = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        return F.conv_transpose2d(x, weight, stride=2).tanh()


def tuple_of(cascade: Cascade, name: str) -> Cascade:
    """Another tuple of the cascade's networks: captions without a prior, or latents with an autoencoder."""
    prior, _, upsampler = cascade.stages
    decoder = cascade.stage("decoder", DecoderStage)
    if name == "captions":
        return Cascade(cascade.clip, [decoder, upsampler])
    latent = LatentStage(decoder.network, decoder.sampler, "latents")
    return Cascade(cascade.clip, [prior, latent])


@pytest.mark.parametrize(("name", "side_px"), [("captions", 32), ("latents", 16)])
def test_engine_samples_any_tuple_of_stages(cascade: Cascade, name: str, side_px: int) -> None:
    other = tuple_of(cascade, name)
    check_staggered(other)
    engine = Engine(other, max_batch_size=3)
    try:
        alone = engine.submit(SampleRequest("two", (1,))).result(60)
        expected = other.sample(["two"], [1])
        assert alone.images.shape == (1, side_px, side_px, 3)
        assert np.array_equal(alone.images, expected.images.numpy())
        assert (alone.z_image is None) == (Z_IMAGE not in expected.values) == (name == "captions")
        futures = [engine.submit(request) for request in REQUESTS]
        for request, future in zip(REQUESTS, futures, strict=True):
            assert almost_equal(future.result(60).images, other.sample_request(request).images.numpy())
    finally:
        engine.close()
    assert not almost_equal(expected.images.numpy(), other.sample(["two"], [2]).images.numpy())


def test_guidance_and_steps_of_a_request_are_those_of_its_pictures(
    cascade: Cascade, make_engine: Callable[..., Engine]
) -> None:
    """Requests with and without guidance, and of other numbers of steps, share their network calls."""
    requests = [
        SampleRequest("two", (1, 2), guidance_scale={"decoder": scale}, num_steps={"decoder": num_steps, "prior": 3})
        for scale, num_steps in ((1.0, 5), (1.7, 9), (4.0, 5))
    ]
    engine = make_engine(max_batch_size=6)
    futures = [engine.submit(request) for request in requests]
    decoder = cascade.stage("decoder", DecoderStage)
    pictures: list[np.ndarray[Any, Any]] = []
    for request, future in zip(requests, futures, strict=True):
        scale, num_steps = request.guidance_scale["decoder"], request.num_steps["decoder"]
        sampler = dataclasses.replace(decoder.sampler, guidance_scale=scale, num_steps=num_steps)
        prior = cascade.stage("prior", PriorStage)
        settings = with_stages(
            cascade,
            dataclasses.replace(decoder, sampler=sampler),
            dataclasses.replace(prior, sampler=dataclasses.replace(prior.sampler, num_steps=3)),
        )
        expected = settings.sample(["two"] * 2, [1, 2])
        assert torch.equal(cascade.sample_request(request).images, expected.images)
        pictures.append(future.result(60).images)
        assert almost_equal(pictures[-1], expected.images.numpy())
    assert not almost_equal(pictures[0], pictures[2])
    assert engine.counts()["rows"] == 2 * (3 * 3 + 5 + 9 + 5 + 3 * 4)
    check_staggered(cascade, [dataclasses.replace(request, seeds=request.seeds[:1]) for request in requests])


def test_guidance_of_a_request_reaches_the_tokens(cascade: Cascade) -> None:
    torch.manual_seed(1)
    prior = ArPrior(ArPriorConfig(width=16, depth=2, num_heads=2, num_components=9, num_buckets=16), cascade.clip.dims)
    randomise(prior)
    tokens = with_stages(cascade, ArPriorStage.of(prior))
    requests = [SampleRequest("two", (1,), guidance_scale={"prior": scale}) for scale in (1.0, 1.7, 6.0)]
    check_staggered(tokens, requests)
    one, _, other = (tokens.sample_request(request).z_image for request in requests)
    assert (one - other).abs().max() > 0.01
    with pytest.raises(ValueError, match="num_steps: prior always samples 9 components"):
        tokens.check(SampleRequest("two", (1,), num_steps={"prior": 3}))


def test_negative_prompts_lead_every_guided_stage_away(cascade: Cascade) -> None:
    torch.manual_seed(1)
    prior = ArPrior(ArPriorConfig(width=16, depth=2, num_heads=2, num_components=9, num_buckets=16), cascade.clip.dims)
    randomise(prior)
    for one in (cascade, with_stages(cascade, ArPriorStage.of(prior))):
        scale = {"prior": 3.0, "decoder": 3.0}
        requests = [
            SampleRequest("two", (1,), guidance_scale=scale, negative_prompt=text) for text in ("", "a red circle")
        ]
        plain, negative = (one.sample_request(request) for request in requests)
        assert (plain.z_image - negative.z_image).abs().max() > 1e-3
        assert (plain.pictures["decoder"].int() - negative.pictures["decoder"].int()).abs().max() > 1
        empty = one.sample_request(dataclasses.replace(requests[0], guidance_scale={"prior": 1.0, "decoder": 1.0}))
        same = one.sample_request(dataclasses.replace(requests[1], guidance_scale={"prior": 1.0, "decoder": 1.0}))
        assert torch.equal(empty.images, same.images)  # without guidance nothing leads away
        check_staggered(one, requests)
