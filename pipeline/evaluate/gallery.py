"""The pictures of an evaluation: ``pictures.json`` for the report, the files that it names, and the grids."""

from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.shards import StoredPictures
from pipeline.evaluate.aggregate import Aggregate, TrainingNeighbours, matrix
from pipeline.evaluate.checks import group_of, parse_flags
from pipeline.evaluate.metrics import cosine
from pipeline.evaluate.parts import NUM_RECONSTRUCTIONS_SHOWN, NUM_STAGES
from pipeline.grid import Block, draw_grid
from pipeline.pictures.frame import thumbnail
from pipeline.pictures.png import to_png
from pipeline.pictures.read import decode
from pipeline.sampling.sample import sample_grid
from pipeline.shapes.check import describe, faults
from pipeline.shapes.perceive import perceive
from pipeline.workspace.store import Artifact

Json = dict[str, Any]
Rows = list[Json]

PICTURES = "pictures.json"
_GRIDS = {
    "shown": "grid.png",
    "stages": "stages.png",
    "reconstructions": "reconstructions.png",
    "neighbours": "neighbours.png",
}
_NUM_NEIGHBOURS = 3
_NUM_FAILURES = 24
"""Most failures shown of each group, the first ones by number of the prompt."""


class Gallery:
    """Writes the pictures of an evaluation.

    Args:
        aggregate: The committed parts.
        output: The evaluate step's artifact.
        num_shown: Prompts in the grid of samples.
    """

    def __init__(self, aggregate: Aggregate, output: Artifact, num_shown: int) -> None:
        self._samples = aggregate.samples
        self._firsts = aggregate.firsts
        self._rows = aggregate.rows
        self._prompts = aggregate.prompts.prompts
        self._output = output
        self._num_shown = num_shown

    def write(self, neighbours: TrainingNeighbours, download: Artifact) -> None:
        """Write everything; the same parts give the same bytes."""
        pictures: dict[str, Rows] = {
            "shown": self._shown(),
            "failures": self._failures(),
            "stages": self._stages(),
            "reconstructions": self._reconstructions(),
            "neighbours": self._neighbours(neighbours, download),
        }
        self._output.write_json(PICTURES, pictures)
        for key, name in _GRIDS.items():
            blocks = [self._block(entry) for entry in pictures[key]]
            if blocks:
                grid = sample_grid(blocks) if key == "shown" else draw_grid(blocks, columns=2, cell_px=128)
                self._output.write_bytes(name, to_png(grid))

    def _shown(self) -> Rows:
        numbers = range(min(self._num_shown, len(self._firsts)))
        entries: Rows = [{"prompt": self._firsts[number]["prompt"], "pictures": []} for number in numbers]
        for row in self._samples:
            if row["prompt_number"] in numbers:
                flags = parse_flags(row["check"])
                check = None if flags is None else flags["everything"]
                picture = {"file": row["file"], "seed": row["seed"], "check": check}
                entries[row["prompt_number"]]["pictures"].append(picture)
        return entries

    def _failures(self) -> Rows:
        """Pictures in which the pixel check misses something or, without it, of which CLIP prefers the negative.

        CLIP does that with many real pictures, too: the report puts their rate beside.
        """
        groups: dict[str, Json] = {}
        for row in self._firsts:
            scene, flags = self._prompts[row["prompt_number"]].scene, parse_flags(row["check"])
            failure: Json = {name: row[name] for name in ("file", "prompt", "seed")}
            if scene is not None and flags is not None:
                title, has_failed = group_of(scene), not flags["everything"]
                failure["wrong"] = faults(flags, scene)
            elif row["margin"] is not None:
                title, has_failed = "captions with a hard negative", row["margin"] <= 0
                failure["preferred"] = row["negative"]
            else:
                continue
            group = groups.setdefault(title, {"title": title, "total": 0, "failed": 0, "pictures": []})
            group["total"] += 1
            if has_failed:
                group["failed"] += 1
                if group["failed"] <= _NUM_FAILURES:
                    if scene is not None:
                        failure["shows"] = describe(perceive(np.asarray(self._open(row["file"]))))
                    group["pictures"].append(failure)
        return [groups[title] for title in sorted(groups)]

    def _block(self, entry: Json) -> Block:
        names = [picture["file"] for picture in entry["pictures"]]
        tags = [picture["label"] for picture in entry["pictures"] if "label" in picture]
        return Block([self._open(name) for name in names], entry["prompt"], tags)

    def _open(self, name: str) -> Image.Image:
        return decode(self._output.path(name).read_bytes(), where=f"{self._output.uri}/{name}")

    def _stages(self) -> Rows:
        names = [name for name in self._output.names() if name.startswith("stages/")]
        entries: Rows = []
        for row in self._firsts[:NUM_STAGES]:
            prefix = f"stages/{row['prompt_number']:05d}-"
            sides = sorted(int(name[len(prefix) : -4]) for name in names if name.startswith(prefix))
            stages = [{"file": f"{prefix}{side}.png", "label": f"{side} px"} for side in sides]
            entries.append({"prompt": row["prompt"], "pictures": stages})
        return entries

    def _reconstructions(self) -> Rows:
        entries: Rows = []
        for number, row in enumerate(self._rows[:NUM_RECONSTRUCTIONS_SHOWN]):
            similarity = cosine(np.array([row["z_reconstruction"]]), np.array([row["z_image"]]))
            pictures = [
                {"file": f"reconstructions/{number:05d}-{label}.png", "label": label}
                for label in ("real", "decoded", "upsampled")
            ]
            entries.append({"prompt": row["caption"], "similarity": float(similarity[0]), "pictures": pictures})
        return entries

    def _neighbours(self, neighbours: TrainingNeighbours, download: Artifact) -> Rows:
        entries: Rows = []
        stored = StoredPictures(download, by_ranges=True)
        rows = self._firsts[:NUM_STAGES]
        for row, neighbours_of_row in zip(rows, neighbours.find(matrix(rows, "z_image")), strict=True):
            pictures: Rows = [{"file": row["file"], "label": "sample", "caption": row["prompt"]}]
            for rank, near in enumerate(neighbours_of_row[:_NUM_NEIGHBOURS]):
                name = f"neighbours/{row['prompt_number']:05d}-{rank}.png"
                picture = thumbnail(stored.decode(near.shard, near.key, near.uid))
                self._output.write_bytes(name, to_png(picture))
                pictures.append(
                    {"file": name, "label": f"{near.similarity:.3f}", "caption": near.caption, "uid": near.uid}
                )
            entries.append({"prompt": row["prompt"], "pictures": pictures})
        return entries
