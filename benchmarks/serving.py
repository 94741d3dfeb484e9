"""The server's engine beside the bare sampler: pictures a second, steps shared, latency, and equality in a crowd.

    python -m benchmarks.serving RECIPE [--clients 16] [--pictures 3] [--gap-s 0.3] [--threads 1]

Every client requests one picture after another, and begins a gap after the client before it; gap 0 lets all begin
together. The rate counts the pictures that are finished while every client has one in progress. The bare sampler takes
a batch of as many items as there are clients through the cascade. Rounds alternate. Floors: 0.9 of the bare sampler's
rate if all begin together, 0.85 with gaps; a request alone less than 50 ms above the bare sampler; a picture in the
crowd at most one grey level, in less than 0.1 % of its values, from the same picture alone.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.side_by_side import publish
from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.serve.engine import Engine
from pipeline.shapes.captions import canonical_caption
from pipeline.shapes.scene import evaluation_scenes

Images = dict[tuple[str, int], NDArray[np.uint8]]
"""Pictures (1, H, W, 3) by prompt and seed."""


@dataclass
class Crowd:
    """What many clients got."""

    rate: float
    """Pictures a second while every client had one in progress."""
    rows_per_step: float
    images: Images = field(default_factory=dict[tuple[str, int], NDArray[np.uint8]])


def run(cascade: Cascade, *, clients: int, pictures: int, gap_s: float, rounds: int) -> list[dict[str, Any]]:
    """One row for each way in which the clients begin."""
    prompts = [canonical_caption(scene.scene) for scene in evaluation_scenes(clients, 0)]
    rows: list[dict[str, Any]] = []
    bare: list[float] = []
    alone: list[float] = []
    crowds: dict[float, list[Crowd]] = {0.0: [], gap_s: []}
    cascade.sample(prompts, list(range(clients)))  # warm
    for _ in range(rounds):
        bare.append(clients / _seconds(lambda: cascade.sample(prompts, list(range(clients)))))
        for gap, results in crowds.items():
            results.append(serve_crowd(cascade, prompts, pictures, gap))
        alone.append(_latency(cascade, prompts[0]))
    for gap, results in crowds.items():
        difference = _difference(cascade, results[-1].images)
        rows.append(
            {
                "begin": "together" if gap == 0 else f"{gap:g} s apart",
                "of_bare_rate": statistics.median(crowd.rate / rate for crowd, rate in zip(results, bare, strict=True)),
                "floor": 0.9 if gap == 0 else 0.85,
                "rows_per_step": statistics.median(crowd.rows_per_step for crowd in results),
                "latency_above_bare_ms": 1000 * statistics.median(alone),
                "largest_difference_levels": int(difference.max()),
                "values_that_differ_percent": 100 * float((difference > 0).mean()),
            }
        )
    return rows


def serve_crowd(cascade: Cascade, prompts: Sequence[str], pictures: int, gap_s: float) -> Crowd:
    """Let a client for each prompt request ``pictures`` pictures one after another."""
    finished: list[list[float]] = [[] for _ in prompts]
    crowd = Crowd(0.0, 0.0)
    with closing(Engine(cascade, max_batch_size=len(prompts))) as engine:
        engine.submit(SampleRequest(prompts[0], (0,))).result()  # the engine learns how long its stages take
        before = engine.counts()
        started_s = time.monotonic()

        def ask(number: int) -> None:
            time.sleep(number * gap_s)
            for seed in range(pictures):
                request = SampleRequest(prompts[number], (seed,))
                crowd.images[request.prompt, seed] = engine.submit(request).result().images
                finished[number].append(time.monotonic() - started_s)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = engine.counts()
    first_s, last_s = (len(prompts) - 1) * gap_s, min(times[-1] for times in finished)
    inside = sum(first_s < moment <= last_s for times in finished for moment in times)
    crowd.rate = inside / (last_s - first_s)
    crowd.rows_per_step = (counts["rows"] - before["rows"]) / (counts["steps"] - before["steps"])
    return crowd


def _latency(cascade: Cascade, prompt: str) -> float:
    """Seconds that one request takes longer than the bare sampler."""
    request = SampleRequest(prompt, (1,))
    with closing(Engine(cascade)) as engine:
        engine.submit(request).result()
        served = statistics.median(_seconds(lambda: engine.submit(request).result()) for _ in range(3))
    return served - statistics.median(_seconds(lambda: cascade.sample_request(request)) for _ in range(3))


def _difference(cascade: Cascade, images: Images) -> NDArray[np.int64]:
    """Grey levels between pictures of the crowd and the same ones sampled alone."""
    alone = {key: cascade.sample([key[0]], [key[1]]).images.numpy() for key in images}
    return np.stack([np.abs(image.astype(int) - alone[key]) for key, image in images.items()])


def _seconds(work: Any) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--gap-s", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe)
    cascade = load_cascade(finished_artifacts(recipe, CASCADE_STEPS), recipe.serve.accelerator, network_configs(recipe))
    options = {"clients": arguments.clients, "pictures": arguments.pictures, "gap_s": arguments.gap_s}
    publish("serving", run(cascade, rounds=arguments.rounds, **options), vars(arguments))


if __name__ == "__main__":
    main()
