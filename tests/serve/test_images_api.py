import asyncio
import base64
import concurrent.futures
import contextlib
import io
import json
import re
import socket
import time
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import httpx
import numpy as np
import openai
import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
)
from PIL import Image

from models.cascade import Cascade, CascadeResult
from models.decoder.stage import DecoderStage
from models.request import SampleRequest
from models.stage import DiffusionStage
from pipeline.clip.inputs import count_tokens
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.engine import Engine
from pipeline.serve.picture_files import encode_picture
from pipeline.serve.protocols import NotServing
from tests.tiny.shards import pixels
from tests.tiny.workspace import served_workspace

PROMPT = "a large red circle on a white background"


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def expected(server: Any, prompt: str, seeds: list[int]) -> CascadeResult:
    return server.cascade.sample([prompt] * len(seeds), seeds)


def close_to(picture: Any, reference: Any) -> bool:
    difference = np.abs(picture.astype(int) - reference)
    return bool(difference.mean() < 0.1 and difference.max() < 16)


def post(server: Any, body: Any = None, **arguments: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60, **arguments)


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


EVENTS = {
    "image_generation.partial_image": ImageGenPartialImageEvent,
    "image_generation.completed": ImageGenCompletedEvent,
    "image_edit.partial_image": ImageEditPartialImageEvent,
    "image_edit.completed": ImageEditCompletedEvent,
}


@pytest.mark.parametrize(
    ("quality", "said"),
    [(None, "medium"), ("auto", "medium"), ("standard", "medium"), ("hd", "high"), ("low", "low"), ("xhigh", "xhigh")],
)
def test_answers_and_events_are_exactly_what_the_client_declares(server: Any, quality: str | None, said: str) -> None:
    """The client itself builds its models from any JSON, and checks nothing."""
    body = {"prompt": PROMPT, "quality": quality, "user": "me", "num_inference_steps": 4}
    answer = ImagesResponse.model_validate(post(server, body).json(), strict=True)
    assert answer.quality == said
    stream = {"stream": True, "partial_images": 1}
    texts = [post(server, body | stream).text]
    form = {name: str(value) for name, value in body.items() if value is not None}
    files = {"image": encode_picture(np.zeros((32, 32, 3), np.uint8), 32)}
    url = f"{server.url}/v1/images/edits"
    texts.append(httpx.post(url, data=form | {"stream": "true", "partial_images": "1"}, files=files, timeout=60).text)
    types = set[str]()
    for line in "\n".join(texts).splitlines():
        if line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            event = EVENTS[data["type"]].model_validate(data, strict=True)
            assert event.quality == said
            types.add(data["type"])
    assert types == EVENTS.keys()


def test_a_stream_says_that_its_events_have_no_urls(client: openai.OpenAI) -> None:
    *_, last = client.images.generate(prompt=PROMPT, stream=True, response_format="url")
    assert pixels(base64.b64decode(last.b64_json)).shape == (32, 32, 3)
    assert (last.model_extra or {})["notes"] == ["response_format: events have b64_json alone, as OpenAI's"]


def test_a_text_that_is_longer_than_clip_reads_is_noted_in_every_form_of_answer(server: Any) -> None:
    note = "{}: CLIP reads 32 tokens, start and end included; what follows is cut off"
    whole, cut = (" ".join(["red"] * number) for number in (30, 31))
    assert count_tokens([whole, cut]) == [32, 33]
    assert "notes" not in post(server, {"prompt": whole, "negative_prompt": whole}).json()
    answer = post(server, {"prompt": cut, "negative_prompt": cut}).json()
    assert answer["notes"] == [note.format("prompt"), note.format("negative_prompt")]
    same = [post(server, {"prompt": text, "seed": 5}).json()["data"][0]["b64_json"] for text in (cut, cut + " star")]
    np.testing.assert_array_equal(*(pixels(base64.b64decode(picture)) for picture in same))
    stream = post(server, {"prompt": cut, "stream": True, "partial_images": 1}).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    assert [event["notes"] for event in events] == [[note.format("prompt")]] * 2
    file = post(server, {"prompt": cut, "response_format": "file"})
    assert file.headers["X-Unclip-Notes"] == note.format("prompt")


