"""``unclip plan``, ``status`` and ``config``: they answer in well under a second, without torch and ray.

``plan --cost`` and ``plan --time`` alone load torch: to build the networks without data, and to run them for a moment.
"""

import dataclasses
import shlex
import sys
import time as clock
from typing import Annotated, Any, cast

import typer

from jobs.options import (
    AsJson,
    Next,
    Overrides,
    RecipePath,
    Until,
    describe_workspace,
    print_json,
    print_measured,
    print_next,
    print_warning,
    recipe_words,
    with_options,
    with_recipe,
)
from pipeline.addresses import without_password
from pipeline.errors import ConfigError, DataError
from pipeline.recipe.estimate import status_remaining
from pipeline.recipe.plan import artifact_of, dependents, make_plan
from pipeline.recipe.recipe import Recipe, json_schema, load_recipe
from pipeline.recipe.status import StepStatus, plan_status
from pipeline.recipe.tables import to_dict
from pipeline.recipe.user_files import passing_inputs, unseen_inputs
from pipeline.workspace.forgotten import Forgotten, Pending
from pipeline.workspace.lock import holder_of
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.progress import ProgressState, clock_time, duration, last_error, read_progress
from pipeline.workspace.store import Workspace

_WATCH_S = 2.0


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    until: Until = "",
    cost: Annotated[
        bool, typer.Option("--cost", help="Count parameters, arithmetic, GPU hours, memory and money instead.")
    ] = False,
    graph: Annotated[
        bool, typer.Option("--graph", help="Print the steps as a mermaid graph, with their states.")
    ] = False,
    time: Annotated[
        bool,
        typer.Option("--time", help="Measure this machine for half a minute or more; print the time of steps and run."),
    ] = False,
    json: AsJson = False,
) -> Next:
    """Show which steps would run, and why; or what its networks cost, or how long the run takes.

    Example: unclip plan configs/demo.toml --set prior.train.num_steps=600
    """
    resolved, words = load_recipe(recipe, overrides or []), recipe_words(recipe, overrides)
    shown = [name for name, is_set in (("--cost", cost), ("--graph", graph), ("--time", time)) if is_set]
    if len(shown) > 1 or (graph and json):
        raise ConfigError(f"{', '.join([*shown, *(['--json'] if json else [])])}: they cannot be shown together")
    again, run = (with_options(f"unclip {command} {words}", {"--until": until}) for command in ("plan", "run"))
    if cost:
        _print_cost(resolved, until, json=json)
        return (again, run)
    workspace = Workspace(resolved.workspace)
    statuses = plan_status(workspace, make_plan(resolved, until=until))
    todo = [status.step.name for status in statuses if status.state != "done"]
    after = (run,) if todo else (f"unclip status {words}",)
    if graph:
        typer.echo(_mermaid(statuses))
        return after
    if time:
        _print_times(resolved, statuses, json=json)
        return after
    if json:
        owner = holder_of(workspace)
        forgotten = Forgotten.read(workspace.root)
        rows = [_as_row(workspace, status, owner) for status in statuses]
        for row, item in zip(rows, statuses, strict=True):
            row["reasons"] = [with_recipe(reason, words) for reason in item.reasons]
            row["forgotten_pairs"] = forgotten.trained_on(item.manifest) if item.manifest else 0
        print_json(rows)
        return ()
    for status in statuses:
        why = with_recipe("; ".join(status.reasons), words)
        typer.echo(f"{status.step.name:<17} {status.step.key}  {status.state:<8} {why}".rstrip())
    for note in [*unseen_inputs(resolved), *passing_inputs(resolved), *_forgotten_notes(workspace, statuses, words)]:
        typer.echo(note)
    typer.echo(f"{len(todo)} of {len(statuses)} steps to run: {', '.join(todo)}" if todo else "nothing to do")
    typer.echo(describe_workspace(workspace))
    return (f"{again} --time", run) if todo else after


def _print_cost(resolved: Recipe, until: str, *, json: bool) -> None:
    """Print what the networks of a recipe cost up to a step, and the money at its prices."""
    from pipeline.networks.bill import format_bill, recipe_bill
    from pipeline.networks.costs import format_costs, recipe_costs
    from pipeline.train.fitting import format_memory, recipe_memory

    names = {step.name for step in make_plan(resolved, until=until)} if until else None
    all_costs, memories, bill = recipe_costs(resolved), recipe_memory(resolved, names), None
    costs = [cost for cost in all_costs if names is None or cost.name in names]
    try:
        bill = recipe_bill(resolved, all_costs, until=until)
    except (ConfigError, DataError) as error:  # the list need not be here to count the networks
        print_warning(f"the money is not counted: {error}")
    if json:
        of_workers = {memory.name: memory.to_dict() for memory in memories}
        networks = [network.to_dict() | {"worker_memory": of_workers.get(network.name)} for network in costs]
        print_json({"networks": networks, "bill": bill and bill.to_dict()})
        return
    networks = [format_costs(costs), format_memory(memories, resolved)] if costs else [f"no network up to {until}"]
    parts = [*networks, *([format_bill(bill)] if bill else [])]
    typer.echo("\n\n".join(parts))


