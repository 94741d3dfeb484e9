"""``unclip ablate``."""

from typing import Annotated

import typer

from jobs.options import AsJson, Next, Overrides, RecipePath, print_json, recipe_words
from pipeline.recipe.recipe import load_recipe


def ablate(
    recipe: RecipePath,
    num_prompts: Annotated[
        int, typer.Option("-n", min=1, help="Prompts to measure: the first of those of evaluate.")
    ] = 60,
    num_shown: Annotated[int, typer.Option("--shown", min=1, help="Prompts shown in the picture, one a row.")] = 8,
    overrides: Overrides = None,
    json: AsJson = False,
) -> Next:
    """Show what the prior is for: caption only, z_text as z_image, the prior, the true z_image; same seeds.

    It says by which measures the paper's order holds, and writes the report with a section about it.

    Example: unclip ablate configs/demo.toml -n 60
    """
    resolved = load_recipe(recipe, overrides or [])

    from pipeline.evaluate.ablate import ablate_recipe
    from pipeline.recipe.plan import make_plan
    from pipeline.report.ablation import format_ablation
    from pipeline.report.report import update_report
    from pipeline.workspace.store import Workspace

    def watch(variant: str, done: int, total: int) -> None:
        typer.echo(f"{variant}: {done}/{total}", err=True)

    output, result = ablate_recipe(resolved, num_prompts=num_prompts, num_shown=num_shown, watch=watch)
    workspace = Workspace(resolved.workspace)
    words = recipe_words(recipe, overrides)
    report = update_report(workspace, make_plan(resolved), resolved, words)
    if json:
        print_json(result | {"artifact": output.uri})
        return ()
    typer.echo(format_ablation(result))
    typer.echo(f"pictures: {output.path('ablation.png')}")
    typer.echo(f"report: {report}")
    return (f'unclip sample {words} "your prompt" --out out', f"unclip promote {words}")
