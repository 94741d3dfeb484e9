import dataclasses
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.cascade import Cascade
from models.decoder.stage import DecoderStage
from models.diffusion.process import Diffusion
from models.pixels import resize, to_pixels, to_uint8
from models.prior.stage import PriorStage
from pipeline.data import vectors
from pipeline.data.negatives import Bigrams, bigrams_of
from pipeline.data.rows import make_uid
from pipeline.data.shards import StoredPictures
from pipeline.data.vectors import read_vectors, to_unit
from pipeline.errors import DataError
from pipeline.evaluate import metrics as m
from pipeline.evaluate import parts
from pipeline.evaluate import prompts as prompts_module
from pipeline.evaluate.evaluate import finish, make_runner, plan_work, summarise
from pipeline.evaluate.features import FeatureExtractor
from pipeline.evaluate.parts import PartRunner, picture_seed, read_part
from pipeline.evaluate.prompts import choose_prompts, choose_rows, first_images
from pipeline.evaluate.sets import cmmd, precision_recall
from pipeline.evaluate.work import Part, Work, plan_parts, samples_of
from pipeline.networks.cascade import load_cascade
from pipeline.networks.quality import psnr_db, sharpness
from pipeline.pictures.frame import square
from pipeline.recipe.plan import inputs_of
from pipeline.recipe.recipe import Recipe
from pipeline.report.report import format_metrics
from pipeline.report.tables import measure_rows
from pipeline.shapes.check import check, describe
from pipeline.shapes.draw import draw_array
from pipeline.shapes.perceive import perceive
from pipeline.shapes.scene import is_held_out
from pipeline.workspace import stored_files
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.shards import write_vectors
from tests.tiny.workspace import NUM_PICTURES, evaluate_step, evaluated_workspace


def _inputs(recipe: Recipe) -> dict[str, Artifact]:
    return inputs_of(Workspace(recipe.workspace), evaluate_step(recipe))


def _run(recipe: Recipe, output: Artifact) -> tuple[Work, dict[str, Any]]:
    work = plan_work(recipe, _inputs(recipe))
    runner = make_runner(recipe, _inputs(recipe), output, work)
    for part in work.parts:
        runner.run(part)
    return work, finish(recipe, _inputs(recipe), output, work)


@pytest.fixture(scope="session")
def evaluated(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Work, dict[str, Any]]:
    output = Artifact(str(tmp_path_factory.mktemp("evaluated")))
    return (output, *_run(tiny, output))


def test_plan_parts_covers_every_item_once_in_parts_of_nearly_equal_size() -> None:
    parts = plan_parts({"samples": 23, "validation": 4}, 8)
    for kind, total in (("samples", 23), ("validation", 4)):
        mine = [part for part in parts if part.kind == kind]
        assert [i for part in mine for i in range(part.start, part.stop)] == list(range(total))
        sizes = [part.stop - part.start for part in mine]
        assert max(sizes) <= 8
        assert max(sizes) - min(sizes) <= 1
    assert len({part.name for part in parts}) == len(parts)
    assert plan_parts({"samples": 0, "validation": 0}, 8) == []


