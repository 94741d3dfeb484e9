"""The filter steps in a real run: on Ray, from the list to the report."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.store import Artifact, Workspace
from tests.ports import free_port
from tests.tiny.command import unclip
from tests.tiny.recipe import write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.e2e]

_FILTERS = """
[filter]
languages = ["en"]
duplicates = "near"
resources.num_workers = 1

[filter_embeddings]
clip_score_share = 0.7
max_similarity = 0.99999
"""


@pytest.mark.slow
def test_a_run_filters_before_and_after_the_embeddings(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, port=free_port())
    path.write_text(path.read_text() + _FILTERS)
    done = unclip("run", str(path), "--until", "prior", cwd=tmp_path, timeout_s=500)
    assert done.returncode == 0, done.stdout
    recipe = load_recipe(path)
    artifacts: dict[str, Artifact] = {
        step.name: artifact_of(Workspace(recipe.workspace), step) for step in make_plan(recipe, until="prior")
    }
    counts = {name: artifact.manifest().counts for name, artifact in artifacts.items()}  # type: ignore[union-attr]
    assert counts["filter"]["in"] == counts["download"]["ok"]
    assert counts["embed"]["in"] == counts["filter"]["ok"]
    assert counts["filter_embeddings"]["in"] == counts["embed"]["ok"]
    assert counts["filter_embeddings"]["clip_score_share"] > 0
    for name in ("filter", "filter_embeddings"):
        assert counts[name]["in"] == sum(counts[name].values()) - counts[name]["in"]
        assert not [file for file in artifacts[name].names() if file.startswith("live/")]
    embeddings = artifacts["filter_embeddings"]
    rows = sum(pq.read_metadata(embeddings.path(f"{shard}.parquet")).num_rows for shard in embeddings.shard_records())
    assert rows == counts["filter_embeddings"]["ok"]
    status = unclip("status", str(path), "--json", cwd=tmp_path)
    by_step = {row["step"]: row for row in json.loads(status.stdout)}
    assert by_step["filter_embeddings"]["counts"] == counts["filter_embeddings"]
    again = unclip("run", str(path), "--until", "prior", cwd=tmp_path)
    assert "filter: starts" not in again.stdout
    assert again.returncode == 0
    assert "What was left out" in (Path(recipe.workspace) / "report.html").read_text()
