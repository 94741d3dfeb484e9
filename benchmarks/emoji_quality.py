"""How well a cascade trained on emoji.py's set finds and samples it: the commands `search` and `measure` of that file.

Legend: N drawings, F features of a small picture.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.emoji import BACKGROUNDS, DRAWINGS, caption_of, fraction, on_background, trained_colours
from benchmarks.side_by_side import publish
from pipeline.clip.frozen import FrozenClip
from pipeline.grid import Block, draw_grid
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.networks.clip import load_clip_artifact
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.recipe.steps import CASCADE_STEPS

Array = NDArray[Any]

COMPARED_PX = 32
"""Side at which samples and drawings are compared, in pixels."""
BATCH_SIZE = 32
KINDS = {
    "trained": "trained drawing",
    "background": "background new to the drawing",
    "style": "name in a new style",
    "skin tone": "new skin tone of a hand",
    "colour": "new colour of a heart, circle or square",
}
"""Kinds of prompts, in words."""
SHOWN = {"trained": 12, "background": 3, "style": 3, "skin tone": 3, "colour": 3}
"""Prompts of each kind in the grid."""
SHARES = ("name and style", "name", "style", "background")


@dataclass(frozen=True)
class Asked:
    """One prompt, and the drawing that it names."""

    kind: str
    """trained, background, or the kind of combination for which the drawing is held out."""
    name: str
    style: str
    background: str

    @property
    def prompt(self) -> str:
        """Name, background and style in words."""
        return caption_of(self.name, self.style, self.background)


class Drawings:
    """All drawings of a made set, small, to compare samples with."""

    def __init__(self, folder: Path) -> None:
        with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
            self.rows = list(csv.DictReader(file))
        self.pictures = [Image.open(folder / row["file_name"]).convert("RGBA") for row in self.rows]
        self.is_trained = np.array([not row["held_out"] for row in self.rows])
        self._on: dict[str, Array] = {}

    def on(self, background: str) -> Array:
        """(N, F) all drawings on one background, as features to compare."""
        if background not in self._on:
            pages = [features(np.asarray(on_background(picture, background))) for picture in self.pictures]
            self._on[background] = np.stack(pages)
        return self._on[background]

    def asked(self, num_trained: int) -> list[Asked]:
        """Every held-out drawing on white; trained drawings on white, and others on a background new to them."""
        asked = [Asked(row["held_out"], row["name"], row["style"], "white") for row in self.rows if row["held_out"]]
        trained = [row for row in self.rows if not row["held_out"]]
        trained.sort(key=lambda row: fraction(f"asked {row['name']} {row['style']}"))
        asked += [Asked("trained", row["name"], row["style"], "white") for row in trained[:num_trained]]
        for row in trained[num_trained : 2 * num_trained]:
            trained_on = {"white", *trained_colours(row["name"], row["style"])}
            new = min(set(BACKGROUNDS) - trained_on, key=lambda colour: fraction(f"{row['name']} {colour}"))
            asked.append(Asked("background", row["name"], row["style"], new))
        return asked


def features(picture: Array) -> Array:
    """(F,) a picture's pixels at COMPARED_PX, in [0, 1]."""
    small = Image.fromarray(picture).resize((COMPARED_PX, COMPARED_PX), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel() / 255


def rms(picture: Array, others: Array) -> Array:
    """(N,) root mean squared differences of one row of features to (N, F)."""
    return np.sqrt(((others - picture) ** 2).mean(axis=1))


def judge(asked: Asked, picture: Array, drawings: Drawings) -> dict[str, Any]:
    """What a sample shows, by the drawing that it is nearest to among all of them, trained or not."""
    row = features(picture)
    distances = rms(row, drawings.on(asked.background))
    nearest = drawings.rows[int(distances.argmin())]
    corner = np.median(picture[:4, :4].reshape(-1, 3), axis=0)
    colour = min(BACKGROUNDS, key=lambda name: float(np.abs(corner - BACKGROUNDS[name]).sum()))
    return {
        "name": nearest["name"] == asked.name,
        "name and style": (nearest["name"], nearest["style"]) == (asked.name, asked.style),
        "style": nearest["style"] == asked.style,
        "background": colour == asked.background,
        "rms to the nearest trained": float(distances[drawings.is_trained].min()),
        "nearest": nearest,
    }


def sample(recipe: Recipe, asked: Sequence[Asked], seeds: Sequence[int]) -> list[list[Array]]:
    """Pictures of each prompt, one for each seed."""
    cascade = load_cascade(finished_artifacts(recipe, CASCADE_STEPS), configs=network_configs(recipe))
    pictures: list[list[Array]] = [[] for _ in asked]
    items = [(number, seed) for number in range(len(asked)) for seed in seeds]
    for start in range(0, len(items), BATCH_SIZE):
        part = items[start : start + BATCH_SIZE]
        images = cascade.sample([asked[number].prompt for number, _ in part], [seed for _, seed in part]).images
        for (number, _), image in zip(part, images.numpy(), strict=True):
            pictures[number].append(image)
    return pictures


def search_table(clip: FrozenClip, drawings: Drawings) -> list[dict[str, Any]]:
    """How early the CLIP finds, for each drawing on white, its own words among those of all drawings."""
    asked = [Asked(row["held_out"] or "trained", row["name"], row["style"], "white") for row in drawings.rows]
    pages = np.stack([np.asarray(on_background(picture, "white")) for picture in drawings.pictures])
    z_image = torch.cat([clip.encode_image(torch.from_numpy(part)) for part in _batches(pages)])
    z_text = torch.cat([clip.encode_text([one.prompt for one in part]).z_text for part in _batches(asked)])
    scores = z_image @ z_text.T
    place = (scores > scores.diagonal()[:, None]).sum(dim=1).numpy()
    kinds = np.array([one.kind for one in asked])
    return [
        {
            "drawings": words,
            "number": int((kinds == kind).sum()),
            **{f"among the first {most}": percent(place[kinds == kind] < most) for most in (1, 5, 20)},
        }
        for kind, words in KINDS.items()
        if kind in kinds
    ]


def _batches(rows: Any) -> Iterator[Any]:
    return (rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE))