def test_samples_take_every_prompt_once_and_the_shown_ones_again() -> None:
    assert samples_of(3, 2, 3) == [(0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
    assert samples_of(1, 16, 1) == [(0, 0)]
    seeds = [picture_seed(5, i, j) for i, j in samples_of(50, 50, 4)]
    assert len(set(seeds)) == len(seeds)


def test_drawn_prompts_come_with_their_scenes_and_a_partner_of_as_many_objects(tiny: Recipe) -> None:
    prompts = plan_work(tiny, _inputs(tiny)).prompts
    assert prompts.source == "drawn"
    assert len(prompts.prompts) == 10
    for number, prompt in enumerate(prompts.prompts):
        assert prompt.scene is not None
        partner = prompts.partners[number]
        assert partner is not None
        other = prompts.prompts[partner].scene
        assert other is not None
        assert partner != number
        assert len(other.objects) == len(prompt.scene.objects)
    assert sorted(number for number in prompts.partners if number is not None) == list(range(10))


def test_metrics_of_the_pixel_check_agree_with_the_pictures_that_were_written(
    evaluated: tuple[Artifact, Work, dict[str, Any]],
) -> None:
    output, work, metrics = evaluated
    hits: dict[str, list[bool]] = {}
    for number, prompt in enumerate(work.prompts.prompts):
        assert prompt.scene is not None
        if len(prompt.scene.objects) == 1:
            with Image.open(output.path(f"samples/{number:05d}-0.png")) as image:
                right = check(np.asarray(image), prompt.scene).correct
            for name, hit in right.items():
                hits.setdefault(name, []).append(hit)
    table = metrics["pixel_check"]["one object"]
    assert set(table) == set(hits)
    for name, flags in hits.items():
        assert (table[name]["generated"]["hits"], table[name]["generated"]["total"]) == (sum(flags), len(flags))
        assert table[name]["guess"]["total"] == len(flags)
    assert table["background"]["real"]["rate"] == 1.0
    assert metrics["num_prompts"] == 10


def test_trained_combinations_are_sampled_and_compared_with_the_held_out_ones(
    tiny: Recipe, cascade: Cascade, evaluated: tuple[Artifact, Work, dict[str, Any]]
) -> None:
    output, work, metrics = evaluated
    assert len(work.trained.prompts) == tiny.evaluate.num_trained_prompts == 4
    rows = [row for part in work.parts if part.kind == "trained" for row in read_part(output, part)]
    for number, (row, prompt) in enumerate(zip(rows, work.trained.prompts, strict=True)):
        assert prompt.scene is not None
        assert not is_held_out(prompt.scene)
        assert (row["prompt_number"], row["prompt"], row["seed"]) == (number, prompt.text, 7 + 1000 * (10 + number))
        picture = cascade.sample([prompt.text], [row["seed"]]).images[0].numpy()
        assert json.loads(row["check"]) == check(picture, prompt.scene).correct
    assert set(metrics["held_out"]) == {"one object", "two objects"}
    for kinds in metrics["held_out"].values():
        assert all(checks["background"]["trained"]["total"] == 2 for checks in kinds.values())


def test_preference_compares_each_caption_with_its_words_in_another_order(
    cascade: Cascade, evaluated: tuple[Artifact, Work, dict[str, Any]]
) -> None:
    output, work, metrics = evaluated
    rows = [row for part in work.parts if part.kind == "samples" for row in read_part(output, part)]
    firsts = [row for row in rows if row["image_number"] == 0]
    reordered = [row for row in firsts if row["negative"]]
    assert 0 < len(reordered) < len(firsts)
    assert all(sorted(row["negative"].split()) == sorted(row["prompt"].split()) for row in reordered)
    clip: Any = cascade.clip
    for column, name in (("z_image", "generated"), ("z_real", "real")):
        hits = 0
        for row in reordered:
            own, other = clip.encode_text([row["prompt"], row["negative"]]).z_text.numpy() @ row[column]
            hits += bool(own > other)
        rate = metrics["preference"][name]
        assert (rate["hits"], rate["total"]) == (hits, len(reordered))
        assert rate["without_negative"] == len(firsts) - len(reordered)
    assert metrics["preference"]["chance"] == 0.5


def test_negatives_are_of_what_clip_reads_of_a_caption(tiny: Recipe, cascade: Cascade, tmp_path: Path) -> None:
    clip: Any = cascade.clip
    words = [f"word{number}" for number in range(60)]
    head, tail = " ".join(words[:50]), "a cat and a dog"  # the tail is behind the end of what is read
    captions = [f"{head} {tail}", f"{tail} {head}", tail]
    assert clip.clip.inputs.cut_at([head])[0] == clip.clip.inputs.context_length
    bigrams = bigrams_of(["a dog and a cat", "cat word0"])
    rows = _rows_of_captions(tiny, cascade, captions, bigrams, tmp_path)
    assert [row["negative"] for row in rows] == ["", f"a dog and a cat {head}", "a dog and a cat"]
    assert [row["margin"] is None for row in rows] == [True, False, False]
    assert rows[1]["margin"] != 0


def test_a_negative_that_the_tokenizer_reads_as_its_caption_is_none(
    tiny: Recipe, cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "hard_negatives", lambda caption, *_: [caption.replace("dog", "DOG")])
    (row,) = _rows_of_captions(tiny, cascade, ["a cat and a dog"], frozenset(), tmp_path)
    assert (row["negative"], row["margin"]) == ("", None)


def _rows_of_captions(
    recipe: Recipe, cascade: Cascade, captions: list[str], bigrams: Bigrams, folder: Path
) -> list[dict[str, Any]]:
    """A part of measured rows, with other captions."""
    work, output = plan_work(recipe, _inputs(recipe)), Artifact(str(folder))
    rows = [dataclasses.replace(work.rows[0], caption=caption) for caption in captions]
    part = Part("validation", 0, 0, len(rows))
    work = dataclasses.replace(work, rows=rows, bigrams=bigrams)
    runner = PartRunner(cascade, work, _inputs(recipe)["download"], output, 0)
    runner.run(part)
    return read_part(output, part)


def test_failures_are_the_pictures_in_which_something_is_wrong(
    evaluated: tuple[Artifact, Work, dict[str, Any]],
) -> None:
    output, _, metrics = evaluated
    samples = [json.loads(line) for line in output.path("samples.jsonl").read_text().splitlines()]
    failed = [row for row in samples if row["file"].endswith("-0.png") and not row["check"]["everything"]]
    groups = output.read_json("pictures.json")["failures"]
    pictures = [picture for group in groups for picture in group["pictures"]]
    assert sorted(picture["file"] for picture in pictures) == sorted(row["file"] for row in failed)
    assert pictures
    for picture in pictures:
        right = next(row["check"] for row in failed if row["file"] == picture["file"])
        assert picture["wrong"]
        assert not any(right[name] for name in picture["wrong"])
        with Image.open(output.path(picture["file"])) as image:
            assert picture["shows"] == describe(perceive(np.asarray(image)))
    for group in groups:
        rate = metrics["pixel_check"][group["title"]]["everything"]["generated"]
        assert (group["failed"], group["total"]) == (rate["total"] - rate["hits"], rate["total"])


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


def test_both_priors_are_measured_on_the_same_captions(evaluated: tuple[Artifact, Work, dict[str, Any]]) -> None:
    output, work, metrics = evaluated
    rows = [row for part in work.parts if part.kind == "validation" for row in read_part(output, part)]
    z_text = np.array([row["z_text"] for row in rows], np.float64)
    z_text /= np.linalg.norm(z_text, axis=1, keepdims=True)
    for name, column, kind in (("prior", "z_prior", "diffusion"), ("prior_2", "z_prior_2", "autoregressive")):
        z_prior = np.array([row[column] for row in rows], np.float64)
        z_prior /= np.linalg.norm(z_prior, axis=1, keepdims=True)
        assert metrics[name]["kind"] == kind
        assert metrics[name]["z_text"]["mean"] == pytest.approx((z_prior * z_text).sum(1).mean(), abs=1e-5)
        unrelated = (z_prior * np.roll(z_text, 1, axis=0)).sum(1).mean()
        assert metrics[name]["unrelated_text"]["mean"] == pytest.approx(unrelated, abs=1e-5)
    assert metrics["prior"]["z_image"]["mean"] != metrics["prior_2"]["z_image"]["mean"]
    titles = [row["name"] for row in measure_rows(metrics)]
    for name in ("Prior (diffusion)", "Prior 2 (autoregressive)"):
        assert [f"{name}: to z_image", f"{name}: to z_text"] == [row for row in titles if row.startswith(name)]


def test_bicubic_psnr_is_that_of_the_stored_picture(
    tiny: Recipe, evaluated: tuple[Artifact, Work, dict[str, Any]]
) -> None:
    """32 -> 16 -> 32 px by Pillow's bicubic filter, an implementation apart from torch's."""
    output, work, _ = evaluated
    part = next(part for part in work.parts if part.kind == "validation")
    row = read_part(output, part)[0]
    with Image.open(output.path("reconstructions/00000-real.png")) as image:
        small = image.resize((16, 16), Image.Resampling.BICUBIC)
        again = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC))
        expected = psnr_db(again[None], np.asarray(image)[None])[0]
    assert row["bicubic_psnr_db"]["upsampler_2"] == pytest.approx(expected, abs=0.3)


