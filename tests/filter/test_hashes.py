"""Perceptual hashes on drawn pictures, and the search in parts of bounded size."""

import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageEnhance, ImageOps

from pipeline.filter import duplicates, gathered
from pipeline.filter.hashes import PictureHash, find_near, hash_picture
from pipeline.filter.labels import write_table
from pipeline.filter.rules import RowRules
from pipeline.recipe.sections import FilterConfig
from pipeline.workspace.store import Artifact
from tests.filter.planted import encode, planted_pairs, scene_picture

NUM_SCENES = 60
COPIES = {
    "jpeg": lambda image: encode(image, "JPEG", quality=40),
    "webp": lambda image: encode(image, "WEBP", quality=30),
    "half the size": lambda image: encode(image.resize((48, 48), Image.Resampling.BICUBIC), "JPEG", quality=80),
    "mirrored": lambda image: encode(ImageOps.mirror(image), "JPEG", quality=70),
    "darker": lambda image: encode(ImageEnhance.Brightness(image).enhance(0.98)),
}


def _near(hashes: list[PictureHash]) -> np.ndarray[Any, Any]:
    return find_near(
        np.array([item.direct for item in hashes], np.uint64),
        np.array([item.mirrored for item in hashes], np.uint64),
        np.array([np.frombuffer(item.thumb, np.uint8) for item in hashes]),
        np.zeros(len(hashes), np.uint64),
        FilterConfig().max_hash_distance,
    )


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_near_its_original_and_to_no_other_picture(kind: str) -> None:
    images = [scene_picture(number) for number in range(NUM_SCENES)]
    hashes = [hash_picture(encode(image), where="original") for image in images]
    hashes += [hash_picture(COPIES[kind](image), where=kind) for image in images]
    same_as = _near(hashes)
    assert same_as[:NUM_SCENES].tolist() == [-1] * NUM_SCENES
    assert (same_as[NUM_SCENES:] == np.arange(NUM_SCENES)).mean() > 0.98


def test_the_same_drawing_in_other_colours_is_another_picture() -> None:
    image = scene_picture(2)
    red, green, blue = image.split()
    other = Image.merge("RGB", (green, red, blue))
    assert _near([hash_picture(encode(one), where="") for one in (image, other)]).tolist() == [-1, -1]


def test_only_rows_of_one_group_are_near() -> None:
    item = hash_picture(encode(scene_picture(0)), where="")
    columns = [np.full(3, value, np.uint64) for value in (item.direct, item.mirrored)]
    thumbs = np.tile(np.frombuffer(item.thumb, np.uint8), (3, 1))
    assert find_near(*columns, thumbs, np.array([1, 2, 1], np.uint64), 4).tolist() == [-1, -1, 0]


@pytest.mark.parametrize("rows_per_part", [7, 1])
def test_small_parts_find_what_one_part_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_part: int
) -> None:
    monkeypatch.setattr(gathered, "LEAST_SHARDS", 3)
    download, measures = Artifact(str(tmp_path / "download")), Artifact(str(tmp_path / "measures"))
    planted_pairs().write(download)
    config = FilterConfig(duplicates="near")
    shards = list(download.shard_records())
    rules, num_rows = RowRules(config), 0
    for shard in shards:
        table = rules(partial(download.path, f"{shard}.tar"), download.path(f"{shard}.parquet"), shard)
        num_rows += table.num_rows
        with measures.write(f"{shard}.arrow") as path:
            write_table(table, path)

    bundles = gathered.plan_bundles(len(shards))
    assert len(bundles) == -(-len(shards) // 3)
    files = Artifact(str(tmp_path / "gathered"))
    for bundle in bundles:
        with files.write(bundle.file) as path:
            gathered.write_batches(gathered.gather_measures(measures, shards, bundle, config), path)

    def find() -> set[tuple[int, int, str, str]]:
        parts = duplicates.search_parts(config, num_rows)
        tables = [duplicates.find_duplicates(files, bundles, part, config).to_pylist() for part in parts]
        return {(row["number"], row["row"], row["reason"], row["same_as"]) for rows in tables for row in rows}

    whole = find()
    monkeypatch.setattr(duplicates, "ROWS_PER_PART", rows_per_part)
    assert len(duplicates.search_parts(config, num_rows)) == 6 * -(-num_rows // rows_per_part)
    assert {row[2] for row in whole} == {"duplicate", "near_duplicate"}
    assert find() == whole


def test_what_a_part_finds_is_held_in_columns(tmp_path: Path) -> None:
    """A part may find a million rows: as Python's objects they took more memory than the rows themselves."""
    num_rows, files, config = 20_000, Artifact(str(tmp_path)), FilterConfig(duplicates="exact")
    table = pa.table(
        {
            "number": pa.array(np.zeros(num_rows), pa.int32()),
            "row": pa.array(np.arange(num_rows), pa.int32()),
            "uid": [f"{row:032x}" for row in range(num_rows)],
            "digest": pa.array([b"same placeholder"] * num_rows, pa.binary(16)),
            "group": pa.array(np.zeros(num_rows), pa.uint64()),
        }
    )
    bundles = [gathered.Bundle("gathered-00", 0, 1)]
    with files.write(bundles[0].file) as path:
        gathered.write_batches([table], path)
    [part] = duplicates.search_parts(config, num_rows)
    tracemalloc.start()
    findings = duplicates.find_duplicates(files, bundles, part, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (findings.num_rows, set(findings["same_as"].to_pylist())) == (num_rows - 1, {f"{0:032x}"})
    assert peak < 300 * num_rows
