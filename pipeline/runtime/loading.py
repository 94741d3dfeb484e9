"""Loads the networks of a recipe, or of a part of it, into an engine of this process."""

import math
from functools import partial
from typing import TYPE_CHECKING

from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.parts import BYTES_PER_GB, NETWORKS, Tables, place_of, read_tables

if TYPE_CHECKING:
    from pipeline.serve.engine import Engine
    from pipeline.serve.metrics import EngineMetrics

_PCA_ROWS = 1_000_000
"""Training embeddings of which the principal components are: more change them little, and are read for an hour."""


def load_engine(tables: Tables, metrics: "EngineMetrics | None" = None) -> "Engine":
    """The networks of a recipe, with checksums compared, and the engine that samples them.

    Args:
        tables: See ``write_tables`` and ``part_tables``.
        metrics: Of all engines of this process; None: it is alone.

    Raises:
        DataError: If a network is damaged.
    """
    from pipeline.networks.arithmetic import Arithmetic
    from pipeline.networks.cascade import load_cascade, network_configs
    from pipeline.networks.cores import use_cores
    from pipeline.networks.files import verified_files
    from pipeline.sampling.edit_pictures import training_pca
    from pipeline.serve.engine import Engine
    from pipeline.serve.memory import GpuMemory, HostMemory
    from pipeline.serve.metrics import EngineMetrics
    from pipeline.serve.traces import open_traces

    recipe, artifacts = read_tables(tables)
    config, part, steps = recipe.serve, tables.get("part", NETWORKS), tables.get("steps")
    place = place_of(config, part)
    own_bytes = place.memory_gb_per_replica * BYTES_PER_GB or math.inf
    use_cores(place.cpus_per_replica)
    networks = {name: artifact for name, artifact in artifacts.items() if name in CASCADE_STEPS}
    for name in networks.keys() if steps is None else networks.keys() & steps:
        verified_files(networks[name])
    arithmetic = Arithmetic(config.precision, config.compiled)
    arithmetic.set_up()
    configs = network_configs(recipe)
    cascade = load_cascade(networks, config.accelerator, configs, steps=steps, arithmetic=arithmetic)
    metrics = metrics or EngineMetrics()
    spans = metrics.spans if config.traces else None
    engine = Engine(
        cascade,
        max_batch_size=place.max_batch_size,
        max_waiting=config.max_queued_requests,
        steps=steps,
        device=config.accelerator,
        traces=open_traces(config.traces, config.name or recipe.name, spans),
        memory=GpuMemory(place.gpus_per_replica) if config.accelerator == "cuda" else HostMemory(own_bytes),
        metrics=metrics,
    )
    if "embed" in artifacts:
        engine.use_components(partial(training_pca, artifacts["embed"], most_rows=_PCA_ROWS))
    return engine