def test_nearest_training_pictures_are_training_rows_found_by_brute_force(
    tiny: Recipe, evaluated: tuple[Artifact, Work, dict[str, Any]]
) -> None:
    output, work, metrics = evaluated
    vectors = read_vectors(_inputs(tiny)["embed"].path("00000.parquet"))
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


def test_a_sample_can_be_made_again_alone_from_its_seed(
    cascade: Cascade, evaluated: tuple[Artifact, Work, dict[str, Any]]
) -> None:
    output, _, _ = evaluated
    row = json.loads(output.path("samples.jsonl").read_text().splitlines()[4])
    alone = cascade.sample([row["prompt"]], [row["seed"]]).images[0].numpy().astype(int)
    with Image.open(output.path(row["file"])) as image:
        # Rounding of another batch size may move the 8-bit condition of an upsampler by one level at single pixels, which
        # random weights enlarge.
        assert np.abs(alone - np.asarray(image).astype(int)).mean() < 0.1


def test_evaluation_in_another_order_gives_the_same_bytes(
    tiny: Recipe, evaluated: tuple[Artifact, Work, dict[str, Any]], tmp_path: Path
) -> None:
    first, work, _ = evaluated
    output, inputs = Artifact(str(tmp_path)), _inputs(tiny)
    runner = make_runner(tiny, inputs, output, plan_work(tiny, inputs))
    for part in reversed(work.parts):
        record = runner.run(part)
        assert output.shard_records()[part.name] == record
        assert record.counts["ok"] == part.stop - part.start
    finish(tiny, inputs, output, work)
    before = {name: info for name, info in first.describe_files().items() if not name.endswith(".done.json")}
    after = {name: info for name, info in output.describe_files().items() if not name.endswith(".done.json")}
    assert before == after


