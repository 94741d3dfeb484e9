"""The evaluate step on Ray: parts are drawn by workers side by side, and put together here."""

import torch

from pipeline.evaluate.evaluate import finish, make_runner, plan_work, summarise
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.pool import ShardJob, map_shards, total_counts
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import Progress


def run_evaluate(context: StepContext) -> StepResult:
    """Draw and measure what is not committed yet, then put all parts together.

    Raises:
        DataError: If an input is damaged.
        StepError: If a worker was lost more often than it is tried again.
    """
    resources = context.recipe.evaluate.resources
    work = plan_work(context.recipe, context.inputs)
    job = ShardJob(EvaluateStage, [part.name for part in work.parts], work.num_items, resources)
    records = map_shards(context, job)
    progress = Progress(context.output)
    progress.update(work.num_items, work.num_items, "rows", "putting numbers and pictures together", force=True)
    metrics = finish(context.recipe, context.inputs, context.output, work)
    progress.update(work.num_items, work.num_items, "rows", force=True)
    return StepResult(counts=total_counts(records), metrics=summarise(metrics), num_workers=resources.num_workers)


class EvaluateStage:
    """Draws and measures parts of the evaluate step."""

    def __init__(self, context: StepContext) -> None:
        recipe = context.recipe
        torch.set_num_threads(max(1, int(recipe.evaluate.resources.cpus_per_worker)))
        work = plan_work(recipe, context.inputs)
        self._parts = {part.name: part for part in work.parts}
        self._runner = make_runner(recipe, context.inputs, context.output, work)

    def __call__(self, shard: str) -> ShardRecord:
        """Draw and measure one part and commit it."""
        return self._runner.run(self._parts[shard])
