"""An API behind its guards, with networks that answer at once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from models.request import SampleRequest
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.guarded_model import GuardedModel
from pipeline.serve.guards import Guards, GuardSettings
from pipeline.serve.keys import KeyRing, Meter
from pipeline.serve.protocols import Accepted, Preview, SampledPictures
from pipeline.serve.safety import SafetyCalls

Serving = Callable[[Any], AbstractContextManager[str]]


class WhiteModel:
    """Networks that answer at once."""

    async def sample(self, request: SampleRequest, _client: str = "") -> SampledPictures:
        return SampledPictures(np.full((len(request.seeds), 16, 16, 3), 255, np.uint8), None)

    async def stream(self, request: SampleRequest, _client: str = "", _num_previews: int = 0) -> Any:
        yield Accepted()
        yield Preview(0, 0, np.full((16, 16, 3), 255, np.uint8))
        yield await self.sample(request)

    async def cut_at(self, texts: Sequence[str]) -> list[int]:
        return [0] * len(texts)

    async def stats(self) -> dict[str, int]:
        return {"requests": 1}


def guarded(
    settings: GuardSettings = GuardSettings(),  # noqa: B008
    keys: Path | None = None,
    hook: Any = None,
    model: Any = None,
    index: Any = None,
) -> Guards:
    meter = Meter(clock=lambda: 0.0)
    safety = SafetyCalls(hook) if hook else None
    behind: Any = GuardedModel(model or WhiteModel(), 16, meter, safety)  # pyright: ignore[reportArgumentType]
    app = create_app(behind, index, ApiSettings(ModelCard("tiny", 16)))
    return Guards(app, settings, KeyRing(keys) if keys else None, meter)


def client_of(app: Any, key: str = "") -> TestClient:
    """A client that calls the application without a socket."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return TestClient(app, base_url="http://127.0.0.1", headers=headers)


def ask(app: Any, key: str = "", **fields: Any) -> Any:
    return client_of(app, key).post("/v1/images/generations", json={"prompt": "a"} | fields)