def test_summary_is_flat_numbers(evaluated: tuple[Artifact, Work, dict[str, Any]]) -> None:
    summary = summarise(evaluated[2])
    rate = evaluated[2]["pixel_check"]["one object"]["colour"]["generated"]["rate"]
    assert summary["pixel_check.one_object.colour.generated"] == rate
    assert all(isinstance(value, float) for value in summary.values())
    assert not any(" " in name for name in summary)


def test_other_sources_are_measured_on_validation_captions_without_a_pixel_check(tmp_path: Path) -> None:
    pairs = {"source": "list", "path": str(tmp_path / "list.csv")}
    (tmp_path / "list.csv").write_text("url,caption\n")
    absent = dict.fromkeys(("upsampler_1", "upsampler_2", "prior_2"))
    recipe = evaluated_workspace(tmp_path / "workspace", pairs=pairs, **absent)
    output = Artifact(str(tmp_path / "out"))
    work, metrics = _run(recipe, output)
    validation = choose_rows(_inputs(recipe)["embed"], 100, "validation")
    assert {prompt.text for prompt in work.prompts.prompts} == {row.caption for row in validation.rows}
    assert (metrics["prompts"], metrics["rows"]) == ("captions", "validation")
    assert set(metrics["memorisation"]) == {"generated", "real", "closer_than_real"}
    assert "pixel_check" not in metrics
    assert "upsampler_1" not in metrics
    assert "prior_2" not in metrics
    assert metrics["clip_score"]["real"]["count"] == len(work.prompts.prompts)
    assert not work.trained.prompts
    assert "held_out" not in metrics
    preference = metrics["preference"]
    assert preference["generated"]["total"] == preference["real"]["total"] > 0
    (group,) = output.read_json("pictures.json")["failures"]
    rate = preference["generated"]
    assert (group["failed"], group["total"]) == (rate["total"] - rate["hits"], rate["total"])
    assert all(picture["preferred"] for picture in group["pictures"])


