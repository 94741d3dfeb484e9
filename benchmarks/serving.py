"""The server's engine beside the bare sampler: pictures a second, latency, previews, steps wasted.

    unclip run configs/demo.toml
    python -m benchmarks.serving configs/demo.toml [--clients 16] [--gap-s 0.3] [--rounds 3] [--threads 1]

Networks that are not trained yet have random weights of the recipe's sizes, which take the same time. Every client
requests a picture, and the next one when it has it; all begin together, or a gap after the client before. Pictures are
counted between two ends of pictures: when every client has its first one, and when every client has two more. The bare
sampler takes batches of its best size, and of one picture for each client. All times but ``neighbours`` are processor
times of this process, so that other programs on the machine do not count; gaps too are of that clock. Rounds alternate,
and ratios are of one round.
"""

import argparse
import asyncio
import json
import queue
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks.search import make_index
from benchmarks.side_by_side import publish
from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.clip.frozen import FrozenClip
from pipeline.errors import ConfigError
from pipeline.networks.arithmetic import Arithmetic
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.plan import artifact_of, finished_artifacts, make_plan
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.recipe.sections import Precision
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.engine import Engine
from pipeline.serve.guards import Guards
from pipeline.serve.http_server import HttpServer, listen
from pipeline.serve.local_neighbours import LocalNeighbours
from pipeline.serve.protocols import Preview
from pipeline.shapes.captions import canonical_caption
from pipeline.shapes.scene import evaluation_scenes
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.workspace import write_networks

_BATCH_SIZES = (8, 16, 32)
Clock = Callable[[], float]
"""Seconds."""


_INDEX_ROWS = 100_000
_LEAVERS = 20


@dataclass
class Crowd:
    """What many clients got."""

    rate: float
    """Pictures a second."""
    rows_per_step: float


def load_networks(recipe: Recipe, precision: Precision | None = None) -> Cascade:
    """The recipe's trained networks, or random ones of its sizes; ``precision`` replaces the recipe's."""
    arithmetic = Arithmetic(precision or recipe.serve.precision, recipe.serve.compiled)
    arithmetic.set_up()
    artifacts = finished_networks(recipe)
    if not artifacts:
        with tempfile.TemporaryDirectory() as folder:
            workspace = Workspace(folder)
            steps = [step for step in make_plan(recipe) if step.name in CASCADE_STEPS]
            artifacts = {step.name: artifact_of(workspace, step) for step in steps}
            write_networks(recipe, artifacts)
            return load_cascade(artifacts, recipe.serve.accelerator, network_configs(recipe), arithmetic=arithmetic)
    return load_cascade(artifacts, recipe.serve.accelerator, network_configs(recipe), arithmetic=arithmetic)


def finished_networks(recipe: Recipe) -> dict[str, Artifact]:
    """The recipe's trained networks; empty if one is not finished."""
    try:
        return finished_artifacts(recipe, CASCADE_STEPS)
    except ConfigError:
        return {}


def rates(
    cascade: Cascade,
    prompts: Sequence[str],
    gap_s: float,
    rounds: int,
    sizes: Sequence[int] = _BATCH_SIZES,
    clock: Clock = time.process_time,
) -> list[dict[str, Any]]:
    """The engine's rate as a share of the bare sampler's, for both ways to begin."""
    by_size = {size: _bare_rate(cascade, prompts, size, clock) for size in sizes}
    best = max(by_size, key=by_size.__getitem__)
    bare_sizes = sorted({best, len(prompts)})
    results: dict[str, list[tuple[dict[int, float], Crowd]]] = {"together": [], "apart": []}
    for _ in range(rounds):
        for begin, crowds in results.items():
            bare = {size: _bare_rate(cascade, prompts, size, clock) for size in bare_sizes}
            crowds.append((bare, serve_crowd(cascade, prompts, gap_s if begin == "apart" else 0.0, clock)))
    rows: list[dict[str, Any]] = []
    for begin, floor in (("together", 0.9), ("apart", 0.85)):
        batch = statistics.median(crowd.rows_per_step for _, crowd in results[begin])
        for size in dict.fromkeys((best, len(prompts))):
            shares = [crowd.rate / bare[size] for bare, crowd in results[begin]]
            what = f"{len(prompts)} clients, {begin}: share of the bare rate in batches of {size}"
            rate = statistics.median(bare[size] for bare, _ in results[begin])
            note = f"bare: {rate:.2f} a second; {batch:.1f} pictures a step; {min(shares):.2f} .. {max(shares):.2f}"
            rows.append(_row(what, statistics.median(shares), floor, note))
    return rows


