"""Choice of the prompts and rows that are sampled and measured; none was trained on if there are validation rows.

Rows are taken in the order of their uids. Uids are hashes, so this is a fixed random sample that does not depend on
the shards.
"""

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.drawn import EVALUATION
from pipeline.data.rows import require_columns
from pipeline.data.vectors import read_vectors
from pipeline.errors import DataError
from pipeline.shapes.captions import canonical_caption
from pipeline.shapes.scene import Object, Scene, trained_scenes
from pipeline.workspace.store import Artifact


@dataclass(frozen=True)
class Prompt:
    """One prompt, with the picture that it should give, if that is known."""

    text: str
    kind: str = ""
    """Which attributes make it new (drawn source), or empty."""
    scene: Scene | None = None
    """What the picture should show, for the pixel check (drawn source)."""
    row: "Row | None" = None
    """The picture whose caption it is (captions)."""


@dataclass(frozen=True)
class Row:
    """One embedded row."""

    uid: str
    key: str
    shard: str
    caption: str
    z_image: NDArray[np.float16]
    """(D,), length one."""
    z_text: NDArray[np.float16]
    """(D,), length one."""


@dataclass(frozen=True)
class PromptSet:
    """All prompts of an evaluation, and where they come from."""

    prompts: tuple[Prompt, ...]
    source: str
    """``drawn``, ``captions`` (of validation rows), ``training captions`` (there are no validation rows), ``file``;
    ``trained`` for combinations that training shows (drawn source)."""
    num_in_file: int = 0
    """Prompts in the file, of which these are the first; 0: there is no file."""

    @cached_property
    def partners(self) -> tuple[int | None, ...]:
        """Another prompt for each, for the floor: the next one with as many objects; None if there is no other."""
        groups: dict[int, list[int]] = {}
        for number, prompt in enumerate(self.prompts):
            groups.setdefault(len(prompt.scene.objects) if prompt.scene else 0, []).append(number)
        partners: dict[int, int | None] = {}
        for group in groups.values():
            for number, other in zip(group, group[1:] + group[:1], strict=True):
                partners[number] = None if other == number else other
        return tuple(partners[number] for number in range(len(self.prompts)))


def choose_prompts(path: str, pairs: Artifact, embed: Artifact, num_prompts: int) -> PromptSet:
    """Choose the prompts to sample: from a file, else from the drawn source, else validation captions.

    Args:
        path: Text file with one prompt on each line; or empty.
        pairs: The pairs step.
        embed: The embed step.
        num_prompts: Most prompts; if there are fewer, all are taken.

    Raises:
        DataError: If there is no prompt, or a file breaks its schema.
    """
    if path:
        texts = _read_lines(path)
        return PromptSet(tuple(Prompt(text) for text in texts[:num_prompts]), "file", len(texts))
    if pairs.exists(EVALUATION):
        return PromptSet(tuple(_read_scenes(pairs)[:num_prompts]), "drawn")
    rows, split = held_out_rows(embed, num_prompts, distinct=True)
    prompts = tuple(Prompt(row.caption, row=row) for row in rows)
    return PromptSet(prompts, "captions" if split == "validation" else "training captions")


def trained_prompts(num_prompts: int, seed: int) -> PromptSet:
    """Prompts of the drawn source whose combinations training shows, to measure what a new combination costs."""
    scenes = trained_scenes(num_prompts, seed)
    return PromptSet(tuple(Prompt(canonical_caption(scene), scene=scene) for scene in scenes), "trained")


def held_out_rows(embed: Artifact, num_rows: int, *, distinct: bool = False) -> tuple[list[Row], str]:
    """Validation rows, or training rows if there are no validation rows; and the name of their split.

    Args:
        embed: The embed step.
        num_rows: Most rows.
        distinct: Take each caption once.

    Raises:
        DataError: If nothing is embedded.
    """
    for split in ("validation", "train"):
        rows = choose_rows(embed, num_rows, split, distinct=distinct)
        if rows:
            return rows, split
    raise DataError(f"{embed.uri}: no rows: nothing was downloaded, or no picture could be read")


def choose_rows(embed: Artifact, num_rows: int, split: str, *, distinct: bool = False) -> list[Row]:
    """The ``num_rows`` rows of a split whose uids come first, in the order of their uids."""
    places = heapq.nsmallest(num_rows * (4 if distinct else 1), _places(embed, split))
    if distinct:
        first: dict[str, tuple[str, str, int, str]] = {}
        for place in places:
            first.setdefault(place[3], place)
        places = list(first.values())[:num_rows]
    rows: dict[str, Row] = {}
    for shard in sorted({place[1] for place in places}):
        vectors = read_vectors(embed.path(f"{shard}.parquet"))
        for uid, _, number, caption in (place for place in places if place[1] == shard):
            key = vectors.table.column("key")[number].as_py()
            rows[uid] = Row(uid, key, shard, caption, vectors.z_image[number], vectors.z_text[number])
    return [rows[place[0]] for place in places]


def _places(embed: Artifact, split: str) -> Iterator[tuple[str, str, int, str]]:
    """(uid, shard, row number, caption) of every row of a split."""
    for shard in embed.shard_records():
        path = embed.path(f"{shard}.parquet")
        table = _read(path, ["uid", "split", "caption"])
        columns = (table.column(name).to_pylist() for name in ("uid", "split", "caption"))
        for number, (uid, row_split, caption) in enumerate(zip(*columns, strict=True)):
            if row_split == split:
                yield uid, shard, number, caption or ""


def _read_scenes(pairs: Artifact) -> list[Prompt]:
    path = pairs.path(EVALUATION)
    table = _read(path, ["prompt", "kind", "scene"])
    prompts: list[Prompt] = []
    for number, row in enumerate(table.to_pylist()):
        try:
            scene = parse_scene(json.loads(row["scene"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: row {number}: column scene is not a scene ({error})") from None
        prompts.append(Prompt(row["prompt"], row["kind"], scene))
    if not prompts:
        raise DataError(f"{path}: no prompts")
    return prompts


def parse_scene(data: dict[str, Any]) -> Scene:
    """A scene from its JSON form (``dataclasses.asdict``)."""
    return Scene(tuple(Object(**item) for item in data["objects"]), data["background"], data.get("relation"))


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        require_columns(list(pq.read_schema(path).names), columns, where=str(path))
        return pq.read_table(path, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: damaged ({error}); remove its folder and run the step again") from None


def _read_lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"evaluate.prompts_path {path}: cannot be read: {error}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"evaluate.prompts_path {path}: no prompts; write one on each line")
    return lines
