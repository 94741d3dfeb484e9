"""``unclip export`` and ``unclip import``."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Next, Overrides, RecipePath, recipe_words
from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe, load_recipe


def export(
    recipe: RecipePath,
    diffusers: Annotated[str, typer.Option("--diffusers", help="Folder to write for diffusers' UnCLIPPipeline.")] = "",
    native: Annotated[str, typer.Option("--native", help="Folder to write every network to, in our own layout.")] = "",
    embeddings: Annotated[
        str, typer.Option("--embeddings", help="Folder to write the embeddings to, in clip-retrieval's layout.")
    ] = "",
    overrides: Overrides = None,
) -> Next:
    """Write for other programs: the trained cascade, as diffusers' UnCLIPPipeline or in our own layout; or embeddings.

    Example: unclip export my.toml --diffusers my-unclip
    """
    if sum(map(bool, (diffusers, native, embeddings))) != 1:
        raise ConfigError("export: give one of --diffusers DIR, --native DIR and --embeddings DIR")
    resolved = load_recipe(recipe, overrides or [])
    if embeddings:
        _export_embeddings(resolved, Path(embeddings))
        return (f"unclip status {recipe_words(recipe, overrides)}",)

    from pipeline.clip.frozen import FrozenText
    from pipeline.networks.cascade import load_cascade, network_configs
    from pipeline.networks.diffusers import export_diffusers, export_native
    from pipeline.recipe.garbage import in_use_of
    from pipeline.recipe.lineage import write_origin
    from pipeline.recipe.plan import finished_artifacts
    from pipeline.recipe.steps import CASCADE_STEPS

    with in_use_of(resolved, CASCADE_STEPS):
        artifacts = finished_artifacts(resolved, CASCADE_STEPS)
        if native:
            export_native(artifacts, Path(native))
            write_origin(Path(native), resolved, artifacts)
            typer.echo(f"{', '.join(artifacts)} in {native}")
            folder = shlex.quote(native)
            return (f'unclip sample {folder} "your prompt" --out out', f"unclip lineage {folder}")
        cascade = load_cascade(artifacts, configs=network_configs(resolved))
        assert isinstance(cascade.clip, FrozenText)
        for note in export_diffusers(cascade, cascade.clip, Path(diffusers)):
            typer.echo(f"note: {note}")
        write_origin(Path(diffusers), resolved, artifacts)
        typer.echo(f"diffusers' UnCLIPPipeline loads {diffusers}")
        return (f"unclip lineage {shlex.quote(diffusers)}",)


def _export_embeddings(recipe: Recipe, folder: Path) -> None:
    from pipeline.data.npy_folder import export_embeddings
    from pipeline.recipe.garbage import in_use_of
    from pipeline.recipe.plan import finished_artifacts

    with in_use_of(recipe, ("embed",)):
        num_rows = export_embeddings(finished_artifacts(recipe, ("embed",))["embed"], folder)
    typer.echo(f"{num_rows} embeddings of pictures and of texts in {folder}, for embedding-reader and clip-retrieval")


def import_(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Folder in the layout of UnCLIPPipeline, or of clip-retrieval.")
    ],
    out: Annotated[str, typer.Option("--out", help="Folder for the networks, and for a recipe that starts from them.")],
) -> Next:
    """Import networks in diffusers' layout (for example Karlo's public weights) to sample, edit or fine-tune them.

    A folder of clip-retrieval's embeddings (img_emb, text_emb, metadata) gives a recipe that takes them over.

    Example: unclip import karlo-v1-alpha --out karlo
    """
    if (Path(folder) / "img_emb").is_dir():
        from pipeline.data.npy_folder import write_import_recipe

        num_rows, path = write_import_recipe(Path(folder), Path(out))
        typer.echo(f"{num_rows} embeddings in {folder}; first name the CLIP that made them in {path}")
        recipe = shlex.quote(str(path))
        return (f"unclip run {recipe} --until index", f"unclip run {recipe} --until clip")
    from pipeline.networks.diffusers import import_diffusers

    for note in import_diffusers(Path(folder), Path(out)):
        typer.echo(f"note: {note}")
    typer.echo(f"networks in {out}; {out}/recipe.toml fine-tunes them")
    networks = shlex.quote(out)
    return (f'unclip sample {networks} "a red fox" -n 4', f"unclip serve {networks}")
