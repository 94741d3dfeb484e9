"""``unclip search``: finds the pairs that are nearest to a text or a picture."""

from pathlib import Path
from typing import cast

import numpy as np
import torch

from pipeline.data.shards import StoredPictures
from pipeline.networks.clip import load_clip_artifact
from pipeline.pictures import read_file, to_png
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe
from pipeline.retrieve.build import Modality
from pipeline.retrieve.index import Neighbour, NeighbourIndex
from pipeline.sampling.grid import Block, draw_grid
from pipeline.workspace.store import Artifact, translate_os_errors


def search_recipe(
    recipe: Recipe, *, text: str = "", image: str = "", k: int = 10, modality: str = "image", out: str = ""
) -> list[Neighbour]:
    """Find the nearest pairs of a recipe's index.

    Args:
        recipe: A recipe whose index is built.
        text: The text to search for, or
        image: The picture file to search for.
        k: Number of neighbours.
        modality: Compare with the ``image`` or the ``text`` of the pairs.
        out: Folder for the neighbours' pictures and ``grid.png``; if empty, none are written.

    Raises:
        ConfigError: If the index is not built yet, or the picture cannot be read.
        DataError: If an artifact is damaged.
        StepError: If the folder cannot be written.
    """
    artifacts = finished_artifacts(recipe, ("download", "clip", "index"))
    clip = load_clip_artifact(artifacts["clip"])
    with torch.no_grad():
        z = (
            clip.encode_image(torch.from_numpy(np.array(read_file(image)))[None])
            if image
            else clip.encode_text([text]).z_text
        )
    index = NeighbourIndex.open(artifacts["index"])
    [neighbours] = index.search(z.cpu().numpy(), k, cast("Modality", modality))
    if out:
        with translate_os_errors(out):
            _write_pictures(neighbours, artifacts["download"], Path(out), text or image)
    return neighbours


def _write_pictures(neighbours: list[Neighbour], download: Artifact, folder: Path, title: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pictures, blocks = StoredPictures(download), list[Block]()
    for rank, neighbour in enumerate(neighbours):
        picture = pictures.decode(neighbour.shard, neighbour.key, neighbour.uid)
        (folder / f"{rank:03d}.png").write_bytes(to_png(picture))
        blocks.append(Block([np.array(picture)], f"{neighbour.similarity:.3f} {neighbour.caption}"))
    draw_grid(blocks, columns=5, title=title).save(folder / "grid.png")
