"""Searches of the index: what they find, and what their answers say."""

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import httpx
import numpy as np
import pytest

from pipeline.data.rows import make_uid
from pipeline.data.vectors import to_unit
from pipeline.errors import ConfigError, StepError
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve import local_neighbours, uploads
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.knn_bodies import KnnRequest
from tests.serve.knn_requests import embeddings, post
from tests.tiny.shards import pixels, plain_picture
from tests.tiny.workspace import COLOURS


def test_a_picture_finds_itself_first_with_its_row_and_its_pixels(server: Any) -> None:
    for colour in ("red", "blue"):
        results = post(server, image=base64.b64encode(plain_picture(colour, 40)).decode()).json()
        assert len(results) == 3
        assert results[0]["caption"] == f"a {colour} picture"
        assert results[0]["uid"] == make_uid(results[0]["url"], results[0]["caption"])
        assert results[0]["similarity"] > 0.999
        assert results[0]["similarity"] >= results[1]["similarity"] >= results[2]["similarity"]
        stored = base64.b64decode(results[0]["image"])
        assert stored.startswith(b"\xff\xd8")
        assert np.abs(pixels(stored).astype(int) - pixels(plain_picture(colour))).max() < 4


def test_an_embedding_finds_what_is_nearest_by_arithmetic(server: Any) -> None:
    table = embeddings(server)
    for modality in ("image", "text"):
        vectors = np.array(table.column(f"z_{modality}").to_pylist(), np.float32)
        query = vectors[4] + 0.3 * vectors[7]
        results = post(server, embedding_input=(5 * query).tolist(), modality=modality, num_images=10).json()
        cosines = vectors @ query / np.linalg.norm(query) / np.linalg.norm(vectors, axis=1)
        order = np.argsort(-cosines)
        assert [one["similarity"] for one in results] == pytest.approx(cosines[order], abs=2e-3)
        assert results[0]["uid"] == table.column("uid")[int(order[0])].as_py()


@pytest.mark.parametrize("number", [1e300, 1e-320])
def test_an_embedding_is_a_direction_whatever_its_numbers(server: Any, number: float) -> None:
    vector = embeddings(server).column("z_image")[4].as_py()
    signs = np.sign(vector)
    expected, results = (post(server, embedding_input=(size * signs).tolist()).json() for size in (1.0, number))
    assert [(one["id"], one["similarity"]) for one in results] == [(one["id"], one["similarity"]) for one in expected]


@pytest.mark.parametrize("error", [StepError("s3: no answer"), OSError("gone")])
def test_a_search_whose_store_is_away_is_503(
    server: Any, neighbours: Any, serving: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    own = local_neighbours.LocalNeighbours(neighbours._retriever)
    for method in ("search", "rows"):
        monkeypatch.setattr(own, method, AsyncMock(side_effect=error))
    with serving(create_app(server.engine, own, ApiSettings(ModelCard("tiny", 32)))) as url:
        search = httpx.post(f"{url}/knn-service", json={"text": "a", "modality": "image", "num_images": 3})
        rows = httpx.post(f"{url}/metadata", json={"ids": [0]})
    for answer in (search, rows):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert answer.headers["Retry-After"]
        assert "the index of the training pictures does not answer" in answer.json()["error"]["message"]


def test_a_server_without_an_index_says_so_and_still_samples(server: Any, serving: Any) -> None:
    with serving(create_app(server.engine, None, ApiSettings(ModelCard("tiny", 32)))) as url:
        assert httpx.get(f"{url}/indices-list").json() == []
        for path, body in (
            ("/knn-service", {"text": "a", "modality": "image", "num_images": 3}),
            ("/metadata", {"ids": [0]}),
        ):
            answer = httpx.post(f"{url}{path}", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "index_not_found")
            assert "this server has no index" in answer.json()["error"]["message"]
        answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a"}, timeout=60)
        assert len(answer.json()["data"]) == 1


def test_a_text_finds_its_own_caption_and_comes_before_a_picture(server: Any) -> None:
    red = base64.b64encode(plain_picture("red")).decode()
    results = post(server, text="a green picture", image=red, modality="text").json()
    assert results[0]["caption"] == "a green picture"
    assert results[0]["similarity"] > 0.999


def test_results_past_num_images_carry_their_number_alone(server: Any) -> None:
    results = post(server, text="a green picture", num_images=2, num_result_ids=5).json()
    assert [set(one) == {"id", "similarity"} for one in results] == [False, False, True, True, True]
    assert "image" in results[1]
    rows = post(server, "/metadata", ids=[one["id"] for one in results]).json()
    assert [row["id"] for row in rows] == [one["id"] for one in results]
    assert rows[0]["metadata"]["caption"] == results[0]["caption"]
    assert {row["metadata"]["caption"] for row in rows} <= {f"a {colour} picture" for colour in COLOURS}


def test_nothing_asked_for_is_an_empty_list(server: Any) -> None:
    assert post(server, text="a", num_images=0).json() == []
    assert post(server, "/metadata", ids=[]).json() == []


def test_the_index_has_the_name_of_the_recipe(server: Any) -> None:
    assert httpx.get(f"{server.url}/indices-list").json() == ["tiny"]
    assert post(server, text="a", indice_name=None).status_code == 200
    answer = post(server, text="a", indice_name="laion5B")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "index_not_found")


