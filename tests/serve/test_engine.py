import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.ar_prior.config import ArPriorConfig, TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.cascade import Cascade, CascadeSettings
from models.diffusion.config import SamplerConfig
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip
from pipeline.serve.chains import Picture
from pipeline.serve.engine import Engine
from pipeline.serve.protocols import Overloaded
from pipeline.serve.steppers import make_steppers
from tests.serve.conftest import unet
from tests.tiny_cascade import randomise

PROMPTS = ["a red circle", "a large blue square above a small green star", "two", "a red circle"]
SEEDS = [1, 2, 3, 4]


def almost_equal(drawn: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """Equal up to the rounding of another batch size.

    A stage's 8-bit conditioning may fall on the other side of a level, which the random networks here carry further.
    """
    if drawn.shape != expected.shape:
        return False
    difference = np.abs(drawn.astype(int) - expected)
    return bool(difference.mean() < 0.1 and difference.max() < 16)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmpp_2m", "heun"])
def test_stepper_draws_staggered_pictures_as_the_cascade_draws_them_alone(cascade: Cascade, method: Any) -> None:
    config = SamplerConfig(method=method, num_steps=5, guidance_scale=1.7)
    upsampler = dataclasses.replace(config, guidance_scale=1.0)
    settings = CascadeSettings(dataclasses.replace(config, clip_x0=False), config, (upsampler,), num_candidates=2)
    check_staggered(cascade, settings)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.7])
def test_stepper_draws_tokens_of_staggered_pictures_too(cascade: Cascade, guidance_scale: float) -> None:
    torch.manual_seed(1)
    prior = ArPrior(ArPriorConfig(width=16, depth=2, num_heads=2, num_components=9, num_buckets=16), cascade.clip.dims)
    randomise(prior)
    autoregressive = Cascade(cascade.clip, prior, cascade.decoder, cascade.upsamplers)
    config = SamplerConfig(method="ddim", num_steps=2)
    tokens = TokenSamplerConfig(guidance_scale=guidance_scale, top_k=8)
    check_staggered(autoregressive, CascadeSettings(tokens, config, (config,), num_candidates=2))
    with pytest.raises(TypeError, match="takes a TokenSamplerConfig, the settings hold a SamplerConfig"):
        make_steppers(autoregressive, CascadeSettings(config, config, (config,)))
    with pytest.raises(TypeError, match="takes a SamplerConfig"):
        make_steppers(cascade, CascadeSettings(tokens, config, (config,)))


