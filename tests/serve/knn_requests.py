"""Searches over HTTP, and the embeddings that they search."""

import json
from typing import Any

import httpx
import pyarrow.parquet as pq

from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.workspace.store import Workspace


def post(server: Any, path: str = "/knn-service", **body: Any) -> httpx.Response:
    # As clip-retrieval's own client sends it: JSON without a content type, every field there, null where unused.
    fields = {
        "text": None, "image": None, "image_url": None, "embedding_input": None,
        "modality": "image", "num_images": 3, "indice_name": "tiny", "use_mclip": False, "deduplicate": False,
        "use_safety_model": True, "use_violence_detector": True, "aesthetic_score": "", "aesthetic_weight": 0.5,
    }  # fmt: skip
    return httpx.post(f"{server.url}{path}", content=json.dumps(fields | body))


def embeddings(server: Any) -> Any:
    steps = {step.name: step for step in make_plan(server.recipe)}
    embed = artifact_of(Workspace(server.recipe.workspace), steps["embed"])
    return pq.read_table(embed.path("00000.parquet"))