def test_without_near_duplicates_there_are_still_k_rows(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """clip-retrieval returns fewer; here the next rows take the place of those that are left out."""
    table = embeddings(server)
    vectors = to_unit(np.array(table.column("z_image").to_pylist(), np.float16))
    limit = float(np.median(vectors @ vectors.T))  # random weights see all pictures as much the same
    monkeypatch.setattr(local_neighbours, "_DUPLICATE_COSINE", limit)
    expected: list[int] = []
    for row in np.argsort(-(vectors @ vectors[4])):
        if all(vectors[row] @ vectors[one] < limit for one in expected):
            expected.append(int(row))
    assert 1 < len(expected) < 10
    for count in (len(expected), 10):
        body = {"embedding_input": vectors[4].tolist(), "num_images": count, "num_result_ids": count}
        results = post(server, **body, deduplicate=True).json()
        assert [one["uid"] for one in results] == [table.column("uid")[row].as_py() for row in expected]


def places(rows: Any) -> list[Any]:
    """Rows without their similarity, whose last digits a batched product rounds in its own way."""
    return [(row["id"], len(row)) for row in rows]


def test_a_list_of_queries_gets_a_list_of_answers(server: Any) -> None:
    texts = ["a red picture", "a blue picture"]
    alone = [places(post(server, text=text).json()) for text in texts]
    assert [places(rows) for rows in post(server, text=texts).json()] == alone
    assert [places(rows) for rows in post(server, text=texts[:1]).json()] == alone[:1]
    pictures = [base64.b64encode(plain_picture(colour, 40)).decode() for colour in ("red", "blue")]
    answers = post(server, image=pictures).json()
    assert [rows[0]["caption"] for rows in answers] == texts
    vectors = np.array(embeddings(server).column("z_image").to_pylist(), np.float32)
    several = [places(rows) for rows in post(server, embedding_input=vectors[2:4].tolist()).json()]
    assert several == [places(post(server, embedding_input=vectors[row].tolist()).json()) for row in (2, 3)]
    assert post(server, text=texts, num_images=0, num_result_ids=0).json() == [[], []]


def test_each_picture_is_embedded_before_the_next_is_decoded(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    acts, embed, read = list[str](), server.engine.embed_image, uploads.read
    monkeypatch.setattr(server.engine, "embed_image", lambda image: acts.append("embedded") or embed(image))
    monkeypatch.setattr(uploads, "read", lambda data, **options: acts.append("decoded") or read(data, **options))
    pictures = [base64.b64encode(plain_picture(colour, 40)).decode() for colour in ("red", "blue", "green")]
    assert len(post(server, image=pictures).json()) == 3
    assert acts == ["decoded", "embedded"] * 3


def test_a_picture_says_which_rows_it_nearly_copies(
    server: Any, neighbours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = base64.b64encode(plain_picture("red", 40)).decode()
    plain = post(server, image=picture, num_images=10).json()
    assert "near_copy" not in plain[0]
    limit = plain[4]["similarity"]
    monkeypatch.setattr(neighbours, "near_copy", AsyncMock(return_value=limit))
    asked = post(server, image=picture, num_images=10, num_result_ids=10, near_copy=True).json()
    expected = [one["split"] == "train" and one["similarity"] > limit for one in asked]
    assert [one["near_copy"] for one in asked] == expected
    assert True in expected
    assert False in expected
    for body in ({"text": "a"}, {"image": picture, "modality": "text"}):
        refused = post(server, near_copy=True, **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "near_copy")


def test_a_text_that_is_longer_than_clip_reads_is_noted_in_the_header(server: Any) -> None:
    silent = {"use_safety_model": False, "use_violence_detector": False}
    long = post(server, text=["red", " ".join(["red"] * 31)], **silent)
    assert long.headers["X-Unclip-Notes"] == (
        "text: CLIP reads 32 tokens, start and end included; what follows is cut off"
    )
    assert "X-Unclip-Notes" not in post(server, text=" ".join(["red"] * 30), **silent).headers


def test_filters_that_have_no_effect_are_named_in_a_header(server: Any) -> None:
    sent = post(server, text="a", use_safety_model=True, use_violence_detector=False, aesthetic_score=9)
    assert sent.headers["X-Unclip-Notes"] == "no effect: use_safety_model, aesthetic_score, aesthetic_weight"
    plain = post(server, text="a", use_safety_model=False, use_violence_detector=False, aesthetic_score="")
    assert "X-Unclip-Notes" not in plain.headers


def test_a_search_for_safe_rows_finds_those_that_the_recipe_says_are_safe(
    server: Any, neighbours: Any, serving: Any
) -> None:
    settings = ApiSettings(ModelCard("tiny", 32), safe_rows="not contains(caption, 'red')")
    with serving(create_app(server.engine, neighbours, settings)) as url:
        filtering, query = SimpleNamespace(url=url), {"text": "a red picture", "modality": "text"}
        for body in ({"deduplicate": True}, {"use_violence_detector": False}, {"use_safety_model": None}):
            safe = post(filtering, num_images=9, **query | {"aesthetic_score": 9} | body)
            assert {row["caption"] for row in safe.json()} <= {f"a {colour} picture" for colour in COLOURS[1:]}
            assert safe.json()
            assert safe.headers["X-Unclip-Notes"] == "no effect: aesthetic_score, aesthetic_weight"
        every = post(filtering, **query, use_safety_model=False, use_violence_detector=False)
        assert every.json()[0]["caption"] == "a red picture"
        assert "X-Unclip-Notes" not in every.headers
    neighbours.require_filter("clip_score >= 0")
    with pytest.raises(ConfigError, match=r"^serve\.safe_rows: no column 'punsafe'; there are uid"):
        neighbours.require_filter("punsafe < 0.1")


def test_the_page_about_http_names_every_field_of_a_search() -> None:
    page = (Path(__file__).parents[2] / "docs/http.md").read_text().partition("## Search")[2].partition("\n## ")[0]
    assert all(f"`{name}`" in page for name in KnnRequest.model_fields)