@pytest.mark.parametrize("error", [NotServing("swapped"), RuntimeError("the tokenizer fails")])
def test_finished_pictures_are_sent_even_if_their_texts_cannot_be_looked_at(
    server: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(server.engine, "cut_at", AsyncMock(side_effect=error))
    assert len(post(server, {"prompt": PROMPT, "n": 2}).json()["data"]) == 2
    assert "image_generation.completed" in post(server, {"prompt": PROMPT, "stream": True}).text


def test_quality_takes_no_more_steps_than_the_decoder_has_timesteps(server: Any, serving: Any) -> None:
    limit = 2 * server.cascade.settings["decoder"]["num_steps"]
    card = ModelCard("tiny", 32, sampling=server.cascade.settings, num_timesteps=limit)
    with serving(create_app(server.engine, None, ApiSettings(card))) as url:
        steps = [
            post_to(url, {"prompt": "a", "quality": quality}).json()["usage"]["steps"] for quality in ("auto", "max")
        ]
    assert steps[1] - steps[0] == limit // 2


def test_stream_shows_each_picture_as_it_comes(server: Any, client: openai.OpenAI) -> None:
    extra = {"seed": 5, "num_inference_steps": 10}
    stream = client.images.generate(prompt=PROMPT, n=2, stream=True, partial_images=3, extra_body=extra)
    events = list(stream)
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    completed = [event for event in events if event.type == "image_generation.completed"]
    assert events == partial + completed
    assert [(event.model_extra or {})["index"] for event in completed] == [0, 1]
    assert sorted(((event.model_extra or {})["index"], event.partial_image_index) for event in partial) == [
        (index, number) for index in range(2) for number in range(3)
    ]
    request = SampleRequest(PROMPT, (5, 6), num_steps={"decoder": 10})
    finished = server.cascade.sample_request(request).images.numpy()
    for event, image in zip(completed, finished, strict=True):
        assert close_to(pixels(base64.b64decode(event.b64_json)), image)
        assert event.size == "32x32"
    first = [pixels(base64.b64decode(event.b64_json)) for event in partial if event.partial_image_index == 0]
    assert all(picture.shape == (32, 32, 3) for picture in first)
    assert not close_to(first[0], finished[0])  # it is a state on the way


def test_openais_asynchronous_client_generates_edits_and_streams(server: Any) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            whole, stream = await asyncio.gather(
                client.images.generate(prompt=PROMPT, extra_body={"seed": 5}),
                client.images.generate(prompt=PROMPT, stream=True, partial_images=1, extra_body={"seed": 5}),
            )
            events = [event async for event in stream]
            assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]
            answers = [(whole.data or [])[0].b64_json, events[-1].b64_json]
            for answer in answers:
                assert close_to(pixels(base64.b64decode(answer or "")), expected(server, PROMPT, [5]).images.numpy()[0])
            edited = await client.images.edit(image=base64.b64decode(answers[0] or ""), prompt="a blue star")
            assert len(edited.data or []) == 1

    asyncio.run(ask())


