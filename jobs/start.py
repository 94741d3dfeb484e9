"""``unclip init`` and ``unclip run``."""

import shlex
import time
from collections.abc import Collection
from typing import Annotated

import typer

from jobs.options import (
    AsJson,
    From,
    Next,
    Only,
    Overrides,
    RayAddress,
    RecipePath,
    Until,
    describe_workspace,
    print_json,
    print_measured,
    print_warning,
    proposing,
    recipe_words,
    with_options,
)
from pipeline.addresses import values_without_secrets, without_password
from pipeline.data.causes import ALL, CLASSES, PICTURE_FAULTS, is_class
from pipeline.data.retries import NONE
from pipeline.errors import ConfigError, UnclipError
from pipeline.recipe.estimate import status_remaining
from pipeline.recipe.last_run import renew_last_run
from pipeline.recipe.plan import chosen_steps, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.status import StepStatus, plan_status
from pipeline.workspace.forgotten import Pending
from pipeline.workspace.progress import duration
from pipeline.workspace.store import Workspace


def init(
    source: Annotated[
        str,
        typer.Argument(
            metavar="LIST", help="List of URLs and captions, folder of pictures, or shards; here or in an object store."
        ),
    ],
    out: Annotated[str, typer.Option("--out", help="Recipe file to write.")] = "my.toml",
    url_column: Annotated[
        str, typer.Option("--url-column", help="Column of the URLs; default: searched by name.")
    ] = "",
    caption_column: Annotated[
        str,
        typer.Option("--caption-column", help="Column of the captions; default: searched by name; -: there is none."),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the recipe file if it is there.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            help="Longest time of the whole run on this machine, in minutes, a quarter of which stays free, since "
            "forecasts err; default: set by the number of pairs.",
            min=0,
        ),
    ] = None,
    time: Annotated[
        bool, typer.Option("--time/--no-time", help="Measure this machine, and say how long the run takes.")
    ] = True,
) -> Next:
    """Look at your pairs and write a short recipe for them and for this machine; say how long it takes.

    Example: unclip init pairs.parquet --out my.toml --minutes 30
    """
    from pipeline.init.recipe import write_recipe

    summary = write_recipe(
        source,
        out,
        url_column=url_column,
        caption_column=caption_column,
        force=force,
        minutes=minutes,
        watch=print_measured,
    )
    typer.echo(f"{out}: {summary}")
    if time or minutes is not None:
        typer.echo(f"time: {_time_of(out, is_measured=minutes is not None)}")
    return (f"unclip plan {shlex.quote(out)}", f"unclip run {shlex.quote(out)}")


