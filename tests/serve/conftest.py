"""Real networks with random weights, small enough to draw a picture in a fraction of a second."""

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from models.cascade import Cascade
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder
from models.decoder.stage import DecoderStage
from models.diffusion.config import DiffusionConfig, SamplerConfig
from models.editor import Editor, EditSettings
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.prior.stage import PriorStage
from models.upsampler.config import UpsamplerConfig
from models.upsampler.network import Upsampler
from models.upsampler.stage import UpsamplerStage
from pipeline.clip.frozen import FrozenClip
from pipeline.clip.model import create_clip
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.plan import artifact_of, finished_artifacts, make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.retrieve.retriever import Retriever
from pipeline.sampling.edit_pictures import training_pca
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.engine import Engine
from pipeline.serve.local_neighbours import LocalNeighbours
from pipeline.workspace.store import Workspace
from tests.models.tiny_models import CONVOLUTION, UNET, randomise
from tests.tiny.networks import CLIP
from tests.tiny.workspace import served_workspace


@pytest.fixture(scope="session")
def cascade() -> Cascade:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    clip = FrozenClip(create_clip(CLIP))
    ddpm = SamplerConfig(method="ddpm", num_steps=6, clip_x0=False, guidance_scale=2.0)
    prior = Prior(PriorConfig(width=16, depth=2, num_heads=2, sampler=ddpm), clip.dims)
    dpmpp = SamplerConfig(method="dpmpp_2m", num_steps=7, guidance_scale=1.5)
    learned = DiffusionConfig(variance="learned_range")
    decoder = Decoder(
        DecoderConfig(image_px=8, context_width=8, unet=UNET, sampler=dpmpp, diffusion=learned), clip.dims
    )
    ddim = SamplerConfig(method="ddim", num_steps=4, eta=0.5)
    upsampler = Upsampler(UpsamplerConfig(image_px=32, low_res_px=8, crop_px=16, unet=CONVOLUTION, sampler=ddim))
    for network in (prior, decoder, upsampler):
        randomise(network)
    for network in (prior, decoder):
        network.null_text.set(clip.encode_text([""]))
    return Cascade(clip, [PriorStage.of(prior), DecoderStage.of(decoder), UpsamplerStage.of(upsampler)])


@pytest.fixture
def make_engine(cascade: Cascade) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(**limits: int) -> Engine:
        engines.append(Engine(cascade, **limits))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@dataclass(frozen=True)
class Server:
    """A running server and what stands behind it."""

    url: str
    recipe: Recipe
    cascade: Cascade
    engine: Engine


@pytest.fixture(scope="session")
def serving() -> Callable[[FastAPI], contextlib.AbstractContextManager[str]]:
    """``with serving(app) as url``."""
    return _serving


@contextlib.contextmanager
def _serving(app: FastAPI) -> Generator[str]:
    """Run an application on a free port, over real sockets."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    torch.set_num_threads(1)
    return served_workspace(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="session")
def neighbours(recipe: Recipe) -> LocalNeighbours:
    workspace = Workspace(recipe.workspace)
    artifacts = {step.name: artifact_of(workspace, step) for step in make_plan(recipe)}
    return LocalNeighbours(Retriever.open(artifacts["index"]))


@pytest.fixture(scope="session")
def server(recipe: Recipe, neighbours: LocalNeighbours) -> Iterator[Server]:
    cascade = load_cascade(finished_artifacts(recipe, CASCADE_STEPS))
    engine = Engine(cascade, max_batch_size=4, max_waiting=3)
    engine.use_components(partial(training_pca, finished_artifacts(recipe, ("embed",))["embed"]))
    card = ModelCard(recipe.name, 32, sampling=cascade.settings)
    with _serving(create_app(engine, neighbours, ApiSettings(card, created=1_700_000_000))) as url:
        yield Server(url, recipe, cascade, engine)
    engine.close()


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Where a file of keys goes."""
    return tmp_path / "keys.json"


@pytest.fixture(scope="module")
def editor(server: Any) -> Editor:
    return Editor(server.cascade, EditSettings(num_steps=3))
