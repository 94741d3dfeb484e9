"""``unclip promote``: which measured cascade is the one to use."""

import dataclasses
from shlex import quote
from typing import Annotated

import typer

from jobs.options import AsJson, Next, Overrides, RecipePath, print_json, print_warning, recipe_words
from pipeline.recipe.champion import DEFAULT_MEASURE, evaluated, promote
from pipeline.recipe.recipe import load_recipe


def promote_(
    recipe: RecipePath,
    overrides: Overrides = None,
    by: Annotated[
        str, typer.Option("--by", metavar="MEASURE", help="The measure of the evaluation that decides.")
    ] = DEFAULT_MEASURE,
    reason: Annotated[str, typer.Option("--reason", help="Why, in your words; stored with the two numbers.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Promote it whatever the measure says; needs a --reason.")
    ] = False,
    json: AsJson = False,
) -> Next:
    """Make the measured cascade of a recipe its champion, if it is better than the present one.

    The choice is kept in the workspace, whose `gc` then leaves the champion's artifacts; the tracker's alias `champion`
    follows, also when the present champion is promoted again.

    Example: unclip promote configs/demo.toml --by cmmd.generated --reason "stars are stars now"
    """
    from pipeline.runtime.tracking.run import send_champion

    resolved, words = load_recipe(recipe, overrides or []), recipe_words(recipe, overrides)
    step, manifest = evaluated(resolved, words)
    promotion, is_new = promote(resolved, step, manifest, print_warning, by=by, reason=reason, force=force)
    send_champion(resolved, step, promotion.reason, print_warning)  # again: the tracker may not have the alias
    if json:
        print_json(dataclasses.asdict(promotion) | {"changed": is_new})
        return ()
    typer.echo(f"champion of {resolved.name}: {promotion.evaluate} ({promotion.reason})")
    if not is_new:
        typer.echo("it was the champion already; nothing has changed")
    return (
        f"unclip serve {words}",
        f"unclip export {words} --native FOLDER",
        f"unclip lineage {step.key} --workspace {quote(resolved.workspace)}",
    )
