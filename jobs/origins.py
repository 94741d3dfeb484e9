"""``unclip lineage`` and ``unclip gc``: where something comes from, and what nobody needs."""

import dataclasses
import shlex
import time
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import AsJson, Next, Overrides, print_json, print_warning, recipe_words, require_workspace
from pipeline.addresses import without_password
from pipeline.errors import ConfigError, UnclipError
from pipeline.recipe.lineage import Lineage, Node, mermaid, trace
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.progress import byte_size, duration
from pipeline.workspace.store import Workspace

if TYPE_CHECKING:
    from pipeline.recipe.garbage import LastRun
    from pipeline.retrieve.index import Neighbour

_FIELDS_SHOWN = 4


def lineage(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A picture (PNG), an artifact or a file in it, an exported folder, or a key's beginning.",
        ),
    ],
    workspace: Annotated[str, typer.Option("--workspace", help="Where the artifacts are.")] = "",
    recipe: Annotated[str, typer.Option("--recipe", help="A recipe with this workspace.")] = "",
    graph: Annotated[bool, typer.Option("--graph", help="Print a mermaid graph.")] = False,
    nearest: Annotated[
        int,
        typer.Option(
            "--nearest", min=0, help="Of a picture: how many of the nearest training pairs are named; 0: none."
        ),
    ] = 3,
    json: AsJson = False,
) -> Next:
    """Show what something was made from: networks, trainings, data, recipes, versions, MLflow runs.

    Of a picture, also the training pairs that are nearest to it, if the workspace has their index.

    Example: unclip lineage out/000-0.png --recipe configs/demo.toml
    """
    lineage = trace(what, workspace or (load_recipe(recipe).workspace if recipe else ""))
    option = ["--recipe", recipe] if recipe else ["--workspace", workspace] if workspace else []
    again = f"unclip lineage {shlex.join([what, *option])}"
    if graph:
        typer.echo(mermaid(lineage))
        return (again,)
    pairs: list[Neighbour] = []
    if nearest and what.lower().endswith(".png"):
        pairs, lineage = _nearest(what, lineage, nearest)
    if json:
        print_json(lineage.to_dict() | {"nearest": [dataclasses.asdict(pair) for pair in pairs]})
    else:
        _print_lineage(lineage, pairs)
    return (f"{again} --graph", *([f"unclip status {shlex.quote(recipe)}"] if recipe else []))


def _nearest(picture: str, lineage: Lineage, count: int) -> "tuple[list[Neighbour], Lineage]":
    """The nearest training pairs, and the lineage with a note if they are not known."""
    from pipeline.retrieve.origins import nearest_pairs  # loads torch

    try:
        pairs = nearest_pairs(picture, lineage, count)
        why = "" if pairs else "the workspace has no finished index of them"
    except UnclipError as error:  # what the manifests say is known all the same
        pairs, why = [], str(error)
    notes = (f"the nearest training pairs are not known: {why}",) if why else ()
    return pairs, dataclasses.replace(lineage, notes=(*lineage.notes, *notes))


def gc(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Every recipe whose artifacts stay.")],
    overrides: Overrides = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without it they are only listed.")] = False,
    json: AsJson = False,
) -> Next:
    """List the artifacts of a workspace that none of these recipes needs; with --delete, remove them.

    What the last run of each recipe made stays too, even if that run had other --set.

    Example: unclip gc my.toml other.toml
    """
    from pipeline.recipe.garbage import find_garbage, last_runs, remove_garbage
    from pipeline.workspace.lock import locked_workspace

    if overrides and len(recipes) > 1:
        raise ConfigError("gc --set changes one recipe; name one, or write each into a file of its own")
    loaded = [load_recipe(recipe, overrides or []) for recipe in recipes]
    workspace = Workspace(loaded[0].workspace)
    require_workspace(workspace)
    with locked_workspace(workspace, print_warning) as lock:  # what runs is not looked at, nor touched
        runs = last_runs(workspace, loaded)
        garbage, others = find_garbage(workspace, loaded, runs)
        if delete:
            garbage, partial = remove_garbage(workspace, garbage, lock.check)
            others += partial
    for run in runs:
        print_warning(f"{_describe_run(run)}; what that run made stays")
    total = sum(one.num_bytes for one in garbage)
    if json:
        rows = [dataclasses.asdict(one) for one in garbage]
        print_json(
            {"garbage": rows, "bytes": total, "removed": delete, "kept": [dataclasses.asdict(k) for k in others]}
        )
        return ()
    for one in garbage:
        state = "" if one.is_finished else "  unfinished"
        typer.echo(f"{one.step:<17} {one.key}  {byte_size(one.num_bytes):>9}{state}")
    for one in others:
        typer.echo(f"{one.step:<17} {one.key}  stays: {one.why}")
    verdict = "removed" if delete else "not needed"
    typer.echo(f"{len(garbage)} artifacts, {byte_size(total)}: {verdict}")
    if garbage and not delete:
        words = shlex.join(recipes) if len(recipes) > 1 else recipe_words(recipes[0], overrides)
        return (f"unclip gc {words} --delete",)
    return (f"unclip status {recipe_words(recipes[0], overrides)}",)


def _describe_run(run: "LastRun") -> str:
    """The recipe's name, and a few of the fields that it was last run with."""
    if not run.changes:
        return f"{run.name} was last run by another release, or with files that have changed since"
    fields = [f"{name} = {value}" for name, value in run.changes.items()]
    more = f" and {len(fields) - _FIELDS_SHOWN} more" if len(fields) > _FIELDS_SHOWN else ""
    return f"{run.name} was last run with {', '.join(fields[:_FIELDS_SHOWN])}{more}"


def _print_lineage(lineage: Lineage, pairs: "list[Neighbour]") -> None:
    facts = ", ".join(f"{name} {lineage.facts[name]!r}" for name in ("prompt", "seed") if name in lineage.facts)
    typer.echo(f"{lineage.what}{f': {facts}' if facts else ''}")
    for node in lineage.nodes:
        typer.echo(f"{node.step:<17} {node.key}  {_describe(node)}")
        for name, value in _details(node).items():
            typer.echo(f"{'':<17} {name}: {value}")
    for pair in pairs:
        typer.echo(f"{'nearest':<17} {pair.uid}  cosine {pair.similarity:.3f}")
        for name, value in {"url": pair.url, "caption": pair.caption}.items():
            typer.echo(f"{'':<17} {name}: {value}")
    for note in lineage.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"workspace {without_password(lineage.workspace)}")


def _describe(node: Node) -> str:
    if node.state != "done":
        return node.state
    when = time.strftime("%F %H:%M", time.localtime(node.created))
    rows = f", {node.counts['in']} rows" if "in" in node.counts else ""
    shards = f" in {node.num_shards} shards" if node.num_shards else ""
    return f"made {when} in {duration(node.wall_s)}{rows}{shards}"


def _details(node: Node) -> dict[str, str]:
    details = {
        "reads": ", ".join(f"{name} {key}" for name, key in [*node.inputs.items(), *node.others]),
        "settings": ", ".join(f"{name} = {value}" for name, value in node.settings.items()),
        "recipes": ", ".join(node.recipes),
        "versions": ", ".join(f"{name} {version}" for name, version in node.versions.items()),
        "MLflow run": node.tracking_run_id,
        "weights": node.weights and f"SHA-256 {node.weights}",
    }
    return {name: value for name, value in details.items() if value}
