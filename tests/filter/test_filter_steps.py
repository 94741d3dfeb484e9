"""The filter steps on drawn pairs with planted faults: each is left out for its own reason, and clean rows stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.data.npy_folder import export_embeddings, find_parts
from pipeline.data.rows import make_uid
from pipeline.data.selection import embeddings_of, selection_of
from pipeline.data.training_rows import ShardReader
from pipeline.data.vectors import read_vectors
from pipeline.errors import ConfigError, StepError
from pipeline.evaluate.prompts import choose_rows
from pipeline.recipe.plan import make_plan
from pipeline.recipe.sections import FILTER_COLUMNS
from pipeline.retrieve.embedded import EmbeddedShards
from pipeline.runtime import filter as filters
from pipeline.runtime.context import StepContext
from pipeline.runtime.data import EmbeddingsImporter
from pipeline.runtime.filter import MeasureWorker, run_filter
from pipeline.runtime.filter_embeddings import run_filter_embeddings
from pipeline.runtime.pool import ShardJob
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact
from tests.filter.planted import (
    Planted,
    caption_of,
    commit,
    count,
    embed_by_eye,
    encode,
    labels_of,
    make_context,
    output_of,
    pair,
    planted_pairs,
    scene_picture,
    tiny_recipe,
    without_ray,
)
from tests.tiny.shards import Sample, make_embeddings, write_shard

RULES: dict[str, Any] = {
    "min_caption_words": 2,
    "max_caption_chars": 300,
    "languages": ["en"],
    "min_image_px": 64,
    "max_aspect_ratio": 4.0,
    "duplicates": "near",
}


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def _filtered(tmp_path: Path, planted: Planted, rules: dict[str, Any]) -> tuple[StepContext, dict[str, dict[str, str]]]:
    columns = sorted(name for names in FILTER_COLUMNS.values() for name in names)
    recipe = tiny_recipe(tmp_path, filter=rules, download={"extra_columns": columns})
    context = make_context(tmp_path, "filter", recipe)
    planted.write(context.inputs["download"])
    result = run_filter(context)
    labels = labels_of(commit(context, result))
    assert len(labels) == len(planted.pairs) == result.counts["in"] == sum(result.counts.values()) - result.counts["in"]
    return context, labels


def test_every_planted_fault_is_left_out_for_its_reason_and_clean_rows_stay(tmp_path: Path) -> None:
    planted = planted_pairs()
    context, labels = _filtered(tmp_path, planted, RULES)
    assert {name: labels[planted.uid(name)]["reason"] for name in planted.pairs} == planted.reasons
    manifest = context.output.manifest()
    assert manifest is not None
    assert manifest.counts == count(planted.reasons)
    for name, original in {
        "same file": "clean-5",
        "webp": "clean-6",
        "mirrored": "clean-6",
        "late copy": "clean-3",
    }.items():
        assert labels[planted.uid(name)]["same_as"] == planted.uid(original)
    assert "de" in labels[planted.uid("german")]["detail"]
    assert not [name for name in context.output.names() if name.startswith("live/")]


def test_the_report_gets_examples_of_every_reason_with_their_pictures(tmp_path: Path) -> None:
    planted = planted_pairs()
    context, _ = _filtered(tmp_path, planted, RULES | {"num_examples": 2})
    examples = context.output.read_json("examples.json")["examples"]
    assert set(examples) == set(planted.reasons.values()) - {""}
    assert {reason: len(entries) for reason, entries in examples.items()} == {
        reason: min(2, number) for reason, number in count(planted.reasons).items() if reason not in {"in", "ok"}
    }
    again = next(entry for entry in examples["duplicate"] if entry["uid"] == planted.uid("same file"))
    assert again["stays"]["caption"] == caption_of(5)
    pictures = [Image.open(context.output.path(item["file"])) for item in again["pictures"]]
    assert np.array_equal(*(np.asarray(picture) for picture in pictures))
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(scene_picture(5)))


def test_without_rules_every_row_stays(tmp_path: Path) -> None:
    planted = planted_pairs(8)
    _, labels = _filtered(tmp_path, planted, {})
    assert {label["reason"] for label in labels.values()} == {""}


def test_a_picture_keeps_its_captions_if_only_pairs_are_compared(tmp_path: Path) -> None:
    planted = Planted({}, {})
    picture, copy = encode(scene_picture(1)), encode(scene_picture(1), "JPEG", quality=70)
    planted.add("one", "", pair("", "a caption", picture))
    planted.add("two", "", pair("", "another caption", picture))
    planted.add("three", "duplicate", pair("", "a caption", picture))
    planted.add("four", "near_duplicate", pair("", "another caption", copy))
    _, labels = _filtered(tmp_path, planted, {"duplicates": "near", "same_caption_only": True})
    assert {name: labels[planted.uid(name)]["reason"] for name in planted.pairs} == planted.reasons


@pytest.mark.parametrize("cell", ["1" + "0" * 400, "[" * 200_000, "nan", "none", ""])
def test_a_cell_that_is_no_number_is_a_missing_number(cell: str, tmp_path: Path) -> None:
    planted = Planted({}, {})
    planted.add("good", "", pair("", "a", encode(scene_picture(1)), punsafe="0.25"))
    planted.add("odd", "no_nsfw", pair("", "b", encode(scene_picture(2)), punsafe=cell))
    _, labels = _filtered(tmp_path, planted, {"max_nsfw": 0.5})
    assert {name: labels[planted.uid(name)]["reason"] for name in planted.pairs} == planted.reasons


@pytest.mark.parametrize("text", ["no digits", "ab", "ff" * 16, "0x" + "a" * 62])
def test_a_checksum_that_is_none_is_computed_from_the_picture(text: str, tmp_path: Path) -> None:
    planted = Planted({}, {})
    picture, other = encode(scene_picture(1)), encode(scene_picture(2))
    planted.add("one", "", pair("", "a", picture))
    planted.add("again", "duplicate", pair("", "b", picture, sha256=text))
    planted.add("other", "", pair("", "c", other, sha256=text))  # the same text, of another picture
    _, labels = _filtered(tmp_path, planted, {"duplicates": "exact"})
    assert {name: labels[planted.uid(name)]["reason"] for name in planted.pairs} == planted.reasons


def test_columns_of_laion_coyo_and_datacomp_decide(tmp_path: Path) -> None:
    planted = Planted({}, {})
    values = {
        "good": ("", {"pwatermark": 0.1, "punsafe": 0.0, "NSFW": "UNLIKELY", "face_bboxes": [], "similarity": 0.34}),
        "marked": (
            "watermark",
            {"pwatermark": 0.9, "punsafe": 0.0, "NSFW": "UNLIKELY", "face_bboxes": [], "similarity": 0.3},
        ),
        "unsafe": (
            "nsfw",
            {"pwatermark": 0.1, "punsafe": 0.8, "NSFW": "UNLIKELY", "face_bboxes": [], "similarity": 0.3},
        ),
        "tagged": (
            "nsfw_tag",
            {"pwatermark": 0.1, "punsafe": 0.0, "NSFW": "UNSURE", "face_bboxes": [], "similarity": 0.3},
        ),
        "crowd": (
            "faces",
            {
                "pwatermark": 0.1,
                "punsafe": 0.0,
                "NSFW": "UNLIKELY",
                "face_bboxes": [[0.1] * 4, [0.2] * 4],
                "similarity": 0.3,
            },
        ),
        "unlike": (
            "similarity",
            {"pwatermark": 0.1, "punsafe": 0.0, "NSFW": "UNLIKELY", "face_bboxes": [], "similarity": 0.1},
        ),
        "unknown": (
            "no_watermark",
            {"pwatermark": None, "punsafe": 0.0, "NSFW": "UNLIKELY", "face_bboxes": [], "similarity": 0.3},
        ),
    }
    for number, (name, (reason, columns)) in enumerate(values.items()):
        planted.add(name, reason, pair("", caption_of(number), encode(scene_picture(number)), **columns))
    rules = {"max_watermark": 0.8, "max_nsfw": 0.5, "nsfw_tags": ["UNLIKELY"], "max_faces": 1, "min_similarity": 0.28}
    _, labels = _filtered(tmp_path, planted, rules)
    assert {name: labels[planted.uid(name)]["reason"] for name in planted.pairs} == planted.reasons


def test_a_rule_without_its_column_says_how_to_bring_it(tmp_path: Path) -> None:
    columns = {"extra_columns": ["pwatermark"]}
    recipe = tiny_recipe(tmp_path, filter={"max_watermark": 0.5}, download=columns)
    context = make_context(tmp_path, "filter", recipe)
    planted_pairs(3).write(context.inputs["download"])
    with pytest.raises(
        ConfigError, match=r"filter\.max_watermark: .* pwatermark or watermark_score.*download\.extra_columns"
    ):
        run_filter(context)


def test_short_captions_are_no_other_language(tmp_path: Path) -> None:
    planted = Planted({}, {})
    for number, caption in enumerate(("a blue cross", "a yellow circle", "a small blue circle")):
        planted.add(caption, "", pair("", caption, encode(scene_picture(number))))
    planted.add("french", "language", pair("", "un chat noir sur un canape", encode(scene_picture(4))))
    _, labels = _filtered(tmp_path, planted, {"languages": ["en"]})
    assert {name: labels[planted.uid(name)]["reason"] for name in planted.pairs} == planted.reasons


def test_an_unknown_language_is_refused_with_the_languages_there_are(tmp_path: Path) -> None:
    context = make_context(tmp_path, "filter", tiny_recipe(tmp_path, filter={"languages": ["en", "xx"]}))
    planted_pairs(3).write(context.inputs["download"])
    with pytest.raises(ConfigError, match=r"no language xx; .*\bde\b"):
        run_filter(context)


def test_a_filter_that_keeps_nothing_stops_the_run_and_says_why(tmp_path: Path) -> None:
    context = make_context(tmp_path, "filter", tiny_recipe(tmp_path, filter={"min_caption_words": 50}))
    planted_pairs(3).write(context.inputs["download"])
    with pytest.raises(StepError, match=r"no row stays: 4 left out: 4 short_caption; loosen \[filter\]"):
        run_filter(context)


def test_the_progress_of_a_pass_counts_each_record_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[ShardJob] = []

    def take(_: StepContext, job: ShardJob) -> list[ShardRecord]:
        jobs.append(job)
        return []

    monkeypatch.setattr(filters, "map_shards", take)
    context = make_context(tmp_path, "filter", tiny_recipe(tmp_path, filter={}))
    filters.Passes(context, ["a", "b", "c"], 30).run(MeasureWorker, filters.MEASURES, "measuring")
    [job], left_out = jobs, ({"language": 2}, {"language": 1, "nsfw": 4}, {})
    records = [
        ShardRecord(shard=shard, counts={"in": 10, "ok": 10 - sum(counts.values())} | counts, files={})
        for shard, counts in zip("abc", left_out, strict=True)
    ]
    assert job.note() == "measuring"
    job.on_records(records[:2])
    assert job.note() == job.note() == "measuring; 7 left out: 4 nsfw, 3 language"
    job.on_records(records[2:])
    assert job.note() == "measuring; 7 left out: 4 nsfw, 3 language"


def test_a_killed_filter_continues_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(root: Path) -> tuple[StepContext, dict[str, Any]]:
        context = make_context(root, "filter", tiny_recipe(root, filter=RULES))
        if not context.inputs["download"].names():
            planted_pairs().write(context.inputs["download"])
        result = run_filter(context)
        return context, commit(context, result).manifest().files  # type: ignore[union-attr]

    _, whole = run(tmp_path / "whole")
    made: list[str] = []
    measure = MeasureWorker.__call__

    def fail(self: MeasureWorker, shard: str) -> Any:
        made.append(shard)
        if len(made) == 3:
            raise KeyboardInterrupt
        return measure(self, shard)

    monkeypatch.setattr(MeasureWorker, "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    _, resumed = run(tmp_path / "killed")
    assert made.count("00000") == 1
    assert made.count("00002") == 2
    assert {name: info for name, info in resumed.items() if name.endswith(".parquet")} == {
        name: info for name, info in whole.items() if name.endswith(".parquet")
    }


def _run_both(tmp_path: Path, planted: Planted, **rules: Any) -> StepContext:
    recipe = tiny_recipe(tmp_path, filter=RULES, filter_embeddings=rules)
    planted.write(output_of(recipe, "download"))
    first = make_context(tmp_path, "filter", recipe)
    commit(first, run_filter(first))
    embed_by_eye(make_context(tmp_path, "embed", recipe))
    context = make_context(tmp_path, "filter_embeddings", recipe)
    commit(context, run_filter_embeddings(context))
    return context


def test_wrong_captions_and_semantic_duplicates_are_left_out_after_the_cheap_rules(tmp_path: Path) -> None:
    planted = planted_pairs()
    for number, wrong in ((70, 71), (72, 73), (74, 75)):
        planted.add(
            f"wrong-{number}",
            "clip_score",
            pair("", f"a wrong caption: {caption_of(wrong)}", encode(scene_picture(number))),
        )
    moved = Image.fromarray(np.roll(np.asarray(scene_picture(9)), (7, -7), axis=(0, 1)))
    planted.add("moved", "semantic_duplicate", pair("", f"as before, {caption_of(9)}", encode(moved)))
    context = _run_both(tmp_path, planted, min_clip_score=0.9, max_similarity=0.998)
    labels = labels_of(output_of(context.recipe, "filter")) | labels_of(context.output)
    assert {name: labels[planted.uid(name)]["reason"] for name in planted.pairs} == planted.reasons
    assert labels[planted.uid("moved")]["same_as"] == planted.uid("clean-9")
    counts = [output_of(context.recipe, name).manifest().counts for name in ("filter", "filter_embeddings")]
    assert counts[0]["in"] == len(planted.pairs)
    assert counts[1]["in"] == counts[0]["ok"]
    assert counts[1]["ok"] == count(planted.reasons)["ok"]


def test_trainings_the_index_and_the_evaluation_read_what_stays(tmp_path: Path) -> None:
    planted = planted_pairs(20)
    planted.add("wrong", "clip_score", pair("", caption_of(71), encode(scene_picture(70))))
    context = _run_both(tmp_path, planted, min_clip_score=0.9)
    inputs = {name: output_of(context.recipe, name) for name in ("download", "embed", "filter", "filter_embeddings")}
    staying = {planted.uid(name) for name, reason in planted.reasons.items() if not reason}
    of_pictures = ShardReader(inputs["download"], None, "train", selection_of(inputs))
    of_embeddings = ShardReader(None, embeddings_of(inputs), "train")
    of_both = ShardReader(inputs["download"], embeddings_of(inputs), "train")
    for reader in (of_pictures, of_embeddings, of_both):
        uids = [uid for shard in reader.shards for uid in reader.table(shard).columns["uid"].to_pylist()]
        assert set(uids) == staying
        assert sum(reader.shard_rows) == len(uids) == len(staying)
        assert reader.shard_rows == [len(reader.table(shard)) for shard in reader.shards]
        assert len(reader.captions()) == len(
            {planted.pairs[name].caption for name, why in planted.reasons.items() if not why}
        )
    cheap = ShardReader(inputs["download"], None, "train", selection_of({"filter": inputs["filter"]}))
    assert sum(cheap.shard_rows) == len(staying) + 1
    shards = EmbeddedShards.open([embeddings_of(inputs)])
    assert shards.num_rows == len(staying)
    indexed = [shards.read(number) for number in range(len(shards.shards))]
    assert {uid for vectors in indexed for uid in vectors.table["uid"].to_pylist()} == staying
    assert {row.uid for row in choose_rows(embeddings_of(inputs), 1000, "train").rows} == staying
    whole = {}
    for shard in inputs["embed"].shard_records():
        vectors = read_vectors(inputs["embed"].path(f"{shard}.parquet"))
        whole |= dict(zip(vectors.table["uid"].to_pylist(), vectors.z_image, strict=True))
    for vectors in indexed:
        for uid, z_image in zip(vectors.table["uid"].to_pylist(), vectors.z_image, strict=True):
            assert np.array_equal(whole[uid], z_image)


def test_the_share_with_the_highest_clip_score_stays(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, filter_embeddings={"clip_score_share": 0.3})
    angles = np.random.default_rng(0).permutation(np.linspace(0.01, 1.5, 200))
    z_text = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    z_image = np.tile(np.array([[1, 0]], np.float32), (200, 1))
    embed = output_of(recipe, "embed")
    make_embeddings(embed, z_image, z_text, 50)
    context = make_context(tmp_path, "filter_embeddings", recipe)
    _write_pictures(context)
    result = run_filter_embeddings(context)
    labels = labels_of(commit(context, result))
    assert result.counts == {"in": 200, "ok": 60, "clip_score_share": 140}
    staying = {make_uid(f"http://a/{i}", f"caption {i}") for i in np.argsort(angles)[:60]}
    assert {uid for uid, label in labels.items() if not label["reason"]} == staying
    assert result.metrics["least_clip_score"] == pytest.approx(np.cos(np.sort(angles)[59]), abs=2e-3)


def _write_pictures(context: StepContext) -> None:
    """A download for the embeddings of ``make_embeddings``, of which the examples are taken."""
    download, picture = context.inputs["download"], encode(scene_picture(0, 32))
    for shard in context.inputs["embed"].shard_records():
        rows = pq.read_table(context.inputs["embed"].path(f"{shard}.parquet"), columns=["url", "caption"]).to_pylist()
        write_shard(download, shard, [Sample(row["url"], row["caption"], picture) for row in rows], "png", digits=5)


@pytest.mark.parametrize("limit", [{"min_aesthetic": 5.0}, {"max_nsfw": 0.4}])
def test_a_head_leaves_out_rows_by_its_score(tmp_path: Path, limit: dict[str, float]) -> None:
    (name,) = limit
    kind = name.partition("_")[2]
    torch.save({"weight": torch.tensor([[4.0, 0.0]]), "bias": torch.tensor([2.0])}, tmp_path / "head.pth")
    rules = limit | {f"{kind}_weights": str(tmp_path / "head.pth")}
    recipe = tiny_recipe(tmp_path, filter_embeddings=rules)
    angles = np.linspace(0, 3, 40)
    z_image = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    make_embeddings(output_of(recipe, "embed"), z_image, z_image, 20)
    context = make_context(tmp_path, "filter_embeddings", recipe)
    _write_pictures(context)
    result = run_filter_embeddings(context)
    scores = 4 * z_image[:, 0] + 2
    bad = scores < 5 if kind == "aesthetic" else scores > 0.4
    assert result.counts == {"in": 40, "ok": int((~bad).sum()), f"{kind}_head": int(bad.sum())}
    staying = {uid for uid, label in labels_of(context.output).items() if not label["reason"]}
    assert staying == {make_uid(f"http://a/{i}", f"caption {i}") for i in np.flatnonzero(~bad)}


def test_imported_embeddings_are_filtered_without_a_download(tmp_path: Path) -> None:
    embeddings, folder = Artifact(str(tmp_path / "made")), tmp_path / "folder"
    angles = np.linspace(0, 3, 24)
    z_image = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    make_embeddings(embeddings, z_image, np.tile(z_image[:1], (24, 1)), 12)
    export_embeddings(embeddings, folder)
    rules = {"min_clip_score": 0.5, "num_examples": 2}
    recipe = tiny_recipe(tmp_path, filter_embeddings=rules, embed={"import_from": str(folder)})
    steps = {step.name: step for step in make_plan(recipe)}
    assert [*steps["filter_embeddings"].inputs] == ["embed"]
    assert {step.name for step in make_plan(recipe, until="index")} == {"embed", "filter_embeddings", "index"}
    worker = EmbeddingsImporter(make_context(tmp_path, "embed", recipe))
    for part in find_parts(folder):
        worker(part.name)
    context = make_context(tmp_path, "filter_embeddings", recipe)
    result = run_filter_embeddings(context)
    num_good = int((z_image[:, 0] >= 0.5).sum())
    assert result.counts == {"in": 24, "ok": num_good, "clip_score": 24 - num_good}
    [one, other] = context.output.read_json("examples.json")["examples"]["clip_score"]
    assert one["caption"] == f"caption {num_good}"
    assert one["pictures"] == other["pictures"] == []