def test_without_validation_rows_the_evaluation_says_so_and_calls_no_trained_picture_unseen(tmp_path: Path) -> None:
    pairs = {"source": "list", "path": str(tmp_path / "list.csv")}
    (tmp_path / "list.csv").write_text("url,caption\n")
    absent = dict.fromkeys(("upsampler_1", "upsampler_2", "prior_2"))
    recipe = evaluated_workspace(tmp_path / "workspace", has_validation=False, pairs=pairs, **absent)
    _, metrics = _run(recipe, Artifact(str(tmp_path / "out")))
    assert (metrics["prompts"], metrics["rows"]) == ("training captions", "training")
    assert set(metrics["memorisation"]) == {"generated"}
    text = format_metrics(metrics)
    assert "Captions of training pictures: there are no validation rows, so these were trained on." in text
    assert "Memorisation rate" not in text


def test_drawn_pictures_are_unseen_without_validation_rows_too(tmp_path: Path) -> None:
    absent = dict.fromkeys(("upsampler_1", "upsampler_2", "prior_2"))
    recipe = evaluated_workspace(tmp_path / "workspace", has_validation=False, **absent)
    _, metrics = _run(recipe, Artifact(str(tmp_path / "out")))
    assert (metrics["prompts"], metrics["rows"]) == ("drawn", "training")
    assert set(metrics["memorisation"]) == {"generated", "real", "closer_than_real"}


def test_prompts_of_a_file_are_drawn_in_its_order(tiny: Recipe, tmp_path: Path) -> None:
    inputs, path = _inputs(tiny), tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  a blue star \n")
    prompts = choose_prompts(str(path), inputs["pairs"], inputs["embed"], 10)
    assert [prompt.text for prompt in prompts.prompts] == ["a red circle", "a blue star"]
    assert (prompts.source, prompts.num_in_file) == ("file", 2)
    first = choose_prompts(str(path), inputs["pairs"], inputs["embed"], 1)
    assert ([prompt.text for prompt in first.prompts], first.num_in_file) == (["a red circle"], 2)
    path.write_text("\n")
    with pytest.raises(DataError, match="no prompts"):
        choose_prompts(str(path), inputs["pairs"], inputs["embed"], 10)


def _embeddings(artifact: Artifact, captions: Sequence[str | None], rows_per_shard: int) -> list[dict[str, Any]]:
    """Commit shards with a training row for each caption; the rows in the order of their uids."""
    rng, rows = np.random.default_rng(0), list[dict[str, Any]]()
    for start in range(0, len(captions), rows_per_shard):
        shard = f"{start // rows_per_shard:05d}"
        part = [
            {
                "uid": make_uid(str(number), ""),
                "key": f"{shard}{number}",
                "url": "",
                "caption": caption,
                "split": "train",
            }
            for number, caption in enumerate(captions[start : start + rows_per_shard], start)
        ]
        z_image, z_text = rng.standard_normal((2, len(part), 8))
        write_vectors(
            artifact, shard, part, *(to_unit(z.astype(np.float16)).astype(np.float16) for z in (z_image, z_text))
        )
        rows += [row | {"shard": shard, "z_image": z} for row, z in zip(part, z_image, strict=True)]
    return sorted(rows, key=lambda row: row["uid"])


