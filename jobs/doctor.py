"""``unclip doctor``: what would stop a run here, and its mend."""

import dataclasses
from typing import Annotated

import typer

from jobs.options import AsJson, Next, Overrides, print_json, print_next, recipe_words
from pipeline.errors import StepError
from pipeline.recipe.recipe import load_recipe

_MARKS = {"ok": "ok", "warning": "!", "problem": "STOP"}


def doctor(
    recipe: Annotated[
        str, typer.Argument(metavar="[RECIPE]", help="Also check its workspace, tracker and accelerators.")
    ] = "",
    overrides: Overrides = None,
    json: AsJson = False,
) -> Next:
    """Check what would stop a run on this machine, and say how to mend it; exit code 4 if something would.

    Example: unclip doctor configs/demo.toml
    """
    from pipeline.init.doctor import Finding, examine

    findings: list[Finding] = []
    for finding in examine(load_recipe(recipe, overrides or []) if recipe else None):
        findings.append(finding)
        if not json:
            typer.echo(f"{_MARKS[finding.state]:<4}  {finding.name:<24} {finding.text}")
            if finding.mend:
                typer.echo(f"{'':<6}{'':<24} mend: {finding.mend}")
    if json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    words = recipe_words(recipe, overrides) if recipe else ""
    problems = [finding.name for finding in findings if finding.state == "problem"]
    if problems:
        typer.echo(f"a run would stop: {', '.join(problems)}", err=True)
        if not json:
            print_next(f"unclip doctor {words}".rstrip())
        raise typer.Exit(StepError.exit_code)
    if not json:
        typer.echo(f"nothing stops a run{' here' if not recipe else ''}")
    return (f"unclip plan {words or 'RECIPE'}", f"unclip run {words or 'RECIPE'}")