def check_staggered(cascade: Cascade, settings: CascadeSettings) -> None:
    steppers = make_steppers(cascade, settings)
    pictures: list[Picture] = []
    waiting = list(zip(PROMPTS, SEEDS, strict=True))
    turn = 0
    with torch.inference_mode():
        while waiting or any(picture.stage < len(steppers) for picture in pictures):
            if waiting and turn % 3 == 0:  # let one in at every third step: all stand at different steps
                prompt, seed = waiting.pop(0)
                pictures.append(Picture(prompt, seed, cascade.clip.encode_text([prompt])))
            turn += 1
            for number, stepper in enumerate(steppers):
                members = [picture for picture in pictures if picture.stage == number]
                if members:
                    stepper.advance(members)
    for picture in pictures:
        alone = cascade.sample([picture.prompt], [picture.seed], settings)
        torch.testing.assert_close(picture.z_image, alone.z_image, atol=2e-4, rtol=1e-3)
        drawn = (picture.pixels[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
        assert almost_equal(drawn.round().numpy(), alone.images[0].numpy())


def test_stepper_leads_pictures_by_clip_as_the_cascade_does(cascade: Cascade) -> None:
    torch.manual_seed(3)
    config = NoisyClipConfig(image_px=cascade.decoder.config.image_px, tower=unet())
    tower = NoisyClip(config, cascade.clip.dims).requires_grad_(requires_grad=False)
    led = Cascade(cascade.clip, cascade.prior, cascade.decoder, cascade.upsamplers, tower)
    sampler = SamplerConfig(method="ddim", num_steps=4, guidance_scale=1.7, clip_guidance_scale=30.0)
    prior = dataclasses.replace(sampler, clip_x0=False, clip_guidance_scale=0.0)
    settings = CascadeSettings(prior, sampler, (), num_candidates=1)
    steppers = make_steppers(led, settings)
    with torch.inference_mode():
        pictures = [Picture(p, s, led.clip.encode_text([p])) for p, s in zip(PROMPTS[:2], SEEDS[:2], strict=True)]
        while any(picture.stage < len(steppers) for picture in pictures):
            steppers[pictures[0].stage].advance(pictures)
    unled = dataclasses.replace(settings, decoder=dataclasses.replace(sampler, clip_guidance_scale=0.0))
    for picture in pictures:
        alone = led.sample([picture.prompt], [picture.seed], settings).images[0].numpy()
        drawn = (picture.pixels[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
        assert almost_equal(drawn.round().numpy(), alone)
        assert (
            np.abs(led.sample([picture.prompt], [picture.seed], unled).images[0].numpy().astype(int) - alone).max() > 1
        )


def test_engine_gives_each_request_its_own_pictures_in_the_order_of_its_seeds(
    cascade: Cascade, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(max_batch_size=3)
    futures = [engine.submit(prompt, [seed, seed + 10]) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    for prompt, seed, future in zip(PROMPTS, SEEDS, futures, strict=True):
        drawn = future.result(60)
        expected = cascade.sample([prompt, prompt], [seed, seed + 10])
        assert almost_equal(drawn.images, expected.images.numpy())
        np.testing.assert_allclose(drawn.z_image, expected.z_image.numpy(), atol=1e-3)
    stats = engine.stats()
    assert (stats["requests"], stats["pictures"], stats["failed"], stats["active"]) == (4, 8, 0, 0)


def test_engine_lets_a_late_request_join_those_under_way(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=8)
    first = engine.submit("a", [0])
    wait_until(lambda: engine.stats()["steps"] >= 2)
    second = engine.submit("b", [0])
    first.result(60), second.result(60)
    stats = engine.stats()
    assert stats["rows"] == 2 * (6 + 7 + 4)  # every step of both was taken once
    assert stats["steps"] < stats["rows"]  # and some of them together


def test_engine_keeps_within_its_batch_and_still_finishes_a_larger_request(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=2)
    future = engine.submit("a", range(5))
    most = 0
    while not future.done():
        most = max(most, engine.stats()["active"])
    assert most == 2
    assert future.result().images.shape == (5, 32, 32, 3)


def test_engine_refuses_more_than_may_wait_and_takes_more_once_there_is_room(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(max_batch_size=1, max_waiting=2)
    under_way = engine.submit("a", [0])
    wait_until(lambda: engine.stats()["active"] == 1)
    waiting = [engine.submit("b", [0]), engine.submit("c", [0])]
    with pytest.raises(Overloaded, match="2 requests are waiting already"):
        engine.submit("d", [0])
    waiting[1].cancel()
    last = engine.submit("e", [0])
    for future in (under_way, waiting[0], last):
        assert future.result(60).images.shape == (1, 32, 32, 3)
    assert engine.stats()["refused"] == 1


def test_engine_drops_a_request_that_nobody_waits_for(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=4)

    async def ask_and_leave() -> None:
        task = asyncio.create_task(engine.draw("a", range(4)))
        while engine.stats()["active"] < 4:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(ask_and_leave())
    wait_until(lambda: engine.stats()["dropped"] == 1)
    stats = engine.stats()
    assert (stats["active"], stats["pictures"]) == (0, 0)
    assert stats["rows"] < 4 * (6 + 7 + 4)
    assert engine.submit("b", [0]).result(60).images.shape == (1, 32, 32, 3)


def test_engine_outlives_a_network_that_fails(cascade: Cascade, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=4)
    hook = cascade.upsamplers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    try:
        with pytest.raises(MemoryError, match="full"):
            engine.submit("a", [0]).result(60)
    finally:
        hook.remove()
    assert engine.submit("a", [0]).result(60).images.shape == (1, 32, 32, 3)
    assert engine.alive
    assert engine.stats()["failed"] == 1


def test_engine_tells_those_who_wait_that_it_closes(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=1)
    futures = [engine.submit("a", [seed]) for seed in range(3)]
    engine.close()
    assert not engine.alive
    assert any(isinstance(future.exception(5), Overloaded) for future in futures)
    with pytest.raises(Overloaded, match="shutting down"):
        engine.submit("b", [0])


def test_engine_refuses_a_request_for_nothing(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(ValueError, match="no seeds"):
        make_engine().submit("a", [])