def serve_crowd(cascade: Cascade, prompts: Sequence[str], gap_s: float, clock: Clock, num_pictures: int = 2) -> Crowd:
    """A client for each prompt requests pictures one after another, until all have ``num_pictures`` after the first."""
    ended: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
    counts = [0] * len(prompts)
    ends: list[float] = []
    window: list[tuple[float, dict[str, int]]] = []
    with closing(Engine(cascade, max_batch_size=len(prompts))) as engine:
        engine.submit(SampleRequest(prompts[0], (0,))).result()  # the engine learns how long its stages take

        def ask(number: int) -> None:
            def note(future: Any) -> None:
                if future.exception() is None:  # else the engine is closed
                    ended.put((number, clock()))

            engine.submit(SampleRequest(prompts[number], (counts[number],))).add_done_callback(note)

        begun, start_s = 0, clock()
        while len(window) < 2:
            late = [number for number in range(begun, len(prompts)) if number * gap_s <= clock() - start_s]
            if begun < len(prompts) and sum(counts) >= begun and clock is time.process_time:  # it stands still now
                late = late or [begun]
            for number in late:
                ask(number)
            begun += len(late)
            try:
                number, end_s = ended.get(timeout=0.01)
            except queue.Empty:
                continue
            counts[number] += 1
            ends.append(end_s)
            if min(counts) == (1, 1 + num_pictures)[len(window)]:
                window.append((end_s, engine.counts()))
            ask(number)
    (first_s, before), (last_s, after) = window
    rate = sum(first_s < end_s <= last_s for end_s in ends) / (last_s - first_s)
    return Crowd(rate, (after["rows"] - before["rows"]) / (after["steps"] - before["steps"]))


def latency(cascade: Cascade, prompt: str, rounds: int, clock: Clock) -> dict[str, Any]:
    """Milliseconds that one request takes longer than the bare sampler."""
    request = SampleRequest(prompt, (1,))
    with closing(Engine(cascade)) as engine:
        engine.submit(request).result()
        pairs = [
            (
                _seconds(lambda: engine.submit(request).result(), clock),
                _seconds(lambda: cascade.sample_request(request), clock),
            )
            for _ in range(3 * rounds)
        ]
    above = 1000 * statistics.median(served - bare for served, bare in pairs)
    return _row("one request above the bare sampler, ms", above, -50, f"bare: {1000 * pairs[0][1]:.0f} ms")


def latency_over_http(cascade: Cascade, prompt: str, rounds: int, clock: Clock) -> dict[str, Any]:
    """Milliseconds that one request over HTTP takes longer than the bare sampler: with its checks, and its PNG."""
    request, body = SampleRequest(prompt, (1,)), {"prompt": prompt, "seed": 1}
    card = ModelCard("benchmark", max(cascade.sides_px.values()))
    with closing(Engine(cascade)) as engine:
        app, listener = create_app(engine, None, ApiSettings(card)), listen("127.0.0.1", 0)
        with (
            HttpServer(Guards(app), listener),
            httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=600) as client,
        ):
            client.post("/v1/images/generations", json=body).raise_for_status()
            pairs = [
                (
                    _seconds(lambda: client.post("/v1/images/generations", json=body).raise_for_status(), clock),
                    _seconds(lambda: cascade.sample_request(request), clock),
                )
                for _ in range(3 * rounds)
            ]
    above = 1000 * statistics.median(served - bare for served, bare in pairs)
    note = f"bare: {1000 * pairs[0][1]:.0f} ms; its client is in the same process"
    return _row("one request over HTTP above the bare sampler, ms", above, -50, note)


def first_preview(cascade: Cascade, prompt: str, rounds: int, clock: Clock) -> dict[str, Any]:
    """Share of a picture's time after which its first preview is there, with 50 steps in the decoder."""
    shares: list[float] = []
    with closing(Engine(cascade)) as engine:
        for seed in range(2 * rounds):
            times: list[float] = []

            def show(_: Preview, times: list[float] = times) -> None:
                times.append(clock())

            start_s = clock()
            engine.submit(SampleRequest(prompt, (seed,), num_steps={"decoder": 50}), num_previews=3, show=show).result()
            shares.append((times[0] - start_s) / (clock() - start_s))
    return _row("first preview of a 50-step picture, share of its time", statistics.median(shares), -0.15)


