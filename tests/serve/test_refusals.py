"""Requests that are refused: wrong ones in OpenAI's form with what is wrong, and those that come to a full or ended engine."""

import concurrent.futures
import contextlib
from typing import Any

import httpx
import openai
import pytest

from models.cascade import Cascade
from models.decoder.stage import DecoderStage
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.engine import Engine
from tests.serve.asking import post, post_to


def test_what_the_networks_cannot_do_is_400(server: Any, serving: Any) -> None:
    decoder = server.cascade.stage("decoder", DecoderStage)
    engine = Engine(Cascade(server.cascade.clip, [decoder]))
    side_px = decoder.network.config.image_px
    with contextlib.closing(engine), serving(create_app(engine, None, ApiSettings(ModelCard("tiny", side_px)))) as url:
        answers = [post_to(url, {"prompt": "a", "prior_guidance_scale": 2.0, "stream": on}) for on in (False, True)]
    for answer in answers:
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "no stage prior; this cascade has decoder"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_parameter"),
        ({"prompt": " "}, "prompt", "invalid_value"),
        ({"prompt": "x" * 4001}, "prompt", "invalid_value"),
        ({"prompt": 3}, "prompt", "invalid_value"),
        ({"prompt": "x", "n": 0}, "n", "invalid_value"),
        ({"prompt": "x", "n": 11}, "n", "invalid_value"),
        ({"prompt": "x", "n": "2"}, "n", "invalid_value"),
        ({"prompt": "x", "size": "64x64"}, "size", "invalid_value"),
        ({"prompt": "x", "size": "16x32"}, "size", "invalid_value"),
        ({"prompt": "x", "size": "large"}, "size", "invalid_value"),
        ({"prompt": "x", "size": "2x2"}, "size", "invalid_value"),
        ({"prompt": "x", "response_format": "png"}, "response_format", "invalid_value"),
        ({"prompt": "x", "response_format": "file", "n": 2}, "response_format", "invalid_value"),
        ({"prompt": "x", "response_format": "file", "neighbours": 2}, "neighbours", "invalid_value"),
        ({"prompt": "x", "partial_images": 2}, "partial_images", "invalid_value"),
        ({"prompt": "x", "stream": True, "partial_images": 4}, "partial_images", "invalid_value"),
        ({"prompt": "x", "background": "transparent"}, "background", "invalid_value"),
        ({"prompt": "x", "output_format": "gif"}, "output_format", "invalid_value"),
        ({"prompt": "x", "seed": -1}, "seed", "invalid_value"),
        ({"prompt": "x", "quality": "best"}, "quality", "invalid_value"),
        ({"prompt": "x", "steps": 3}, "steps", "unknown_parameter"),
        ({"prompt": "x", "guidance_scale": -1}, "guidance_scale", "invalid_value"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps", "invalid_value"),
        ({"prompt": "x", "negative_prompt": 3}, "negative_prompt", "invalid_value"),
        ([], None, "invalid_json"),
    ],
)
def test_wrong_requests_are_400_and_name_the_parameter(server: Any, body: Any, param: str, code: str) -> None:
    answer = post(server, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"], error["code"]) == (
        400,
        "invalid_request_error",
        param,
        code,
    )
    assert not param or param in error["message"]


def test_bodies_that_are_no_json_are_400_and_large_ones_413(server: Any) -> None:
    assert post(server, content=b"{").json()["error"]["code"] == "invalid_json"
    declared = post(server, content=b" " * ((1 << 20) + 1))
    assert (declared.status_code, declared.json()["error"]["code"]) == (413, "body_too_large")

    def chunks() -> Any:
        for _ in range(20):
            yield b" " * (1 << 16)

    chunked = post(server, content=chunks())  # no length is declared
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/embeddings", "/knn-service"])
def test_half_of_a_character_is_400_wherever_it_stands(server: Any, path: str) -> None:
    for field in (b'"user": "cut \\ud83d"', b'"\\uD83D": 1'):
        answer = httpx.post(f"{server.url}{path}", content=b'{"prompt": "a", ' + field + b"}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
        assert r"half of a character, '\ud83d'" in answer.json()["error"]["message"]
    whole = post(server, content=b'{"prompt": "a", "user": "\\ud83d\\ude00"}')
    assert whole.json()["safety_identifier"] == "\U0001f600"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": "x", "guidance": 3}, "unknown parameter: guidance; do you mean guidance_scale?"),
        ({"prompt": "x", "steps": 3}, "unknown parameter: steps; do you mean num_inference_steps?"),
        ({"promt": "x", "prompt": "y"}, "unknown parameter: promt; do you mean prompt?"),
        ({"prompt": "x", "loras": []}, "unknown parameter: loras"),
        ({"prompt": "x", "n": 1000}, "n: Input should be less than or equal to 10, got 1000"),
        ({"prompt": "x", "quality": "ultra"}, "or 'hd', got 'ultra'"),
        ({"prompt": "x", "quality": "u" * 9999}, f"or 'hd', got '{'u' * 59}..."),
    ],
)
def test_an_error_says_what_came_and_what_is_meant(server: Any, body: Any, says: str) -> None:
    assert post(server, body).json()["error"]["message"].endswith(says)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"content": b"a red star"}, "Expecting value: line 1 column 1 (char 0)"),
        ({"content": b'{"prompt": "a",}'}, "line 1 column"),
        ({"content": b"[" * 100_000}, "unreadable"),
        ({"data": {"prompt": "a"}}, "a form came"),
        ({"files": {"image": b"x"}}, "a form came"),
    ],
)
def test_a_body_that_is_no_json_is_told_why(server: Any, body: Any, reason: str) -> None:
    answer = httpx.post(f"{server.url}/v1/images/generations", **body)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert reason in message
    assert message.endswith('; send an object, such as {"prompt": "a red star"}')


def test_any_content_type_is_read_as_json(server: Any) -> None:
    answer = post(server, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 200


def test_unknown_routes_and_methods_are_errors_of_the_same_form(server: Any) -> None:
    missing = httpx.post(f"{server.url}/v1/images/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    method = httpx.get(f"{server.url}/v1/images/generations")
    assert (method.status_code, method.headers["Allow"]) == (405, "POST")
    assert method.json()["error"]["message"] == "GET /v1/images/generations: this route takes POST"
    for base in ("", "/v1/v1"):  # a client whose base_url is wrong
        wrong = openai.OpenAI(base_url=f"{server.url}{base}", api_key="any", max_retries=0)
        with pytest.raises(openai.NotFoundError, match="do you mean /v1/images/generations"):
            wrong.images.generate(prompt="a")


def test_overload_is_429_with_a_time_to_come_back(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "_wait_s", lambda: 40.5)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: post(server, {"prompt": f"{number}", "n": 10}), range(12)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert {answer.headers["Retry-After"] for answer in refused} == {"41"}
    assert refused[0].json()["error"]["code"] == "overloaded"
    done = [answer for answer in answers if answer.status_code == 200]
    assert len(done) >= 3  # as many as may wait
    assert len(done) + len(refused) == 12


def test_a_dead_engine_is_not_healthy(server: Any, serving: Any) -> None:
    engine = Engine(server.cascade)
    engine.close()
    with serving(create_app(engine, None, ApiSettings(ModelCard("tiny", 32)))) as url:
        assert httpx.get(f"{url}/healthz").status_code == 503
        assert post_to(url, {"prompt": "a"}).json()["error"]["type"] == "overloaded_error"
