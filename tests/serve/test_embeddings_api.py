"""``POST /v1/embeddings``, by OpenAI's own client."""

import base64
import inspect
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import CreateEmbeddingResponse

from models.editor import Editor
from tests.serve.test_edits_api import CLIENTS_OWN
from tests.tiny.pictures import noisy_picture, tensor


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


def test_an_answer_is_exactly_what_the_client_declares_and_says_what_had_no_effect(
    server: Any, client: openai.OpenAI
) -> None:
    names = set(inspect.signature(client.embeddings.create).parameters) - CLIENTS_OWN
    values = {"input": "a", "model": "tiny", "encoding_format": "float", "user": "me", "dimensions": 16}
    answer: Any = client.embeddings.create(**{name: values[name] for name in names})
    CreateEmbeddingResponse.model_validate(answer.to_dict(), strict=True)
    assert answer.model_extra["notes"] == ["user: has no effect here"]
    page = (Path(__file__).parents[2] / "docs/http.md").read_text().partition("## Embeddings")[2].partition("## ")[0]
    assert all(f"`{name}`" in page for name in names)


def test_texts_that_are_longer_than_clip_reads_are_noted(server: Any) -> None:
    long, rest = " ".join(["red"] * 31), "CLIP reads 32 tokens, start and end included; what follows is cut off"
    picture = f"data:image/png;base64,{base64.b64encode(noisy_picture(1)).decode()}"

    def notes(texts: Any) -> Any:
        return httpx.post(f"{server.url}/v1/embeddings", json={"input": texts}, timeout=60).json().get("notes")

    assert notes(["red", picture]) is None
    assert notes(long) == [f"input: {rest}"]
    assert notes([picture, long, "red", long]) == [f"input: 2 of 4 (index 1, 3): {rest}"]
    assert notes([long] * 12) == [f"input: 12 of 12 (index 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...): {rest}"]


def test_dimensions_are_refused_before_anything_is_embedded(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = list[Any]()
    embed_texts = server.engine.embed_texts
    monkeypatch.setattr(server.engine, "embed_texts", lambda texts: embedded.extend(texts) or embed_texts(texts))
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": ["a", "b"], "dimensions": 3})
    assert answer.json()["error"]["message"].startswith("dimensions: embeddings of this CLIP have 16 numbers")
    assert "a" not in embedded


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
