"""Notes on texts that CLIP cuts off: looked for while pictures are sampled, and never waited for long."""

import asyncio
import base64
import json
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest
from starlette.testclient import TestClient

from pipeline.clip.inputs import count_tokens
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve import generation
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.embeddings import EmbeddingRequest, embed
from pipeline.serve.generation import Generation
from pipeline.serve.images import GenerationRequest
from pipeline.serve.protocols import NotServing, SampledPictures
from pipeline.serve.web import ApiError
from tests.serve.asking import PROMPT, post
from tests.serve.test_deadlines import CANCELLED, Networks, never
from tests.tiny.shards import pixels


def test_a_text_that_is_longer_than_clip_reads_is_noted_in_every_form_of_answer(server: Any) -> None:
    note = "{}: CLIP reads 32 tokens, start and end included; what follows is cut off"
    whole, cut = (" ".join(["red"] * number) for number in (30, 31))
    assert count_tokens([whole, cut]) == [32, 33]
    assert "notes" not in post(server, {"prompt": whole, "negative_prompt": whole}).json()
    answer = post(server, {"prompt": cut, "negative_prompt": cut}).json()
    assert answer["notes"] == [note.format("prompt"), note.format("negative_prompt")]
    same = [post(server, {"prompt": text, "seed": 5}).json()["data"][0]["b64_json"] for text in (cut, cut + " star")]
    np.testing.assert_array_equal(*(pixels(base64.b64decode(picture)) for picture in same))
    stream = post(server, {"prompt": cut, "stream": True, "partial_images": 1}).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    assert [event["notes"] for event in events] == [[note.format("prompt")]] * 2
    file = post(server, {"prompt": cut, "response_format": "file"})
    assert file.headers["X-Unclip-Notes"] == note.format("prompt")


@pytest.mark.parametrize("error", [NotServing("swapped"), RuntimeError("the tokenizer fails")])
def test_finished_pictures_are_sent_even_if_their_texts_cannot_be_looked_at(
    server: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(server.engine, "cut_at", AsyncMock(side_effect=error))
    assert len(post(server, {"prompt": PROMPT, "n": 2}).json()["data"]) == 2
    assert "image_generation.completed" in post(server, {"prompt": PROMPT, "stream": True}).text


class NoNotes(Networks):
    """Networks that sample, but never say which texts they cut: their CLIP has died."""

    async def cut_at(self, _texts: Sequence[str]) -> list[int]:
        await never()
        raise AssertionError


def test_finished_pictures_do_not_wait_for_the_notes_on_their_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as long as the request would, and its timeout is none of theirs."""
    monkeypatch.setattr(generation, "_LONGEST_NOTE_S", 0.3)
    networks: Any = NoNotes()
    app = create_app(networks, None, ApiSettings(ModelCard("tiny", 16)))
    client = TestClient(app, base_url="http://127.0.0.1")
    CANCELLED.clear()
    begun_s = time.monotonic()
    forms: list[dict[str, Any]] = [{}, {"stream": True}, {"response_format": "file"}]
    answers = [client.post("/v1/images/generations", json={"prompt": "quick", "timeout": 0.2} | form) for form in forms]
    assert [answer.status_code for answer in answers] == [200] * 3
    whole, stream, file = answers
    assert "notes" not in whole.json()
    assert "event: image_generation.completed" in stream.text
    assert "X-Unclip-Notes" not in file.headers
    assert len(CANCELLED) == 3
    assert time.monotonic() - begun_s < 20


def test_texts_are_looked_at_while_the_pictures_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_LONGEST_NOTE_S", 0.0)
    networks: Any = Networks()
    is_looked_at = asyncio.Event()

    async def cut_at(texts: Sequence[str]) -> list[int]:
        is_looked_at.set()
        return [8] * len(texts)

    async def sample(*_: Any) -> SampledPictures:
        await asyncio.wait_for(is_looked_at.wait(), 20)
        return SampledPictures(np.zeros((1, 16, 16, 3), np.uint8), None)

    monkeypatch.setattr(networks, "cut_at", cut_at)
    monkeypatch.setattr(networks, "sample", sample)
    request = Generation(networks, GenerationRequest(prompt="a"), ModelCard("tiny", 16))
    assert asyncio.run(request.answer())["notes"][0].startswith("prompt: CLIP reads 8 tokens")


def test_texts_of_refused_embeddings_are_looked_at_no_further() -> None:
    networks: Any = NoNotes()
    CANCELLED.clear()

    async def ask() -> None:
        body = EmbeddingRequest(input=["quick", "data:image/png;base64,AAAA"])
        with pytest.raises(ApiError):
            await embed(networks, body, ModelCard("tiny", 16))
        await asyncio.sleep(0)
        assert len(CANCELLED) == 1

    asyncio.run(ask())