def _mermaid(statuses: list[StepStatus]) -> str:
    """The plan as a mermaid graph, from the data down; what is not done has rounded corners."""
    lines = ["graph TD"]
    for status in statuses:
        name = status.step.name
        left, right = ("[", "]") if status.state == "done" else ("(", ")")
        lines.append(f'  {name}{left}"{name}<br/>{status.step.key}<br/>{status.state}"{right}')
        lines += [f"  {one} --> {name}" for one in status.step.inputs]
    return "\n".join(lines)


def _forgotten_notes(workspace: Workspace, statuses: list[StepStatus], words: str) -> list[str]:
    """A sentence if rows wait to leave the files, and for each network that was trained on forgotten pairs."""
    forgotten, notes = Forgotten.read(workspace.root), list[str]()
    if Pending.read(workspace.root) is not None:
        compact = f"unclip forget --compact --workspace {shlex.quote(workspace.root)}"
        notes.append(f"forgotten rows leave the files when a run starts, or with: {compact}")
    trained = {
        item.step.name: count for item in statuses if item.manifest and (count := forgotten.trained_on(item.manifest))
    }
    for name, count in trained.items():
        again = dependents([item.step for item in statuses], name)
        node_s = sum(item.manifest.node_s for item in statuses if item.manifest and item.step.name in again)
        [manifest] = [item.manifest for item in statuses if item.manifest and item.step.name == name]
        notes.append(
            f"{name}: was trained on {count} pairs that are forgotten; {_before_that(workspace, forgotten, manifest)}"
            f"`unclip run {words} --from {name} --force` makes it and what is made from it anew, which took "
            f"{duration(node_s)} of machines"
        )
    return notes


def _before_that(workspace: Workspace, forgotten: Forgotten, manifest: Manifest) -> str:
    """What has to be done first: made anew, a network would begin with, or continue, what has read the pairs."""
    first = forgotten.begun_with(manifest)
    if first is not None and first not in manifest.inputs.items():
        return (
            f"let {manifest.step}.init_from name other weights than those of {'/'.join(first)}, which was trained on "
            "them, then "
        )
    continued = manifest.metrics.get("continued")
    earlier = workspace.artifact(manifest.step, continued["key"]) if continued else None
    if earlier is None or not earlier.names():
        return ""
    finished = earlier.manifest()
    if finished is not None and not forgotten.trained_on(finished):
        return ""
    return f"move {earlier.uri} away, which it would continue, then "


def status(
    recipe: RecipePath,
    overrides: Overrides = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Print it again every two seconds while a run goes on.")
    ] = False,
    json: AsJson = False,
) -> Next:
    """Show where every step stands: time spent, rows, and for running ones the rate, the time to go and the workers.

    A step that no living run works on is shown as stopped, with its last error.

    Example: unclip status configs/demo.toml --watch
    """
    resolved, words = load_recipe(recipe, overrides or []), recipe_words(recipe, overrides)
    while True:
        if watch and sys.stdout.isatty() and not json:
            typer.echo("\x1b[H\x1b[2J", nl=False)
        is_running, following = _print_status(resolved, words, json=json)
        if not (watch and is_running):
            return following
        if not json:
            print_next(*following)
        clock.sleep(_WATCH_S)


def _print_status(resolved: Recipe, words: str, *, json: bool) -> tuple[bool, Next]:
    """Print the state of every step once; returns whether a run goes on, and what is useful next."""
    from pipeline.runtime.tracking.place import Place

    workspace = Workspace(resolved.workspace)
    statuses = plan_status(workspace, make_plan(resolved))
    rest = status_remaining(resolved, statuses)
    spans = {name: dataclasses.asdict(span) for name, span in rest.spans.items()}
    owner = holder_of(workspace)
    rows = [_as_row(workspace, item, owner) | spans.get(item.step.name, {}) for item in statuses]
    if json:
        print_json(rows)
        return bool(owner), ()
    for row in rows:
        state = "running" if row["is_running"] else row["state"]
        typer.echo(f"{row['step']:<17} {row['key']}  {state:<8} {_describe(row)}".rstrip())
    is_done = all(item.state == "done" for item in statuses)
    if not is_done:
        typer.echo(f"run: {rest.explain(words)}")
    typer.echo(f"workspace {without_password(workspace.root)}{f', held by {owner}' if owner else ''}")
    place = Place(resolved, workspace)
    if number := place.num_waiting():
        sender = "the run that goes on sends" if owner else f"`unclip run {words}` sends"
        typer.echo(f"tracker {place.shown_uri}: {number} records wait in {place.kept_in}; {sender} them")
    if owner:
        return True, (f"unclip status {words} --watch",)
    if is_done:
        return False, (f'unclip sample {words} "your prompt" --out out', f"unclip serve {words}")
    return False, (f"unclip run {words}",)


