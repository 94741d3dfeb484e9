"""Pictures that clients send: how often and where they are decoded, and their masks."""

import asyncio
import base64
import concurrent.futures
import io
import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from models.request import Interpolation, RawPicture, Variation
from pipeline.recipe.picture_card import ModelCard
from pipeline.sampling.masks import shrink_mask
from pipeline.serve import api, knn, uploads
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.embeddings import EmbeddingRequest, embed
from pipeline.serve.held import HeldBodies, HeldBytes, HeldPictures
from pipeline.serve.protocols import Overloaded
from tests.serve.test_engine import wait_until
from tests.tiny.pictures import noisy_picture, png


def test_no_more_than_two_pictures_of_clients_are_decoded_at_once_and_other_threads_stay_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, most, read, may_end = list[int](), list[int](), uploads.read, threading.Event()

    def slow(data: bytes, **options: Any) -> Any:
        running.append(1)
        most.append(len(running))
        assert may_end.wait(30)
        try:
            return read(data, **options)
        finally:
            running.pop()

    monkeypatch.setattr(uploads, "read", slow)

    async def decode_many() -> list[RawPicture]:
        asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(2))
        decoded = asyncio.gather(*(uploads.decoding(uploads.raw_picture, noisy_picture(1), "image") for _ in range(12)))
        await asyncio.wait_for(asyncio.to_thread(lambda: None), 5)
        assert not decoded.done()
        may_end.set()
        return await decoded

    pictures = asyncio.run(decode_many())
    assert len({picture.sha256 for picture in pictures}) == 1
    assert max(most) == 2


def test_a_picture_with_a_mask_is_decoded_once_as_it_was_without(monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = uploads.read, list[str]()
    monkeypatch.setattr(
        uploads, "read", lambda data, **options: calls.append(options["where"]) or read(data, **options)
    )
    levels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "PNG")
    picture, mask = uploads.masked_picture(stream.getvalue(), None, 16)
    assert calls == ["image"]
    assert picture == uploads.raw_picture(stream.getvalue(), "image", 16)
    assert mask is not None


def test_a_long_strip_is_sent_as_a_small_picture() -> None:
    strip = uploads.bounded_picture(png(np.zeros((1024, 16_384, 3), np.uint8)), "image")
    assert strip.nbytes < 13 << 20
    assert strip.shape[1] / strip.shape[0] == pytest.approx(16, rel=0.01)


def test_pictures_of_requests_under_way_are_bounded_until_each_request_ends() -> None:
    held, one = HeldPictures(most_bytes=5000), uploads.raw_picture(noisy_picture(1), "image")
    variation, interpolation = Variation(one), Interpolation((one, one), (0.0,))
    assert len(one.levels) == 32 * 32 * 3
    with held.hold_edit(variation):
        for edit in (variation, interpolation):
            with pytest.raises(Overloaded, match="pictures to edit of 0 MB are under way already"):
                held.hold_edit(edit)
    with (large := held.hold_edit(interpolation)):  # alone it is taken, however large
        assert held.num_bytes == 2 * len(one.levels)
    assert (held.num_bytes, large.num_bytes) == (0, 0)  # also while an error refers to the request
    held.hold_edit(variation)  # nobody waits for its request: the connection is gone before the answer began
    assert held.num_bytes == 0


def test_who_is_refused_comes_back_when_one_of_those_before_is_likely_to_have_ended() -> None:
    held = HeldBytes("bodies", 100)
    first = held.hold(60)
    first.began_s -= 30
    with pytest.raises(Overloaded) as unknown:
        held.hold(60)
    first.end()
    assert held.num_bytes == 0
    holds = [held.hold(40), held.hold(40)]
    with pytest.raises(Overloaded) as refused:
        held.hold(40)
    assert unknown.value.retry_after_s == 0
    assert refused.value.retry_after_s == pytest.approx(15, abs=1)
    assert [hold.num_bytes for hold in holds] == [40, 40]


