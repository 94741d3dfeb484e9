"""``unclip append``, ``delete``, ``restore`` and ``compact``: changes of a finished index.

A search and a server that are under way keep the version that they have opened.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import (
    AsJson,
    Next,
    Overrides,
    RayAddress,
    RecipePath,
    print_json,
    print_warning,
    proposing,
    recipe_words,
)
from pipeline.errors import ConfigError
from pipeline.recipe.plan import finished_artifacts, make_plan
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.workspace.files import is_remote
from pipeline.workspace.lock import locked_workspace
from pipeline.workspace.store import Artifact, Workspace

if TYPE_CHECKING:
    from pipeline.retrieve.build import IndexSummary
    from pipeline.retrieve.changes import Change

Uids = Annotated[list[str] | None, typer.Option("--uid", help="Uid of a pair; may be given several times.")]
Urls = Annotated[list[str] | None, typer.Option("--url", help="URL: every pair of it; may be given several times.")]
File = Annotated[str, typer.Option("--file", help="File of uids and URLs, one a line.")]


def append(
    recipe: RecipePath,
    more: Annotated[
        str, typer.Argument(metavar="MORE", help="Recipe whose embeddings are finished, or their folder or URI.")
    ],
    overrides: Overrides = None,
    address: RayAddress = "",
    json: AsJson = False,
) -> Next:
    """Add pairs to a finished index: the embeddings of another recipe, by the same CLIP.

    First write a recipe of the new pairs, with this recipe's CLIP, and run it: unclip run more.toml --until embed

    Example: unclip append my.toml more.toml
    """
    resolved = load_recipe(recipe, overrides or [])
    with proposing(recipe_words(more, None)):
        embed, recipe_of_more = _more(more)

    from pipeline.runtime import index
    from pipeline.runtime.admission import require_room
    from pipeline.runtime.connection import connect

    _finished_index(resolved)
    [step] = [step for step in make_plan(resolved) if step.name == "index"]
    with locked_workspace(Workspace(resolved.workspace), print_warning) as lock, connect(address):
        if not address:
            require_room(resolved, ["index"])
        _print_summary(index.append(resolved, step, embed, lock.check, recipe_of_more), json=json)
    return _search_it(recipe, overrides)


def compact(recipe: RecipePath, overrides: Overrides = None, address: RayAddress = "", json: AsJson = False) -> Next:
    """Build one segment from all, without the deleted pairs: searches get faster, and deleted pairs leave the disk.

    Example: unclip compact my.toml
    """
    resolved = load_recipe(recipe, overrides or [])

    from pipeline.runtime import index
    from pipeline.runtime.admission import require_room
    from pipeline.runtime.connection import connect

    _finished_index(resolved)
    [step] = [step for step in make_plan(resolved) if step.name == "index"]
    with locked_workspace(Workspace(resolved.workspace), print_warning) as lock, connect(address):
        if not address:
            require_room(resolved, ["index"])
        _print_summary(index.compact(resolved, step, lock.check), json=json)
    return _search_it(recipe, overrides)


def delete(
    recipe: RecipePath,
    uid: Uids = None,
    url: Urls = None,
    file: File = "",
    overrides: Overrides = None,
    json: AsJson = False,
) -> Next:
    """Take pairs out of the index: no search returns them, from its next start on.

    The same holds for every other index of the workspace, and for those that are built later.

    Example: unclip delete my.toml --url https://example.com/cat.jpg --file takedown.txt
    """
    from pipeline.retrieve.changes import delete_everywhere

    _change(load_recipe(recipe, overrides or []), _names(uid, url, file), delete_everywhere, "deleted", json=json)
    words = recipe_words(recipe, overrides)
    return (f"unclip compact {words}", f"unclip restore {words} --uid UID")


def restore(
    recipe: RecipePath,
    uid: Uids = None,
    url: Urls = None,
    file: File = "",
    overrides: Overrides = None,
    json: AsJson = False,
) -> Next:
    """Undo delete. A pair that a later build left out comes back when its embeddings are appended.

    Example: unclip restore my.toml --file takedown.txt
    """
    from pipeline.retrieve.changes import restore_everywhere

    _change(load_recipe(recipe, overrides or []), _names(uid, url, file), restore_everywhere, "restored", json=json)
    return _search_it(recipe, overrides)


def _search_it(recipe: str, overrides: list[str] | None) -> Next:
    return (f'unclip search {recipe_words(recipe, overrides)} "your words" -k 10',)


def _change(
    recipe: Recipe,
    names: list[str],
    change_everywhere: Callable[[Workspace, Sequence[str], Callable[[], None]], dict[str, "Change"]],
    what: str,
    *,
    json: bool,
) -> None:
    """Change every index of the workspace; print the change of the recipe's own, and how many others changed."""
    own, workspace = _finished_index(recipe).key, Workspace(recipe.workspace)
    with locked_workspace(workspace, print_warning) as lock:
        changes = change_everywhere(workspace, names, lock.check)
    change = changes.pop(own)
    num_others = sum(other.changed > 0 for other in changes.values())
    if json:
        print_json({**dataclasses.asdict(change), "other_indexes_changed": num_others})
        return
    before = f"; {change.unchanged} {what} before" if change.unchanged else ""
    others = f"; {num_others} other indexes of this workspace changed, too" if num_others else ""
    typer.echo(f"{change.changed} pairs {what}{before}; the index has version {change.version}{others}")
    later = "; no later build of an index takes it" if what == "deleted" else "; the next build or append takes it"
    for name in change.unknown:
        typer.echo(f"not in the index: {name}{later}", err=True)


def _names(uids: list[str] | None, urls: list[str] | None, file: str) -> list[str]:
    from pipeline.retrieve.changes import read_names

    names = [*(uids or []), *(urls or []), *(read_names(file) if file else [])]
    if not names:
        raise ConfigError("give the pairs: --uid UID, --url URL or --file FILE")
    return names


def _finished_index(recipe: Recipe) -> Artifact:
    return finished_artifacts(recipe, ("index",))["index"]


def _more(more: str) -> tuple[Artifact, Recipe | None]:
    """The embeddings that an argument names, and their recipe if it is one."""
    if is_remote(more):
        return Artifact(more.rstrip("/")), None
    folder = Path(more.removeprefix("file://"))
    if folder.is_dir():
        return Artifact(str(folder.resolve())), None
    recipe = load_recipe(more, [])
    return _embeddings_of(recipe), recipe


def _embeddings_of(recipe: Recipe) -> Artifact:
    from pipeline.data.selection import embeddings_of

    return embeddings_of(finished_artifacts(recipe, ("embed", "filter_embeddings")))


def _print_summary(summary: "IndexSummary", *, json: bool) -> None:
    from pipeline.retrieve.recall import missed_target

    if missed := missed_target(summary.metrics):
        print_warning(f"index: {missed}")
    if json:
        print_json({"counts": summary.counts, "metrics": summary.metrics})
        return
    rest = ", ".join(f"{count} {name}" for name, count in summary.counts.items() if name not in {"in", "ok"})
    typer.echo(
        f"{summary.counts['ok']} of {summary.counts['in']} pairs in the new segment" + (f"; {rest}" if rest else "")
    )