def config(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file; without one, the defaults.")] = "",
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of all recipes.")] = False,
    json: AsJson = False,
) -> Next:
    """Print the resolved recipe as TOML or JSON, or the JSON schema of all recipes.

    Example: unclip config configs/demo.toml --set seed=1
    """
    following = (f"unclip plan {recipe_words(recipe, overrides)}",) if recipe else ("unclip init LIST --out my.toml",)
    if schema:
        print_json(json_schema())
        return following
    tables = to_dict(load_recipe(recipe or None, overrides or []))
    if json:
        print_json(tables)
        return ()
    import tomli_w

    typer.echo(tomli_w.dumps(_without_none(tables)), nl=False)
    return following


def _print_times(recipe: Recipe, statuses: list[StepStatus], *, json: bool) -> None:
    """Measure the steps that are not done, and print when each starts and ends."""
    import time

    from pipeline.timing.run_time import measure_run

    start = time.monotonic()
    run, machine = measure_run(recipe, statuses, print_measured)
    measured_s = time.monotonic() - start
    if json:
        spans = {name: dataclasses.asdict(span) for name, span in run.spans.items()}
        rows = [{"step": item.step.name, "state": item.state} | spans.get(item.step.name, {}) for item in statuses]
        values = {"run_s": run.seconds, "untimed": run.untimed, "machine": dataclasses.asdict(machine), "steps": rows}
        print_json(values)
        return
    for status in statuses:
        span = run.spans.get(status.step.name)
        if span is None:
            typer.echo(f"{status.step.name:<17} {'done' if status.state == 'done' else 'not timed'}")
        else:
            ends = f"{clock_time(span.start_s)} to {clock_time(span.end_s)}"
            typer.echo(f"{status.step.name:<17} {duration(span.end_s - span.start_s):>9}   {ends}")
    seconds = f"about {duration(run.seconds)}"
    if run.besides:
        why = " (whose time a few rows here do not tell)" if run.untimed else ""
        seconds = f"at least {duration(run.seconds)}{run.besides}{why}"
    typer.echo(
        f"run: {seconds} on {machine.cpus:g} CPUs; with all of them busy, work takes {machine.crowding:.2f} times as "
        f"long; measured in {duration(measured_s)}"
    )


def _as_row(workspace: Workspace, status: StepStatus, owner: str) -> dict[str, Any]:
    """A step's state as JSON; ``owner`` is the living run of the workspace, or empty."""
    artifact = artifact_of(workspace, status.step)
    progress = read_progress(artifact) if status.state == "partial" else None
    manifest = status.manifest
    error = last_error(artifact) if status.state == "partial" else ""
    return {
        "step": status.step.name,
        "key": status.step.key,
        "state": status.state,
        "reasons": list(status.reasons),
        "artifact": without_password(artifact.uri),
        "wall_s": manifest.wall_s if manifest else None,
        "counts": manifest.counts if manifest else {},
        "progress": dataclasses.asdict(progress) if progress else None,
        "age_s": round(progress.age_s, 1) if progress else None,
        "is_running": bool(owner and progress and not error),
        "error": error,
    }


def _describe(row: dict[str, Any]) -> str:
    if row["state"] == "done":
        totals_first = sorted(row["counts"].items(), key=lambda item: (item[0] not in {"in", "ok"}, item[0]))
        counts = ", ".join(f"{value} {name}" for name, value in totals_first)
        return "; ".join([f"{row['wall_s']:7.1f} s  {counts}", *row["reasons"]])
    if row["progress"]:
        state = ProgressState(**row["progress"])
        return _running_text(state) if row["is_running"] else _stopped_text(state, row["error"])
    return "; ".join(row["reasons"])


def _running_text(state: ProgressState) -> str:
    notice = f"; {state.notice}" if state.notice else ""
    return f"{state.text}{state.where}{notice}; read {duration(state.age_s)} ago"


def _stopped_text(state: ProgressState, error: str) -> str:
    """A reading that no living run has written."""
    share = f" at {state.done}/{state.total} {state.unit}" if state.has_begun else ""
    why = error or "it wrote no error: the run was killed, or its machine went away"
    return f"stopped {duration(state.age_s)} ago{share}; {why}"


def _without_none(value: Any) -> Any:
    """A table, those inside it, and those of its lists without null values, which TOML does not have."""
    if isinstance(value, dict):
        tables = cast("dict[str, Any]", value)
        return {name: _without_none(one) for name, one in tables.items() if one is not None}
    return [_without_none(one) for one in cast("list[Any]", value)] if isinstance(value, list) else value
