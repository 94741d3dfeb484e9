"""The artifacts of a workspace that no given recipe needs."""

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError, DataError, StepError
from pipeline.recipe.champion import champions
from pipeline.recipe.last_run import RESOLVED, Planned, changes_since, named_artifacts, planned, read_last_run
from pipeline.recipe.lineage import indexed_embeddings
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import STEPS
from pipeline.workspace.lock import in_use, used_artifacts
from pipeline.workspace.store import Workspace

RESULTS = ("ablate", "search")
"""What commands of no step write under keys of their own; it stays as long as all that it was made from."""
SEARCH = "search.json"
"""What a batch search is of, before it is finished, too."""


@dataclass(frozen=True)
class Garbage:
    """An artifact that may go."""

    step: str
    key: str
    num_bytes: int
    is_finished: bool


@dataclass(frozen=True)
class Kept:
    """An artifact that stays although no recipe needs it."""

    step: str
    key: str
    why: str


@dataclass(frozen=True)
class LastRun:
    """The last run of a recipe, if it made other artifacts than the recipe as it is now."""

    name: str
    """Of the recipe."""
    plan: Planned
    changes: dict[str, object]
    """The fields that differ, by dotted name, as they were then; none if a file of the user or the release differs."""


def last_runs(workspace: Workspace, recipes: Sequence[Recipe]) -> list[LastRun]:
    """The last runs of these recipes that made other artifacts: with ``--set``, or before something was changed.

    Raises:
        DataError: If it is not known what such a run made.
    """
    runs: list[LastRun] = []
    for recipe in recipes:
        try:
            last = read_last_run(workspace, recipe.name)
        except DataError as error:
            raise DataError(
                f"what the last run of {recipe.name} made is not known: {error}; run the recipe once more as it was "
                f"run then ({RESOLVED}, which is there, has its fields), and it is; what an older release made under "
                "other keys is listed as not needed then: copy what you need of it first"
            ) from None
        if last is not None and not last.keys <= planned(recipe).keys:
            runs.append(LastRun(recipe.name, last, changes_since(workspace, recipe)))
    return runs


def find_garbage(
    workspace: Workspace, recipes: Sequence[Recipe], runs: Sequence[LastRun] = ()
) -> tuple[list[Garbage], list[Kept]]:
    """What may be removed, the largest first; and what stays for another reason than a recipe.

    What the plan of a recipe or of a last run holds is needed, finished or not; so is all that it was made from, the
    embeddings that an index of it reads, be they of another recipe, the trainings that an unfinished one of it
    continues, and the artifacts of which it names files: without the network that a training starts from there is no
    plan, also when it is finished.
    An ablation or a batch search stays with what it was made from; of an ablation that was stopped nobody knows that.

    Raises:
        ConfigError: If a recipe has another workspace.
        DataError: If a manifest cannot be read: what it needs is not known then.
    """
    for recipe in recipes:
        if Workspace(recipe.workspace).root != workspace.root:
            raise ConfigError(f"recipe {recipe.name} has another workspace: {recipe.workspace}")
    needed: set[tuple[str, str]] = set()
    for plan in [*(planned(recipe) for recipe in recipes), *(run.plan for run in runs)]:
        needed |= plan.keys | {*plan.named}
        for name, step in plan.steps.items():
            if step.continues and workspace.artifact(name, step.key).manifest() is None:
                needed |= {(name, key) for key in step.continues}
    needed = _with_inputs(workspace, needed)
    used = read_artifacts(workspace) | _with_champions(workspace)
    garbage: list[Garbage] = []
    others: list[Kept] = []
    places = [(row.name, key) for row in STEPS for key in workspace.keys(row.name)]
    for step, key in places + _left_results(workspace, needed | used.keys()):
        if (step, key) in needed:
            continue
        if owner := used.get((step, key)):
            others.append(Kept(step, key, f"in use by {owner}"))
            continue
        artifact = workspace.artifact(step, key)
        garbage.append(Garbage(step, key, sum(artifact.sizes().values()), artifact.manifest() is not None))
    return sorted(garbage, key=lambda one: -one.num_bytes), others


