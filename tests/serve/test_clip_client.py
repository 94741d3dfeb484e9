"""clip-retrieval's own client, as it is on PyPI, against the server."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.serve.api import ApiSettings, create_app
from pipeline.workspace.store import Workspace
from tests.tiny.shards import plain_picture

_CLIENT = Path(sys.prefix) / "oracles/clip_retrieval/clip_client.py"


@pytest.fixture(scope="module")
def clip_client() -> Any:
    """The client's module alone: its package imports the whole back end, which does not go with this environment."""
    if not _CLIENT.exists():
        pytest.skip("clip-retrieval is not installed apart: make dev")
    spec = importlib.util.spec_from_file_location("clip_client", _CLIENT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(clip_client: Any, server: Any) -> Any:
    """With every default of the client but the number of results, so that it asks for safe and distinct pictures."""
    return clip_client.ClipClient(url=f"{server.url}/knn-service", indice_name="tiny", num_images=4)


def test_the_client_searches_by_text(clip_client: Any, server: Any) -> None:
    text = clip_client.ClipClient(
        f"{server.url}/knn-service", "tiny", modality=clip_client.Modality.TEXT, num_images=3, deduplicate=False
    )
    results = text.query(text="a green picture")
    assert len(results) == 3
    assert results[0]["caption"] == "a green picture"
    assert results[0]["similarity"] > 0.999
    assert {"id", "url", "uid", "image", "similarity", "caption"} <= set(results[0])


def test_the_client_searches_by_a_picture_with_alpha_too(client: Any, tmp_path: Path) -> None:
    (tmp_path / "blue.png").write_bytes(plain_picture("blue", 40))
    [nearest, *_] = client.query(image=str(tmp_path / "blue.png"))
    assert nearest["caption"] == "a blue picture"
    assert nearest["similarity"] > 0.999
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")  # what is transparent is white, not black
    [nearest, *_] = client.query(image=str(tmp_path / "clear.png"))
    assert nearest["caption"] == "a white picture"
    assert nearest["similarity"] > 0.999


def test_the_client_searches_by_an_embedding(client: Any, server: Any) -> None:
    steps = {step.name: step for step in make_plan(server.recipe)}
    embed = artifact_of(Workspace(server.recipe.workspace), steps["embed"])
    table = pq.read_table(embed.path("00000.parquet"))
    vector = np.array(table.column("z_image")[6].as_py(), np.float32)
    [nearest, *_] = client.query(embedding_input=(3 * vector).tolist())
    assert nearest["uid"] == table.column("uid")[6].as_py()


def test_ids_survive_the_clients_json_and_give_the_same_row(client: Any, server: Any) -> None:
    import httpx

    results = client.query(text="a red picture")
    assert all(float(one["id"]) == one["id"] and int(float(one["id"])) == one["id"] for one in results)
    rows = httpx.post(
        f"{server.url}/metadata", json={"indice_name": "tiny", "ids": [int(float(one["id"])) for one in results]}
    ).json()
    assert [row["metadata"]["uid"] for row in rows] == [one["uid"] for one in results]


def test_by_default_the_client_finds_only_rows_that_the_recipe_calls_safe(
    clip_client: Any, server: Any, neighbours: Any, serving: Any
) -> None:
    settings = ApiSettings(ModelCard("tiny", 32), safe_rows="not contains(caption, 'red')")
    with serving(create_app(server.engine, neighbours, settings)) as url:
        query: dict[str, Any] = {"modality": clip_client.Modality.TEXT, "num_images": 10, "deduplicate": False}
        answers = [
            clip_client.ClipClient(f"{url}/knn-service", "tiny", **query, **safety).query(text="a red picture")
            for safety in ({}, {"use_safety_model": False, "use_violence_detector": False})
        ]
    assert [len(results) for results in answers] == [9, 10]
    assert "a red picture" not in {result["caption"] for result in answers[0]}


def test_the_client_is_refused_other_aesthetic_numbers_than_its_own(clip_client: Any, server: Any) -> None:
    url = f"{server.url}/knn-service"
    assert isinstance(clip_client.ClipClient(url, "tiny").query(text="a red picture"), list)
    for field, number in (("aesthetic_score", 5), ("aesthetic_weight", 0.9)):
        answer = clip_client.ClipClient(url, "tiny", **{field: number}).query(text="a red picture")
        assert answer["error"]["param"] == field


def test_an_address_of_a_picture_is_refused_in_words(client: Any) -> None:
    answer = client.query(image="http://169.254.169.254/latest/meta-data")
    assert "fetches no URLs" in answer["error"]["message"]
