"""Drawn pairs of the demo with planted faults, in shards; the filter steps without Ray."""

import hashlib
import io
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.data.rows import make_uid
from pipeline.data.selection import selection_of
from pipeline.data.shard_tables import good_rows
from pipeline.data.shards import StoredPictures
from pipeline.recipe.plan import Step, artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime import filter as steps
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.pool import ShardJob
from pipeline.shapes.captions import canonical_caption
from pipeline.shapes.draw import draw
from pipeline.shapes.perceive import perceive
from pipeline.shapes.scene import BACKGROUNDS, COLOURS, RADIUS, SHAPES, training_scene
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.recipe import tiny_tables
from tests.tiny.shards import Sample, write_shard, write_vectors

PX = 96
ROWS_PER_SHARD = 9


def scene_picture(number: int, side_px: int = PX) -> Image.Image:
    """Scene ``number`` of the demo; no two of the first hundred are nearly the same."""
    return Image.fromarray(np.asarray(draw(training_scene(0, number), side_px)))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def caption_of(number: int) -> str:
    """The caption of scene ``number``."""
    return canonical_caption(training_scene(0, number))


def pair(name: str, caption: str, picture: bytes, *, size: tuple[int, int] = (400, 300), **columns: Any) -> Sample:
    """A downloaded pair, with the columns that img2dataset writes."""
    more = {"original_width": size[0], "original_height": size[1], "sha256": hashlib.sha256(picture).hexdigest()}
    return Sample(f"http://a/{name}", caption, picture, columns=more | columns)


@dataclass
class Planted:
    """Pairs by name, and the reason for which each has to be left out; empty if it stays."""

    pairs: dict[str, Sample]
    reasons: dict[str, str]

    def add(self, name: str, reason: str, sample: Sample) -> None:
        """Add one pair."""
        self.pairs[name] = replace(sample, url=f"http://a/{name}")
        self.reasons[name] = reason

    def uid(self, name: str) -> str:
        """The uid of a pair."""
        return make_uid(self.pairs[name].url, self.pairs[name].caption)

    def write(self, download: Artifact) -> None:
        """Write the pairs as committed shards, in their order."""
        samples = list(self.pairs.values())
        for start in range(0, len(samples), ROWS_PER_SHARD):
            write_shard(download, f"{start // ROWS_PER_SHARD:05d}", samples[start : start + ROWS_PER_SHARD], "png")


def planted_pairs(num_clean: int = 40) -> Planted:
    """Clean pairs, and among them one or more with each fault that needs no embedding."""
    planted = Planted({}, {})
    for number in range(num_clean):
        planted.add(f"clean-{number}", "", pair("", caption_of(number), encode(scene_picture(number))))
        if number == 20:
            _plant(planted)
    planted.add("late copy", "duplicate", pair("", "yet another caption for it", encode(scene_picture(3))))
    return planted


def _plant(planted: Planted) -> None:
    copied, other = scene_picture(5), scene_picture(6)
    planted.add("same file", "duplicate", pair("", "the same picture once more", encode(copied)))
    for name, data in {
        "jpeg": encode(copied, "JPEG", quality=60),
        "webp": encode(other, "WEBP", quality=40),
        "smaller": encode(copied.resize((48, 48), Image.Resampling.BICUBIC), "JPEG", quality=80),
        "mirrored": encode(ImageOps.mirror(other), "JPEG", quality=80),
        "mirrored file": encode(ImageOps.mirror(scene_picture(7))),
    }.items():
        planted.add(name, "near_duplicate", pair("", f"a picture that is there already, {name}", data))
    unseen = (encode(scene_picture(number)) for number in range(50, 70))
    planted.add("no words", "short_caption", pair("", "image", next(unseen)))
    planted.add("empty", "short_caption", pair("", "", next(unseen)))
    planted.add("essay", "long_caption", pair("", "a long red star " * 40, next(unseen)))
    planted.add("german", "language", pair("", "ein kleiner blauer Kreis auf weissem Hintergrund", next(unseen)))
    planted.add("tiny", "small_image", pair("", "a tiny picture of a star", next(unseen), size=(40, 300)))
    planted.add("banner", "aspect_ratio", pair("", "a banner for a website", next(unseen), size=(900, 110)))


