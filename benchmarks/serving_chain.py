"""The time of a hop: one request to a chain of deployments, beside the same request to one replica and to no server.

    python -m benchmarks.serving_chain [--rounds 40]

Tiny networks with random weights, so that Ray's part of a request shows, on a Ray of this machine; all in turns, from
one process, as the server calls them; "bare" is the cascade in that process, with as many threads as a replica.
Required: less than 20 ms a hop, and less than 50 ms for one replica above the bare cascade.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve

from benchmarks.side_by_side import publish
from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.networks.cores import use_cores
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.serve_sections import ServeStageConfig
from pipeline.runtime.connection import connect
from pipeline.runtime.deployments import networks_application
from pipeline.runtime.parts import digest_of, parts_of, write_tables
from pipeline.runtime.remote_model import RemoteModel
from pipeline.runtime.served import served_artifacts
from pipeline.workspace.store import Artifact
from tests.tiny.workspace import served_workspace

_PARTS = ("prior", "decoder", "upsampler_1", "upsampler_2")
_CPUS = 0.25
_FLOOR_MS = 20.0
_ABOVE_BARE_FLOOR_MS = 50.0


def main() -> None:
    """Deploy both, and time them alternately."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        recipe = served_workspace(Path(folder))
        artifacts, _ = served_artifacts(recipe)
        section = replace(recipe.serve, cpus_per_replica=_CPUS)
        stages: dict[str, Any] = {part: ServeStageConfig(cpus_per_replica=_CPUS) for part in _PARTS}
        one = replace(recipe, serve=section)
        chain = replace(recipe, serve=replace(section, mode="chain", **stages))
        with connect():
            serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
            models = [_deploy(name, served, artifacts) for name, served in (("one", one), ("chain", chain))]
            use_cores(_CPUS)
            bare = load_cascade(artifacts, configs=network_configs(one))
            times_s, bare_s = asyncio.run(_alternate(models, bare, rounds))
        num_hops = len(parts_of(chain)) - 1
    medians_ms = [1000 * statistics.median(times) for times in times_s]
    extra_ms = sorted(1000 * (b - a) / num_hops for a, b in zip(*times_s, strict=True))
    above_ms = 1000 * statistics.median(one - alone for one, alone in zip(times_s[0], bare_s, strict=True))
    low, median, high = statistics.quantiles(extra_ms, n=4)
    row = {
        "one_replica_ms": medians_ms[0],
        "above_bare_ms": above_ms,
        "above_bare_floor_ms": _ABOVE_BARE_FLOOR_MS,
        "chain_ms": medians_ms[1],
        "hops": num_hops,
        "hop_ms": median,
        "low_ms": low,
        "high_ms": high,
        "floor_ms": _FLOOR_MS,
    }
    publish("serving_chain", [row], {"rounds": rounds})


def _deploy(name: str, recipe: Recipe, artifacts: dict[str, Artifact]) -> RemoteModel:
    first = serve.run(networks_application(recipe, artifacts), name=name, route_prefix=None)
    first_part, *others = parts_of(recipe)
    handles = {first_part: first, **{part: serve.get_deployment_handle(part, name) for part in others}}
    return RemoteModel(handles, digest_of(write_tables(recipe, artifacts)))


async def _alternate(models: list[RemoteModel], bare: Cascade, rounds: int) -> tuple[list[list[float]], list[float]]:
    """Times of each model, and of the cascade in this process, in seconds; the order of models changes every round."""
    times_s: list[list[float]] = [[], []]
    bare_s = list[float]()
    for number in range(-3, rounds):  # the first ones warm up
        for who in ((0, 1), (1, 0))[number % 2]:
            started_s = time.perf_counter()
            await models[who].sample(SampleRequest("a red circle", (number + 3,)))
            if number >= 0:
                times_s[who].append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        bare.sample_request(SampleRequest("a red circle", (number + 3,)))
        if number >= 0:
            bare_s.append(time.perf_counter() - started_s)
    return times_s, bare_s


if __name__ == "__main__":
    main()
