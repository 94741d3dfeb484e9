"""The batch search: answers to all queries of a file, on Ray; it continues after a stop of any kind."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from pipeline.errors import ConfigError, StepError
from pipeline.recipe.garbage import SEARCH, in_use_of
from pipeline.recipe.plan import Step, finished_artifacts, manifest_of
from pipeline.recipe.recipe import Recipe
from pipeline.retrieve.query_list import num_parts, write_queries
from pipeline.retrieve.retriever import Retriever
from pipeline.retrieve.search import STEPS, SearchOptions
from pipeline.runtime.admission import require_room
from pipeline.runtime.calls import failure_of
from pipeline.runtime.connection import connect, own_servers, require_alive
from pipeline.runtime.context import StepContext
from pipeline.runtime.head import watched_head
from pipeline.runtime.observer import Observer
from pipeline.runtime.placement import cluster_has_roles, controller_options
from pipeline.runtime.pool import ShardJob, map_shards, total_counts
from pipeline.workspace.digests import fingerprint
from pipeline.workspace.lock import locked
from pipeline.workspace.manifest import Manifest, ShardRecord
from pipeline.workspace.progress import Progress, read_progress
from pipeline.workspace.store import LIVE, Artifact, Workspace

QUERIES = "queries.parquet"

_VERSION = 3
_POLL_S = 0.5
_PART_DIGITS = 5


@dataclass(frozen=True)
class SearchContext(StepContext):
    """A batch search, as the step that it is for the pool of workers; travels between processes."""

    options: SearchOptions
    artifacts: dict[str, Artifact]
    """The finished steps that it reads."""
    folder: str
    """Where the answers go; empty: into the workspace, under its key."""
    index_version: int
    """Version of the index that every worker searches, whatever changes the index meanwhile."""

    @property
    def output(self) -> Artifact:
        """The artifact to write."""
        return Artifact(self.folder) if self.folder else super().output


def search_many(
    recipe: Recipe,
    queries: str,
    options: SearchOptions,
    observer: Observer,
    *,
    out: str = "",
    address: str = "",
) -> tuple[Artifact, Manifest]:
    """Answer every query of a file; what an earlier run of the same search has answered is kept.

    A search is of the version that the index has when it begins. After a change of the index (append, delete, restore,
    compact) the same command is another search.

    Args:
        recipe: A recipe whose index is built. ``[embed.resources]`` says how many workers answer, and on what device.
        queries: List of queries, see ``query_list``.
        options: How to search.
        observer: Receives the start, the progress about twice a second, and the end.
        out: Folder or URI for the answers; empty: ``search/<key>`` in the workspace.
        address: Ray cluster; empty: one of our own on this machine.

    Returns:
        The folder of the answers (``NNNNN.parquet``), and its manifest.

    Raises:
        ConfigError: If the index is not built yet, the filter is wrong, or ``out`` holds answers of another search.
        DataError: If the queries cannot be read, or a file of the index is damaged.
        StepError: If a worker was lost too often, or can never start on this machine alone, the folder cannot be
            written, another run writes to it, or the index was changed so often meanwhile that its version is gone.
    """
    artifacts = finished_artifacts(recipe, STEPS)
    if not Path(queries).is_file():
        hint = "; the list must be on this machine: copy it from its store first" if "://" in queries else ""
        raise ConfigError(f"--queries {queries}: no such file{hint}")
    retriever = Retriever.open(artifacts["index"])
    retriever.conditions(options.where, options.distinct)  # refuses a wrong filter before Ray
    section = asdict(options) | {"queries": fingerprint(queries)} | _state_of(artifacts["index"], retriever)
    inputs = {name: artifact.key for name, artifact in artifacts.items()}
    step = Step("search", _VERSION, section, inputs)
    where = Workspace(out) if out else Workspace(recipe.workspace)
    folder, version = where.root if out else "", retriever.index.version
    context = SearchContext(recipe, step, where.root, options, artifacts, folder, version)
    output = context.output
    _require_same_search(output, step)
    manifest = output.manifest()
    if manifest is not None:
        return output, manifest
    place = f"{output.uri}: another run writes these answers"
    lock = f"{output.uri}/{LIVE}lock" if where.is_local else f"{output.uri}.lock"  # a commit removes the live files
    own = [] if out else [(step.name, step.key)]
    with in_use_of(recipe, STEPS, own), locked(lock, place, observer.warned) as held:
        output.clear_temporaries()
        if not output.exists(SEARCH):
            with output.write(QUERIES) as path:
                write_queries(Path(queries), path)
            output.write_json(SEARCH, {"section": section, "inputs": inputs, "step_version": _VERSION})
        with connect(address), watched_head(address, observer.warned):
            if not address:
                require_room(recipe, ["embed"])  # whose resources the workers take
            counts = _answer(context, observer)
        manifest = manifest_of(step, output, counts, wall_s=Progress(output, waits=True).wall_s)
        held.check()
        output.commit(manifest)
        observer.finished(step, manifest)
        return output, manifest


class SearchWorker:
    """Answers parts of a batch search."""

    def __init__(self, context: StepContext) -> None:
        from pipeline.networks.cores import use_cores
        from pipeline.retrieve.batch import PartSearcher
        from pipeline.retrieve.search import Searcher

        assert isinstance(context, SearchContext)
        resources = context.recipe.embed.resources
        num_threads = use_cores(resources.cpus_per_worker)
        searcher = Searcher(context.artifacts, resources.accelerator, context.index_version)
        self._output = context.output
        self._answer = PartSearcher(searcher, context.options, self._output.path(QUERIES), num_threads)

    def __call__(self, shard: str) -> ShardRecord:
        """Answer one part and commit it."""
        start, name = time.monotonic(), f"{shard}.parquet"
        with self._output.write(name) as path:
            counts = self._answer(int(shard), path)
        files = {name: self._output.describe(name)}
        record = ShardRecord(shard=shard, counts=dict(counts), files=files, wall_s=round(time.monotonic() - start, 3))
        self._output.commit_shard(record)
        return record


def _answer(context: SearchContext, observer: Observer) -> dict[str, int]:
    """Run the pool in a Ray task, whose progress is read from its file, and pass on what it raises."""
    servers = own_servers()
    observer.started(context.step)
    task = _run_search.options(**controller_options(has_roles=cluster_has_roles())).remote(context)
    try:
        while not ray.wait([task], timeout=_POLL_S)[0]:
            require_alive(servers)
            state = read_progress(context.output)
            if state is not None:
                observer.progressed(context.step, state)
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise failure_of(error, "search", context.output) from None
    except ray.exceptions.RayError as error:
        reason = f"the search lost its Ray task ({type(error).__name__})"
        raise StepError(f"{reason}; what is answered is kept in {context.output.uri}; run again to continue") from None
    except KeyboardInterrupt:
        ray.cancel(task, force=True)
        raise


@ray.remote
def _run_search(context: SearchContext) -> dict[str, int]:
    import pyarrow.parquet as pq

    queries = context.output.path(QUERIES)
    parts = [f"{number:0{_PART_DIGITS}d}" for number in range(num_parts(queries))]
    num_rows = pq.read_metadata(queries).num_rows
    return total_counts(map_shards(context, ShardJob(SearchWorker, parts, num_rows, context.recipe.embed.resources)))


def _state_of(index: Artifact, retriever: Retriever) -> dict[str, Any]:
    """What tells the answers of an index from those before a change of it, or before it was built anew."""
    manifest = index.manifest()
    return {"index_version": retriever.index.version, "index_created": manifest.created if manifest else 0.0}


def _require_same_search(output: Artifact, step: Step) -> None:
    if not output.exists(SEARCH):
        return
    before = output.read_json(SEARCH)
    old = before["section"] | before["inputs"] | {"version": before["step_version"]}
    new = step.section | step.inputs | {"version": step.version}
    changes = [f"{name}: {old.get(name)} -> {value}" for name, value in new.items() if old.get(name) != value]
    if changes:
        raise ConfigError(
            f"{output.uri}: holds the answers of another search ({'; '.join(changes)}); give another --out"
        )
