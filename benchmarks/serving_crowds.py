"""A picture alone and in a crowd: the largest difference over random arrivals of random requests, by precision.

    unclip run configs/demo.toml
    python -m benchmarks.serving_crowds configs/demo.toml [--crowds 4] [--requests 24] [--precisions float32 bfloat16]

Each crowd is a seeded draw: requests that arrive at random times (exponential gaps, an eighth of a picture's time alone
in the mean), each with its own caption, seed, guidance, decoder steps, size and, one in four, a negative prompt; one in
six is cancelled after a random wait. Every picture of the others is sampled again alone, by the bare sampler, in the
same precision, and compared level by level. Required in float32: at most 1 grey level, in less than 0.1 % of the
values. In bfloat16 the arithmetic of a batch rounds otherwise, which 50 steps carry on; what is required there is that
pictures alone are those of float32 within 40 dB (PSNR, median). The networks must be trained: random ones magnify
rounding.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.serving import finished_networks, load_networks
from benchmarks.side_by_side import publish
from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.recipe.recipe import load_recipe
from pipeline.serve.engine import Engine
from pipeline.shapes.captions import canonical_caption
from pipeline.shapes.scene import evaluation_scenes

_BATCH_SIZE = 16
_LEAVERS = 1 / 6


Pictures = NDArray[np.uint8]
"""(N, H, W, 3)."""


@dataclass
class Differences:
    """Pictures of crowds beside the same ones alone."""

    pictures: int = 0
    equal: int = 0
    """Pictures without any difference."""
    largest: int = 0
    """Grey levels."""
    values: int = 0
    different: int = 0
    """Values that differ."""
    steps: int = 0
    rows: int = 0
    alone: dict[tuple[int, int], Pictures] = field(default_factory=dict[tuple[int, int], Pictures])
    """The pictures alone, by the numbers of their crowd and request."""

    def add(self, crowd: Pictures, alone: Pictures, key: tuple[int, int]) -> None:
        """Compare the pictures (N, H, W, 3) of a request."""
        levels = np.abs(crowd.astype(np.int64) - alone)
        self.pictures += len(levels)
        self.equal += int((levels.reshape(len(levels), -1).max(1) == 0).sum())
        self.largest = max(self.largest, int(levels.max()))
        self.values += levels.size
        self.different += int((levels > 0).sum())
        self.alone[key] = alone

    def psnr_db(self, other: "Differences") -> list[float]:
        """Of the pictures alone, beside the same ones of another precision; a request that left in one is left out."""
        both = self.alone.keys() & other.alone.keys()
        powers = [np.square(self.alone[key].astype(float) - other.alone[key]).mean((1, 2, 3)) for key in both]
        return (10 * np.log10(255**2 / np.maximum(np.concatenate(powers), 1e-6))).tolist()


def draw_request(draws: random.Random, captions: Sequence[str], sides_px: Sequence[int]) -> SampleRequest:
    """A request with settings of its own."""
    caption, other = draws.sample(captions, 2)
    return SampleRequest(
        caption,
        tuple(draws.sample(range(10_000), draws.choice((1, 1, 2)))),
        guidance_scale={"decoder": draws.choice((1.0, 1.5, 2.0, 4.0))},
        num_steps={"decoder": draws.choice((10, 25, 50))},
        negative_prompt=other if draws.random() < 0.25 else "",
        side_px=draws.choice(sides_px),
    )


def serve_crowd(
    cascade: Cascade, requests: Sequence[SampleRequest], mean_gap_s: float, draws: random.Random
) -> tuple[dict[int, Pictures], dict[str, int]]:
    """Pictures by the number of their request, without those that were cancelled; and the engine's counts."""
    futures: list[Future[Any]] = []
    with closing(Engine(cascade, max_batch_size=_BATCH_SIZE, max_waiting=len(requests))) as engine:
        for request in requests:
            futures.append(engine.submit(request))
            time.sleep(draws.expovariate(1 / mean_gap_s))
            if draws.random() < _LEAVERS:
                draws.choice(futures).cancel()
        images: dict[int, Pictures] = {}
        for number, future in enumerate(futures):
            try:
                images[number] = future.result().images
            except CancelledError:
                continue
        return images, engine.counts()


def differences(cascade: Cascade, num_crowds: int, num_requests: int) -> Differences:
    """Compare crowds with the bare sampler."""
    result = Differences()
    captions = [canonical_caption(scene.scene) for scene in evaluation_scenes(64, 0)]
    sides_px = [stage.side_px for stage in cascade.stages if stage.side_px is not None]
    start_s = time.perf_counter()
    cascade.sample(captions[:1], [0])
    picture_s = time.perf_counter() - start_s
    for seed in range(num_crowds):
        draws = random.Random(seed)
        requests = [draw_request(draws, captions, sides_px) for _ in range(num_requests)]
        images, counts = serve_crowd(cascade, requests, picture_s / 8, draws)
        for number, crowd in images.items():
            result.add(crowd, cascade.sample_request(requests[number]).images.numpy(), (seed, number))
        result.steps += counts["steps"]
        result.rows += counts["rows"]
    return result


def _row(precision: str, of: Differences, whole: Differences | None) -> dict[str, Any]:
    share, is_whole = 100 * of.different / of.values, precision == "float32"
    psnr_db = sorted(of.psnr_db(whole)) if whole is not None and not is_whole else []
    median_db = statistics.median(psnr_db) if psnr_db else 0.0
    return {
        "precision": precision,
        "pictures": of.pictures,
        "rows_a_step": of.rows / of.steps,
        "pictures_equal": of.equal,
        "largest_difference": of.largest,
        "values_that_differ_%": share,
        "psnr_db_to_float32": median_db if psnr_db else "",
        "lowest_db": psnr_db[0] if psnr_db else "",
        "holds": (of.largest <= 1 and share < 0.1) if is_whole else median_db >= 40,
    }


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--crowds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="Change a field of the recipe.")
    parser.add_argument("--name", default="serving_crowds", help="Of the file of results.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe, arguments.set)
    if not finished_networks(recipe):
        parser.exit(2, f"{arguments.recipe}: its networks are not trained yet: unclip run {arguments.recipe}\n")
    measured = {
        precision: differences(load_networks(recipe, precision), arguments.crowds, arguments.requests)
        for precision in arguments.precisions
    }
    rows = [_row(precision, one, measured.get("float32")) for precision, one in measured.items()]
    device = torch.cuda.get_device_name() if recipe.serve.accelerator == "cuda" else "cpu"
    publish(arguments.name, rows, vars(arguments) | {"device": device})


if __name__ == "__main__":
    main()
