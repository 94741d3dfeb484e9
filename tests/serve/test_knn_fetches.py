"""Pictures that a search fetches by their URLs."""

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response

from pipeline.data.urls import AddressRules
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve import knn
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.web import ApiError
from tests.serve.knn_requests import post
from tests.tiny.pictures import noisy_picture
from tests.tiny.shards import plain_picture


@pytest.fixture(scope="module")
def fetching(server: Any, neighbours: Any, serving: Any) -> Any:
    """A server that fetches pictures."""
    settings = ApiSettings(ModelCard("tiny", 32), fetches_urls=True)
    with serving(create_app(server.engine, neighbours, settings)) as url:
        yield SimpleNamespace(url=url)


@pytest.fixture(scope="module")
def pictures(serving: Any) -> Any:
    """A host of pictures on this machine."""
    app = FastAPI()

    @app.get("/red.png")
    async def red() -> Response:
        return Response(plain_picture("red", 40), media_type="image/png")

    @app.get("/away")
    async def away() -> Response:
        return RedirectResponse("http://169.254.169.254/latest/meta-data")

    with serving(app) as url:
        yield url


def test_addresses_that_are_not_public_are_refused_on_every_hop(
    fetching: Any, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = [f"{pictures}/red.png", pictures.replace("127.0.0.1", "localhost") + "/red.png", "http://[::1]/a.png"]
    for url in [*hosts, "http://169.254.169.254/latest", "http://10.0.0.1/a.png"]:
        answer = post(fetching, image_url=url)
        assert answer.status_code == 400, url
        assert "image_url: address: the host has a private, loopback" in answer.json()["error"]["message"]
    for url, cause in (("file:///etc/passwd", "scheme"), ("gopher://a/b", "scheme"), ("http://", "url")):
        assert post(fetching, image_url=url).json()["error"]["message"].startswith(f"image_url: {cause}: ")
    monkeypatch.setattr(knn, "AddressRules", lambda: AddressRules(["127.0.0.1/32"]))
    assert "image_url: address: " in post(fetching, image_url=f"{pictures}/away").json()["error"]["message"]


def test_a_picture_is_fetched_where_that_is_on(
    fetching: Any, server: Any, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "AddressRules", lambda: AddressRules(["127.0.0.1/32"]))
    [nearest, *_] = post(fetching, image_url=f"{pictures}/red.png").json()
    assert nearest["caption"] == "a red picture"
    assert "fetches no URLs" in post(server, image_url=f"{pictures}/red.png").json()["error"]["message"]
    assert len(post(fetching, image_url=[f"{pictures}/red.png"] * 2).json()) == 2
    small = dataclasses.replace(knn._FETCHING, max_body_bytes=20)
    monkeypatch.setattr(knn, "_FETCHING", small)
    message = post(fetching, image_url=f"{pictures}/red.png").json()["error"]["message"]
    assert message.startswith("image_url: body-size: ")


def test_all_pictures_of_a_request_are_fetched_in_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, left_s = knn._fetch, list[float]()

    async def slow(_: str, longest_s: float) -> Any:
        left_s.append(longest_s)
        await asyncio.sleep(0.05)
        return noisy_picture(1)

    monkeypatch.setattr(knn, "_fetch", slow)
    model, nobody = AsyncMock(), AsyncMock()
    model.embed_image.return_value = np.zeros(2, np.float32)
    asyncio.run(knn._embed(model, nobody, "image_url", ["a", "b", "c"]))
    first, second, third = left_s
    assert first == knn._FETCHES_S
    assert second <= first - 0.04
    assert third <= second - 0.04
    with pytest.raises(ApiError, match="did not come within 30 s"):
        asyncio.run(fetch("http://example.com/a.png", 0.0))
