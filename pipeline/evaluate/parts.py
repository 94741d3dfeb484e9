"""The parts of an evaluation: any worker samples, measures and commits a part as a whole.

Legend: N items of a part, D features of an embedding. ``parts/<name>.parquet`` holds the measurements of one part;
aggregate.py computes the numbers of all parts.
"""

import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from models.cascade import Cascade
from models.pixels import resize, to_pixels, to_uint8
from models.stage import PIXELS, Z_IMAGE, Batch, DiffusionStage
from pipeline.clip.frozen import FrozenClip
from pipeline.data.batch import Batch as TrainingBatch
from pipeline.data.mends import repair_hint
from pipeline.data.negatives import hard_negatives
from pipeline.data.shards import StoredPictures
from pipeline.errors import DataError
from pipeline.evaluate.features import FeatureExtractor
from pipeline.evaluate.prompts import PromptSet, Row
from pipeline.evaluate.work import Part, Work
from pipeline.networks.bound import bound_of
from pipeline.networks.measuring import ValidationRows, num_pictures
from pipeline.networks.quality import psnr_db, sharpness, ssim
from pipeline.pictures.frame import square
from pipeline.pictures.png import to_png
from pipeline.shapes.check import check
from pipeline.shapes.draw import draw_array
from pipeline.shapes.scene import Scene
from pipeline.workspace.hashing import HashedFile
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact

Json = dict[str, Any]
Array = NDArray[Any]
Pixels = NDArray[np.uint8]

NUM_STAGES = 6
"""Prompts whose picture is kept after every stage of the cascade."""
NUM_RECONSTRUCTIONS = 16
"""Validation rows that are reconstructed from their z_image and enlarged, for the measures."""
NUM_RECONSTRUCTIONS_SHOWN = 6
"""How many of the reconstructions are kept as pictures."""
_MAX_PSNR_DB = 99.0
"""Equal pictures (a blank page) have no finite PSNR; they count as this."""
_THREADS = 8
"""Pictures of an object store take some requests each."""
_PROMPT_SEED_STRIDE = 1000
"""Distance of the seeds of two prompts, so that no two pictures of an evaluation share their noise."""
ENLARGED = ("psnr_db", "ssim", "sharpness")
"""Measures of enlarged pictures, for each upsampler; the prefix ``bicubic_`` marks bicubic enlargement."""
_VECTORS = frozenset(
    {
        "z_image",
        "z_text",
        "z_prior",
        "z_prior_2",
        "z_real",
        "z_reconstruction",
        "features",
        "features_real",
    }
)