def _left_results(workspace: Workspace, staying: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """Ablations and batch searches of what does not stay, and those that do not say of what they are."""
    left: list[tuple[str, str]] = []
    for step in RESULTS:
        for key in workspace.keys(step):
            artifact = workspace.artifact(step, key)
            manifest = artifact.manifest()
            inputs = manifest.inputs if manifest else (artifact.find_json(SEARCH) or {}).get("inputs", {})
            if not inputs or not all(one in staying for one in inputs.items()):
                left.append((step, key))
    return left


def remove_garbage(
    workspace: Workspace, garbage: Sequence[Garbage], check: Callable[[], None]
) -> tuple[list[Garbage], list[Kept]]:
    """Remove artifacts, but those that somebody has begun to read.

    Args:
        workspace: The workspace, locked.
        garbage: What may go.
        check: Raises StepError if the lock was lost.

    Returns:
        What was removed, and what stays.
    """
    removed: list[Garbage] = []
    others: list[Kept] = []
    used, read = dict[str, str](), dict[tuple[str, str], str]()
    for one in garbage:
        check()
        if (now := used_artifacts(workspace)) != used:  # else the same manifests, which may be large, say the same
            used, read = now, _read_through(workspace, now)
        if owner := read.get((one.step, one.key)):
            others.append(Kept(one.step, one.key, f"in use by {owner}"))
            continue
        workspace.artifact(one.step, one.key).destroy()
        removed.append(one)
    return removed, others


@contextlib.contextmanager
def in_use_of(
    recipe: Recipe,
    steps: Collection[str],
    others: Iterable[tuple[str, str]] = (),
    warn: Callable[[str], None] = lambda _: None,
) -> Generator[None]:
    """Say inside a block that some steps of a recipe are being read, so that `unclip gc` leaves them.

    Who may only read the workspace cannot say so, and reads all the same.

    Args:
        recipe: The recipe.
        steps: Names of the steps; none: the recipe is not planned, so the user's files that it names may be elsewhere.
        others: Step and key of further artifacts.
        warn: Receives a sentence if it cannot be said.

    Raises:
        ConfigError: See ``make_plan``.
    """
    workspace, stack = Workspace(recipe.workspace), contextlib.ExitStack()
    read = named_artifacts(workspace, recipe, steps) | {*others}
    if steps:
        read |= {(step.name, step.key) for step in make_plan(recipe) if step.name in steps}
    if not workspace.is_local or Path(workspace.root).is_dir():  # a folder of networks has no workspace
        try:
            stack.enter_context(in_use(workspace, [f"{step}/{key}" for step, key in sorted(read)]))
        except (ConfigError, StepError) as error:
            warn(f"`unclip gc` cannot see what is read here, and may remove it: {error}")
    try:
        yield
    finally:
        with contextlib.suppress(ConfigError, StepError):  # the store is away: it counts as read for a minute more
            stack.close()


def read_artifacts(workspace: Workspace) -> dict[tuple[str, str], str]:
    """Each artifact, by step and key, that a living process reads, with all that it was made from; and the process."""
    return _read_through(workspace, used_artifacts(workspace))


def _read_through(workspace: Workspace, used: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Each of these artifacts, and all that they were made from, with the process that reads it."""
    read: dict[tuple[str, str], str] = {}
    for name, owner in used.items():
        step, _, key = name.partition("/")
        read |= dict.fromkeys(_with_inputs(workspace, {(step, key)}, read), owner)
    return read


def _with_champions(workspace: Workspace) -> dict[tuple[str, str], str]:
    """Each artifact that a champion needs, with all that it was made from; and whose champion it is."""
    kept: dict[tuple[str, str], str] = {}
    for artifact, owner in champions(workspace).items():
        kept |= dict.fromkeys(_with_inputs(workspace, {artifact}, kept), owner)
    return kept


def _with_inputs(
    workspace: Workspace, artifacts: set[tuple[str, str]], others: Collection[tuple[str, str]] = ()
) -> set[tuple[str, str]]:
    """Artifacts and all that they were made from or read, without ``others``, whose inputs are among these."""
    waiting, reached = list(artifacts), set[tuple[str, str]]()
    while waiting:
        step, key = waiting.pop()
        if (step, key) in reached or (step, key) in others:
            continue
        reached.add((step, key))
        artifact = workspace.artifact(step, key)
        manifest = artifact.manifest()
        if manifest is not None:
            waiting += manifest.inputs.items()
        waiting += indexed_embeddings(step, artifact)
    return reached
