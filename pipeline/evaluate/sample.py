"""Drawing prompts: PNG files, a labelled grid, and one line of JSON for each picture.

Picture ``j`` of every prompt has seed ``seed + j``, so each one can be drawn again alone, and the same seed shows what
other words change.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.cascade import Cascade, CascadeSettings
from pipeline.errors import ConfigError
from pipeline.evaluate.pictures import Block, draw_grid, to_png
from pipeline.plan import artifact_of, make_plan
from pipeline.recipe import Recipe
from pipeline.store import Artifact, Workspace, translate_os_errors
from pipeline.weights import load_cascade

Json = dict[str, Any]

GRID = "grid.png"
SAMPLES = "samples.jsonl"
_CELL_PX = (128, 256)
"""Smallest and largest side of a picture in the grid, in pixels."""


def sample_recipe(recipe: Recipe, prompts: Sequence[str], *, num_images: int, seed: int, out_dir: Path) -> list[Json]:
    """Draw prompts with the trained cascade of a recipe; see ``sample_prompts``.

    Raises:
        ConfigError: If a network is not trained yet; names the command that trains it.
    """
    cascade = load_cascade(cascade_artifacts(recipe), recipe.evaluate.resources.accelerator)
    return sample_prompts(
        cascade, prompts, num_images=num_images, seed=seed, out_dir=out_dir, batch_size=recipe.evaluate.batch_size
    )


def cascade_artifacts(recipe: Recipe) -> dict[str, Artifact]:
    """The trained networks of a recipe, by step name.

    Raises:
        ConfigError: If one is not trained yet.
    """
    workspace, artifacts = Workspace(recipe.workspace), dict[str, Artifact]()
    for step in make_plan(recipe):
        if step.name in recipe.trained():
            artifacts[step.name] = artifact_of(workspace, step)
            if artifacts[step.name].manifest() is None:
                raise ConfigError(
                    f"{step.name}: not trained yet under this recipe; train it first with `unclip run RECIPE`"
                )
    return artifacts


def sample_prompts(
    cascade: Cascade,
    prompts: Sequence[str],
    *,
    num_images: int,
    seed: int,
    out_dir: Path,
    settings: CascadeSettings | None = None,
    batch_size: int = 16,
) -> list[Json]:
    """Draw each prompt ``num_images`` times and write the pictures, ``grid.png`` and ``samples.jsonl``.

    Args:
        cascade: The trained networks.
        prompts: What to draw.
        num_images: Pictures of each prompt.
        seed: Seed of each prompt's first picture; its others have the next ones.
        out_dir: Folder, made when missing; files of an earlier call are replaced.
        settings: How to sample; the cascade's own if None.
        batch_size: Pictures drawn at a time.

    Returns:
        The rows of ``samples.jsonl``: file, prompt, seed and settings of each picture.

    Raises:
        ConfigError: If there is nothing to draw.
        StepError: If the folder cannot be written.
    """
    if not prompts or num_images < 1:
        raise ConfigError(f"nothing to draw: {len(prompts)} prompts, {num_images} pictures of each")
    settings = settings or cascade.default_settings()
    wanted = [(number, image) for number in range(len(prompts)) for image in range(num_images)]
    rows: list[Json] = []
    pictures: list[NDArray[np.uint8]] = []
    with translate_os_errors(str(out_dir)):
        out_dir.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            seeds = [seed + image for _, image in batch]
            drawn = cascade.sample([prompts[number] for number, _ in batch], seeds, settings).images.numpy()
            for (number, image), picture in zip(batch, drawn, strict=True):
                name = f"{number:03d}-{image}.png"
                (out_dir / name).write_bytes(to_png(picture))
                pictures.append(picture)
                rows.append(
                    {"file": name, "prompt": prompts[number], "seed": seed + image, "settings": asdict(settings)}
                )
        lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        (out_dir / SAMPLES).write_text(lines, encoding="utf-8")
        blocks = [
            Block(pictures[number * num_images : (number + 1) * num_images], prompt)
            for number, prompt in enumerate(prompts)
        ]
        (out_dir / GRID).write_bytes(to_png(sample_grid(blocks)))
    return rows


def sample_grid(blocks: Sequence[Block]) -> Any:
    """The grid of samples: two prompts side by side where each has few pictures."""
    side_px = max(np.asarray(blocks[0].pictures[0]).shape[:2])
    cell_px = min(max(side_px, _CELL_PX[0]), _CELL_PX[1])
    columns = 2 if len(blocks) > 1 and len(blocks[0].pictures) <= 4 else 1
    if len(blocks[0].pictures) == 1:
        columns = min(4, len(blocks))
    return draw_grid(blocks, columns=columns, cell_px=cell_px)
