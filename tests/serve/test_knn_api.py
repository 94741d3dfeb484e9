import asyncio
import base64
import dataclasses
import gc
import json
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response

from pipeline.data.rows import make_uid
from pipeline.data.urls import AddressRules
from pipeline.data.vectors import to_unit
from pipeline.errors import ConfigError, StepError
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.serve import knn, local_neighbours, uploads
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.knn_bodies import KnnRequest
from pipeline.serve.web import ApiError, parse
from pipeline.workspace.store import Workspace
from tests.tiny.pictures import noisy_picture
from tests.tiny.shards import pixels, plain_picture
from tests.tiny.workspace import COLOURS


def post(server: Any, path: str = "/knn-service", **body: Any) -> httpx.Response:
    # As clip-retrieval's own client sends it: JSON without a content type, every field there, null where unused.
    fields = {
        "text": None, "image": None, "image_url": None, "embedding_input": None,
        "modality": "image", "num_images": 3, "indice_name": "tiny", "use_mclip": False, "deduplicate": False,
        "use_safety_model": True, "use_violence_detector": True, "aesthetic_score": "", "aesthetic_weight": 0.5,
    }  # fmt: skip
    return httpx.post(f"{server.url}{path}", content=json.dumps(fields | body))


def embeddings(server: Any) -> Any:
    steps = {step.name: step for step in make_plan(server.recipe)}
    embed = artifact_of(Workspace(server.recipe.workspace), steps["embed"])
    return pq.read_table(embed.path("00000.parquet"))


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


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "give one of text, image, embedding_input"),
        ({"image_url": "http://169.254.169.254/latest"}, "fetches no URLs"),
        ({"image": "not base64!"}, "image: not base64"),
        ({"image": base64.b64encode(b"GIF89a nonsense").decode()}, "image: not a picture"),
        ({"embedding_input": [1.0, 2.0]}, "2 numbers; this index takes 16"),
        ({"embedding_input": [0.0] * 16}, "all zero"),
        ({"embedding_input": [10**400] * 16}, "16 numbers; this index takes 16, all finite"),
        ({"text": "a", "modality": "sound"}, "modality"),
        ({"text": "a", "num_images": 100_000}, "num_images"),
        ({"text": "a", "num_images": None}, "num_images"),
    ],
)
def test_wrong_searches_are_400_and_say_why(server: Any, body: dict[str, Any], words: str) -> None:
    answer = post(server, **body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


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


def test_millions_of_empty_lists_are_refused_at_once_and_never_made(server: Any) -> None:
    body = b'{"modality": "image", "num_images": 3, "embedding_input": [' + b"[]," * 3_000_000 + b"[]]}"
    process = psutil.Process()
    before, start = process.memory_info().rss, time.process_time()
    answer = httpx.post(f"{server.url}/knn-service", content=body, timeout=60)
    assert time.process_time() - start < 1  # of client and server
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert process.memory_info().rss - before < 60 << 20  # the body itself, twice; its lists would take 200 MB
    few = post(server, embedding_input=[[]] * 60_000)
    assert few.status_code == 400
    assert few.json()["error"]["param"].startswith("embedding_input")


def test_unknown_rows_are_400(server: Any) -> None:
    [first] = post(server, text="a red picture", num_images=1).json()
    answer = post(server, "/metadata", ids=[first["id"], 10])
    message = "ids: no row 10: the index has 10 rows, and none of this id"
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    for number in (-1, 2**53, 2**70):
        message = f"ids: no row {number}: an id has 53 bits"
        answer = post(server, "/metadata", ids=[number])
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)


def test_a_picture_that_would_fill_the_memory_is_not_decoded(server: Any) -> None:
    bomb = plain_picture("red", 6400)  # a few kilobytes, 41 million pixels
    answer = post(server, image=base64.b64encode(bomb).decode())
    assert answer.status_code == 400
    assert "image: image area too large (6400 x 6400 px" in answer.json()["error"]["message"]


