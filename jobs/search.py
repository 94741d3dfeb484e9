"""``unclip search``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.options import AsJson, Overrides, RecipePath, print_json
from pipeline.errors import ConfigError
from pipeline.recipe.recipe import load_recipe


def search(
    recipe: RecipePath,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for.")] = "",
    image: Annotated[str, typer.Option("--image", help="Picture to look for, instead of a text.")] = "",
    num_results: Annotated[int, typer.Option("-k", min=1, help="Neighbours to find.")] = 10,
    modality: Annotated[
        Literal["image", "text"], typer.Option("--modality", help="Search pictures (image) or captions (text).")
    ] = "image",
    out: Annotated[str, typer.Option("--out", help="Folder for the neighbours' pictures and their grid.")] = "",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Find the nearest pairs to a text or a picture.

    Example: unclip search configs/demo.toml "a blue circle" -k 10
    """
    if bool(text) == bool(image):
        raise ConfigError(
            'search: give either a text or --image FILE, for example: unclip search RECIPE "a blue circle"'
        )
    resolved = load_recipe(recipe, overrides or [])

    from pipeline.retrieve.search import search_recipe

    neighbours = search_recipe(resolved, text=text, image=image, k=num_results, modality=modality, out=out)
    if json:
        print_json([dataclasses.asdict(neighbour) for neighbour in neighbours])
        return
    for neighbour in neighbours:
        typer.echo(f"{neighbour.similarity:.4f}  {neighbour.uid}  {neighbour.caption}  {neighbour.url}")
    if out:
        typer.echo(f"pictures: {Path(out) / 'grid.png'}")
