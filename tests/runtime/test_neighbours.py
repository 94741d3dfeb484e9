"""The index as a deployment of a chain, in Ray Serve's local mode."""

import asyncio
import base64
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import serve
from starlette.testclient import TestClient

from pipeline.errors import ConfigError, DataError
from pipeline.recipe.recipe import parse_recipe
from pipeline.recipe.serve_sections import ServeStageConfig
from pipeline.retrieve.retriever import Retriever
from pipeline.runtime.deployments import replica_of
from pipeline.runtime.front import Front
from pipeline.runtime.loading import load_engine
from pipeline.runtime.neighbours import NeighboursReplica, remote_parts
from pipeline.runtime.parts import (
    NEIGHBOURS,
    Tables,
    digest_of,
    needs_of_replica,
    networks_options,
    part_tables,
    parts_of,
    write_tables,
)
from pipeline.runtime.served import served_artifacts
from pipeline.serve.upkeep import Upkeep
from pipeline.workspace.store import Artifact
from tests.tiny.shards import plain_picture
from tests.tiny.workspace import served_workspace


def test_a_chain_finds_the_same_neighbours_without_an_index_in_the_http_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = served_workspace(tmp_path)
    artifacts, _ = served_artifacts(recipe)
    chain = replace(recipe, serve=replace(recipe.serve, mode="chain", neighbours=ServeStageConfig(replicas=(1, 2))))
    tables, handles = write_tables(chain, artifacts), dict[str, Any]()
    assert [*parts_of(chain)][-1] == NEIGHBOURS
    for part in parts_of(chain):
        deployment: Any = serve.deployment(replica_of(part), name=part, user_config=part_tables(chain, tables, part))
        handles[part] = serve.run(deployment.bind(), name=part, route_prefix=None, _local_testing_mode=True)
        while handles[part].broadcast("reconfigure", part_tables(chain, tables, part)).results() != [None]:
            pass
    here, apart = Front(recipe.serve), Front(chain.serve)
    engine = load_engine(write_tables(recipe, artifacts))
    here.open(recipe, artifacts, engine)

    def fail(*_: object) -> None:
        raise AssertionError("the index is opened in the HTTP process")

    monkeypatch.setattr(Retriever, "open", fail)
    apart.open(chain, artifacts, *remote_parts(tables, handles, Upkeep()))
    clients = [TestClient(front, base_url="http://127.0.0.1") for front in (here, apart)]
    picture = base64.b64encode(plain_picture("blue")).decode()
    found: dict[str, Any] = {"modality": "image", "num_images": 2, "num_result_ids": 4, "indice_name": "tiny"}
    for path, body in (
        ("/knn-service", found | {"image": picture}),
        ("/knn-service", found | {"text": ["a red picture", "two"], "deduplicate": True}),
        ("/knn-service", found | {"embedding_input": [1.0, 2.0]}),
        ("/metadata", {"ids": [1]}),
        ("/v1/images/generations", {"prompt": "a", "seed": 1, "neighbours": 3}),
    ):
        answers = [client.post(path, json=body) for client in clients]
        contents = [answer.json() for answer in answers]
        for content in contents:
            if "data" in content:
                content["data"][0].pop("b64_json")
                content["created"] = 0
        assert answers[0].status_code == answers[1].status_code
        assert _rounded(contents[0]) == _rounded(contents[1])
    route, files = "/v1/images/pca-reconstructions", {"image": plain_picture("blue")}
    for client in clients:
        answer = client.post(route, data={"components": "2", "num_inference_steps": "2"}, files=files)
        assert answer.status_code == 200, answer.text
        assert [row["components"] for row in answer.json()["data"]] == [2, 16]
        refused = client.post(route, data={"components": "17"}, files=files)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "components")
    engine.close()


def _rounded(value: Any) -> Any:
    """JSON whose numbers have three digits: parts of a chain add in another order."""
    match value:
        case float():
            return round(value, 3)
        case dict():
            return {name: _rounded(one) for name, one in value.items()}
        case list():
            return [_rounded(one) for one in value]
        case _:
            return value


