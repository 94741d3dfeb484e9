"""The pairs step: a small source in this process, a large one with several workers."""

from pipeline.runtime.admission import require_room
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.pool import ShardJob, map_shards
from pipeline.workspace.forgotten import Forgotten
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import Progress


def run_pairs(context: StepContext) -> StepResult:
    """Write the list of pairs; several workers share the tasks of each phase, if there is more than one task.

    Raises:
        DataError: See ``PairsMaker``.
        StepError: If several are to work, and this machine has no room for one.
    """
    progress = Progress(context.output)
    from pipeline.data.drawn import EVALUATION, write_evaluation
    from pipeline.data.make_pairs import READ, PairsMaker
    from pipeline.data.sources import count_pairs, source_of

    recipe, output = context.recipe, context.output
    resources, num_rows = recipe.pairs.resources, count_pairs(recipe.pairs)
    maker, num_workers = PairsMaker(source_of(recipe), output, Forgotten.read(context.root)), 1
    before = 0

    def note(done: int) -> None:
        progress.update(before + done, max(before + done, num_rows), "rows")

    for names in maker.phases():
        records = output.shard_records()  # every record of the step: once a phase, not once a name
        missing = [name for name in names if name not in records]
        # The rows that max_pairs leaves to a piece depend on those before it.
        if len(missing) > 1 and resources.num_workers > 1 and not recipe.pairs.max_pairs:
            if not context.can_grow:
                require_room(recipe, ["pairs"], is_long_list=True)
            map_shards(context, ShardJob(PairsWorker, names, num_rows, resources))
            num_workers = resources.num_workers
        else:
            for name in names:
                record = records.get(name) or maker.make(name, note)
                before += record.counts.get("in", 0) if name.startswith(READ) else 0
    summary = maker.finish()
    if recipe.pairs.source == "drawn":
        with output.write(EVALUATION) as path:
            summary.metrics["evaluation_prompts"] = write_evaluation(path, recipe.seed)
    progress.update(summary.counts["in"], summary.counts["in"], "rows", force=True)
    return StepResult(counts=dict(summary.counts), metrics=summary.metrics, num_workers=num_workers)


class PairsWorker:
    """Does tasks of the pairs step."""

    def __init__(self, context: StepContext) -> None:
        from pipeline.data.make_pairs import PairsMaker
        from pipeline.data.sources import source_of

        self._maker = PairsMaker(source_of(context.recipe), context.output, Forgotten.read(context.root))

    def __call__(self, shard: str) -> ShardRecord:
        """Do one task and commit it."""
        return self._maker.make(shard)