@pytest.mark.parametrize("shape", ["text", "escapes", "numbers", "image", "no json"])
def test_a_large_body_that_is_refused_costs_little(server: Any, shape: str) -> None:
    num_bytes = 23 << 20
    bodies = {
        "text": b'{"modality": "image", "num_images": 3, "text": "' + b"x" * num_bytes + b'"}',
        "escapes": b'{"modality": "image", "num_images": 3, "text": "' + b"a\\n" * (num_bytes // 3) + b'"}',
        "numbers": b'{"modality": "image", "num_images": 3, "embedding_input": [' + b"1," * (num_bytes // 2) + b"1]}",
        "image": b'{"modality": "image", "num_images": 3, "image": "' + b"AAAA" * (num_bytes // 4) + b'"}',
        "no json": b"{" * num_bytes,
    }
    process = psutil.Process()
    with httpx.Client(timeout=60) as client:
        client.post(f"{server.url}/knn-service", content=b"{}")
        before, start = process.memory_info().rss, time.process_time()
        answer = client.post(f"{server.url}/knn-service", content=bodies[shape])
        taken_s = time.process_time() - start  # of client and server
    assert answer.status_code in {400, 413}
    assert taken_s < 0.5
    assert process.memory_info().rss - before < 100 << 20


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


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": ["a"] * 33}, "text: give a text, or a list of 1 to 32"),
        ({"text": []}, "text: give a text"),
        ({"text": ["a", 3]}, "text: give a text"),
        ({"text": ["a", "x" * 4001]}, "text: a text has more than 4000 characters"),
        ({"embedding_input": [[1.0] * 16, 1.0]}, "embedding_input: give at most"),
        ({"embedding_input": [[1.0] * 16, [1.0]]}, "embedding_input: 1 numbers; this index takes 16"),
        ({"embedding_input": 3}, "embedding_input: give at most"),
        ({"embedding_input": ["a"]}, "embedding_input: an item is not a number"),
        ({"text": "a", "use_mclip": True}, "use_mclip: this server has one CLIP"),
    ],
)
def test_wrong_lists_of_queries_are_400_and_say_why(server: Any, body: dict[str, Any], words: str) -> None:
    answer = post(server, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(words)


@pytest.mark.parametrize(
    ("sizes", "param"),
    [({"num_images": 1000}, "num_images"), ({"num_images": 1, "num_result_ids": 10_000}, "num_result_ids")],
)
def test_searches_that_would_fill_the_memory_are_refused_before_anything_is_embedded(
    server: Any, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], param: str
) -> None:
    monkeypatch.setattr(server.engine, "embed_texts", Mock(side_effect=AssertionError("it was embedded")))
    answer = post(server, text=["a", "b", "c"], **sizes)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert f"{param}: {sizes[param]} for each of 3 searches; all of a request have at most" in answer.text
    monkeypatch.undo()
    assert post(server, text=["a", "b"], **sizes | {param: sizes[param] // 2}).status_code == 200


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


@pytest.mark.parametrize(
    ("score", "weight", "field"),
    [
        (9, 0.5, None),
        (9, None, None),
        (None, 0.7, None),
        ("", 0.7, None),
        (3, 0, None),
        (3, 0.5, "aesthetic_score"),
        (3, "", "aesthetic_score"),
        (9, 0.7, "aesthetic_weight"),
        (3, 0.7, "aesthetic_score"),
    ],
)
def test_aesthetic_numbers_that_somebody_chose_are_refused_by_name(
    server: Any, score: Any, weight: Any, field: str | None
) -> None:
    answer = post(server, text="a", aesthetic_score=score, aesthetic_weight=weight)
    assert answer.status_code == (400 if field else 200)
    if field:
        assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (field, "unsupported")
        assert f"{field} = " in answer.json()["error"]["message"]


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


def test_a_refused_text_is_freed_with_its_answer() -> None:
    class Text(str):
        """A text that can be watched."""

    text, reason = Text("x" * 5000), ""
    watched = weakref.ref(text)
    gc.disable()
    try:
        try:
            parse(KnnRequest, {"modality": "image", "num_images": 1, "text": text})
        except ApiError as error:
            reason = str(error)
        del text
        assert "4000 characters" in reason
        assert watched() is None
    finally:
        gc.enable()
