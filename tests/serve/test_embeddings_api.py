"""``POST /v1/embeddings``, by OpenAI's own client."""

import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from models.editor import Editor
from tests.tiny.pictures import noisy_picture, tensor


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_openais_client_embeds_texts_and_pictures(server: Any, client: openai.OpenAI, form: Any) -> None:
    picture = noisy_picture(1)
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    answer = client.embeddings.create(input=["a red circle", url, "a blue star"], model="tiny", encoding_format=form)
    rows = [entry.embedding for entry in answer.data]
    if form == "base64":
        rows = [np.frombuffer(base64.b64decode(str(row)), np.float32) for row in rows]
    editor = Editor(server.cascade)
    texts, [image] = server.cascade.clip.embed_text(["a red circle", "a blue star"]), editor.embed(tensor(picture))
    for row, expected in zip(rows, [texts[0], image, texts[1]], strict=True):
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert len(client.embeddings.create(input="a", model="tiny").data[0].embedding) == len(texts[0])


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": [1, 2]}, 400, "input"),
        ({"input": [[1]]}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a"] * 2049}, 400, "input"),
        ({"input": ["data:image/png;base64,AAAA"] * 33}, 400, "input"),
        ({"input": "data:image/png;base64,AAAA"}, 400, "input"),
        ({"input": "a", "dimensions": 3}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "a", "model": "text-embedding-3-small"}, 404, "model"),
        ({"input": "a", "pooling": "mean"}, 400, "pooling"),
    ],
)
def test_wrong_embeddings_are_refused_by_name(server: Any, body: Any, status: int, param: str) -> None:
    answer = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