def _time_of(path: str, *, is_measured: bool) -> str:
    """How long a new recipe takes; a recipe that cannot be measured is a recipe all the same."""
    recipe = load_recipe(path)
    statuses = plan_status(Workspace(recipe.workspace), make_plan(recipe))
    try:
        if not is_measured:
            from pipeline.timing.run_time import measure_run

            with proposing(shlex.quote(path)):
                measure_run(recipe, statuses, print_measured)
    except UnclipError as error:
        return f"not known: {error}"
    remaining = status_remaining(recipe, statuses)
    seconds = f"{'at least' if remaining.besides else 'about'} {duration(remaining.seconds)}"
    return f"{seconds} on this machine{remaining.besides}"


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    until: Until = "",
    start: From = "",
    step: Only = "",
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="With --from or --step: make them anew if they are finished; unfinished work is continued."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and why; run nothing.")] = False,
    address: RayAddress = "",
    json: AsJson = False,
    retry_failed: Annotated[
        str,
        typer.Option(
            "--retry-failed",
            metavar="[CLASS]",
            help="Try the download's failed rows again, all or those of a class such as timeout, http or http-503; "
            "none: give up what a stop left of that.",
        ),
    ] = "",
    shown_as: Annotated[str, typer.Option(hidden=True, help="The recipe in the commands that are proposed.")] = "",
    job: Annotated[str, typer.Option(hidden=True, help="Id of the Ray job that this run is.")] = "",
) -> Next:
    """Run every step that is not done; run it again after a stop of any kind and it continues.

    Example: unclip run configs/demo.toml
    """
    start_s = time.monotonic()
    resolved = load_recipe(recipe, overrides or [])
    words = shown_as or recipe_words(recipe, overrides)
    workspace = Workspace(resolved.workspace)
    steps = make_plan(resolved)
    within, chosen = chosen_steps(steps, start=start, until=until, only=step)
    if force and not (start or step):
        raise ConfigError("--force: say what is to be made anew, with --from STEP or --step STEP")
    if retry_failed:
        _require_retry(retry_failed, chosen, source=resolved.pairs.source)
    before = plan_status(workspace, within)
    forced = chosen if force else set[str]()
    reopened = {"download"} if retry_failed not in {"", NONE} else set[str]()
    ran = [item.step.name for item in before if item.state != "done" or item.step.name in forced | reopened]
    _require_inputs([item for item in before if item.step.name not in chosen], words, address)
    if all(item.state == "todo" for item in before):
        typer.echo(describe_workspace(workspace), err=True)
    if dry_run:
        _print_dry_run([item for item in before if item.step.name in ran], forced, json=json)
        options = {"--until": until, "--from": start, "--step": step, "--force": force}
        options |= {"--retry-failed": retry_failed, "--address": address}
        return (with_options(f"unclip run {words}", options) if ran else f"unclip status {words}",)
    if ran or Pending.read(workspace.root) is not None:
        from jobs.watch import Watcher
        from pipeline.runtime.follow import TablePublisher
        from pipeline.runtime.run import run_recipe

        watcher = Watcher(before, TablePublisher(job) if job else None, recipe=words)
        try:
            run_recipe(resolved, before, watcher, address=address, retry_failed=retry_failed, force=forced)
        finally:
            watcher.close()
    else:
        from pipeline.runtime.tracking.run import send_waiting

        renew_last_run(resolved, print_warning)
        send_waiting(resolved, workspace, print_warning)
    from pipeline.report.report import update_report

    where = update_report(workspace, steps, resolved, words)
    wall_s = round(time.monotonic() - start_s, 1)
    if json:
        print_json(values_without_secrets({"ran": ran, "wall_s": wall_s, "workspace": workspace.root, "report": where}))
        return ()
    number = "1 step" if len(ran) == 1 else f"{len(ran)} steps"
    typer.echo(f"ran {number} in {wall_s:.0f} s" if ran else f"nothing to do: all {len(before)} steps are done")
    typer.echo(f"report: {without_password(where)}")
    return _next(words, {status.step.name for status in before}, has_shapes=resolved.pairs.source == "drawn")


def _require_retry(failed_class: str, chosen: Collection[str], *, source: str) -> None:
    """Refuse another try of rows that no download has, or that this run would not make."""
    if failed_class != NONE and not is_class(failed_class):
        classes = ", ".join([ALL, *CLASSES, "http-404 and so on", *PICTURE_FAULTS])
        raise ConfigError(f"--retry-failed {failed_class}: no such class of failures; there are {classes}; or {NONE}")
    if source == "shards":
        raise ConfigError("--retry-failed: these shards are taken in as they are; nothing is downloaded")
    if "download" not in chosen:
        raise ConfigError(f"--retry-failed: download is not among the steps of this run ({', '.join(sorted(chosen))})")


def _require_inputs(inputs: list[StepStatus], words: str, address: str) -> None:
    """Refuse to run steps whose inputs are not finished."""
    missing = [item.step.name for item in inputs if item.state != "done"]
    if missing:
        first = with_options(f"unclip run {words}", {"--until": missing[-1], "--address": address})
        raise ConfigError(f"{', '.join(missing)}: not finished, and not among the chosen steps; first: {first}")


def _print_dry_run(statuses: list[StepStatus], forced: set[str], *, json: bool) -> None:
    rows = [
        {
            "step": item.step.name,
            "key": item.step.key,
            "reasons": ["it is made anew"] if item.step.name in forced and item.state == "done" else [*item.reasons],
        }
        for item in statuses
    ]
    if json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(f"{row['step']:<17} {row['key']}  {'; '.join(row['reasons'])}".rstrip())
    typer.echo(f"{len(rows)} steps would run" if rows else "nothing to do")


def _next(recipe: str, steps: set[str], *, has_shapes: bool) -> Next:
    commands: list[str] = []
    if "evaluate" in steps:
        prompt = "a large red star on a white background" if has_shapes else "your prompt"
        commands.append(f'unclip sample {recipe} "{prompt}" -n 4 --out out')
    if "index" in steps:
        commands.append(f'unclip search {recipe} "{"a blue circle" if has_shapes else "your words"}" -k 10')
    if "evaluate" in steps:
        commands.append(f"unclip serve {recipe}")
    return (*commands, f"unclip status {recipe}")
