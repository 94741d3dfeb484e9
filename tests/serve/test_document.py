"""The OpenAPI document, and what the server answers to whatever can be made from it."""

import time
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pipeline.serve.edits import EDITS
from tests.serve.conftest import Server

_SLOW = "num_inference_steps"


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    return httpx.get(f"{server.url}/openapi.json").json()


@pytest.fixture
def api(document: dict[str, Any], server: Server) -> Any:
    for path in document["paths"].values():  # a thousand steps are asked for where only their number matters
        for content in path.get("post", {}).get("requestBody", {"content": {}})["content"].values():
            content["schema"]["properties"].pop(_SLOW, None)
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    return schema


def test_the_document_names_every_route_and_field(document: dict[str, Any]) -> None:
    assert {f"/v1/images/{name}" for name in ("generations", *EDITS)} < document["paths"].keys()
    body = document["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["prompt"]
    assert {"seed", "negative_prompt", "partial_images"} < body["properties"].keys()
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"prompt", "image", "mask"} < form["properties"].keys()
    assert form["required"] == ["prompt", "image"]
    assert all("$ref" not in str(path) for path in document["paths"].values())


def test_the_page_of_the_document_names_every_route_and_field_with_its_limits(
    document: dict[str, Any], server: Server
) -> None:
    answer = httpx.get(f"{server.url}/docs")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path}" in answer.text
            for media in operation.get("requestBody", {"content": {}})["content"].values():
                assert all(f"<code>{field}</code>" in answer.text for field in media["schema"]["properties"])
    assert "<td><code>prompt</code></td><td>required</td><td>string, at most 4000 characters</td>" in answer.text
    assert "<td><code>n</code></td><td></td><td>integer, 1 to 10</td>" in answer.text
    assert "<td><code>output_format</code></td><td></td><td>png, jpeg, webp</td>" in answer.text
    assert "<td><code>image[]</code></td><td>required</td><td>list of file, at most 2</td>" in answer.text
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def test_a_stream_is_described_by_its_events(document: dict[str, Any]) -> None:
    answers = document["paths"]["/v1/images/generations"]["post"]["responses"]["200"]["content"]
    assert answers["text/event-stream"]["schema"]["required"] == ["event", "data"]


PATHS = {
    "GET": ["/", "/docs", "/healthz", "/metrics", "/v1/models", "/v1/models/{name}", "/indices-list"],
    "POST": [
        *(f"/v1/images/{name}" for name in ("generations", *EDITS)),
        "/v1/embeddings",
        "/knn-service",
        "/metadata",
    ],
}


def test_every_route_is_tried(document: dict[str, Any]) -> None:
    paths = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert paths == {(method, path) for method, of_method in PATHS.items() for path in of_method}


REQUESTS = [
    (method, path, mode)
    for method, paths in PATHS.items()
    for path in paths
    for mode in GenerationMode
    if method == "POST" or mode is GenerationMode.POSITIVE  # nothing of the others can be wrong
]


@pytest.mark.parametrize(("method", "path", "mode"), REQUESTS)
def test_no_request_breaks_the_server(api: Any, method: str, path: str, mode: GenerationMode) -> None:
    @given(api[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check(case: Any) -> None:
        started_s = time.process_time()
        answer = case.call()
        if 400 <= answer.status_code < 500:
            assert time.process_time() - started_s < 1  # of client and server
        assert answer.status_code < 500 or (answer.status_code == 504 and "timeout" in case.body)
        case.validate_response(
            answer, checks=[status_code_conformance, content_type_conformance, response_schema_conformance]
        )

    check()
