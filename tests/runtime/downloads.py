"""Downloads from a server of these tests, as steps of a run."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.recipe.plan import make_plan, manifest_of
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.context import StepContext
from pipeline.runtime.pairs import run_pairs
from pipeline.workspace.store import Artifact


def tables_of(folder: Path, urls: Sequence[str], **settings: Any) -> dict[str, Any]:
    (folder / "list.csv").write_text(
        "\n".join(["url,caption", *(f'"{url}",caption {i}' for i, url in enumerate(urls))])
    )
    resources = {"num_workers": 1, "cpus_per_worker": 0.5, "min_success_prob": 0.0} | settings.pop("resources", {})
    fixed = {
        "image_px": 64,
        "retries": 0,
        "deadline_s": 20.0,
        "allowed_networks": ["127.0.0.1/32"],
    }
    return {
        "workspace": str(folder / "workspace"),
        "pairs": {"source": "list", "path": str(folder / "list.csv")},
        "download": fixed | settings | {"resources": resources},
    }


def context_of(tables: dict[str, Any]) -> StepContext:
    """The context of the download; the pairs are made."""
    recipe = parse_recipe(tables)
    contexts = {step.name: StepContext(recipe, step, recipe.workspace) for step in make_plan(recipe, until="download")}
    pairs = contexts["pairs"]
    pairs.output.commit(manifest_of(pairs.step, pairs.output, run_pairs(pairs).counts))
    return contexts["download"]


def messages_of(output: Artifact, shard: str = "00000") -> list[str | None]:
    return pq.read_table(output.path(f"{shard}.parquet")).column("error_message").to_pylist()


def die_of_killers(worker: Any) -> None:
    """Let the worker's process die as soon as it fetches a URL with ``killer`` in it."""
    fetch = worker._downloader._fetch_one

    async def fetch_or_die(request: Any) -> Any:
        if "killer" in request.url:
            os.kill(os.getpid(), signal.SIGKILL)
        return await fetch(request)

    worker._downloader._fetch_one = fetch_or_die
