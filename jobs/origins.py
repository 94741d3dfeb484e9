"""``unclip lineage`` and ``unclip gc``: where something comes from, and what nobody needs."""

import dataclasses
import shlex
import time
from typing import Annotated

import typer

from jobs.options import AsJson, print_json, print_next, print_warning
from pipeline.recipe.lineage import Lineage, Node, mermaid, trace
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.progress import duration
from pipeline.workspace.store import Workspace


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
    json: AsJson = False,
) -> None:
    """Show what something was made from: networks, trainings, data, recipes, versions, MLflow runs.

    Example: unclip lineage out/000-0.png --recipe configs/demo.toml
    """
    lineage = trace(what, workspace or (load_recipe(recipe).workspace if recipe else ""))
    if json:
        print_json(lineage.to_dict())
    elif graph:
        typer.echo(mermaid(lineage))
    else:
        _print_lineage(lineage)


def gc(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Every recipe whose artifacts stay.")],
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without it they are only listed.")] = False,
    json: AsJson = False,
) -> None:
    """List the artifacts of a workspace that none of these recipes needs; with --delete, remove them.

    Example: unclip gc my.toml other.toml
    """
    from pipeline.recipe.garbage import find_garbage, remove_garbage
    from pipeline.workspace.lock import locked_workspace

    loaded = [load_recipe(recipe) for recipe in recipes]
    workspace = Workspace(loaded[0].workspace)
    workspace.check()
    with locked_workspace(workspace, print_warning) as lock:  # what runs is not looked at, nor touched
        garbage, others = find_garbage(workspace, loaded)
        if delete:
            garbage, begun = remove_garbage(workspace, garbage, lock.check)
            others += begun
    total = sum(one.num_bytes for one in garbage)
    if json:
        rows = [dataclasses.asdict(one) for one in garbage]
        print_json(
            {"garbage": rows, "bytes": total, "removed": delete, "kept": [dataclasses.asdict(k) for k in others]}
        )
        return
    for one in garbage:
        state = "" if one.is_finished else "  unfinished"
        typer.echo(f"{one.step:<17} {one.key}  {_size(one.num_bytes):>9}{state}")
    for one in others:
        typer.echo(f"{one.step:<17} {one.key}  stays: {one.why}")
    verdict = "removed" if delete else "not needed"
    typer.echo(f"{len(garbage)} artifacts, {_size(total)}: {verdict}")
    if garbage and not delete:
        print_next(f"gc {shlex.join(recipes)} --delete")


def _print_lineage(lineage: Lineage) -> None:
    facts = ", ".join(f"{name} {lineage.facts[name]!r}" for name in ("prompt", "seed") if name in lineage.facts)
    typer.echo(f"{lineage.what}{f': {facts}' if facts else ''}")
    for node in lineage.nodes:
        typer.echo(f"{node.step:<17} {node.key}  {_describe(node)}")
        for name, value in _details(node).items():
            typer.echo(f"{'':<17} {name}: {value}")
    for note in lineage.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"workspace {lineage.workspace}")


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
    }
    return {name: value for name, value in details.items() if value}


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
