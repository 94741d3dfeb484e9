"""Edits through files: what is written, and what is refused in words."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.cascade import Cascade
from models.editor import Editor, EditSettings
from models.pca import PcaSums
from pipeline.data.vectors import read_vectors, to_unit
from pipeline.errors import ConfigError
from pipeline.pictures.read import read_file
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.sampling import edit_options
from pipeline.sampling.edit_options import EditOptions, evenly
from pipeline.sampling.edit_pictures import EDITS, Sources, edit_recipe, training_pca
from pipeline.sampling.masks import masked_pixels
from pipeline.sampling.sample import sample_recipe
from pipeline.shapes.draw import draw_array
from pipeline.shapes.scene import training_scene
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.shards import make_embeddings
from tests.tiny.workspace import evaluated_tables

QUICK = EditSettings(num_steps=3, num_refinements=1)
FRAMES = {"reconstruct": 1, "interpolate": 3, "text-diff": 3, "pca-reconstruct": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two pictures that are not square, and larger than the cascade's."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        picture = Image.fromarray(draw_array(training_scene(0, number), 60))
        picture.crop((0, 6, 60, 54)).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(2)]


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    white = np.zeros((48, 60), np.uint8)
    white[:, 30:] = 255
    Image.fromarray(white).save(path)
    return str(path)


def options(mask: str) -> EditOptions:
    return EditOptions(
        seed=5, num_images=2, num_frames=3, source="a red circle", target="a blue star", prompt="a green square",
        mask=mask, components=(2, 5),
    )  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_writes_pictures_grid_and_rows(
    edit: str, tiny: Recipe, files: list[str], mask: str, tmp_path: Path
) -> None:
    used = files if edit == "interpolate" else files[:1]
    rows = edit_recipe(tiny, edit, used, options(mask), QUICK, out_dir=tmp_path)
    sources = {f"source-{number}.png" for number in range(len(used))}
    assert len(rows) == FRAMES.get(edit, 2)
    assert {path.name for path in tmp_path.iterdir()} == {row["file"] for row in rows} | sources | {
        "grid.png",
        "edits.jsonl",
    }
    lines = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    assert lines == json.loads(json.dumps(rows))
    assert all(row["edit"] == edit and row["sources"] == used and row["seed"] >= 5 for row in rows)
    for row in rows:
        with Image.open(tmp_path / row["file"]) as image:
            assert image.size == (32, 32)
            image.load()
            facts, parameters = json.loads(image.info["unclip"]), image.info["parameters"].splitlines()
        assert (facts["edit"]["kind"], facts["seed"]) == (edit, row["seed"])
        assert facts["edit"]["sources"] == [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in used]
        assert facts["edit"]["settings"] == row["settings"]
        own = row.keys() - {"file", "edit", "sources", "label", "seed", "prompt", "settings"}
        assert {name: facts["edit"][name] for name in own} == {name: row[name] for name in own}
        assert facts["prompt"] == parameters[0] == row.get("prompt", "")
        scale = 1.5 if "prompt" in row else 1.0
        decoder = facts["sampling"]["decoder"]
        assert (decoder["method"], decoder["num_steps"], decoder["guidance_scale"]) == ("ddim", 3, scale)
        assert decoder["eta"] == row.get("eta", 0.0)
        assert f"Steps: 3, Sampler: ddim, CFG scale: {scale}, Seed: {row['seed']}, Size: 32x32, " in parameters[1]
        assert ("Denoising strength: 0.6, " in parameters[1]) == (edit == "sdedit")
        assert {"clip", "prior", "decoder", "upsampler_2"} <= facts["networks"].keys()
        assert facts["actions"][0]["action"] == ("c2pa.edited" if "paint" in edit else "c2pa.created")


def test_a_single_frame_is_the_last_one() -> None:
    assert evenly(1.0, 3) == (0.0, 0.5, 1.0)
    assert evenly(0.4, 1) == (0.4,)


@pytest.mark.parametrize(("strength", "names"), [(0.0, set()), (0.1, set()), (0.4, {"parameters", "unclip"})])
def test_a_picture_that_no_step_changed_is_not_said_to_be_made(
    strength: float, names: set[str], tiny: Recipe, files: list[str], tmp_path: Path
) -> None:
    chosen = EditOptions(num_images=1, prompt="a green square", strength=strength)
    edit_recipe(tiny, "sdedit", files[:1], chosen, QUICK, out_dir=tmp_path)  # of three steps, 0.1 is none
    with Image.open(tmp_path / "000.png") as image:
        image.load()
        assert {"parameters", "unclip"} & image.info.keys() == names


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_inpainting_keeps_the_file_outside_the_mask(tiny: Recipe, files: list[str], mask: str, tmp_path: Path) -> None:
    rows = edit_recipe(tiny, "inpaint", files[:1], options(mask), QUICK, out_dir=tmp_path)
    source, result = _pixels(tmp_path / "source-0.png"), _pixels(tmp_path / rows[0]["file"])
    assert rows[0]["method"] == "replacement"
    np.testing.assert_array_equal(result[:, :16], source[:, :16])
    assert np.abs(result[:, 16:] - source[:, 16:]).max() > 5


def test_outpainting_keeps_the_whole_picture_in_the_middle(tiny: Recipe, files: list[str], tmp_path: Path) -> None:
    rows = edit_recipe(tiny, "outpaint", files[:1], options(""), QUICK, out_dir=tmp_path)
    with Image.open(files[0]) as picture:
        small = picture.crop((6, 0, 54, 48)).resize((16, 16), Image.Resampling.BICUBIC)
    result = _pixels(tmp_path / rows[0]["file"])
    assert np.abs(result[8:24, 8:24] - np.asarray(small).astype(int)).max() <= 12  # cut and shrunk in the other order
    assert np.abs(result[:8] - result[8, 8]).max() > 5


def test_components_that_nobody_named_are_those_that_there_are(
    tiny: Recipe, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edit_options, "NUM_COMPONENTS", (2, 5, 16, 20))
    rows = edit_recipe(tiny, "pca-reconstruct", files[:1], EditOptions(), QUICK, out_dir=tmp_path)
    assert [row["components"] for row in rows] == [2, 5, 16]  # the last is all of them


def test_more_components_hold_more_of_the_embedding_and_all_of_them_the_whole(
    tiny: Recipe, cascade: Cascade, files: list[str]
) -> None:
    with Image.open(files[0]) as picture:
        sources = Sources((files[0],), (picture.convert("RGB"),), _embed(tiny))
    counts = EditOptions(components=(1, 4, 16))  # 16 is the width of these embeddings
    result = EDITS["pca-reconstruct"](Editor(cascade, QUICK), sources, counts).result
    away = (result.z_image[:3] - result.z_image[3]).norm(dim=1)  # cosines are all 1 to single precision
    assert away[0] > away[1] > away[2]
    assert away[2].item() == pytest.approx(0, abs=1e-5)
    assert (result.images[2].int() - result.images[3].int()).abs().max() <= 1  # one noise for all of them


def test_components_are_those_of_the_training_embeddings(tiny: Recipe) -> None:
    embed = _embed(tiny)
    vectors = read_vectors(embed.path("00000.parquet"))
    train = np.array(vectors.table.column("split").to_pylist()) == "train"
    assert 0 < train.sum() < len(train)
    sums = PcaSums(16)
    rows = torch.from_numpy(vectors.z_image[train].astype(np.float32))
    sums.update(torch.nn.functional.normalize(rows, dim=1))
    torch.testing.assert_close(training_pca(embed).variance, sums.pca().variance)


def test_components_of_much_data_are_of_shards_from_all_of_it(tmp_path: Path) -> None:
    embed, read = Artifact(str(tmp_path)), list[None]()
    vectors = np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32)
    make_embeddings(embed, vectors, vectors, 10, held_out_every=5)
    pca = training_pca(embed, lambda: read.append(None), most_rows=35)
    sums = PcaSums(16)
    for start in (0, 30, 60):
        rows = vectors[[start + number for number in range(10) if number % 5]]
        sums.update(torch.from_numpy(to_unit(rows.astype(np.float16))))
    torch.testing.assert_close(pca.variance, sums.pca().variance)
    assert len(read) == 3


def _embed(recipe: Recipe) -> Artifact:
    return artifact_of(Workspace(recipe.workspace), next(s for s in make_plan(recipe) if s.name == "embed"))


def read_mask(path: Path, picture: Image.Image) -> np.ndarray:
    return masked_pixels(read_file(str(path), alpha=True), picture, str(path), "0.png")


def test_mask_is_read_from_white_or_from_transparency(files: list[str], tmp_path: Path) -> None:
    with Image.open(files[0]) as picture:
        whole = picture.convert("RGB")
    hole = np.full((48, 60, 4), 255, np.uint8)
    hole[10:20, 30:40, 3] = 0
    Image.fromarray(hole).save(tmp_path / "hole.png")
    masked = read_mask(tmp_path / "hole.png", whole)
    assert masked.shape == (48, 48)
    assert np.argwhere(masked).min(0).tolist() == [10, 24]
    assert masked.sum() == 100
    gray = Image.fromarray(np.where(hole[..., 3] == 0, 255, 0).astype(np.uint8))
    gray.save(tmp_path / "white.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "white.png", whole), masked)


def test_masks_that_cannot_be_used_are_refused(files: list[str], tmp_path: Path) -> None:
    with Image.open(files[0]) as picture:
        whole = picture.convert("RGB")
    path = tmp_path / "mask.png"
    Image.new("L", (60, 60), 255).save(path)
    with pytest.raises(ConfigError, match=r"60 x 60 px and 60 x 48 px"):
        read_mask(path, whole)
    Image.new("L", (60, 48), 0).save(path)
    with pytest.raises(ConfigError, match="empty"):
        read_mask(path, whole)


def test_what_cannot_be_edited_is_a_configuration_error(
    tiny: Recipe, files: list[str], mask: str, tmp_path: Path
) -> None:
    not_a_picture = tmp_path / "notes.txt"
    not_a_picture.write_text("notes")
    for file, words in ((str(tmp_path / "none.png"), "no such file"), (str(not_a_picture), "not a picture")):
        with pytest.raises(ConfigError, match=words):
            edit_recipe(tiny, "vary", [file], options(mask), QUICK, out_dir=tmp_path / "out")
    many, same = EditOptions(components=(17,)), EditOptions(source="a", target="a")
    with pytest.raises(ConfigError, match="--components 17"):
        edit_recipe(tiny, "pca-reconstruct", files[:1], many, QUICK, out_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="text-diff: CLIP reads 'a' and 'a' as the same"):
        edit_recipe(tiny, "text-diff", files[:1], same, QUICK, out_dir=tmp_path / "out")
    untrained = parse_recipe(evaluated_tables(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="clip is not finished"):
        edit_recipe(untrained, "vary", files[:1], options(mask), QUICK, out_dir=tmp_path / "out")


@pytest.mark.parametrize("name", ["000.png", "source-0.png", "grid.png", "preview.png"])
@pytest.mark.parametrize("is_mask", [False, True])
@pytest.mark.parametrize("is_linked", [False, True])
def test_an_edit_does_not_replace_what_it_starts_from(
    name: str, is_mask: bool, is_linked: bool, tiny: Recipe, files: list[str], mask: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    original = tmp_path / "original.png" if is_linked else out / name
    original.write_bytes(before := Path(mask if is_mask else files[0]).read_bytes())
    if is_linked:
        (out / name).symlink_to(original)
    source = files[0] if is_mask else str(original)
    chosen = options(str(original) if is_mask else mask)
    with pytest.raises(ConfigError, match=rf"out/{name}: the edit starts from it and would replace it"):
        edit_recipe(tiny, "inpaint", [source], chosen, QUICK, out_dir=out)
    assert original.read_bytes() == before
    assert {path.name for path in out.iterdir()} == {name}


def test_an_edit_may_start_from_another_picture_of_its_folder(tiny: Recipe, files: list[str], tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(before := Path(files[0]).read_bytes())
    for _ in range(2):
        edit_recipe(tiny, "vary", [str(photo)], EditOptions(num_images=1), QUICK, out_dir=tmp_path)
    assert photo.read_bytes() == before


def test_candidates_are_kept_by_clip_score(tiny: Recipe, tmp_path: Path) -> None:
    prompts = ["a red circle", "a small blue star"]
    plain = sample_recipe(tiny, prompts, num_images=5, seed=3, out_dir=tmp_path / "all", num_candidates=5)
    best = sample_recipe(tiny, prompts, num_images=2, seed=3, out_dir=tmp_path / "best", num_candidates=5)
    for prompt in prompts:
        scores = {row["seed"]: row["clip_score"] for row in plain if row["prompt"] == prompt}
        ranked = [row for row in best if row["prompt"] == prompt]
        assert set(scores) == {3, 4, 5, 6, 7}
        assert [row["seed"] for row in ranked] == sorted(scores, key=lambda seed: -scores[seed])[:2]
        assert ranked[0]["clip_score"] == pytest.approx(max(scores.values()), abs=1e-5)
    with pytest.raises(ConfigError, match="--candidates 1"):
        sample_recipe(tiny, prompts, num_images=2, seed=3, out_dir=tmp_path / "none", num_candidates=1)