def steps_after_leaving(cascade: Cascade, prompt: str, num_clients: int, latest: int) -> dict[str, Any]:
    """Most steps that end for a client after it hung up, at a random one of its first ``latest`` steps."""
    counts = list[int]()
    with closing(Engine(cascade)) as engine:
        app, listener = create_app(engine, None, ApiSettings(ModelCard("benchmark", 0))), listen("127.0.0.1", 0)
        address = listener.getsockname()
        with HttpServer(Guards(app), listener):
            for number, share in enumerate(np.random.default_rng(0).random(num_clients)):
                before = engine.counts()["steps"]
                with closing(_request_picture(address, prompt, number)):
                    while engine.counts()["steps"] < before + 1 + int(latest * share):
                        time.sleep(0.001)
                    left_at = engine.counts()["steps"]
                while engine.counts()["active"]:
                    time.sleep(0.001)
                counts.append(engine.counts()["steps"] - left_at)
    note = f"{num_clients} clients over HTTP; mean {statistics.mean(counts):.2f}, the step that it left in included"
    return _row("steps for a client after it left, at most", max(counts), -1, note)


def _request_picture(address: Any, prompt: str, seed: int) -> socket.socket:
    """The connection of a client that has sent its request."""
    body = json.dumps({"prompt": prompt, "seed": seed}).encode()
    link = socket.create_connection(address)
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    link.sendall(head % len(body) + body)
    return link


def faster(recipe: Recipe, cascade: Cascade, prompts: Sequence[str], clock: Clock) -> dict[str, Any]:
    """How much sooner pictures in the recipe's precision are there than those in float32."""
    whole, seeds = load_networks(recipe, "float32"), range(len(prompts))
    times = [_seconds(lambda one=one: one.sample(prompts, seeds), clock) for one in (whole, cascade)]
    what = f"{recipe.serve.precision}: times as many pictures a second as float32"
    return _row(what, times[0] / times[1], 0, f"float32: {times[0]:.2f} s")


def neighbours(cascade: Cascade) -> dict[str, Any]:
    """Milliseconds of wall time that the neighbours of a picture add to its request."""
    clip = cascade.clip
    assert isinstance(clip, FrozenClip)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        retriever, _ = make_index(Path(folder), _INDEX_ROWS, clip.dims.embed_dim)
        index = LocalNeighbours(retriever)
        pictures = torch.randint(0, 256, (60, 128, 128, 3), dtype=torch.uint8)
        for number in range(60):
            start_s = time.perf_counter()
            vector = clip.encode_image(pictures[number : number + 1])[0].cpu().numpy()
            asyncio.run(index.search(vector[None], 10, "image"))
            times.append(1000 * (time.perf_counter() - start_s))
    low, median, high = np.percentile(times[10:], [25, 50, 75])
    return _row(f"10 neighbours among {_INDEX_ROWS} rows, ms", float(median), -10, f"quartiles {low:.1f}, {high:.1f}")


def _row(what: str, value: float, floor: float, note: str = "") -> dict[str, Any]:
    """A row of the table; a negative ``floor`` is a ceiling."""
    limit = f">= {floor:g}" if floor >= 0 else f"<= {-floor:g}"
    return {
        "what": what,
        "value": value,
        "required": limit,
        "holds": value >= floor if floor >= 0 else value <= -floor,
        "note": note,
    }


def _bare_rate(cascade: Cascade, prompts: Sequence[str], size: int, clock: Clock) -> float:
    many = [prompts[number % len(prompts)] for number in range(size)]
    return size / _seconds(lambda: cascade.sample(many, range(size)), clock)


def _seconds(work: Callable[[], object], clock: Clock) -> float:
    start_s = clock()
    work()
    return clock() - start_s


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--gap-s", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="Change a field of the recipe.")
    parser.add_argument("--name", default="serving", help="Of the file of results.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe, arguments.set)
    clock = time.perf_counter if recipe.serve.accelerator == "cuda" else time.process_time
    cascade = load_networks(recipe)
    prompts = [canonical_caption(scene.scene) for scene in evaluation_scenes(arguments.clients, 0)]
    cascade.sample(prompts[:1], [0])  # warm
    rows = rates(cascade, prompts, arguments.gap_s, arguments.rounds, clock=clock)
    rows += [
        measure(cascade, prompts[0], arguments.rounds, clock) for measure in (latency, latency_over_http, first_preview)
    ]
    rows.append(steps_after_leaving(cascade, prompts[0], _LEAVERS, latest=40))
    if finished_networks(recipe) and recipe.serve.precision != "float32":
        rows.append(faster(recipe, cascade, prompts, clock))
    if recipe.serve.accelerator == "cpu":  # the search runs on processors
        rows.append(neighbours(cascade))
    device = torch.cuda.get_device_name() if recipe.serve.accelerator == "cuda" else "cpu"
    publish(arguments.name, rows, vars(arguments) | {"device": device})


if __name__ == "__main__":
    main()