def test_refused_streams_are_errors_and_no_events(server: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.images.generate(prompt=PROMPT, stream=True, model="another")
    body = {"prompt": "a", "stream": True, "n": 10}
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        statuses = {answer.status_code for answer in pool.map(lambda _: post(server, body), range(12))}
    assert statuses == {200, 429}


def test_a_stream_that_nobody_reads_is_dropped(serving: Any, tmp_path: Path) -> None:
    slow = served_workspace(tmp_path, overrides=("decoder.model.sampler.num_steps=400",))
    engine = Engine(load_cascade(finished_artifacts(slow, CASCADE_STEPS)), max_batch_size=4)
    app = create_app(engine, None, ApiSettings(ModelCard("slow", 32)))
    with contextlib.closing(engine), serving(app) as url:
        body = {"prompt": "a", "n": 4, "stream": True, "partial_images": 3}
        with httpx.stream("POST", f"{url}/v1/images/generations", json=body, timeout=60) as answer:
            next(answer.iter_lines())
        deadline = time.monotonic() + 20
        while not (now := engine.counts())["dropped"]:
            assert time.monotonic() < deadline, now
            time.sleep(0.02)
    assert now["active"] == now["pictures"] == 0


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


def test_what_the_networks_cannot_do_is_400(server: Any, serving: Any) -> None:
    decoder = server.cascade.stage("decoder", DecoderStage)
    engine = Engine(Cascade(server.cascade.clip, [decoder]))
    side_px = decoder.network.config.image_px
    with contextlib.closing(engine), serving(create_app(engine, None, ApiSettings(ModelCard("tiny", side_px)))) as url:
        answers = [post_to(url, {"prompt": "a", "prior_guidance_scale": 2.0, "stream": on}) for on in (False, True)]
    for answer in answers:
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "no stage prior; this cascade has decoder"


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


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_parameter"),
        ({"prompt": " "}, "prompt", "invalid_value"),
        ({"prompt": "x" * 4001}, "prompt", "invalid_value"),
        ({"prompt": 3}, "prompt", "invalid_value"),
        ({"prompt": "x", "n": 0}, "n", "invalid_value"),
        ({"prompt": "x", "n": 11}, "n", "invalid_value"),
        ({"prompt": "x", "n": "2"}, "n", "invalid_value"),
        ({"prompt": "x", "size": "64x64"}, "size", "invalid_value"),
        ({"prompt": "x", "size": "16x32"}, "size", "invalid_value"),
        ({"prompt": "x", "size": "large"}, "size", "invalid_value"),
        ({"prompt": "x", "size": "2x2"}, "size", "invalid_value"),
        ({"prompt": "x", "response_format": "png"}, "response_format", "invalid_value"),
        ({"prompt": "x", "response_format": "file", "n": 2}, "response_format", "invalid_value"),
        ({"prompt": "x", "response_format": "file", "neighbours": 2}, "neighbours", "invalid_value"),
        ({"prompt": "x", "partial_images": 2}, "partial_images", "invalid_value"),
        ({"prompt": "x", "stream": True, "partial_images": 4}, "partial_images", "invalid_value"),
        ({"prompt": "x", "background": "transparent"}, "background", "invalid_value"),
        ({"prompt": "x", "output_format": "gif"}, "output_format", "invalid_value"),
        ({"prompt": "x", "seed": -1}, "seed", "invalid_value"),
        ({"prompt": "x", "quality": "best"}, "quality", "invalid_value"),
        ({"prompt": "x", "steps": 3}, "steps", "unknown_parameter"),
        ({"prompt": "x", "guidance_scale": -1}, "guidance_scale", "invalid_value"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps", "invalid_value"),
        ({"prompt": "x", "negative_prompt": 3}, "negative_prompt", "invalid_value"),
        ([], None, "invalid_json"),
    ],
)
def test_wrong_requests_are_400_and_name_the_parameter(server: Any, body: Any, param: str, code: str) -> None:
    answer = post(server, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"], error["code"]) == (
        400,
        "invalid_request_error",
        param,
        code,
    )
    assert not param or param in error["message"]


def test_bodies_that_are_no_json_are_400_and_large_ones_413(server: Any) -> None:
    assert post(server, content=b"{").json()["error"]["code"] == "invalid_json"
    declared = post(server, content=b" " * ((1 << 20) + 1))
    assert (declared.status_code, declared.json()["error"]["code"]) == (413, "body_too_large")

    def chunks() -> Any:
        for _ in range(20):
            yield b" " * (1 << 16)

    chunked = post(server, content=chunks())  # no length is declared
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/embeddings", "/knn-service"])
def test_half_of_a_character_is_400_wherever_it_stands(server: Any, path: str) -> None:
    for field in (b'"user": "cut \\ud83d"', b'"\\uD83D": 1'):
        answer = httpx.post(f"{server.url}{path}", content=b'{"prompt": "a", ' + field + b"}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
        assert r"half of a character, '\ud83d'" in answer.json()["error"]["message"]
    whole = post(server, content=b'{"prompt": "a", "user": "\\ud83d\\ude00"}')
    assert whole.json()["safety_identifier"] == "\U0001f600"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": "x", "guidance": 3}, "unknown parameter: guidance; do you mean guidance_scale?"),
        ({"prompt": "x", "steps": 3}, "unknown parameter: steps; do you mean num_inference_steps?"),
        ({"promt": "x", "prompt": "y"}, "unknown parameter: promt; do you mean prompt?"),
        ({"prompt": "x", "loras": []}, "unknown parameter: loras"),
        ({"prompt": "x", "n": 1000}, "n: Input should be less than or equal to 10, got 1000"),
        ({"prompt": "x", "quality": "ultra"}, "or 'hd', got 'ultra'"),
        ({"prompt": "x", "quality": "u" * 9999}, f"or 'hd', got '{'u' * 59}..."),
    ],
)
def test_an_error_says_what_came_and_what_is_meant(server: Any, body: Any, says: str) -> None:
    assert post(server, body).json()["error"]["message"].endswith(says)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"content": b"a red star"}, "Expecting value: line 1 column 1 (char 0)"),
        ({"content": b'{"prompt": "a",}'}, "line 1 column"),
        ({"content": b"[" * 100_000}, "unreadable"),
        ({"data": {"prompt": "a"}}, "a form came"),
        ({"files": {"image": b"x"}}, "a form came"),
    ],
)
def test_a_body_that_is_no_json_is_told_why(server: Any, body: Any, reason: str) -> None:
    answer = httpx.post(f"{server.url}/v1/images/generations", **body)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert reason in message
    assert message.endswith('; send an object, such as {"prompt": "a red star"}')


