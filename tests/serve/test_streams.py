"""Pictures as server-sent events: previews, then the pictures, as OpenAI's clients read them."""

import asyncio
import base64
import concurrent.futures
import json
from typing import Any

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

from models.request import SampleRequest
from pipeline.serve.picture_files import encode_picture
from tests.serve.asking import PROMPT, close_to, expected, post
from tests.tiny.shards import pixels

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
