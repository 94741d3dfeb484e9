"""A whole recipe through Ray on an object store that fails in every way: its bytes are those of a calm run here."""

from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.status import plan_status
from pipeline.runtime.run import run_recipe
from pipeline.workspace.store import Workspace
from tests.ports import free_port
from tests.s3_server import faulty, started
from tests.tiny.command import ROOT
from tests.tiny.recipe import TRAINED, merge, tiny_tables, training
from tests.workspace.conftest import use

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

_CUT_IN = ("download", "embed", "prior", "evaluate")
"""Steps in whose middle the server is gone."""
_TIMED = (".done.json", "_stats.json", "metrics.jsonl", "segment.json", "index.json")
"""Ends of the names of files that hold times."""


class _Silent:
    """An observer that says nothing."""

    def __getattr__(self, _event: str) -> Any:
        return lambda *_: None


def _tables(workspace: str, port: int) -> dict[str, Any]:
    one_worker = {"resources": {"num_workers": 1}}
    scenes = {"num_pairs": 48, "image_px": 32, "port": port, "num_faulty": 0}
    tables = tiny_tables(
        Path("replaced"),
        tracking={"uri": "off"},
        pairs={"validation_prob": 0.2, "drawn": scenes},
        download={"samples_per_shard": 24, **one_worker},
        embed={"batch_size": 8, **one_worker},
        index={"num_recall_queries": 8},
        evaluate={"num_prompts": 4, "num_shown": 2, "num_images_per_shown": 1, "batch_size": 4, **one_worker},
    )
    short = training(4, batch_size=4, save_every_steps=2, log_every_steps=2)
    tables = merge(tables, dict.fromkeys(TRAINED, short)) | {"workspace": workspace}
    return merge(tables, {"upsampler_1": {"resources": {"num_workers": 2, "cpus_per_worker": 0.5}}})


def _run(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Run a recipe; the checksums of its files by step, without those that hold times."""
    workspace, checksums = Workspace(recipe.workspace), dict[str, dict[str, str]]()
    run_recipe(recipe, plan_status(workspace, make_plan(recipe)), _Silent())
    for step in make_plan(recipe):
        manifest = artifact_of(workspace, step).manifest()
        assert manifest is not None, step.name
        files = manifest.files.items()
        checksums[step.name] = {name: facts["sha256"] for name, facts in files if not name.endswith(_TIMED)}
    return checksums


def test_a_recipe_on_a_store_with_faults_has_the_bytes_of_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, pictures = free_port(), free_port()
    with started() as server:
        server.make_bucket("faulty")
        environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "UNCLIP_CACHE": str(tmp_path / "cache")}
        use(server.environment | environment, monkeypatch)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            here = _run(parse_recipe(_tables(str(tmp_path / "w"), pictures)))
            with faulty(server, port, _CUT_IN) as cuts:
                assert _run(parse_recipe(_tables("s3a://faulty/w", pictures))) == here
            assert sorted(cuts) == sorted(_CUT_IN)
        finally:
            ray.shutdown()
