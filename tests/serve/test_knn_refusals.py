"""Searches that are refused: each says why, and costs little time and memory."""

import base64
import gc
import time
import weakref
from typing import Any
from unittest.mock import Mock

import httpx
import psutil
import pytest

from pipeline.serve.knn_bodies import KnnRequest
from pipeline.serve.web import ApiError, parse
from tests.serve.knn_requests import post
from tests.tiny.shards import plain_picture


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
