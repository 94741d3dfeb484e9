"""The parts of the networks that Ray Serve places: their steps, their tables, and what each needs of a machine."""

import hashlib
import json
from dataclasses import replace
from typing import Any

from pipeline.recipe.paths import with_absolute_paths
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.serve_sections import ServeConfig, ServeGatewayConfig, ServeStageConfig
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.recipe.tables import to_dict
from pipeline.workspace.store import Artifact

Tables = dict[str, Any]

NETWORKS = "networks"
"""Name of the deployment that has all networks."""
NEIGHBOURS = "neighbours"
"""Name of the deployment that has the index."""
_FIRST = "prior"
"""The part of a chain with CLIP, the prior, and what has no part of its own."""
BYTES_PER_GB = 1e9
_SPARE_REQUESTS = 64
_UPSCALE_DELAY_S = 10.0
HEALTH_CHECK_PERIOD_S = 1.0
"""How often Ray Serve looks whether a replica lives (10 s by default, which a dead one is then missed for)."""


def parts_of(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """The steps of each part, by the name of its deployment: CLIP's is the first, the index the last, without steps."""
    steps = [name for name in CASCADE_STEPS if getattr(recipe, name) is not None]
    if recipe.serve.mode != "chain":
        return {NETWORKS: tuple(steps)}
    parts: dict[str, tuple[str, ...]] = {}
    for step in steps:
        part = "decoder" if step == "noisy_clip" else step if step in {"decoder", *recipe.upsamplers()} else _FIRST
        parts[part] = (*parts.get(part, ()), step)
    return parts if recipe.serve.neighbours is None else {**parts, NEIGHBOURS: ()}


def place_of(config: ServeConfig, part: str) -> ServeStageConfig:
    """Where a part runs."""
    if part == NETWORKS:
        return ServeStageConfig(
            replicas=config.replicas,
            target_requests=config.target_requests,
            scale_down_after_s=config.scale_down_after_s,
            cpus_per_replica=config.cpus_per_replica,
            gpus_per_replica=config.gpus_per_replica,
            memory_gb_per_replica=config.memory_gb_per_replica,
            label_selector=config.label_selector,
            max_batch_size=config.max_batch_size,
        )
    stage: ServeStageConfig = getattr(config, part)
    return replace(
        stage,
        label_selector={**config.label_selector, **stage.label_selector},
        max_batch_size=stage.max_batch_size or config.max_batch_size,
    )


def part_tables(recipe: Recipe, tables: Tables, part: str) -> Tables:
    """What the replicas of a part are configured with."""
    return tables if part == NETWORKS else {**tables, "part": part, "steps": list(parts_of(recipe)[part])}


def write_tables(recipe: Recipe, artifacts: dict[str, Artifact]) -> Tables:
    """A recipe and its finished steps as plain tables, which Ray Serve passes to the replicas.

    Local paths become absolute: the replicas run in other folders.
    """
    places = {name: artifact.uri for name, artifact in artifacts.items()}
    return {"recipe": to_dict(with_absolute_paths(recipe)), "artifacts": places}


def read_tables(tables: Tables) -> tuple[Recipe, dict[str, Artifact]]:
    """What ``write_tables`` wrote."""
    return parse_recipe(tables["recipe"]), {name: Artifact(uri) for name, uri in tables["artifacts"].items()}


def digest_of(tables: Tables) -> str:
    """Of what is served, the same for all parts of a chain: requests say by it which networks they mean."""
    common = {name: value for name, value in tables.items() if name not in {"part", "steps"}}
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]


def networks_options(config: ServeConfig, part: str = NETWORKS) -> dict[str, Any]:
    """How Ray Serve places a part of the networks, in the words of its configuration files."""
    place = place_of(config, part)
    needs = needs_of_replica(config, part)
    memory = {"memory": int(needs.pop("memory"))} if "memory" in needs else {}
    return {
        **scaling_of(place),
        "ray_actor_options": {
            **{f"num_{kind.lower()}s": number for kind, number in needs.items()},
            **memory,
            "label_selector": place.label_selector,
        },
        # The engine decides how many may wait, for fair shares up to twice as many; Ray must not stop them before.
        "max_ongoing_requests": 2 * (place.max_batch_size + config.max_queued_requests) + _SPARE_REQUESTS,
        "graceful_shutdown_timeout_s": config.drain_s,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
    }


def scaling_of(place: ServeStageConfig | ServeGatewayConfig) -> dict[str, Any]:
    """How many copies Ray Serve runs, in the words of its configuration files."""
    fewest, most = place.replicas
    if fewest == most:
        return {"num_replicas": fewest}
    return {
        "autoscaling_config": {
            "min_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": place.target_requests,
            "upscale_delay_s": _UPSCALE_DELAY_S,
            "downscale_delay_s": place.scale_down_after_s,
        }
    }


def needs_of_replica(config: ServeConfig, part: str = NETWORKS) -> dict[str, float]:
    """Ray's resources that one replica takes."""
    place = place_of(config, part)
    needs = {"CPU": place.cpus_per_replica}
    if config.accelerator == "cuda" and part != NEIGHBOURS:
        needs["GPU"] = place.gpus_per_replica
    if place.memory_gb_per_replica:
        needs["memory"] = place.memory_gb_per_replica * BYTES_PER_GB
    return needs


def most_requests(config: ServeConfig) -> int:
    """Requests that may be in a chain at a time; 0 without one, because its engine decides."""
    return config.max_batch_size + config.max_queued_requests if config.mode == "chain" else 0