class PartRunner:
    """Samples and measures parts; each worker builds one.

    Args:
        cascade: The trained networks; its ``clip`` is the frozen CLIP.
        work: The prompts, rows and samples that the parts number.
        download: Shards of pictures.
        output: The evaluate step's artifact.
        seed: The recipe's seed.
        extractor: Features for a second Frechet distance; None: only CLIP's.
    """

    def __init__(
        self,
        cascade: Cascade,
        work: Work,
        download: Artifact,
        output: Artifact,
        seed: int,
        extractor: FeatureExtractor | None = None,
    ) -> None:
        self._cascade = cascade
        self._clip = cast("FrozenClip", cascade.clip)
        self._prompts = work.prompts
        self._trained = work.trained
        self._rows = work.rows
        self._stored = StoredPictures(download, by_ranges=True)
        self._output = output
        self._seed = seed
        self._samples = work.samples
        self._extractor = extractor
        self._bigrams = work.bigrams
        self._sides_px = list(cascade.sides_px.values())
        self.second: Cascade | None = None
        """The recipe's second prior alone, if it has one; only its embeddings are measured."""

    def run(self, part: Part) -> ShardRecord:
        """Do one part, commit it and return its record.

        Raises:
            DataError: If a picture of a shard cannot be read, or a network gives numbers that are not finite.
        """
        start, names = time.monotonic(), list[str]()
        if part.kind == "trained":
            rows = self._sample_trained(part)
        else:
            rows = self._sample(part, names) if part.kind == "samples" else self._measure_rows(part, names)
        with self._output.write(f"{part.name}.parquet") as path:
            write_rows(rows, path)
        files = {name: self._output.describe(name) for name in [f"{part.name}.parquet", *names]}
        counts = {"in": len(rows), "ok": len(rows)}
        record = ShardRecord(shard=part.name, counts=counts, files=files, wall_s=round(time.monotonic() - start, 3))
        self._output.commit_shard(record)
        return record

    def _sample(self, part: Part, names: list[str]) -> list[Json]:
        samples = self._samples[part.start : part.stop]
        prompts = [self._prompts.prompts[i] for i, _ in samples]
        seeds = [picture_seed(self._seed, i, j) for i, j in samples]
        result = self._cascade.sample([prompt.text for prompt in prompts], seeds)
        z_prior = _finite(result.z_image.cpu().numpy(), "prior")
        z_image = self._embed(result.images.numpy())
        z_text = self._clip.encode_text([prompt.text for prompt in prompts]).z_text.cpu().numpy()
        features = self._features([picture.numpy() for picture in result.images])
        rows: list[Json] = []
        for n, ((i, j), prompt) in enumerate(zip(samples, prompts, strict=True)):
            picture = result.images[n].numpy()
            row: Json = {
                "prompt_number": i,
                "image_number": j,
                "prompt": prompt.text,
                "kind": prompt.kind,
                "seed": seeds[n],
                "file": f"samples/{i:05d}-{j}.png",
                "settings": json.dumps(self._cascade.settings, sort_keys=True),
                "z_image": z_image[n],
                "z_text": z_text[n],
                "z_prior": z_prior[n],
                "features": features[n],
            }
            row |= check_pixels(self._prompts, i, picture)
            rows.append(row)
            self._write_picture(row["file"], picture, names)
            if j == 0 and i < NUM_STAGES:
                for side_px, stage in zip(self._sides_px, result.pictures.values(), strict=True):
                    self._write_picture(f"stages/{i:05d}-{side_px}.png", stage[n].numpy(), names)
        self._add_real(rows)
        for row, (negative, direction) in zip(rows, self._contrast([p.text for p in prompts], z_text), strict=True):
            row |= {"negative": negative, "margin": _dot(row["z_image"], direction)}
            row["margin_real"] = _dot(row["z_real"], direction)
        return rows

    def _sample_trained(self, part: Part) -> list[Json]:
        """Samples of trained combinations; their prompts are numbered after the held-out ones, as are their seeds."""
        numbers, first = range(part.start, part.stop), len(self._prompts.prompts)
        prompts = [self._trained.prompts[number] for number in numbers]
        seeds = [picture_seed(self._seed, first + number, 0) for number in numbers]
        pictures = self._cascade.sample([prompt.text for prompt in prompts], seeds).images.numpy()
        return [
            {
                "prompt_number": number,
                "prompt": prompt.text,
                "seed": seed,
                "check": None if prompt.scene is None else _check_json(picture, prompt.scene),
            }
            for number, prompt, seed, picture in zip(numbers, prompts, seeds, pictures, strict=True)
        ]

    def _contrast(self, captions: Sequence[str], z_text: Array) -> list[tuple[str, Array | None]]:
        """A hard negative of each caption, and z_text of the caption minus that of the negative.

        ("", None) where there is no negative, or CLIP reads none: its tokenizer may leave out what differs.
        """
        negatives = [self._negative_of(caption) for caption in captions]
        tokens = self._clip.clip.tokenize([*captions, *negatives])
        is_read = (tokens[: len(captions)] != tokens[len(captions) :]).any(dim=1).tolist()
        places = [place for place, negative in enumerate(negatives) if negative and is_read[place]]
        contrast: list[tuple[str, Array | None]] = [("", None)] * len(captions)
        if places:
            z_negative = self._clip.encode_text([negatives[place] for place in places]).z_text.cpu().numpy()
            for place, z in zip(places, z_negative, strict=True):
                contrast[place] = (negatives[place], z_text[place] - z)
        return contrast

    def _negative_of(self, caption: str) -> str:
        """A hard negative of a caption by the recipe's seed; empty if there is none."""
        rng, num_words = random.Random(f"{self._seed} {caption}"), self._clip.clip.inputs.num_whole_words(caption)
        return next(iter(hard_negatives(caption, self._bigrams, 1, rng, num_words)), "")

    def _add_real(self, rows: list[Json]) -> None:
        """Add to the first sample of each prompt the real picture of its scene, or the picture whose caption it is."""
        from_scenes: list[Json] = []
        pictures: list[Pixels] = []
        from_rows: list[Json] = []
        for row in rows:
            row |= {"check_real": None, "z_real": None, "features_real": None}
            prompt = self._prompts.prompts[row["prompt_number"]]
            if row["image_number"] != 0:
                continue
            if prompt.scene is not None:
                pictures.append(draw_array(prompt.scene, self._sides_px[-1]))
                row["check_real"] = _check_json(pictures[-1], prompt.scene)
                from_scenes.append(row)
            elif prompt.row is not None:
                row["z_real"] = prompt.row.z_image.astype(np.float32)
                from_rows.append(row)
        if from_scenes:
            for row, z_image in zip(from_scenes, self._embed(np.stack(pictures)), strict=True):
                row["z_real"] = z_image
        if self._extractor is not None:
            stored = [self._prompts.prompts[row["prompt_number"]].row for row in from_rows]
            pictures += self._real_pictures([row for row in stored if row is not None])
            for row, features in zip(from_scenes + from_rows, self._features(pictures), strict=True):
                row["features_real"] = features

    def _measure_rows(self, part: Part, names: list[str]) -> list[Json]:
        rows = self._rows[part.start : part.stop]
        seeds = [picture_seed(self._seed, number, 0) for number in range(part.start, part.stop)]
        batch = Batch(self._clip.encode_text([row.caption for row in rows]), tuple(seeds))
        z_prior = _finite(self._embeddings(self._cascade, batch), "prior")
        columns: list[Json] = [
            {
                "uid": row.uid,
                "caption": row.caption,
                "z_image": row.z_image.astype(np.float32),
                "z_text": row.z_text.astype(np.float32),
                "z_prior": z,
                "z_reconstruction": None,
                "real_sharpness": None,
                "bits_per_dim": None,
            }
            | dict.fromkeys(f"{prefix}{name}" for prefix in ("", "bicubic_") for name in ENLARGED)
            for row, z in zip(rows, z_prior, strict=True)
        ]
        contrast = self._contrast([row.caption for row in rows], batch.text.z_text.cpu().numpy())
        for column, row, (negative, direction) in zip(columns, rows, contrast, strict=True):
            column |= {"negative": negative, "margin": _dot(row.z_image, direction)}
        if self.second is not None:
            second = _finite(self._embeddings(self.second, batch), "prior_2")
            for column, z in zip(columns, second, strict=True):
                column["z_prior_2"] = z
        count = max(0, min(NUM_RECONSTRUCTIONS - part.start, len(rows)))
        if count:
            pictures = np.stack(self._real_pictures(rows[:count]))
            self._reconstruct(part.start, rows[:count], pictures, columns, names)
            self._enlarge(pictures, batch[:count], columns)
            self._add_bounds(part.start, rows[:count], pictures, columns)
        return columns

    def _embeddings(self, cascade: Cascade, batch: Batch) -> Array:
        """The z_image that a cascade's prior samples for captions."""
        priors = [stage for stage in cascade.stages if stage.makes == Z_IMAGE]
        return cascade.run(batch, priors).z_image.cpu().numpy()

    def _reconstruct(
        self, start: int, rows: Sequence[Row], pictures: Pixels, columns: list[Json], names: list[str]
    ) -> None:
        """Sample pictures from their true z_image and their captions."""
        count = len(rows)
        text = self._clip.encode_text([row.caption for row in rows])
        z_image = torch.from_numpy(np.stack([row.z_image for row in rows]).astype(np.float32)).to(self._clip.device)
        seeds = [picture_seed(self._seed, start + n, 0) for n in range(count)]
        batch = Batch(text, tuple(seeds), {Z_IMAGE: z_image})
        samples = list(self._cascade.run(batch, self._cascade.after(Z_IMAGE)).pictures.values())
        decoded, upsampled = samples[0].numpy(), samples[-1].numpy()
        for n, z in enumerate(self._embed(upsampled)):
            columns[n]["z_reconstruction"] = z
            if start + n < NUM_RECONSTRUCTIONS_SHOWN:
                for label, picture in (("real", pictures), ("decoded", decoded), ("upsampled", upsampled)):
                    self._write_picture(f"reconstructions/{start + n:05d}-{label}.png", picture[n], names)

    def _enlarge(self, pictures: Pixels, batch: Batch, columns: list[Json]) -> None:
        """Shrink real pictures and enlarge them again, with each upsampler and by bicubic interpolation."""
        pixels = to_pixels(torch.from_numpy(pictures)).to(self._clip.device)
        measures: dict[str, dict[str, Array]] = {}
        for stage in self._cascade.stages:
            if stage.low_res_px is None or stage.side_px is None:
                continue
            large = to_uint8(resize(pixels, stage.side_px)).cpu().numpy()
            small = resize(pixels, stage.low_res_px)
            ours = self._cascade.run_stage(stage, batch.with_values(**{PIXELS: small}))
            bicubic = resize(small, stage.side_px)
            measures.setdefault("real_sharpness", {})[stage.name] = sharpness(large)
            for prefix, enlarged in (("", ours), ("bicubic_", bicubic)):
                large_again = to_uint8(enlarged).cpu().numpy()
                psnr = np.minimum(psnr_db(large_again, large), _MAX_PSNR_DB)
                measured = (psnr, ssim(large_again, large), sharpness(large_again))
                for name, values in zip(ENLARGED, measured, strict=True):
                    measures.setdefault(f"{prefix}{name}", {})[stage.name] = values
        for n, column in enumerate(columns[: len(pictures)]):
            column |= {
                name: {stage: float(values[n]) for stage, values in by_stage.items()}
                for name, by_stage in measures.items()
            }

    def _add_bounds(self, start: int, rows: Sequence[Row], pictures: Pixels, columns: list[Json]) -> None:
        """Bits per dimension of each stage that samples pixels and whose network was trained with the bound."""
        count = min(num_pictures(self._sides_px[-1]) - start, len(rows))
        if count <= 0:
            return
        batch = TrainingBatch(
            uids=tuple(row.uid for row in rows[:count]),
            captions=tuple(row.caption for row in rows[:count]),
            images=torch.from_numpy(pictures[:count]),
            z_image=torch.from_numpy(np.stack([row.z_image for row in rows[:count]]).astype(np.float32)),
        )
        measured = ValidationRows(batch.to(self._clip.device), self._clip, picture_seed(self._seed, start, 0))
        stages = [stage for stage in self._cascade.stages if stage.makes == PIXELS]
        bounds = {
            stage.name: bound_of(stage.network, measured) for stage in stages if isinstance(stage, DiffusionStage)
        }
        for n, column in enumerate(columns[:count]):
            by_stage = {name: float(bound[n]) for name, bound in bounds.items() if bound is not None}
            column["bits_per_dim"] = by_stage or None  # Parquet has no struct without a field

    def _real_pictures(self, rows: Sequence[Row]) -> list[Pixels]:
        """The stored pictures of rows, in their order, at the side of the last stage; some are read at once."""

        def read(row: Row) -> Pixels:
            return square(self._stored.decode(row.shard, row.key, row.uid), self._sides_px[-1])

        with ThreadPoolExecutor(_THREADS) as threads:
            return list(threads.map(read, rows))

    def _features(self, pictures: Sequence[Pixels]) -> Sequence[NDArray[np.float32] | None]:
        if self._extractor is None or not pictures:
            return [None] * len(pictures)
        return list(self._extractor(np.stack(pictures)))

    def _embed(self, pictures: Pixels) -> NDArray[np.float32]:
        return _finite(self._clip.encode_image(torch.from_numpy(np.array(pictures))).cpu().numpy(), "clip")

    def _write_picture(self, name: str, picture: Pixels, names: list[str]) -> None:
        self._output.write_bytes(name, to_png(picture))
        names.append(name)


