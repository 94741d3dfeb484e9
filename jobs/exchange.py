"""``unclip export`` and ``unclip import``."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Overrides, RecipePath
from pipeline.errors import ConfigError
from pipeline.recipe.recipe import load_recipe


def export(
    recipe: RecipePath,
    diffusers: Annotated[str, typer.Option("--diffusers", help="Folder to write for diffusers' UnCLIPPipeline.")] = "",
    native: Annotated[str, typer.Option("--native", help="Folder to write every network to, in our own layout.")] = "",
    overrides: Overrides = None,
) -> None:
    """Write the trained cascade for other programs: as diffusers' UnCLIPPipeline, or as safetensors with JSON.

    Example: unclip export my.toml --diffusers my-unclip
    """
    if bool(diffusers) == bool(native):
        raise ConfigError("export: give either --diffusers DIR or --native DIR")
    resolved = load_recipe(recipe, overrides or [])

    from pipeline.clip import FrozenText
    from pipeline.networks.cascade import load_cascade, network_configs
    from pipeline.networks.diffusers import export_diffusers, export_native
    from pipeline.recipe.plan import finished_artifacts
    from pipeline.recipe.steps import CASCADE_STEPS

    artifacts = finished_artifacts(resolved, CASCADE_STEPS)
    if native:
        export_native(artifacts, Path(native))
        typer.echo(f"{', '.join(artifacts)} in {native}")
        return
    cascade = load_cascade(artifacts, configs=network_configs(resolved))
    assert isinstance(cascade.clip, FrozenText)
    for note in export_diffusers(cascade, cascade.clip, Path(diffusers)):
        typer.echo(f"note: {note}")
    typer.echo(f"diffusers' UnCLIPPipeline loads {diffusers}")


def import_(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder in the layout of UnCLIPPipeline.")],
    out: Annotated[str, typer.Option("--out", help="Folder for the networks and a recipe that starts from them.")],
) -> None:
    """Import networks in diffusers' layout (for example Karlo's public weights) to sample, edit or fine-tune them.

    Example: unclip import karlo-v1-alpha --out karlo
    """
    from pipeline.networks.diffusers import import_diffusers

    for note in import_diffusers(Path(folder), Path(out)):
        typer.echo(f"note: {note}")
    typer.echo(
        f'networks in {out}; sample them: unclip sample {out} "a red fox" -n 4; serve them: unclip serve {out}; '
        f"fine-tune them: {out}/recipe.toml"
    )
