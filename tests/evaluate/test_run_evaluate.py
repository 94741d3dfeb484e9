from pathlib import Path

import pytest
import ray

from pipeline.evaluate.evaluate import finish, make_runner, plan_work
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.context import StepContext
from pipeline.runtime.data import run_evaluate
from pipeline.runtime.run import connect
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import LIVE, Artifact
from tests.evaluate.workspaces import evaluate_step


@pytest.mark.ray
def test_run_evaluate_keeps_committed_parts_and_ends_in_the_bytes_of_one_process(tiny: Recipe, tmp_path: Path) -> None:
    context = StepContext(tiny, evaluate_step(tiny), tiny.workspace)
    work, output = plan_work(tiny, context.inputs), context.output
    alone = Artifact(str(tmp_path))
    runner = make_runner(tiny, context.inputs, alone, work)
    for part in work.parts:
        runner.run(part)
    finish(tiny, context.inputs, alone, work)

    first = work.parts[0]
    kept = make_runner(tiny, context.inputs, output, work).run(first)
    with connect():
        result = ray.get(ray.remote(num_cpus=0)(run_evaluate).remote(context))
    assert output.shard_records()[first.name] == kept
    assert result.counts == {"in": work.num_items, "ok": work.num_items}
    assert result.metrics["num_prompts"] == 10
    assert result.num_workers == 2
    progress = read_progress(output)
    assert progress is not None
    assert progress.done == progress.total == work.num_items

    def files(artifact: Artifact) -> dict[str, object]:
        skipped = (LIVE, ".done.json")
        return {
            name: artifact.describe(name)
            for name in artifact.names()
            if not name.startswith(skipped[0]) and not name.endswith(skipped[1])
        }

    assert files(output) == files(alone)
