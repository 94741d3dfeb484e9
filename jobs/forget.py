"""``unclip forget``: pairs leave a workspace, and do not come back."""

import contextlib
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import AsJson, Next, RayAddress, print_json, print_warning, require_workspace
from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.workspace.forgotten import Pending
from pipeline.workspace.lock import Lock, locked_workspace
from pipeline.workspace.progress import duration
from pipeline.workspace.store import Workspace

if TYPE_CHECKING:
    from pipeline.forget.search import Search


def forget(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="URL|UID|FILE...", help="URLs (every pair of each), uids, or files of them, one a line."
        ),
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", help="A recipe with this workspace.")] = "",
    workspace: Annotated[str, typer.Option("--workspace", help="Where the artifacts are.")] = "",
    delete: Annotated[bool, typer.Option("--delete", help="Forget them; without it they are only counted.")] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Also rewrite the files now, and not at the start of the next run.")
    ] = False,
    address: RayAddress = "",
    json: AsJson = False,
) -> Next:
    """Count what a workspace holds of some pairs; with --delete, forget them.

    From then on no search returns them, no list, download or append takes them again, and no training reads them. The
    workspace keeps hashes of their names, without content. Their rows and pictures leave its files with --compact, or
    when the next run starts.

    Example: unclip forget https://example.com/cat.jpg takedown.txt --recipe my.toml --delete --compact
    """
    from pipeline.forget.search import names_of

    if not what and not compact:
        raise ConfigError("say what to forget: URLs, uids, or files of them, one a line")
    if what and compact and not delete:
        raise ConfigError("--compact rewrites files: give it with --delete, or alone to finish what was begun")
    resolved, place = _place(recipe, workspace)
    names, option = names_of(what or []), shlex.join(["--recipe", recipe] if recipe else ["--workspace", place.root])
    shown, search = shlex.quote(recipe) if recipe else "RECIPE", None
    with locked_workspace(place, print_warning) as lock:
        if names:
            from pipeline.forget import forget as forgetting
            from pipeline.forget.search import search as search_in

            search = search_in(place, names)
            if delete:
                forgetting.forget(place, search, lock.check)
        done = _rewrite(place, lock, resolved, address) if compact else None
    if json:
        print_json(_as_json(search, done, is_forgotten=delete))
        return ()
    if search is not None:
        _print_search(search, shown, place.root, is_forgotten=delete)
        if done is None:
            _print_removals(search.pending, "is removed with --compact, or by the next run")
    if done is not None:
        _print_removals(done, "is removed")
        typer.echo("their files are rewritten" if search else "the files of what was forgotten are rewritten")
    elif compact:
        typer.echo("nothing to rewrite")
    elif search is not None and (search.rows or search.pending.removals) and delete:
        return (f"unclip forget --compact {option}",)
    elif search is not None and (search.rows or search.pending.removals):
        return (f"unclip forget {shlex.join(what or [])} {option} --delete --compact",)
    return (f"unclip plan {shown}",)


def _place(recipe: str, workspace: str) -> tuple[Recipe | None, Workspace]:
    if not recipe and not workspace:
        raise ConfigError("say which workspace: --recipe RECIPE, or --workspace FOLDER")
    resolved = load_recipe(recipe) if recipe else None
    place = Workspace(workspace or (resolved.workspace if resolved else ""))
    require_workspace(place)
    return resolved, place


def _rewrite(place: Workspace, lock: Lock, recipe: Recipe | None, address: str) -> Pending | None:
    """Rewrite what holds forgotten rows; returns what was done, None if there was nothing."""
    pending = Pending.read(place.root)
    if pending is None:
        return None
    from pipeline.runtime.connection import connect
    from pipeline.runtime.forget import finish_forgetting

    with connect(address) if pending.indexes else contextlib.nullcontext():
        return finish_forgetting(place, lock.check, lambda text: typer.echo(text, err=True), recipe)


def _print_search(search: "Search", recipe: str, root: str, *, is_forgotten: bool) -> None:
    for step, count in search.rows.items():
        typer.echo(f"{step:<17} {count} rows")
    for network in search.networks:
        verb = "was trained" if (network.step, network.key) in search.dirty else "is being trained"
        typer.echo(f"{network.step:<17} {network.key}  {verb} on {network.pairs} of these pairs")
    for (step, key), first in search.begun_with:
        typer.echo(f"{step:<17} {key}  began with the weights of {'/'.join(first)}, which was trained on them")
    if search.dirty:
        runs = [
            f"unclip run {recipe} --from {step} --force" for step in dict.fromkeys(step for step, _ in search.roots)
        ]
        steps = ", ".join(dict.fromkeys(step for step, _ in search.dirty))
        typer.echo(
            f"to have no network that was trained on them: {'; and '.join(runs)}; "
            f"{steps} took {duration(search.node_s)} of machines"
        )
    for step, key in search.continued:
        typer.echo(f"before that, move {root}/{step}/{key} away: the {step} that is made anew would continue it")
    for step, first in dict.fromkeys((one[0], first) for one, first in search.begun_with):
        typer.echo(
            f"before that, let {step}.init_from name other weights than those of {'/'.join(first)}: the {step} that is "
            "made anew would begin with them"
        )
    for name in search.unknown:
        typer.echo(f"not in the workspace: {name}{'; it will not be taken' if is_forgotten else ''}", err=True)
    if not search.uids:
        typer.echo(f"0 pairs: none of {len(search.names)} names is in {root}")
        return
    verdict = "forgotten" if is_forgotten else "found; nothing is changed"
    typer.echo(f"{len(search.uids)} pairs of {len(search.names)} names: {verdict}")


def _print_removals(work: Pending, verdict: str) -> None:
    from pipeline.forget.search import SHOWN

    reasons = {step: f"shows such a pair; `unclip {step}` makes it anew" for step in SHOWN}
    reasons["index"] = "a run makes it anew, without what was appended to it"
    for step, key in work.removals:
        reason = reasons.get(step, "a run makes it anew")
        typer.echo(f"{step:<17} {key}  {verdict}: {reason}")


def _as_json(search: "Search | None", done: Pending | None, *, is_forgotten: bool) -> dict[str, object]:
    state: dict[str, object] = {"forgotten": is_forgotten and search is not None, "rewritten": done is not None}
    if done is not None:
        state["removed"] = _artifacts(done.removals)
    if search is None:
        return state
    networks = [{"step": one.step, "key": one.key, "pairs": one.pairs} for one in search.networks]
    return state | {
        "pairs": len(search.uids),
        "rows": search.rows,
        "unknown": list(search.unknown),
        "networks": networks,
        "to_make_anew": _artifacts(search.dirty),
        "to_move_away": _artifacts(search.continued),
        "begun_with": [
            {"step": step, "key": key, "weights": {"step": name, "key": origin}}
            for (step, key), (name, origin) in search.begun_with
        ],
        "to_remove": _artifacts(search.pending.removals),
        "node_s": round(search.node_s, 3),
    }


def _artifacts(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"step": step, "key": key} for step, key in pairs]
