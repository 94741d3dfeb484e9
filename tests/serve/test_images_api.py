"""Pictures by OpenAI's client: what comes is what the cascade samples, in every form and size."""

import base64
import io
import json
import re
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from models.request import SampleRequest
from models.stage import DiffusionStage
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.picture_files import encode_picture
from tests.serve.asking import PROMPT, close_to, expected, post, post_to
from tests.tiny.shards import pixels


def test_openai_client_gets_the_pictures_that_the_cascade_samples(server: Any, client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt=PROMPT, n=3, size="32x32", model="tiny", response_format="b64_json", user="me", extra_body={"seed": 5}
    )
    assert abs(answer.created - time.time()) < 60
    assert answer.data is not None
    pictures = [pixels(base64.b64decode(image.b64_json or "")) for image in answer.data]
    for picture, reference in zip(pictures, expected(server, PROMPT, [5, 6, 7]).images.numpy(), strict=True):
        assert close_to(picture, reference)
    assert [image.model_extra for image in answer.data] == [{"seed": 5}, {"seed": 6}, {"seed": 7}]


def test_settings_of_a_request_are_those_of_its_pictures(server: Any, client: openai.OpenAI) -> None:
    settings = {
        "negative_prompt": "a blue star",
        "guidance_scale": 4.0,
        "prior_guidance_scale": 1.5,
        "num_inference_steps": 3,
    }
    answer = client.images.generate(prompt=PROMPT, extra_body={"seed": 5, **settings}).data or []
    request = SampleRequest(
        PROMPT,
        (5,),
        guidance_scale={"decoder": 4.0, "prior": 1.5},
        num_steps={"decoder": 3},
        negative_prompt="a blue star",
    )
    picture = pixels(base64.b64decode(answer[0].b64_json or ""))
    assert close_to(picture, server.cascade.sample_request(request).images.numpy()[0])
    assert not close_to(picture, expected(server, PROMPT, [5]).images.numpy()[0])


def test_every_field_of_the_client_is_honoured_or_named_in_the_notes(server: Any, client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt=PROMPT, quality="high", style="vivid", moderation="low", background="opaque", output_format="webp",
        output_compression=30, user="me", n=2, size="16x16",
    )  # fmt: skip
    assert answer.data is not None
    files = [base64.b64decode(image.b64_json or "") for image in answer.data]
    assert all(file[:4] == b"RIFF" and pixels(file).shape == (16, 16, 3) for file in files)
    assert (answer.output_format, answer.quality, answer.size, answer.background) == ("webp", "high", "16x16", "opaque")
    assert answer.model_extra is not None
    assert answer.model_extra["notes"] == ["style: has no effect here", "moderation: has no effect here"]
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    prior, decoder, upsampler = (
        server.cascade.stage(name, DiffusionStage).sampler.num_steps for name in ("prior", "decoder", "upsampler_1")
    )
    assert answer.usage.model_extra["pixels"] == 2 * 16 * 16
    assert answer.usage.model_extra["steps"] == 2 * (prior + round(1.5 * decoder) + upsampler)


def test_quality_takes_no_more_steps_than_the_decoder_has_timesteps(server: Any, serving: Any) -> None:
    limit = 2 * server.cascade.settings["decoder"]["num_steps"]
    card = ModelCard("tiny", 32, sampling=server.cascade.settings, num_timesteps=limit)
    with serving(create_app(server.engine, None, ApiSettings(card))) as url:
        steps = [
            post_to(url, {"prompt": "a", "quality": quality}).json()["usage"]["steps"] for quality in ("auto", "max")
        ]
    assert steps[1] - steps[0] == limit // 2


def test_file_answers_are_the_picture_and_png_says_what_made_it(server: Any, serving: Any) -> None:
    card = ModelCard(
        "tiny", 32, networks={"decoder": "0" * 16}, weights={"decoder": "abcdef0123" + "4" * 54}, version="1.2",
        sampling={"decoder": {"method": "ddpm", "num_steps": 7, "guidance_scale": 2.0}}, aliases=("dall-e-2",),
    )  # fmt: skip
    body = {"prompt": PROMPT, "negative_prompt": "blue", "seed": 5, "guidance_scale": 4, "response_format": "file"}
    with serving(create_app(server.engine, None, ApiSettings(card))) as url:
        answer = post_to(url, body)
        assert post_to(url, {"prompt": PROMPT, "model": "dall-e-2"}).status_code == 200
        assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["tiny", "dall-e-2"]
        unseeded = {"prompt": PROMPT, "response_format": "file", "output_format": "jpeg", "style": "vivid"}
        jpeg = post_to(url, unseeded)
        again = post_to(url, unseeded | {"seed": int(jpeg.headers["X-Unclip-Seed"])})
    assert again.content == jpeg.content
    assert (jpeg.headers["Content-Type"], jpeg.headers["X-Unclip-Notes"]) == ("image/jpeg", "style: has no effect here")
    assert (answer.headers["Content-Type"], answer.headers["X-Unclip-Seed"]) == ("image/png", "5")
    assert "X-Unclip-Notes" not in answer.headers
    with Image.open(io.BytesIO(answer.content)) as picture:
        chunks: dict[str, str] = picture.text
    assert chunks["parameters"] == (
        f"{PROMPT}\nNegative prompt: blue\nSteps: 7, Sampler: ddpm, CFG scale: 4.0, Seed: 5, Size: 32x32, "
        "Model hash: abcdef0123, Model: tiny, Version: unclip 1.2"
    )
    everything = json.loads(chunks["unclip"])
    assert (everything["seed"], everything["prompt"], everything["networks"]) == (5, PROMPT, card.networks)
    assert everything["sampling"]["decoder"]["guidance_scale"] == 4.0


