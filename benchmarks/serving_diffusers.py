"""Our server beside diffusers' UnCLIPPipeline behind FastAPI with a lock, which makes one picture at a time.

    python -m benchmarks.serving_diffusers [--clients 16] [--rounds 5] [--threads 1]
    python -m benchmarks.serving_diffusers --device cuda --size single-gpu [--precision bfloat16]

The networks are those of benchmarks/sampling.py: the demo's widths, as far as diffusers' layout can hold them, exported
and loaded by diffusers, so that both servers have the same weights. Both sample by ancestral steps, guided alike, as
many as the demo (16, 50 and 8), or with `--size single-gpu` as many as that recipe. Each server is a process of its own
and answers PNG files over real HTTP. In every round each client requests a picture, all at the same moment, first of
one server and then of the other; the order changes every round. Seconds are processor seconds of the server's process
on a CPU, and wall seconds on a GPU or where the row says so. Floors: 1.5x on a CPU, 3x on a GPU.
"""

import argparse
import base64
import io
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import torch
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel
from torch import nn

from benchmarks.sampling import DEMO, Size, load_pipeline, make_cascade
from benchmarks.side_by_side import publish, summarise
from models.diffusion.config import SamplerConfig
from models.prior.config import PriorConfig
from models.stage import DiffusionStage
from pipeline.clip.frozen import FrozenClip
from pipeline.networks.arithmetic import Arithmetic
from pipeline.networks.counting import Counter
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.sections import Precision
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.engine import Engine
from pipeline.serve.guards import Guards
from pipeline.serve.http_server import HttpServer, listen
from tests.ports import free_port

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROMPT = "a large red star above a small blue circle"
_ROUTE = "/v1/images/generations"
_ALONE = 3
"""Pictures that one client requests after another."""
Who = Literal["ours", "theirs"]


@dataclass(frozen=True)
class Setting:
    """What both servers are started with."""

    size: Size
    device: str
    precision: Precision
    threads: int
    clients: int


@dataclass(frozen=True)
class Facts:
    """What a server says of its networks once it is ready."""

    num_parameters: int
    """CLIP's text tower, prior, decoder and upsampler."""
    flops: float
    """Of one picture."""


def demo() -> Size:
    """The demo's widths and numbers of steps."""
    return _with_steps(replace(DEMO, guidance_scale=2.0), 16, 50, 8)


def single_gpu() -> Size:
    """The sizes and numbers of steps of configs/single-gpu.toml: 64 px, enlarged to 256."""
    recipe = load_recipe(Path(__file__).parent.parent / "configs" / "single-gpu.toml")
    prior, decoder, upsampler = recipe.prior.model, recipe.decoder.model, recipe.upsampler_1.model
    assert isinstance(prior, PriorConfig)
    size = Size(
        recipe.clip.model,
        replace(prior, num_candidates=1),
        decoder,
        replace(upsampler, rounded=False),
        guidance_scale=2.0,
        num_images=1,
        floor=3.0,
    )
    return _with_steps(size, *(one.sampler.num_steps for one in (prior, decoder, upsampler)))


def _with_steps(size: Size, prior: int, decoder: int, upsampler: int) -> Size:
    return replace(
        size,
        prior=replace(size.prior, sampler=SamplerConfig(num_steps=prior)),
        decoder=replace(size.decoder, sampler=SamplerConfig(num_steps=decoder)),
        upsampler=replace(size.upsampler, sampler=SamplerConfig(num_steps=upsampler)),
    )


SIZES: dict[str, Callable[[], Size]] = {"demo": demo, "single-gpu": single_gpu}


class Body(BaseModel):
    """What both servers read."""

    prompt: str
    seed: int


def our_server(setting: Setting, stack: ExitStack) -> tuple[Any, Facts]:
    """The engine behind the API and its guards."""
    arithmetic = Arithmetic(setting.precision)
    cascade = make_cascade(setting.size, setting.device, arithmetic)
    networks = [stage.network for stage in cascade.stages if isinstance(stage, DiffusionStage)]
    assert isinstance(cascade.clip, FrozenClip)
    facts = _facts([cascade.clip.clip.model, *networks], lambda: cascade.sample([_PROMPT], [0]), skipped="visual.")
    engine = Engine(cascade, max_batch_size=setting.clients, max_waiting=setting.clients, device=setting.device)
    stack.callback(engine.close)
    card = ModelCard("ours", setting.size.upsampler.image_px, sampling=cascade.settings)
    return Guards(create_app(engine, None, ApiSettings(card))), facts


def their_server(setting: Setting, _: ExitStack) -> tuple[Any, Facts]:
    """The pipeline behind a lock."""
    cascade, size = make_cascade(setting.size), setting.size
    assert isinstance(cascade.clip, FrozenClip)
    pipe = load_pipeline(cascade, cascade.clip, _DTYPES[setting.precision]).to(setting.device)
    pipe.set_progress_bar_config(disable=True)
    lock = threading.Lock()

    def sample(prompt: str, seed: int) -> Image.Image:
        return pipe(
            prompt,
            prior_num_inference_steps=size.prior.sampler.num_steps,
            decoder_num_inference_steps=size.decoder.sampler.num_steps,
            super_res_num_inference_steps=size.upsampler.sampler.num_steps,
            prior_guidance_scale=size.guidance_scale,
            decoder_guidance_scale=size.guidance_scale,
            generator=torch.Generator(setting.device).manual_seed(seed),
        ).images[0]

    parts = [pipe.text_encoder, pipe.prior, pipe.text_proj, pipe.decoder, pipe.super_res_first]
    facts = _facts(parts, lambda: sample(_PROMPT, 0))
    app = FastAPI()

    @app.post(_ROUTE)
    def generate(body: Body) -> dict[str, Any]:
        with lock:
            picture = sample(body.prompt, body.seed)
        file = io.BytesIO()
        picture.save(file, "PNG")
        return {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}

    return app, facts


