"""Sampling prompts: PNG files, a labelled grid, and one line of JSON for each picture.

Picture ``j`` of every prompt has seed ``seed + j``, so that each can be sampled again alone, and equal seeds show the
effect of other words.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.cascade import Cascade
from models.editor import ImageEncoder
from models.request import SampleRequest
from models.stage import Watch
from pipeline.errors import ConfigError
from pipeline.grid import Block, draw_grid
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.pictures.png import to_png, with_texts
from pipeline.recipe.garbage import in_use_of
from pipeline.recipe.picture_card import ModelCard, made_with, model_card
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.sampling.at import as_far_as_trained, checkpoint_networks, networks_of
from pipeline.sampling.preview import Preview
from pipeline.workspace.disk import translate_os_errors
from pipeline.workspace.store import Artifact

Json = dict[str, Any]

GRID = "grid.png"
SAMPLES = "samples.jsonl"
_CELL_PX = (128, 256)
"""Smallest and largest side of a picture in the grid, in pixels."""


def sample_recipe(
    recipe: Recipe,
    prompts: Sequence[str],
    *,
    num_images: int,
    seed: int,
    out_dir: Path,
    num_candidates: int = 0,
    at: Sequence[str] = (),
    watch: Watch | None = None,
) -> list[Json]:
    """Sample prompts with the trained cascade of a recipe; see ``sample_prompts``.

    Args:
        recipe: The recipe.
        prompts: What the pictures show.
        num_images: Pictures of each prompt.
        seed: Seed of each prompt's first picture.
        out_dir: Folder for the pictures.
        num_candidates: See ``sample_prompts``.
        at: Networks that are still trained, each as STEP@NUMBER, with the checkpoint to take. Upsamplers that are not
            finished are left out then.
        watch: Called after each step of each stage.

    Raises:
        ConfigError: If a network is not trained yet, or has no such checkpoint; says what there is.
    """
    accelerator = recipe.evaluate.resources.accelerator
    with in_use_of(recipe, CASCADE_STEPS), checkpoint_networks(recipe, at) as live:
        recipe = as_far_as_trained(recipe, at)
        artifacts = networks_of(recipe, live)
        cascade = load_cascade(artifacts, accelerator, network_configs(recipe))
    return sample_prompts(
        cascade,
        prompts,
        num_images=num_images,
        seed=seed,
        out=PictureFolder(out_dir, model_card(recipe, artifacts)),
        num_candidates=num_candidates,
        batch_size=recipe.evaluate.batch_size,
        watch=watch,
    )


@dataclass(frozen=True)
class PictureFolder:
    """Where pictures are written, and what their files say."""

    path: Path
    """Created if missing; files of an earlier call are replaced."""
    card: ModelCard | None = None
    """What they are made with; None: their files say nothing."""

    def write(self, name: str, picture: NDArray[np.uint8], prompt: str, seed: int) -> None:
        """Write a picture whole: a run that is killed leaves no half of one, and none that does not say what made it.

        Raises:
            StepError: If it cannot be written.
        """
        card, texts = self.card, dict[str, str]()
        if card is not None:
            texts = made_with(card, SampleRequest(prompt, (seed,)), seed, card.image_px)
        Artifact(str(self.path.resolve())).write_bytes(name, with_texts(to_png(picture), texts))


def sample_prompts(
    cascade: Cascade,
    prompts: Sequence[str],
    *,
    num_images: int,
    seed: int,
    out: PictureFolder,
    num_candidates: int = 0,
    batch_size: int = 16,
    watch: Watch | None = None,
) -> list[Json]:
    """Sample each prompt ``num_images`` times and write the pictures, ``grid.png`` and ``samples.jsonl``.

    Args:
        cascade: The trained networks.
        prompts: What the pictures show.
        num_images: Pictures of each prompt.
        seed: Seed of each prompt's first picture; its others have the following seeds.
        out: The folder.
        num_candidates: Pictures sampled of each prompt; those with the highest CLIP score are kept, the best first.
            0: ``num_images``, in the order of their seeds, without scores.
        batch_size: Pictures sampled at a time.
        watch: Called after each step of each stage; ``preview.png`` shows the steps.

    Returns:
        The rows of ``samples.jsonl``: file, prompt, seed, settings and, with candidates, ``clip_score``.

    Raises:
        ConfigError: If there is nothing to sample, or there are fewer candidates than pictures to keep.
        StepError: If the folder cannot be written.
    """
    if not prompts or num_images < 1:
        raise ConfigError(f"nothing to sample: {len(prompts)} prompts, {num_images} pictures of each")
    if num_candidates and num_candidates < num_images:
        raise ConfigError(f"--candidates {num_candidates}: fewer than the {num_images} pictures to keep of each prompt")
    seeds = range(seed, seed + (num_candidates or num_images))
    rows: list[Json] = []
    blocks: list[Block] = []
    with translate_os_errors(str(out.path)):
        out.path.mkdir(parents=True, exist_ok=True)
        with Preview(out.path, watch) as preview:
            groups = _sample(cascade, prompts, seeds, batch_size, preview, scored=num_candidates > 0)
            for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
                best = sorted(group, key=lambda one: -(one.score or 0.0))[:num_images]  # a stable sort
                for rank, one in enumerate(best):
                    name = f"{number:03d}-{rank}.png"
                    out.write(name, one.picture, prompt, one.seed)
                    row: Json = {"file": name, "prompt": prompt, "seed": one.seed, "settings": cascade.settings}
                    rows.append(row if one.score is None else row | {"clip_score": one.score})
                tags = [f"{one.score:.3f}" for one in best if one.score is not None]
                blocks.append(Block([one.picture for one in best], prompt, tags))
        lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        (out.path / SAMPLES).write_text(lines, encoding="utf-8")
        (out.path / GRID).write_bytes(to_png(sample_grid(blocks)))
    return rows


@dataclass(frozen=True)
class _Sample:
    """One picture of a prompt."""

    seed: int
    picture: NDArray[np.uint8]
    score: float | None


def _sample(
    cascade: Cascade, prompts: Sequence[str], seeds: Sequence[int], batch_size: int, watch: Watch, *, scored: bool
) -> Iterator[list[_Sample]]:
    """The pictures of each prompt in turn, one for each seed; a batch may hold those of several prompts."""
    items = [(prompt, seed) for prompt in prompts for seed in seeds]
    group: list[_Sample] = []
    for start in range(0, len(items), batch_size):
        texts, batch_seeds = zip(*items[start : start + batch_size], strict=True)
        images = cascade.sample(texts, batch_seeds, watch=watch).images
        scores = clip_scores(cascade, images, texts) if scored else [None] * len(images)
        for seed, picture, score in zip(batch_seeds, images.numpy(), scores, strict=True):
            group.append(_Sample(seed, picture, score))
            if len(group) == len(seeds):
                yield group
                group = []


def clip_scores(cascade: Cascade, images: Tensor, texts: Sequence[str]) -> list[float]:
    """Cosine of the CLIP embeddings of each picture, uint8 (B, H, W, 3), and its text.

    Raises:
        ConfigError: If the cascade's CLIP has no image tower.
    """
    clip = cascade.clip
    if not isinstance(clip, ImageEncoder):
        raise ConfigError("--candidates: this cascade's CLIP has no image tower to rank candidates")
    return (clip.encode_image(images) * clip.encode_text(texts).z_text).sum(1).tolist()


def sample_grid(blocks: Sequence[Block]) -> Any:
    """The grid of samples, with two prompts side by side if each has few pictures."""
    side_px = max(np.asarray(blocks[0].pictures[0]).shape[:2])
    cell_px = min(max(side_px, _CELL_PX[0]), _CELL_PX[1])
    columns = 2 if len(blocks) > 1 and len(blocks[0].pictures) <= 4 else 1
    if len(blocks[0].pictures) == 1:
        columns = min(4, len(blocks))
    return draw_grid(blocks, columns=columns, cell_px=cell_px)
