"""What a key may use, what it pays for, and what its scopes open."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import numpy as np
import pytest

from models.request import SampleRequest
from pipeline.serve.keys import Meter, Scope, add_key, read_keys
from pipeline.serve.protocols import Accepted, Images, NeighbourRow, NotServing, Overloaded, Preview, SampledPictures
from tests.serve.guarded import WhiteModel, ask, client_of, guarded
from tests.tiny.shards import plain_picture


@pytest.mark.parametrize(
    ("limits", "expected", "unit"),
    [
        ({"requests": 2}, [200, 200, 429], "requests"),
        ({"pixels": 2 * 16 * 16}, [200, 200, 429], "pixels"),
        ({"bytes": 10}, [200, 429], "bytes"),
    ],
)
def test_what_a_key_uses_is_limited(keys: Path, limits: dict[str, int], expected: list[int], unit: str) -> None:
    key, other = add_key(keys, "alice", **limits), add_key(keys, "bob")
    app = guarded(keys=keys)
    answers = [ask(app, key) for _ in expected]
    assert [answer.status_code for answer in answers] == expected
    error = answers[-1].json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert unit in error["message"]
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 36000
    assert ask(app, other).status_code == 200
    if unit == "requests":
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]


class RefusingModel(WhiteModel):
    """Networks that refuse, each time for the next of these reasons, and then answer."""

    def __init__(self) -> None:
        self.errors = [Overloaded("full"), NotServing("none"), ValueError("no such size")]
        self.clients = list[str]()

    async def sample(self, request: SampleRequest, client: str = "") -> SampledPictures:
        self.clients.append(client)
        if self.errors:
            raise self.errors.pop()
        return SampledPictures(np.zeros((len(request.seeds), 16, 16, 3), np.uint8), None)

    async def stream(self, request: SampleRequest, client: str = "", _num_previews: int = 0) -> Any:
        sampled = await self.sample(request, client)
        yield Accepted()
        yield sampled


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_pays_no_pixels_for_pictures_that_are_refused(keys: Path, stream: bool) -> None:
    key = add_key(keys, "alice", pixels=16 * 16)
    app = guarded(keys=keys, model=RefusingModel())
    assert [ask(app, key, stream=stream).status_code for _ in range(5)] == [400, 503, 429, 200, 429]


class NearModel(WhiteModel):
    """Networks that also embed pictures."""

    async def embed_image(self, _image: Images) -> Any:
        return np.eye(4)[0]


@pytest.mark.parametrize("stream", [False, True])
def test_neighbours_need_the_scope_of_a_search(keys: Path, stream: bool) -> None:
    row = NeighbourRow(7, 0.5, {"uid": "u", "url": "http://data", "caption": "a caption", "split": "train"})
    index = Mock(search=AsyncMock(return_value=[[row]]), near_copy=AsyncMock(return_value=None))
    scopes: list[list[Scope]] = [["images"], ["images", "search"]]
    without, both = (add_key(keys, str(number), opens) for number, opens in enumerate(scopes))
    for app in (guarded(keys=keys, model=NearModel(), index=index), guarded(model=NearModel(), index=index)):
        index.search.reset_mock()
        answers = [ask(app, key, neighbours=1, stream=stream) for key in (without, both)]
        assert [answer.status_code for answer in answers] == [200, 200]
        has_neighbours = ["a caption" in answer.text for answer in answers]
        assert has_neighbours == [app.keys is None, True]
        assert ["lacks the scope 'search'" in answer.text for answer in answers] == [app.keys is not None, False]
        assert index.search.await_count == sum(has_neighbours)
    assert "scope" not in ask(guarded(keys=keys, index=index), without).text


class FailingModel(WhiteModel):
    """Networks that accept a stream and then fail, before its pictures or after them."""

    def __init__(self, error: Exception, has_pictures: bool) -> None:
        self.error = error
        self.has_pictures = has_pictures

    async def stream(self, request: SampleRequest, _client: str = "", _num_previews: int = 0) -> Any:
        yield Accepted()
        yield Preview(0, 0, np.full((16, 16, 3), 255, np.uint8))
        if self.has_pictures:
            yield await self.sample(request)
        raise self.error


@pytest.mark.parametrize("error", [NotServing("gone"), Overloaded("full"), ValueError("no such edit")])
@pytest.mark.parametrize("has_pictures", [False, True])
def test_a_key_pays_for_a_stream_that_fails_only_if_its_pictures_came(
    keys: Path, error: Exception, has_pictures: bool
) -> None:
    key = add_key(keys, "alice", pixels=16 * 16)
    app = guarded(keys=keys, model=FailingModel(error, has_pictures))
    answer = ask(app, key, stream=True, partial_images=1)
    assert (answer.status_code, "event: error" in answer.text) == (200, True)
    assert ("completed" in answer.text) == has_pictures
    assert ask(app, key).status_code == (429 if has_pictures else 200)


class ReducingModel(WhiteModel):
    """Networks with the training embeddings, which notes what it is asked for."""

    def __init__(self) -> None:
        self.reduced = list[Sequence[int]]()
        self.edits = list[Any]()

    async def reduce_image(self, _image: Any, components: Sequence[int]) -> tuple[tuple[int, ...], Any]:
        self.reduced.append(components)
        return (*components, 16), np.eye(16)[: len(components) + 1]

    async def sample(self, request: SampleRequest, _client: str = "") -> SampledPictures:
        self.edits.append(request.edit)
        return await super().sample(request)


def test_a_key_without_the_pixels_has_no_embeddings_read_for_it(keys: Path) -> None:
    key, model = add_key(keys, "alice", pixels=4 * 16 * 16), ReducingModel()
    client, files = client_of(guarded(keys=keys, model=model, index=Mock()), key), {"image": plain_picture("red")}
    answers = [
        client.post("/v1/images/pca-reconstructions", data={"components": counts}, files=files)
        for counts in ("2,3", "5")
    ]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert model.reduced == [(2, 3)]
    [edit] = model.edits
    assert (edit.picture.levels, len(edit.picture.sha256), edit.components) == (b"", 64, (2, 3, 16))


def test_shares_are_of_checked_keys_and_else_of_addresses(keys: Path) -> None:
    key, other = add_key(keys, "alice"), add_key(keys, "bob")
    for path, headers, number in (
        (keys, [f"Bearer {key}", f"bearer {key}", f"Bearer  {key}"], 1),
        (keys, [f"Bearer {key}", f"Bearer {other}"], 2),
        (None, ["Bearer invented", "Bearer another", "Basic x"], 1),
    ):
        model = RefusingModel()
        model.errors.clear()
        client = client_of(guarded(keys=path, model=model))
        for header in headers:
            answer = client.post("/v1/images/generations", json={"prompt": "a"}, headers={"Authorization": header})
            assert answer.status_code == 200
        assert len(set(model.clients)) == number


def test_a_bucket_fills_evenly_and_a_large_request_passes_when_it_is_full(keys: Path) -> None:
    now_s = 0.0
    add_key(keys, "alice", pixels=600)
    [key] = read_keys(keys)
    meter = Meter(clock=lambda: now_s)
    assert meter.wait_s(key, "pixels", 10_000) == 0
    meter.use(key, "pixels", 660)
    assert meter.wait_s(key, "pixels", 60) == pytest.approx(12)
    now_s = 12.0
    assert meter.wait_s(key, "pixels", 60) == pytest.approx(0)
    assert meter.wait_s(key, "requests") == 0
