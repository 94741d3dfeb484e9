"""``unclip append``, ``delete``, ``restore`` and ``compact``: changes of a finished index.

A search and a server that are under way keep the version that they have opened.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import AsJson, Overrides, RayAddress, RecipePath, print_json
from pipeline.errors import ConfigError
from pipeline.recipe.plan import finished_artifacts, make_plan
from pipeline.recipe.recipe import Recipe, load_recipe
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
    more: Annotated[str, typer.Argument(metavar="MORE", help="Recipe whose embeddings are finished, or their folder.")],
    overrides: Overrides = None,
    address: RayAddress = "",
    json: AsJson = False,
) -> None:
    """Add pairs to a finished index: the embeddings of another recipe, by the same CLIP.

    First write a recipe of the new pairs, with this recipe's CLIP, and run it: unclip run more.toml --until embed

    Example: unclip append my.toml more.toml
    """
    resolved = load_recipe(recipe, overrides or [])
    embed = Artifact(str(Path(more).resolve())) if Path(more).is_dir() else _embeddings_of(load_recipe(more, []))

    from pipeline.runtime import index
    from pipeline.runtime.run import connect

    _finished_index(resolved)
    [step] = [step for step in make_plan(resolved) if step.name == "index"]
    with locked_workspace(Workspace(resolved.workspace)), connect(address):
        _print_summary(index.append(resolved, step, embed), json=json)


def compact(recipe: RecipePath, overrides: Overrides = None, address: RayAddress = "", json: AsJson = False) -> None:
    """Build one segment from all, without the deleted pairs: searches get faster, and deleted pairs leave the disk.

    Example: unclip compact my.toml
    """
    resolved = load_recipe(recipe, overrides or [])

    from pipeline.runtime import index
    from pipeline.runtime.run import connect

    _finished_index(resolved)
    [step] = [step for step in make_plan(resolved) if step.name == "index"]
    with locked_workspace(Workspace(resolved.workspace)), connect(address):
        _print_summary(index.compact(resolved, step), json=json)


def delete(
    recipe: RecipePath,
    uid: Uids = None,
    url: Urls = None,
    file: File = "",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Take pairs out of the index: no search returns them, from its next start on.

    Example: unclip delete my.toml --url https://example.com/cat.jpg --file takedown.txt
    """
    resolved = load_recipe(recipe, overrides or [])

    from pipeline.retrieve import changes

    names = _names(uid, url, file)
    with locked_workspace(Workspace(resolved.workspace)):
        _print_change(changes.delete(_finished_index(resolved), names), "deleted", json=json)


def restore(
    recipe: RecipePath,
    uid: Uids = None,
    url: Urls = None,
    file: File = "",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Undo delete. A pair that was compacted away comes back when its embeddings are appended again.

    Example: unclip restore my.toml --file takedown.txt
    """
    resolved = load_recipe(recipe, overrides or [])

    from pipeline.retrieve import changes

    names = _names(uid, url, file)
    with locked_workspace(Workspace(resolved.workspace)):
        _print_change(changes.restore(_finished_index(resolved), names), "restored", json=json)


def _names(uids: list[str] | None, urls: list[str] | None, file: str) -> list[str]:
    from pipeline.retrieve.changes import read_names

    names = [*(uids or []), *(urls or []), *(read_names(file) if file else [])]
    if not names:
        raise ConfigError("give the pairs: --uid UID, --url URL or --file FILE")
    return names


def _finished_index(recipe: Recipe) -> Artifact:
    return finished_artifacts(recipe, ("index",))["index"]


def _embeddings_of(recipe: Recipe) -> Artifact:
    from pipeline.data.selection import embeddings_of

    return embeddings_of(finished_artifacts(recipe, ("embed", "filter_embeddings")))


def _print_change(change: "Change", what: str, *, json: bool) -> None:
    if json:
        print_json(dataclasses.asdict(change))
        return
    before = f"; {change.unchanged} {what} before" if change.unchanged else ""
    typer.echo(f"{change.changed} pairs {what}{before}; the index has version {change.version}")
    for name in change.unknown:
        typer.echo(f"not in the index: {name}", err=True)


def _print_summary(summary: "IndexSummary", *, json: bool) -> None:
    if json:
        print_json({"counts": summary.counts, "metrics": summary.metrics})
        return
    rest = ", ".join(f"{count} {name}" for name, count in summary.counts.items() if name not in {"in", "ok"})
    typer.echo(
        f"{summary.counts['ok']} of {summary.counts['in']} pairs in the new segment" + (f"; {rest}" if rest else "")
    )