def test_defaults_are_one_picture_of_full_size_and_a_new_seed_each_time(client: openai.OpenAI) -> None:
    first, second = (client.images.generate(prompt=PROMPT).data or [] for _ in range(2))
    assert (len(first), len(second)) == (1, 1)
    assert pixels(base64.b64decode(first[0].b64_json or "")).shape == (32, 32, 3)
    assert first[0].b64_json != second[0].b64_json


def test_a_size_that_a_stage_makes_ends_there(server: Any, client: openai.OpenAI) -> None:
    sides = server.cascade.sides_px
    before = server.engine.counts()["rows"]
    small = client.images.generate(prompt=PROMPT, size=f"{sides['decoder']}x{sides['decoder']}", extra_body={"seed": 3})
    assert small.data is not None
    reference = expected(server, PROMPT, [3]).pictures["decoder"].numpy()[0]
    assert close_to(pixels(base64.b64decode(small.data[0].b64_json or "")), reference)
    steps = [server.cascade.stage(name, DiffusionStage).sampler.num_steps for name in ("prior", "decoder")]
    assert server.engine.counts()["rows"] == before + sum(steps)


def test_a_size_that_no_stage_makes_is_the_next_larger_picture_made_smaller(client: openai.OpenAI) -> None:
    seed = {"seed": 3}
    small = client.images.generate(prompt=PROMPT, size="24x24", extra_body=seed).data or []
    large = client.images.generate(prompt=PROMPT, size="auto", extra_body=seed).data or []
    picture, whole = (pixels(base64.b64decode(answer[0].b64_json or "")) for answer in (small, large))
    assert picture.shape == (24, 24, 3)
    assert np.abs(picture.astype(int) - pixels(encode_picture(whole, 24))).mean() < 1


def test_to_png_shrinks_with_antialiasing() -> None:
    checkers = np.indices((32, 32)).sum(0)[..., None].repeat(3, 2) % 2 * 255
    shrunk = pixels(encode_picture(checkers.astype(np.uint8), 16))[2:-2, 2:-2]
    assert np.abs(shrunk.astype(int) - 127).max() <= 2  # grey; taking every second pixel would be black or white


def test_url_answers_carry_the_picture_in_the_url(client: openai.OpenAI) -> None:
    [image] = client.images.generate(prompt=PROMPT, response_format="url").data or []
    kind, _, data = (image.url or "").partition(",")
    assert kind == "data:image/png;base64"
    assert pixels(base64.b64decode(data)).shape == (32, 32, 3)
    assert image.b64_json is None


def test_models_are_listed_and_an_unknown_one_is_404(client: openai.OpenAI) -> None:
    assert [(model.id, model.owned_by) for model in client.models.list()] == [("tiny", "unclip")]
    assert client.models.retrieve("tiny").created == 1_700_000_000
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt=PROMPT, model="dall-e-2")
    assert caught.value.body == {
        "message": "model 'dall-e-2' does not exist; this server has 'tiny'",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_health_and_metrics_count_the_sampled_pictures(server: Any) -> None:
    before = httpx.get(f"{server.url}/healthz").json()
    assert (before["status"], before["model"]) == ("ok", "tiny")
    post(server, {"prompt": "a", "n": 2})
    after = httpx.get(f"{server.url}/healthz").json()
    assert after["pictures"] == before["pictures"] + 2
    assert after["requests"] == before["requests"] + 1
    metrics = httpx.get(f"{server.url}/metrics").text
    assert f'unclip_pictures_total{{replica=""}} {float(after["pictures"])}' in metrics
    encoded = re.search(r"^unclip_encode_seconds_count (.+)$", metrics, re.MULTILINE)
    assert encoded
    assert float(encoded[1]) > 0