def test_any_content_type_is_read_as_json(server: Any) -> None:
    answer = post(server, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 200


def test_unknown_routes_and_methods_are_errors_of_the_same_form(server: Any) -> None:
    missing = httpx.post(f"{server.url}/v1/images/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    method = httpx.get(f"{server.url}/v1/images/generations")
    assert (method.status_code, method.headers["Allow"]) == (405, "POST")
    assert method.json()["error"]["message"] == "GET /v1/images/generations: this route takes POST"
    for base in ("", "/v1/v1"):  # a client whose base_url is wrong
        wrong = openai.OpenAI(base_url=f"{server.url}{base}", api_key="any", max_retries=0)
        with pytest.raises(openai.NotFoundError, match="do you mean /v1/images/generations"):
            wrong.images.generate(prompt="a")


def test_overload_is_429_with_a_time_to_come_back(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "_wait_s", lambda: 40.5)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: post(server, {"prompt": f"{number}", "n": 10}), range(12)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert {answer.headers["Retry-After"] for answer in refused} == {"41"}
    assert refused[0].json()["error"]["code"] == "overloaded"
    done = [answer for answer in answers if answer.status_code == 200]
    assert len(done) >= 3  # as many as may wait
    assert len(done) + len(refused) == 12


def test_a_client_that_leaves_is_dropped(serving: Any, tmp_path: Path) -> None:
    slow = served_workspace(tmp_path, overrides=("decoder.model.sampler.num_steps=400",))  # time enough to leave
    engine = Engine(load_cascade(finished_artifacts(slow, CASCADE_STEPS)), max_batch_size=4, max_waiting=3)
    body = b'{"prompt": "a", "n": 10}'
    with contextlib.closing(engine), serving(create_app(engine, None, ApiSettings(ModelCard("slow", 32)))) as url:
        host, port = url.removeprefix("http://").split(":")
        with contextlib.closing(socket.create_connection((host, int(port)))) as link:
            link.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            while not httpx.get(f"{url}/healthz").json()["requests"]:
                time.sleep(0.01)
        deadline = time.monotonic() + 20
        while not (now := httpx.get(f"{url}/healthz").json())["dropped"]:
            assert time.monotonic() < deadline, now
            time.sleep(0.02)
    assert now["active"] == now["waiting"] == 0
    assert now["pictures"] < 10


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


def test_a_dead_engine_is_not_healthy(server: Any, serving: Any) -> None:
    engine = Engine(server.cascade)
    engine.close()
    with serving(create_app(engine, None, ApiSettings(ModelCard("tiny", 32)))) as url:
        assert httpx.get(f"{url}/healthz").status_code == 503
        assert post_to(url, {"prompt": "a"}).json()["error"]["type"] == "overloaded_error"


def post_to(url: str, body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)


def test_the_page_is_allowed_its_own_script_and_nothing_else(server: Any) -> None:
    answer = httpx.get(server.url)
    policy = answer.headers["Content-Security-Policy"]
    assert answer.headers["Content-Type"].startswith("text/html")
    [encoded] = re.findall(r'<script type="application/json" id="facts">(.*)</script>', answer.text)
    facts = json.loads(encoded)
    assert (facts["model"], facts["image_px"], facts["neighbours"]) == ("tiny", 32, True)
    assert "/v1/images/generations" in facts["routes"]
    assert facts["sampling"].keys() == server.cascade.settings.keys()
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy
    assert "src=" not in answer.text  # nothing comes from elsewhere


def test_the_name_of_a_recipe_is_only_text_in_the_page(server: Any, serving: Any) -> None:
    card = ModelCard("</script><script>alert(1)</script>", 32)
    with serving(create_app(server.engine, None, ApiSettings(card))) as url:
        text = httpx.get(url).text
    assert card.name not in text
    assert json.loads(text.split('id="facts">')[1].split("</script>")[0])["model"] == card.name
