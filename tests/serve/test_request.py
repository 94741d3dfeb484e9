"""A request is one object from the HTTP body to the stage: no layer between them takes it apart."""

import asyncio
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.cascade import Cascade
from models.request import SampleRequest
from models.stage import Batch, Chain
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve import generation, images
from pipeline.serve.engine import Engine
from pipeline.serve.generation import Generation
from pipeline.serve.images import GenerationRequest
from pipeline.serve.protocols import SampledPictures


@dataclass(frozen=True)
class TilingRequest(SampleRequest):
    """With a field that no layer between the body and the stage has heard of."""

    tiling: bool = False


class Stage:
    """The cascade's last stage, which notes the requests of what enters it."""

    def __init__(self, stage: Any) -> None:
        self._stage = stage
        self.requests: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def enter(self, batch: Batch, noise: Any = None) -> Chain:
        self.requests.append(batch.request)
        return self._stage.enter(batch, noise)


def test_a_new_field_reaches_the_stage_through_every_layer(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        generation, "sample_request", lambda body, *_: TilingRequest(body.prompt, (body.seed,), tiling=True)
    )
    last = Stage(cascade.stages[-1])
    engine = Engine(Cascade(cascade.clip, [*cascade.stages[:-1], last]))
    try:
        body = GenerationRequest(prompt="a red circle", seed=5)
        answer = asyncio.run(Generation(engine, body, ModelCard("tiny", 32)).answer())
    finally:
        engine.close()
    assert [entry["seed"] for entry in answer["data"]] == [5]
    assert last.requests == [TilingRequest("a red circle", (5,), tiling=True)]


def test_replicas_and_their_proxy_pass_the_object_whole() -> None:
    from pipeline.runtime.remote_model import RemoteModel
    from pipeline.runtime.replicas import ModelReplica

    request, received = TilingRequest("a", (1,), tiling=True), list[SampleRequest]()

    class Handled:
        """Stands for the engine behind a replica, and for Ray's handle before it."""

        async def sample(self, request: SampleRequest, client: str, hop: None, later: Any) -> SampledPictures:
            assert (client, hop, later) == ("me", None, ())
            received.append(request)
            return SampledPictures(np.zeros((1, 2, 2, 3), np.uint8), None)

        async def remote(
            self, served: str, request: SampleRequest, client: str, hop: None, later: Any
        ) -> SampledPictures:
            assert served == "now"
            return await self.sample(request, client, hop, later)

        def close(self) -> None:
            """As the engine's."""

    replica = ModelReplica()
    replica._engines, replica._served = {"now": Handled()}, "now"
    asyncio.run(replica.sample("now", request, "me"))
    handle: Any = type("Handle", (), {"sample": Handled()})()
    asyncio.run(RemoteModel({"networks": handle}, "now").sample(request, "me"))
    assert received == [request, request]
    assert all(one is request for one in received)


def test_the_page_about_http_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs/http.md").read_text()
    section = page.partition("## Fields of")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(GenerationRequest.model_fields)


def test_body_becomes_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    body = GenerationRequest(prompt="a", n=3, seed=7)
    assert images.sample_request(body) == SampleRequest("a", (7, 8, 9))
    full = GenerationRequest(
        prompt="a",
        seed=7,
        negative_prompt="b",
        guidance_scale=2,
        prior_guidance_scale=3,
        num_inference_steps=4,
        num_candidates=5,
        timeout=6,
    )
    assert images.sample_request(full, 64) == SampleRequest(
        "a",
        (7,),
        guidance_scale={"decoder": 2.0, "prior": 3.0},
        num_steps={"decoder": 4},
        negative_prompt="b",
        num_candidates=5,
        side_px=64,
        timeout_s=6.0,
    )
    assert {field.name for field in fields(SampleRequest)} == {
        "prompt", "seeds", "guidance_scale", "num_steps", "negative_prompt", "side_px", "num_candidates", "edit",
        "timeout_s", "traceparent",
    }  # fmt: skip
    monkeypatch.setattr(images.secrets, "randbelow", lambda _limit: 11)
    assert images.sample_request(GenerationRequest(prompt="a")) == SampleRequest("a", (11,))