def _facts(modules: Sequence[nn.Module], sample: Callable[[], object], skipped: str = "none") -> Facts:
    sample()  # warm
    with Counter() as counter:
        sample()
    parameters = [
        parameter for module in modules for name, parameter in module.named_parameters() if not name.startswith(skipped)
    ]
    return Facts(sum(map(torch.numel, parameters)), counter.flops)


def serve(who: Who, setting: Setting, port: int, pipe: Connection) -> None:
    """A server's process: it says its facts when it is ready, and ends when anything is said to it."""
    torch.set_num_threads(setting.threads)
    Arithmetic(setting.precision).set_up()
    with ExitStack() as stack:
        app, facts = (our_server if who == "ours" else their_server)(setting, stack)
        stack.enter_context(HttpServer(app, listen("127.0.0.1", port)))
        pipe.send(facts)
        pipe.recv()


@dataclass
class Server:
    """A running server."""

    url: str
    facts: Facts
    process: psutil.Process

    def ask(self, seed: int) -> float:
        """Wall seconds until a picture is here."""
        start_s = time.perf_counter()
        answer = httpx.post(self.url, json={"prompt": _PROMPT, "seed": seed}, timeout=600)
        file = base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])
        taken_s = time.perf_counter() - start_s
        Image.open(io.BytesIO(file)).load()
        return taken_s

    def busy_s(self) -> float:
        """Processor seconds of its process so far."""
        times = self.process.cpu_times()
        return times.user + times.system


@contextmanager
def running(who: Who, setting: Setting) -> Generator[Server]:
    """A server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    port = free_port()
    process = context.Process(target=serve, args=(who, setting, port, there), daemon=True)
    process.start()
    there.close()
    try:
        yield Server(f"http://127.0.0.1:{port}{_ROUTE}", here.recv(), psutil.Process(process.pid))
        here.send("end")
    finally:
        process.join(20)
        process.kill()


@dataclass(frozen=True)
class Round:
    """One server in one round."""

    wall_s: float
    """Until all clients have their picture."""
    busy_s: float
    """Of the server's processors meanwhile."""
    mean_wait_s: float
    """Mean time of a client."""


def crowd(server: Server, clients: int) -> Round:
    """Each client requests one picture, all at once."""
    with ThreadPoolExecutor(clients) as pool:
        start_s, busy_s = time.perf_counter(), server.busy_s()
        waits = list(pool.map(server.ask, range(clients)))
        return Round(time.perf_counter() - start_s, server.busy_s() - busy_s, statistics.mean(waits))


def alone(server: Server) -> Round:
    """One client requests some pictures, one after another; the times are those of one."""
    start_s, busy_s = time.perf_counter(), server.busy_s()
    waits = [server.ask(seed) for seed in range(_ALONE)]
    wall_s = (time.perf_counter() - start_s) / _ALONE
    return Round(wall_s, (server.busy_s() - busy_s) / _ALONE, statistics.mean(waits))


def measure(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table."""
    on_gpu = setting.device != "cpu"
    crowds: list[tuple[Round, Round]] = []
    singles: list[tuple[Round, Round]] = []
    with running("ours", setting) as ours, running("theirs", setting) as theirs:
        for server in (ours, theirs):
            crowd(server, setting.clients)  # warm
        for number in range(rounds):
            pair = (ours, theirs) if number % 2 == 0 else (theirs, ours)
            done = {id(server): (crowd(server, setting.clients), alone(server)) for server in pair}
            crowds.append((done[id(ours)][0], done[id(theirs)][0]))
            singles.append((done[id(ours)][1], done[id(theirs)][1]))
    kind, seconds = ("wall", "wall_s") if on_gpu else ("processor", "busy_s")
    count = setting.clients
    rows = [
        _row(f"{count} clients, a picture each: {kind} seconds", crowds, seconds, 3.0 if on_gpu else 1.5),
        _row(f"{count} clients, a picture each: wall seconds of a client, mean", crowds, "mean_wait_s"),
        _row(f"one client, one picture: {kind} seconds", singles, seconds),
    ]
    facts = ours.facts, theirs.facts
    return [
        *rows,
        _fact("parameters, M", *(one.num_parameters / 1e6 for one in facts)),
        _fact("GFLOP of a picture", *(one.flops / 1e9 for one in facts)),
    ]


def _row(what: str, pairs: Sequence[tuple[Round, Round]], name: str, floor: float | None = None) -> dict[str, Any]:
    times = [(getattr(ours, name), getattr(theirs, name)) for ours, theirs in pairs]
    one = summarise(what, times, floor=floor or 0.0)
    return {
        "what": what,
        "ours": one.ours_s,
        "theirs": one.theirs_s,
        "ratio": one.ratio,
        "low": one.low,
        "high": one.high,
        "floor": floor,
        "rounds": one.rounds,
    }


def _fact(what: str, ours: float, theirs: float) -> dict[str, Any]:
    return {"what": what, "ours": ours, "theirs": theirs, "ratio": theirs / ours} | dict.fromkeys(
        ("low", "high", "floor", "rounds")
    )


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=_DTYPES, default="float32")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="serving_diffusers", help="Of the file of results.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = Setting(
        SIZES[arguments.size](), arguments.device, arguments.precision, arguments.threads, arguments.clients
    )
    rows = measure(setting, arguments.rounds)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    publish(arguments.name, rows, vars(arguments) | {"device": device})


if __name__ == "__main__":
    sys.exit(main())