def make_context(root: Path, name: str, recipe: Recipe) -> StepContext:
    """The context of one step."""
    return StepContext(recipe, next(step for step in make_plan(recipe) if step.name == name), str(root))


def tiny_recipe(root: Path, **sections: Any) -> Recipe:
    """A tiny recipe with filter sections."""
    return parse_recipe(tiny_tables(root, **sections))


def commit(context: StepContext, result: StepResult) -> Artifact:
    """Commit a step as a run does."""
    context.output.commit(manifest_of(context.step, context.output, result.counts))
    return context.output


def output_of(recipe: Recipe, name: str) -> Artifact:
    """The artifact of a step."""
    step: Step = next(step for step in make_plan(recipe) if step.name == name)
    return artifact_of(Workspace(recipe.workspace), step)


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the passes of a filter step run here, one shard after the other."""

    def map_shards(context: StepContext, job: ShardJob) -> list[ShardRecord]:
        output = job.output or context.output
        worker: Any = None
        records = output.shard_records()  # once: on an object store that asks for each file of them
        for shard in job.shards:
            if shard not in records:
                worker = worker or job.worker(context)
                worker(shard)
        records = output.shard_records()
        return [records[shard] for shard in job.shards]

    monkeypatch.setattr(steps, "map_shards", map_shards)


def labels_of(output: Artifact) -> dict[str, dict[str, str]]:
    """All labels by uid."""
    names = [name for name in output.names() if name.startswith("labels/")]
    return {row["uid"]: row for name in names for row in pq.read_table(output.path(name)).to_pylist()}


def count(reasons: dict[str, str]) -> dict[str, int]:
    """Counts as a manifest has them."""
    counts = Counter(reasons.values())
    ok = counts.pop("", 0)
    return {"in": len(reasons), "ok": ok, **counts}


# A CLIP of drawn pictures that needs no training: it reads a picture with the demo's checker, and a caption as words.
_WORDS = sorted({*SHAPES, *COLOURS, *BACKGROUNDS, *RADIUS})
_PLACE = 0.3
"""How much the places of objects count; captions say nothing of them."""


def _see(data: bytes) -> NDArray[Any]:
    perception = perceive(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    names = [
        perception.background,
        *(name for item in perception.objects for name in (item.colour, item.shape, item.size)),
    ]
    places = np.zeros(4)
    for number, item in enumerate(perception.objects[:2]):
        places[2 * number : 2 * number + 2] = item.x - 0.5, item.y - 0.5
    return _unit(np.concatenate([_bag([name for name in names if name]), _PLACE * places]))


def _read(caption: str) -> NDArray[Any]:
    return _unit(np.concatenate([_bag(caption.split()), np.zeros(4)]))


def _bag(words: list[str]) -> NDArray[Any]:
    return np.array([words.count(word) for word in _WORDS], np.float32)


def _unit(vector: NDArray[Any]) -> NDArray[Any]:
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def embed_by_eye(context: StepContext) -> None:
    """Embed what the filter keeps, as the embed step does."""
    inputs, selection = context.inputs, selection_of(context.inputs)
    for shard in inputs["download"].shard_records():
        table = good_rows(pq.read_table(inputs["download"].path(f"{shard}.parquet")))
        rows = (table if selection is None else selection.of(table, shard)).to_pylist()
        pictures = StoredPictures(inputs["download"])
        z_image = [_see(pictures.read(shard, row["key"], row["uid"])) for row in rows]
        z_text = [_read(row["caption"]) for row in rows]
        empty = np.zeros((0, len(_WORDS) + 4))
        write_vectors(context.output, shard, rows, np.array(z_image or empty), np.array(z_text or empty))