def test_bodies_of_requests_under_way_are_bounded_in_sum(
    server: Any, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are small are taken always, and that of an edit counts until its pictures are decoded."""
    monkeypatch.setattr(api, "HeldBodies", lambda app: HeldBodies(app, most_bytes=1 << 20))
    has_come, may_end, edit_of = threading.Event(), threading.Event(), api.edit_of
    monkeypatch.setattr(api, "edit_of", lambda *some: (has_come.set(), may_end.wait(60), edit_of(*some))[2])
    files = {"image": noisy_picture(1) + bytes(800_000)}  # behind the end of the PNG
    texts = b'{"input": "a"' + b" " * 320_000 + b"}"
    app = create_app(server.engine, None, ApiSettings(ModelCard("tiny", 32)))
    with serving(app) as url, concurrent.futures.ThreadPoolExecutor() as threads:

        def edit() -> int:
            form = {"num_inference_steps": "200"}
            return httpx.post(f"{url}/v1/images/variations", files=files, data=form, timeout=60).status_code

        def embed() -> httpx.Response:
            return httpx.post(f"{url}/v1/embeddings", content=texts, timeout=60)

        assert embed().status_code == 200
        first = threads.submit(edit)
        assert has_come.wait(60)
        error = embed().json()["error"]
        assert (error["code"], error["message"]) == (
            "overloaded",
            "bodies of requests of 1 MB are under way already; try again later",
        )
        assert httpx.post(f"{url}/v1/embeddings", json={"input": "a"}, timeout=60).status_code == 200
        may_end.set()
        wait_until(lambda: embed().status_code == 200)
        assert not first.done()
        assert first.result() == 200


def test_pictures_are_decoded_in_the_time_of_their_request_and_while_its_client_is_there(
    server: Any, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, requests, edit_of, sample = list[Any](), list[Any](), api.edit_of, server.engine.sample
    monkeypatch.setattr(api, "edit_of", lambda *some: (time.sleep(0.3), decoded.append(None), edit_of(*some))[2])
    monkeypatch.setattr(
        server.engine, "sample", lambda request, *rest: (requests.append(request), sample(request, *rest))[1]
    )
    may_end = threading.Event()
    busy = [uploads._DECODERS.submit(may_end.wait, 60) for _ in range(2)]
    with serving(create_app(server.engine, None, ApiSettings(ModelCard("tiny", 32)))) as url:

        def post(longest_s: float, **fields: str) -> httpx.Response:
            files, form = {"image": noisy_picture(1)}, {"num_inference_steps": "2"} | fields
            return httpx.post(f"{url}/v1/images/variations", files=files, data=form, timeout=longest_s)

        late = post(60, timeout="0.1")
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        with pytest.raises(httpx.ReadTimeout):
            post(0.2)
        time.sleep(0.3)  # in which the server sees that its client has left
        may_end.set()
        assert post(60, timeout="30").status_code == 200
    assert len(decoded) == 1
    assert requests[0].timeout_s < 30 - 0.3
    assert all(one.result() for one in busy)


@pytest.mark.parametrize(
    ("route", "room", "name", "most_bytes"),
    [
        ("embeddings", uploads, "_TO_EMBED", 5000),
        ("image", uploads, "_TO_EMBED", 5000),
        ("image_url", uploads, "_TO_EMBED", 5000),
        ("image_url", knn, "_FETCHED", 500),
    ],
)
def test_pictures_that_wait_for_clip_are_bounded_in_sum(
    monkeypatch: pytest.MonkeyPatch, route: str, room: Any, name: str, most_bytes: int
) -> None:
    """Once they are decoded each is larger than the file that a client sent; files that were fetched are bounded, too."""
    held, may_end = HeldBytes("pictures", most_bytes), asyncio.Event()
    monkeypatch.setattr(room, name, held)
    monkeypatch.setattr(knn, "_fetch", AsyncMock(return_value=noisy_picture(1)))
    text = base64.b64encode(noisy_picture(1)).decode()

    async def embed_image(_image: Any) -> Any:
        await may_end.wait()
        return np.zeros(2, np.float32)

    async def ask(networks: Any) -> Any:
        if route == "embeddings":
            body = EmbeddingRequest(input=[f"data:image/png;base64,{text}"])
            return await embed(networks, body, ModelCard("tiny", 32))
        return await knn._embed(networks, networks, route, [text])

    async def ask_three() -> list[Any]:
        networks = SimpleNamespace(embed_image=embed_image)
        asking = [asyncio.create_task(ask(networks)) for _ in range(3)]
        await asyncio.to_thread(wait_until, lambda: sum(one.done() for one in asking) == 2)
        may_end.set()
        return await asyncio.gather(*asking, return_exceptions=True)

    answers = asyncio.run(ask_three())
    assert sum(isinstance(answer, Overloaded) for answer in answers) == 2
    assert held.num_bytes == 0


def test_every_form_of_answer_to_an_edit_makes_room_again(
    server: Any, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldPictures(most_bytes=5000)
    monkeypatch.setattr(api, "HeldPictures", lambda: held)
    settings = ApiSettings(ModelCard("tiny", 32))
    sizes = list[int]()
    add = held.hold_edit
    monkeypatch.setattr(held, "hold_edit", lambda edit: (add(edit), sizes.append(held.num_bytes))[0])
    with serving(create_app(server.engine, None, settings)) as url:

        def post(**fields: str) -> int:
            form, files = {"num_inference_steps": "2"} | fields, {"image": noisy_picture(1)}
            return httpx.post(f"{url}/v1/images/variations", files=files, data=form, timeout=60).status_code

        assert [post(), post(stream="true"), post(response_format="file"), post(size="8x8")] == [200] * 4
        late = {"num_inference_steps": "1000", "timeout": "0.3"}  # the picture is decoded in it, but not sampled
        assert [post(**late), post(stream="true", **late), post(neighbours="1")] == [504, 200, 400]
        wait_until(lambda: held.num_bytes == 0)
        assert sizes == [3072] * 7
        with add(Variation(uploads.raw_picture(noisy_picture(1), "image"))):
            assert post() == 429
        assert post() == 200


def test_a_smaller_mask_covers_every_pixel_that_it_touches() -> None:
    masked = np.random.default_rng(0).random((37, 37)) > 0.98
    expected = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(masked)[None, None].float(), 16)[0, 0] > 0
    np.testing.assert_array_equal(shrink_mask(masked, 16), expected.numpy())
    np.testing.assert_array_equal(shrink_mask(masked, 64), masked)