def check_pixels(prompts: PromptSet, number: int, picture: Pixels) -> Json:
    """The pixel check of a sample against its own prompt, and against another prompt, as columns of its row."""
    scene, partner = prompts.prompts[number].scene, prompts.partners[number]
    other = None if partner is None else prompts.prompts[partner].scene
    return {
        "check": None if scene is None else _check_json(picture, scene),
        "check_shuffled": None if other is None else _check_json(picture, other),
    }


def picture_seed(seed: int, prompt_number: int, image_number: int) -> int:
    """Seed of one picture of an evaluation; ``unclip sample --seed`` samples it again."""
    return seed + _PROMPT_SEED_STRIDE * prompt_number + image_number


def write_rows(rows: Sequence[Json], path: Path) -> None:
    """Write rows as Parquet; vectors become lists of float32."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    vector = pa.list_(pa.float32())
    arrays = {n: pa.array(values, vector if n in _VECTORS else None) for n, values in columns.items()}
    with HashedFile(path) as stream:
        pq.write_table(pa.table(arrays), stream)


def read_part(output: Artifact, part: Part) -> list[Json]:
    """The rows of a committed part; a vector is an array, or None if it is absent.

    Raises:
        DataError: If its file is damaged; names it.
    """
    path = output.path(f"{part.name}.parquet")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: damaged ({error}); {repair_hint(path)}") from None
    vectors = [name for name in table.column_names if name in _VECTORS]
    rows: list[Json] = table.drop_columns(vectors).to_pylist()
    for name in vectors:  # without Python numbers: tens of thousands of rows have tens of millions
        column = table.column(name).combine_chunks()
        values, ends = column.values.to_numpy(), column.offsets.to_numpy()
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        for n, row in enumerate(rows):
            row[name] = values[ends[n] : ends[n + 1]] if valid[n] else None
    return rows


def _finite(vectors: NDArray[np.float32], step: str) -> NDArray[np.float32]:
    if not np.isfinite(vectors).all():
        raise DataError(f"evaluate: the {step} gives numbers that are not finite; train it again with a lower rate")
    return vectors


def _dot(z_image: Array | None, direction: Array | None) -> float | None:
    """How much nearer a picture is to its caption than to the caption's negative, as a difference of cosines."""
    return None if z_image is None or direction is None else float(z_image.astype(np.float64) @ direction)


def _check_json(picture: Pixels, scene: Scene) -> str:
    return json.dumps(check(picture, scene).correct, sort_keys=True)
