"""The training pictures beside each picture that was sampled."""

import asyncio
import base64
import json
import threading
from typing import Any
from unittest.mock import AsyncMock

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import DataError, StepError
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.retrieve.index import Neighbour
from pipeline.retrieve.retriever import Retriever
from pipeline.serve import local_neighbours
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.local_neighbours import LocalNeighbours
from pipeline.serve.metrics import HttpMetrics
from pipeline.serve.protocols import NotServing
from pipeline.workspace.store import Workspace
from tests.serve.test_engine import wait_until
from tests.tiny.shards import pixels, plain_picture


def test_every_picture_has_its_nearest_pairs_by_its_own_pixels(server: Any) -> None:
    body = {"prompt": "a red picture", "n": 2, "seed": 5, "neighbours": 3}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()
    steps = {step.name: step for step in make_plan(server.recipe)}
    embed = artifact_of(Workspace(server.recipe.workspace), steps["embed"])
    table = pq.read_table(embed.path("00000.parquet"))
    rows = np.array(table.column("z_image").to_pylist(), np.float32)
    assert len(answer["data"]) == 2
    for entry in answer["data"]:
        picture = torch.from_numpy(pixels(base64.b64decode(entry["b64_json"])).copy())[None]
        cosines = rows @ server.cascade.clip.encode_image(picture)[0].numpy() / np.linalg.norm(rows, axis=1)
        order = np.argsort(-cosines)[:3]
        near = entry["neighbours"]
        assert [one["similarity"] for one in near] == pytest.approx(cosines[order], abs=2e-3)
        assert near[0]["uid"] == table.column("uid")[int(order[0])].as_py()
        assert set(near[0]) == {"id", "uid", "url", "caption", "split", "similarity", "near_copy"}
        assert near[0]["near_copy"] is None  # ten rows say nothing of how near others come


def test_a_near_copy_is_above_the_limit_and_of_a_training_row(
    server: Any, neighbours: LocalNeighbours, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LocalNeighbours(neighbours._retriever)
    files, form = {"image": plain_picture("red", 32)}, {"neighbours": "10", "seed": "1"}
    with serving(create_app(server.engine, own, ApiSettings(ModelCard("tiny", 32)))) as url:
        route = f"{url}/v1/images/variations"
        near = httpx.post(route, data=form, files=files, timeout=60).json()["data"][0]["neighbours"]
        limit = near[4]["similarity"]
        monkeypatch.setattr(own, "near_copy", AsyncMock(return_value=limit))
        again = httpx.post(route, data=form, files=files, timeout=60).json()["data"][0]["neighbours"]
        stream = httpx.post(route, data=form | {"stream": "true"}, files=files, timeout=60).text
    assert [one["id"] for one in again] == [one["id"] for one in near]
    flags = [one["near_copy"] for one in again]
    assert flags == [one["split"] == "train" and one["similarity"] > limit for one in again]
    assert True in flags[:4]
    completed = json.loads(stream.rpartition("data: ")[2])
    assert completed["neighbours"] == again


@pytest.mark.parametrize(
    "error",
    [NotServing("no replica is ready"), DataError("index: damaged"), StepError("s3: no answer"), OSError("gone")],
)
def test_pictures_are_sent_although_their_neighbours_cannot_be_found(
    server: Any, neighbours: LocalNeighbours, serving: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    own = LocalNeighbours(neighbours._retriever)
    monkeypatch.setattr(own, "search", AsyncMock(side_effect=error))
    body = {"prompt": "a red picture", "neighbours": 3, "num_inference_steps": 2}
    note = "neighbours: the index of the training pictures does not answer"
    with serving(create_app(server.engine, own, ApiSettings(ModelCard("tiny", 32)))) as url:
        answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).json()
        stream = httpx.post(f"{url}/v1/images/generations", json=body | {"stream": True}, timeout=60).text
    assert answer["data"][0].keys() == {"b64_json", "seed"}
    completed = json.loads(stream.rpartition("data: ")[2])
    assert answer["notes"] == completed["notes"] == [note]


def test_the_limit_of_near_copies_is_measured_once_for_all_who_ask_and_again_if_it_failed(
    neighbours: LocalNeighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, may_end, begun = LocalNeighbours(neighbours._retriever), threading.Event(), list[None]()

    def measure(_index: Any) -> float:
        begun.append(None)
        if len(begun) == 1:
            raise OSError("no disk")
        assert may_end.wait(20)
        return 0.5

    async def ask() -> list[Any]:
        with pytest.raises(OSError, match="no disk"):
            await own.near_copy()
        asking = [asyncio.create_task(own.near_copy()) for _ in range(4)]
        await asyncio.to_thread(wait_until, lambda: len(begun) == 2)
        asking[0].cancel()  # its client has left
        await asyncio.sleep(0)
        may_end.set()
        return [*await asyncio.gather(*asking, return_exceptions=True), await own.near_copy()]

    monkeypatch.setattr(local_neighbours, "near_copy_similarity", measure)
    left, *limits = asyncio.run(ask())
    assert isinstance(left, asyncio.CancelledError)
    assert (limits, len(begun)) == ([0.5] * 4, 2)


def test_neighbours_without_an_index_are_refused_before_anything_is_sampled(server: Any, serving: Any) -> None:
    before = server.engine.counts()["requests"]
    with serving(create_app(server.engine, None, ApiSettings(ModelCard("tiny", 32)))) as url:
        answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", "neighbours": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "neighbours")
    assert server.engine.counts()["requests"] == before


def test_searches_are_timed_as_the_server_times_them(neighbours: LocalNeighbours) -> None:
    metrics = HttpMetrics()
    timed = LocalNeighbours(neighbours._retriever, metrics.neighbours.time)
    width = asyncio.run(timed.embed_dim())
    asyncio.run(timed.search(np.eye(width, dtype=np.float32)[:2], 1, "image"))
    assert metrics.registry.get_sample_value("unclip_neighbours_seconds_count") == 1


@pytest.mark.parametrize("error", [DataError("no such sample"), StepError("the store does not answer")])
def test_a_picture_that_cannot_be_read_is_missing_alone(
    neighbours: LocalNeighbours, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    own = LocalNeighbours(Retriever(neighbours._retriever.index))
    read, vectors = own._retriever.picture, np.eye(16, dtype=np.float32)[:1]
    [whole] = asyncio.run(own.search(vectors, 3, "image", num_pictures=3))

    def picture(neighbour: Neighbour) -> bytes:
        if neighbour.id == whole[1].id:
            raise error
        return read(neighbour)

    monkeypatch.setattr(own._retriever, "picture", picture)
    [rows] = asyncio.run(own.search(vectors, 3, "image", num_pictures=3))
    assert [row.id for row in rows] == [row.id for row in whole]
    assert [row.picture is None for row in rows] == [False, True, False]