def percent(flags: Any) -> str:
    """The share of true flags, in words."""
    return f"{100 * np.mean(flags):.0f} %"


def table(asked: Sequence[Asked], pictures: Sequence[Sequence[Array]], drawings: Drawings) -> list[dict[str, Any]]:
    """One row for each kind of prompt: shares of its samples, and their distance to the trained drawings."""
    judged = [(one.kind, judge(one, picture, drawings)) for one, group in zip(asked, pictures, strict=True)
              for picture in group]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for kind, words in KINDS.items():
        of_kind = [row for other, row in judged if other == kind]
        if not of_kind:
            continue
        shares = {name: percent([row[name] for row in of_kind]) for name in SHARES}
        distance = float(np.median([row["rms to the nearest trained"] for row in of_kind]))
        rows.append({"prompts": words, "samples": len(of_kind), **shares, "rms_to_nearest_trained": distance})
    return rows


def show(asked: Sequence[Asked], pictures: Sequence[Sequence[Array]], drawings: Drawings) -> Image.Image:
    """A grid: each prompt with its samples and, last, the trained drawing that is nearest to the first."""
    trained = np.flatnonzero(drawings.is_trained)
    blocks: list[Block] = []
    for one, group in zip(asked, pictures, strict=True):
        distances = rms(features(group[0]), drawings.on(one.background)[trained])
        nearest = on_background(drawings.pictures[trained[distances.argmin()]], one.background)
        tags = ["" for _ in group] + ["nearest trained"]
        note = "" if one.kind == "trained" else f" ({KINDS[one.kind]})"
        blocks.append(Block([*group, np.asarray(nearest)], one.prompt + note, tags))
    return draw_grid(blocks, columns=3, cell_px=72)


def first_of_each(asked: Sequence[Asked], numbers: dict[str, int]) -> list[Asked]:
    """The first prompts of each kind, in an order that no result decides."""
    order = sorted(asked, key=lambda one: fraction(f"shown {one.prompt}"))
    return [one for kind, number in numbers.items() for one in [one for one in order if one.kind == kind][:number]]


def search(arguments: argparse.Namespace) -> None:
    """Measure the trained CLIP alone, and publish."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    clip = load_clip_artifact(finished_artifacts(recipe, ["clip"])["clip"])
    publish("emoji_search", search_table(clip, Drawings(arguments.data / DRAWINGS)), {"recipe": recipe.name})


def measure(arguments: argparse.Namespace) -> None:
    """Sample, judge, publish, and draw the grid."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    drawings = Drawings(arguments.data / DRAWINGS)
    asked = drawings.asked(arguments.trained)
    pictures = sample(recipe, asked, range(arguments.seed, arguments.seed + arguments.images))
    settings = {"recipe": recipe.name, "overrides": arguments.overrides, "seed": arguments.seed}
    publish("emoji", table(asked, pictures, drawings), settings)
    if arguments.grid:
        shown = first_of_each(asked, SHOWN)
        seeds = range(arguments.seed, arguments.seed + 4)
        show(shown, sample(recipe, shown, seeds), drawings).convert("RGB").save(arguments.grid, quality=88)
        print(f"written: {arguments.grid}")
