"""A whole evaluation: its metrics, its files, its summary."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.vectors import read_vectors
from pipeline.evaluate import metrics as m
from pipeline.evaluate.evaluate import summarise
from pipeline.evaluate.parts import read_part
from pipeline.evaluate.work import Work
from pipeline.recipe.recipe import Recipe
from pipeline.workspace.store import Artifact
from tests.evaluate.conftest import evaluate_inputs
from tests.tiny.workspace import NUM_PICTURES


def test_general_metrics_agree_with_their_definitions(evaluated: tuple[Artifact, Work, dict[str, Any]]) -> None:
    output, work, metrics = evaluated
    rows = [row for part in work.parts if part.kind == "samples" for row in read_part(output, part)]
    firsts = {row["prompt_number"]: row for row in rows if row["image_number"] == 0}
    z_image = np.array([firsts[i]["z_image"] for i in range(10)])
    z_text = np.array([firsts[i]["z_text"] for i in range(10)])
    z_real = np.array([firsts[i]["z_real"] for i in range(10)])
    assert metrics["clip_score"]["generated"]["mean"] == pytest.approx((z_image * z_text).sum(1).mean(), abs=1e-6)
    shuffled = np.mean([z_image[i] @ z_text[j] for i, j in enumerate(work.prompts.partners) if j is not None])
    assert metrics["clip_score"]["shuffled"]["mean"] == pytest.approx(shuffled, abs=1e-6)
    whole = m.frechet_distance(m.FeatureSums.of(z_image), m.FeatureSums.of(z_real))
    assert metrics["frechet_clip"]["generated"] == pytest.approx(whole, rel=1e-6)
    assert metrics["prior"]["z_image"]["count"] == NUM_PICTURES // 5
    assert set(metrics) >= {"decoder", "upsampler_1", "upsampler_2", "memorisation", "r_precision", "held_out"}


def test_nearest_training_pictures_are_training_rows_found_by_brute_force(
    tiny: Recipe, evaluated: tuple[Artifact, Work, dict[str, Any]]
) -> None:
    output, work, metrics = evaluated
    vectors = read_vectors(evaluate_inputs(tiny)["embed"].path("00000.parquet"))
    is_train = np.array(vectors.table.column("split").to_pylist()) == "train"
    train = vectors.z_image[is_train].astype(np.float64)
    rows = [row for part in work.parts if part.kind == "samples" for row in read_part(output, part)]
    z_image = np.array([row["z_image"] for row in rows if row["image_number"] == 0])
    assert metrics["memorisation"]["generated"]["mean"] == pytest.approx((z_image @ train.T).max(1).mean(), abs=1e-3)
    uids: list[str] = np.array(vectors.table.column("uid").to_pylist())[is_train].tolist()
    samples = [json.loads(line) for line in output.path("samples.jsonl").read_text().splitlines()]
    z_image_of = {row["file"]: np.array(row["z_image"], np.float64) for row in rows}
    for sample in samples:
        similarity = train @ z_image_of[sample["file"]]
        assert similarity[uids.index(sample["nearest"]["uid"])] == pytest.approx(similarity.max(), abs=1e-3)
        assert sample["nearest"]["similarity"] == pytest.approx(similarity.max(), abs=1e-3)
    pictures = output.read_json("pictures.json")
    neighbour_uids = [picture["uid"] for entry in pictures["neighbours"] for picture in entry["pictures"][1:]]
    assert len(neighbour_uids) == 3 * 6
    assert set(neighbour_uids) <= set(uids)


def test_evaluation_writes_samples_grids_and_every_picture_it_names(
    evaluated: tuple[Artifact, Work, dict[str, Any]],
) -> None:
    output, _, _ = evaluated
    rows = [json.loads(line) for line in output.path("samples.jsonl").read_text().splitlines()]
    assert len(rows) == 10 + 3
    assert {"file", "prompt", "seed", "settings", "check"} <= set(rows[0])
    pictures = output.read_json("pictures.json")
    files = {p["file"] for entries in pictures.values() for entry in entries for p in entry["pictures"]}
    files |= {row["file"] for row in rows} | {"grid.png", "stages.png", "reconstructions.png", "neighbours.png"}
    for name in files:
        with Image.open(output.path(name)) as image:
            image.load()
    sides = [Image.open(output.path(p["file"])).size for p in pictures["stages"][0]["pictures"]]
    assert sides == [(8, 8), (16, 16), (32, 32)]
    assert [len(entry["pictures"]) for entry in pictures["shown"]] == [2, 2, 2]


def test_summary_is_flat_numbers(evaluated: tuple[Artifact, Work, dict[str, Any]]) -> None:
    summary = summarise(evaluated[2])
    rate = evaluated[2]["pixel_check"]["one object"]["colour"]["generated"]["rate"]
    assert summary["pixel_check.one_object.colour.generated"] == rate
    assert all(isinstance(value, float) for value in summary.values())
    assert not any(" " in name for name in summary)