def test_rows_are_chosen_by_uid_whatever_the_number_asked(tmp_path: Path) -> None:
    embed = Artifact(str(tmp_path))
    rows = _embeddings(embed, [f"caption {number}" for number in range(700)], 7)
    choice = choose_rows(embed, 40, "train")
    assert [(row.uid, row.key, row.caption, row.shard) for row in choice.rows] == [
        (row["uid"], row["key"], row["caption"], row["shard"]) for row in rows[:40]
    ]
    assert [row.uid for row in choice.captioned] == [row["uid"] for row in rows[:40]]
    expected = to_unit(np.array([row["z_image"] for row in rows[:40]], np.float16))
    np.testing.assert_allclose(np.array([row.z_image for row in choice.rows], np.float32), expected, atol=2e-3)
    np.testing.assert_allclose(first_images(embed, 40, "train"), expected, atol=2e-3)
    assert [row.uid for row in choose_rows(embed, 3, "train").rows] == [row["uid"] for row in rows[:3]]
    assert not choose_rows(embed, 3, "validation").rows
    assert len(first_images(embed, 3, "validation")) == 0


@pytest.mark.parametrize("rows_per_shard", [7, 25])
def test_rows_are_chosen_with_few_shards_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_shard: int
) -> None:
    """Shards of any size: several together, one alone, and one by its row groups."""
    embed, sizes, looks, concat = Artifact(str(tmp_path)), list[int](), list[tuple[int, int]](), pa.concat_tables
    monkeypatch.setattr(vectors, "ROW_GROUP_ROWS", 5)
    rows = _embeddings(embed, [f"caption {number}" for number in range(100)], rows_per_shard)

    def measured(tables: Sequence[pa.Table]) -> pa.Table:
        sizes.append(sum(table.num_rows for table in tables[1:]))
        return concat(tables)

    monkeypatch.setattr(prompts_module, "_ROWS_AT_ONCE", 20)
    monkeypatch.setattr(prompts_module.pa, "concat_tables", measured)
    choice = choose_rows(embed, 10, "train", lambda *look: looks.append(look))
    assert [row.uid for row in choice.rows] == [row["uid"] for row in rows[:10]]
    assert (sum(sizes), max(sizes) <= 20) == (100, True)
    num_shards = -(-100 // rows_per_shard)
    assert looks[-1] == (num_shards, num_shards)
    assert len(looks) > 2


def test_a_caption_is_one_prompt_and_an_empty_one_is_none(tmp_path: Path) -> None:
    embed, pairs = Artifact(str(tmp_path / "embed")), Artifact(str(tmp_path / "pairs"))
    captions = ["photo" if number % 10 else f"caption {number}" for number in range(500)]
    captions[10:13] = ["", " ", None]
    rows = _embeddings(embed, captions, 20)
    texts = [prompt.text for prompt in choose_prompts("", pairs, embed, 40).prompts]
    assert texts == [one for one in dict.fromkeys(row["caption"] for row in rows) if (one or "").strip()][:40]
    assert len(texts) == 40
    without = Artifact(str(tmp_path / "without"))
    _embeddings(without, ["", None], 2)
    assert [prompt.text for prompt in choose_prompts("", pairs, without, 40).prompts] == [""]


def test_of_shards_in_a_store_little_else_than_the_chosen_rows_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    embed = Artifact(f"memory://{uuid.uuid4().hex}")
    rows = _embeddings(embed, [f"caption {number}" for number in range(300)], 100)
    monkeypatch.setattr(stored_files, "_SMALL_BYTES", 0)
    monkeypatch.setattr(Artifact, "path", lambda _, name: pytest.fail(f"{name} is fetched whole"))
    assert [row.uid for row in choose_rows(embed, 5, "train").rows] == [row["uid"] for row in rows[:5]]
    assert len(first_images(embed, 5, "train")) == 5


@pytest.mark.parametrize("damage", ["column", "scene", "bytes"])
def test_a_broken_evaluation_table_is_a_data_error_that_names_it(tiny: Recipe, tmp_path: Path, damage: str) -> None:
    pairs = Artifact(str(tmp_path))
    rows = {"prompt": ["x"], "kind": ["k"], "scene": ['{"objects": [{}], "background": "red"}']}
    if damage == "column":
        del rows["scene"]
    with pairs.write("evaluation.parquet") as path:
        if damage == "bytes":
            path.write_bytes(b"PAR1 not parquet")
        else:
            pq.write_table(pa.table(rows), path)
    with pytest.raises(DataError, match=r"evaluation\.parquet") as caught:
        choose_prompts("", pairs, _inputs(tiny)["embed"], 5)
    if damage == "bytes":
        assert "; bring it back from a copy" in str(caught.value)


def test_a_broken_part_is_a_data_error_that_names_it(tmp_path: Path) -> None:
    output = Artifact(str(tmp_path))
    output.write_bytes("parts/samples-00002.parquet", b"nothing")
    with pytest.raises(DataError, match="samples-00002"):
        read_part(output, Part("samples", 2, 0, 1))


def test_a_network_that_draws_nan_is_a_data_error_that_names_it(tiny: Recipe, tmp_path: Path) -> None:
    output, inputs = Artifact(str(tmp_path)), _inputs(tiny)
    work = plan_work(tiny, inputs)
    cascade = load_cascade({name: inputs[name] for name in tiny.trained()})
    cascade.stage("prior", PriorStage).network.out.bias.fill_(float("nan"))
    runner = PartRunner(cascade, work, inputs["download"], output, tiny.seed)
    with pytest.raises(DataError, match="the prior gives numbers that are not finite"):
        runner.run(work.parts[0])
    assert output.shard_records() == {}


class _Patches(torch.nn.Module):
    """Stands for an Inception: uint8 pictures to features, with the option that the published file has."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return features if return_features else features.sum(1)


def test_a_recipes_own_features_give_a_frechet_distance(tiny: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "features.pt"
    torch.jit.script(_Patches()).save(str(file))
    evaluate = dataclasses.replace(tiny.evaluate, features_path=str(file))
    recipe, output = dataclasses.replace(tiny, evaluate=evaluate), Artifact(str(tmp_path / "out"))
    assert evaluate_step(recipe).key != evaluate_step(tiny).key
    work, metrics = _run(recipe, output)
    assert metrics["frechet_features"]["count"] == 10

    def features(picture: Any) -> Any:
        planes = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        return _Patches()(planes, return_features=True).numpy()[0]

    generated, real = [], []
    for number, prompt in enumerate(work.prompts.prompts):
        with Image.open(output.path(f"samples/{number:05d}-0.png")) as image:
            generated.append(features(image))
        assert prompt.scene is not None
        real.append(features(draw_array(prompt.scene, 32)))
    expected = m.frechet_distance(m.FeatureSums.of(np.array(generated)), m.FeatureSums.of(np.array(real)))
    assert metrics["frechet_features"]["generated"] == pytest.approx(expected, rel=1e-3)


def test_a_feature_file_that_is_none_is_a_data_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "features.pt"
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"features\.pt: not a TorchScript file"):
        FeatureExtractor(str(file))
    torch.jit.script(_Patches()).save(str(file))
    with pytest.raises(DataError, match=r"one vector each|fails on"):
        FeatureExtractor(str(file))(np.zeros((2, 0, 0, 3), np.uint8))


def test_set_measures_and_upsampler_measures_agree_with_their_parts(
    evaluated: tuple[Artifact, Work, dict[str, Any]],
) -> None:
    output, work, metrics = evaluated
    rows = [row for part in work.parts if part.kind == "samples" for row in read_part(output, part)]
    firsts = [row for row in rows if row["image_number"] == 0]
    generated, real = (np.array([row[name] for row in firsts], np.float64) for name in ("z_image", "z_real"))
    assert metrics["cmmd"]["generated"] == pytest.approx(cmmd(generated, real))
    precision, recall = precision_recall(generated, real)
    assert metrics["precision"]["generated"]["hits"] == precision.hits
    assert metrics["recall"]["generated"]["hits"] == recall.hits
    validation = [row for part in work.parts if part.kind == "validation" for row in read_part(output, part)]
    with Image.open(output.path("reconstructions/00000-real.png")) as image:
        assert validation[0]["real_sharpness"]["upsampler_2"] == pytest.approx(
            sharpness(np.asarray(image)[None])[0], rel=1e-6
        )
    bicubic = [row["bicubic_ssim"]["upsampler_2"] for row in validation if row["bicubic_ssim"] is not None]
    assert metrics["upsampler_2"]["bicubic_ssim"]["mean"] == pytest.approx(np.mean(bicubic), rel=1e-6)
    assert (
        metrics["upsampler_2"]["bicubic_ssim"]["mean"] > metrics["upsampler_2"]["ssim"]["mean"]
    )  # nothing was learned


def test_a_network_that_was_trained_with_the_bound_is_measured_in_bits_per_dimension(tmp_path: Path) -> None:
    """The decoder, whose variance is learned, and not the upsamplers."""
    diffusion = {"num_timesteps": 30, "variance": "learned_range"}
    recipe = evaluated_workspace(tmp_path / "workspace", decoder={"model": {"diffusion": diffusion}})
    work, metrics = _run(recipe, Artifact(str(tmp_path / "output")))
    part = next(part for part in work.parts if part.kind == "validation")
    assert read_part(Artifact(str(tmp_path / "output")), part)[0]["bits_per_dim"].keys() == {"decoder"}
    assert metrics["bits_per_dim"].keys() == {"decoder"}
    measured = metrics["bits_per_dim"]["decoder"]
    assert measured["count"] == min(8, len(work.rows))
    assert "Decoder: bits per dimension" in format_metrics(metrics)

    # Again, with other noise, term by term, as the loss adds them up.
    cascade = load_cascade(_inputs(recipe))
    decoder = cascade.stage("decoder", DecoderStage).network
    text = cascade.clip.encode_text([row.caption for row in work.rows[:8]])
    z_image = torch.from_numpy(np.stack([row.z_image for row in work.rows[:8]]).astype(np.float32))
    pictures = np.stack([_stored(recipe, row, decoder.config.image_px) for row in work.rows[:8]])
    x0, diffusion = to_pixels(torch.from_numpy(pictures)), Diffusion(decoder.config.diffusion)
    condition = decoder.encode_condition(z_image, text)
    total = diffusion.prior_bpd(x0)
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        t = torch.full((len(x0),), step)
        x_t = diffusion.q_sample(x0, t, torch.randn(x0.shape, generator=generator))
        output = decoder(x_t, t, condition)
        prediction = diffusion.predict(output, x_t, t, t - 1)
        total = total + diffusion.vlb_terms(prediction._replace(x0=prediction.x0.clamp(-1, 1)), x0, x_t, t)
    assert measured["mean"] == pytest.approx(total.mean().item(), rel=0.1)


def _stored(recipe: Recipe, row: Any, side_px: int) -> np.ndarray:
    """The picture of a row, resized to the decoder's side."""
    stored = square(StoredPictures(_inputs(recipe)["download"]).decode(row.shard, row.key, row.uid), 32)
    return to_uint8(resize(to_pixels(torch.from_numpy(np.array(stored)[None])), side_px))[0].numpy()
