"""The drawn source of pairs: a URL list of the project's own pictures, and held-out prompts for evaluation."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.lists import BATCH_ROWS
from pipeline.recipe.pairs_sections import DrawnConfig
from pipeline.shapes.captions import canonical_caption
from pipeline.shapes.scene import evaluation_scenes
from pipeline.shapes.server import HOST
from pipeline.shapes.url_list import FAULTS, url_table

EVALUATION = "evaluation.parquet"
NUM_EVALUATION_SCENES = 280
"""The largest possible number; evaluate reads the first of them, and their kinds alternate."""


def drawn_batches(config: DrawnConfig, seed: int) -> Iterator[pa.Table]:
    """Yield the URL list of the drawn pictures with their attributes, and ``num_faulty`` URLs whose faults alternate.

    Args:
        config: The recipe's section.
        seed: The recipe's seed.
    """
    faults = Counter(itertools.islice(itertools.cycle(FAULTS), config.num_faulty))
    table = url_table(f"http://{HOST}:{config.port}", config.num_pairs, seed, config.image_px, faults)
    for start in range(0, table.num_rows, BATCH_ROWS):
        yield table.slice(start, BATCH_ROWS)


def write_evaluation(path: Path, seed: int) -> int:
    """Write ``evaluation.parquet`` (prompt, kind, and the scene as JSON) and return its number of rows."""
    scenes = evaluation_scenes(NUM_EVALUATION_SCENES, seed)
    columns = {
        "prompt": [canonical_caption(item.scene) for item in scenes],
        "kind": [item.kind for item in scenes],
        "scene": [json.dumps(dataclasses.asdict(item.scene)) for item in scenes],
    }
    pq.write_table(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), path)
    return len(scenes)
