"""Reconstructions from principal components, and the search for these."""

import asyncio
import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from models.editor import Editor
from models.pca import Pca
from models.request import EditError
from pipeline.errors import ConfigError, DataError, StepError
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.plan import finished_artifacts
from pipeline.sampling import edit_pictures
from pipeline.sampling.edit_options import EditOptions
from pipeline.sampling.edit_pictures import EDITS as COMMANDS
from pipeline.sampling.edit_pictures import Sources
from pipeline.serve import embedder as embedder_module
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.embedder import Embedder
from pipeline.serve.engine import Engine
from pipeline.serve.protocols import NotServing
from tests.serve.edit_requests import images, png_of, post
from tests.tiny.command import ROOT
from tests.tiny.pictures import almost_equal, noisy_picture
from tests.tiny.shards import pixels


def test_pca_reconstructions_are_those_of_the_command(
    server: Any, editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, embed = noisy_picture(1), finished_artifacts(server.recipe, ("embed",))["embed"]
    basis, _ = torch.linalg.qr(torch.from_numpy(np.random.default_rng(0).normal(size=(16, 16))))
    pca = Pca(
        torch.zeros(16, dtype=torch.float64), basis, torch.ones(16), 16.0
    )  # its own embeddings are nearly their mean
    monkeypatch.setattr(edit_pictures, "training_pca", lambda _: pca)
    monkeypatch.setattr(server.engine._embedder, "fit_pca", lambda _: pca)
    monkeypatch.setattr(server.engine._embedder, "_fitting", None)
    sources = Sources(("a.png",), (Image.fromarray(pixels(picture)),), embed)
    frames = COMMANDS["pca-reconstruct"](editor, sources, EditOptions(seed=5, components=(1, 4)))
    answer = post(server, "pca-reconstructions", picture, components="1, 4", seed="5")
    assert all(almost_equal(one, same) for one, same in zip(images(answer), frames.result.images, strict=True))
    assert not almost_equal(images(answer)[0], images(answer)[2])
    frames_of_answer = [(row["seed"], row["components"]) for row in answer.json()["data"]]
    assert frames_of_answer == [(row["seed"], row["components"]) for row in frames.rows] == [(5, 1), (5, 4), (5, 16)]
    [usual] = images(post(server, "pca-reconstructions", picture, seed="5"))  # 16 are fewer than any of the usual ones
    assert almost_equal(usual, images(answer)[2])


def test_pca_reconstructions_stream_with_previews_and_say_what_they_are(server: Any) -> None:
    fields = {"components": "2", "stream": "true", "partial_images": "1", "seed": "5", "num_inference_steps": "10"}
    stream = post(server, "pca-reconstructions", noisy_picture(1), **fields)
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"] * 2
    assert [event["components"] for event in events[2:]] == [2, 16]
    frames = [json.loads(png_of(base64.b64decode(event["b64_json"])).text["unclip"]) for event in events[2:]]
    assert [facts["frame"] for facts in frames] == [{"components": 2}, {"components": 16}]
    facts = frames[-1]
    assert facts["edit"].pop("sources")
    assert facts["edit"] == {"kind": "pcareconstruction", "components": [2, 16]}
    assert (facts["sampling"]["decoder"]["method"], facts["seed"]) == ("ddim", 5)


@pytest.mark.parametrize(
    "error", [ConfigError("too few training embeddings"), DataError("00001.parquet: damaged; fetch it again")]
)
def test_principal_components_are_found_once_and_a_while_after_an_error_again(
    server: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    embedder, calls = Embedder(server.cascade.clip), list[None]()
    image, fit = pixels(noisy_picture(1)).copy(), server.engine._embedder.fit_pca

    def fit_pca(check: Callable[[], None]) -> Pca:
        calls.append(None)
        if len(calls) == 1:
            raise error
        return fit(check)

    with pytest.raises(EditError, match="without their training embeddings"):
        asyncio.run(embedder.reduce_image(image, [1]))
    embedder.fit_pca = fit_pca
    for _ in range(2):
        with pytest.raises(EditError, match=f"no principal components: {error}"):
            asyncio.run(embedder.reduce_image(image, [1]))
    assert len(calls) == 1
    monkeypatch.setattr(embedder_module, "_AGAIN_AFTER_S", 0.0)

    async def several() -> list[Any]:
        return await asyncio.gather(*(embedder.reduce_image(image, [count]) for count in (1, 2, 16)))

    answers = asyncio.run(several())
    assert len(calls) == 2
    assert [components for components, _ in answers] == [(1, 16), (2, 16), (16, 16)]
    np.testing.assert_allclose(np.linalg.norm(answers[0][1], axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(answers[2][1][0], answers[2][1][1], atol=1e-5)


def test_a_store_that_does_not_answer_for_a_moment_is_asked_again_at_once(server: Any) -> None:
    embedder, fit = Embedder(server.cascade.clip), server.engine._embedder.fit_pca
    image, answers = pixels(noisy_picture(1)).copy(), iter([False, True])

    def fit_pca(check: Callable[[], None]) -> Pca:
        if not next(answers):
            raise StepError("s3: no answer")
        return fit(check)

    embedder.fit_pca = fit_pca
    with pytest.raises(StepError, match="no answer"):
        asyncio.run(embedder.reduce_image(image, [1]))
    components, _ = asyncio.run(embedder.reduce_image(image, [1]))
    assert components == (1, 16)


def test_a_search_for_components_ends_with_its_engine(make_engine: Callable[..., Engine]) -> None:
    engine, image, begun = make_engine(), pixels(noisy_picture(1)).copy(), threading.Event()

    def fit_pca(check: Callable[[], None]) -> Pca:
        begun.set()
        while True:
            check()
            time.sleep(0.01)

    async def ask() -> None:
        asked = asyncio.create_task(engine.reduce_image(image, [1]))
        await asyncio.to_thread(begun.wait)
        await asyncio.to_thread(engine.close)
        with pytest.raises(NotServing):
            await asked

    engine.use_components(fit_pca)
    asyncio.run(ask())
    assert not [thread for thread in threading.enumerate() if thread.name == "unclip-pca"]


_ENDS_WITH_A_SEARCH = """
import asyncio, threading
import numpy as np
from pipeline.serve import embedder
from pipeline.serve.engine import Engine
from tests.tiny.networks import make_cascade

embedder._END_WAIT_S, begun = 0.0, threading.Event()

def fit_pca(_):
    begun.set()
    threading.Event().wait()  # a store that is silent

async def ask():
    asked = asyncio.create_task(engine.reduce_image(np.zeros((32, 32, 3), np.uint8), [1]))
    await asyncio.to_thread(begun.wait)
    asked.cancel()

engine = Engine(make_cascade())
engine.use_components(fit_pca)
asyncio.run(ask())
engine.close()
"""


def test_the_end_of_a_process_waits_for_no_search_for_components() -> None:
    command, environment = [sys.executable, "-c", _ENDS_WITH_A_SEARCH], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr


def test_networks_without_training_embeddings_have_no_principal_components(server: Any, serving: Any) -> None:
    with serving(create_app(server.engine, None, ApiSettings(ModelCard("tiny", 32)))) as url:
        files = {"image": noisy_picture(1)}
        answer = httpx.post(f"{url}/v1/images/pca-reconstructions", files=files, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "index_not_found")
    assert "a folder of networks" in answer.json()["error"]["message"]