def test_a_replica_keeps_the_index_of_before_until_there_is_a_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = served_workspace(tmp_path)
    artifacts, _ = served_artifacts(recipe)
    opened, real = list[str](), Retriever.open

    def note(artifact: Artifact, *, is_verified: bool) -> Retriever:
        opened.append(artifact.uri)
        return real(artifacts["index"], is_verified=is_verified)

    monkeypatch.setattr(Retriever, "open", note)

    async def swaps() -> None:
        replica = NeighboursReplica()
        for uri in ("a", "b"):
            await replica.reconfigure(write_tables(recipe, {**artifacts, "index": Artifact(uri)}))
        width = await replica.ask("a", "embed_dim")
        [rows] = await replica.ask("a", "search", np.eye(width, dtype=np.float32)[:1], 3, "image", num_pictures=1)
        assert [row.picture is not None for row in rows] == [True, False, False]
        await replica.ask("c", "embed_dim")
        await replica.ask("a", "embed_dim")
        with pytest.raises(ValueError, match="no row"):
            await replica.ask("a", "rows", [2**60])

    asyncio.run(swaps())
    assert [Path(uri).name for uri in opened] == ["a", "b", "c"]


def test_calls_that_need_an_index_at_once_open_it_once_and_a_failure_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = served_workspace(tmp_path)
    artifacts, _ = served_artifacts(recipe)
    opened, may_open, real = list[str](), threading.Event(), Retriever.open

    def slowly(artifact: Artifact, *, is_verified: bool) -> Retriever:
        opened.append(artifact.uri)
        assert may_open.wait(30)
        if len(opened) == 1:
            raise DataError("a disk that is away for a moment")
        return real(artifact, is_verified=is_verified)

    monkeypatch.setattr(Retriever, "open", slowly)

    async def ask() -> None:
        replica, uri = NeighboursReplica(), artifacts["index"].uri
        calls = [asyncio.create_task(replica.ask(uri, "embed_dim")) for _ in range(3)]
        while not opened:
            await asyncio.sleep(0.01)
        calls[0].cancel()
        may_open.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in results] == [asyncio.CancelledError, DataError, DataError]
        widths = await asyncio.gather(*(replica.ask(uri, "embed_dim") for _ in range(3)))
        assert len(set(widths)) == 1

    asyncio.run(ask())
    assert len(opened) == 2


def test_an_index_with_a_flipped_bit_is_not_served(tmp_path: Path) -> None:
    recipe = served_workspace(tmp_path)
    artifacts, _ = served_artifacts(recipe)
    rows = next(artifacts["index"].path("segment_00000").glob("image.*.faiss"))
    damaged = bytearray(rows.read_bytes())
    damaged[-1] ^= 1
    rows.write_bytes(damaged)
    Retriever.open(artifacts["index"])  # such damage is seen by its checksum alone
    message = rf"{rows.name}: does not match its checksum; bring it back from a copy"
    with pytest.raises(DataError, match=message):
        asyncio.run(NeighboursReplica().reconfigure(write_tables(recipe, artifacts)))
    without = {name: artifact for name, artifact in artifacts.items() if name != "index"}
    asyncio.run(swapped(write_tables(recipe, without), write_tables(recipe, artifacts)))
    engine, front = load_engine(write_tables(recipe, artifacts)), Front(recipe.serve)
    with pytest.raises(DataError, match=message):
        front.open(recipe, artifacts, engine)
    engine.close()


async def swapped(before: Tables, damaged: Tables) -> None:
    """A replica that serves goes on, and says that it has not what a swap brings."""
    replica = NeighboursReplica()
    await replica.reconfigure(before)
    await replica.reconfigure(damaged)
    assert (await replica.serves(digest_of(before)), await replica.serves(digest_of(damaged))) == (True, False)
    with pytest.raises(DataError):
        await replica.prepare(damaged)


def test_the_index_takes_no_gpu_and_is_apart_in_a_chain_alone() -> None:
    table = {"memory_gb_per_replica": 3, "replicas": [2, 2], "label_selector": {"b": "2"}}
    serving = {"mode": "chain", "accelerator": "cuda", "label_selector": {"a": "1"}, "neighbours": table}
    recipe = parse_recipe({"serve": serving})
    assert needs_of_replica(recipe.serve, NEIGHBOURS) == {"CPU": 1.0, "memory": 3e9}
    options = networks_options(recipe.serve, NEIGHBOURS)
    assert (options["num_replicas"], options["ray_actor_options"]["label_selector"]) == (2, {"a": "1", "b": "2"})
    for wrong, message in (
        ({"neighbours": table}, r'serve\.neighbours: only read with serve\.mode = "chain"'),
        ({"mode": "chain", "neighbours": {"gpus_per_replica": 0.5}}, "the index takes no GPU"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_recipe({"serve": wrong})
