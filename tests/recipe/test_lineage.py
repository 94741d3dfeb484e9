"""From a picture, a folder or an artifact back to the pairs."""

import dataclasses
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.errors import ConfigError, DataError
from pipeline.pictures.png import to_png, with_texts
from pipeline.recipe.lineage import mermaid, trace, write_origin
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.workspace.store import MANIFEST, Workspace
from tests.recipe.finished import finish, picture_of
from tests.tiny.recipe import tiny_tables


def test_a_text_chunk_leaves_the_pixels_alone() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    with Image.open(io.BytesIO(with_texts(to_png(pixels), {"parameters": "a", "unclip": "\N{SNOWMAN}"}))) as image:
        image.load()
        assert image.info["unclip"] == "\N{SNOWMAN}"
        assert np.array_equal(np.asarray(image), pixels)


def test_a_picture_leads_to_its_pairs(recipe: Recipe, tmp_path: Path) -> None:
    keys = finish(recipe)
    networks = {name: keys[name] for name in CASCADE_STEPS if name in keys}
    lineage = trace(str(picture_of(tmp_path, networks)), recipe.workspace)
    assert (lineage.facts["prompt"], lineage.facts["seed"]) == ("a red \N{SNOWMAN}", 3)
    nodes = {node.step: node for node in lineage.nodes}
    assert {name: node.key for name, node in nodes.items()} == {
        name: key for name, key in keys.items() if name not in {"index", "evaluate"}
    }
    assert lineage.nodes[-1].step == "pairs"
    assert nodes["decoder"].inputs == {name: keys[name] for name in nodes["decoder"].inputs}
    assert (nodes["decoder"].recipes, nodes["decoder"].num_shards) == ((recipe.name,), 1)
    assert nodes["decoder"].settings["train.num_steps"] == recipe.decoder.train.num_steps
    assert f"  clip_{keys['clip']} --> decoder_{keys['decoder']}" in mermaid(lineage).splitlines()


def test_weights_that_are_not_those_of_the_picture_are_named(recipe: Recipe, tmp_path: Path) -> None:
    keys, weights = finish(recipe), hashlib.sha256(b"weights").hexdigest()
    step = next(step for step in make_plan(recipe) if step.name == "prior")
    prior = artifact_of(Workspace(recipe.workspace), step)
    prior.write_bytes("model.safetensors", b"weights")
    prior.remove(MANIFEST)
    prior.commit(manifest_of(step, prior))
    networks = {"prior": keys["prior"], "decoder": keys["decoder"]}
    for digests in ({"prior": weights}, {"decoder": weights}, {}):  # the decoder has no file of weights
        same = trace(str(picture_of(tmp_path, networks, weights=digests)), recipe.workspace)
        assert same.facts["weights"] == digests
        assert same.notes == ()
        assert {node.step: node.weights for node in same.nodes if node.weights} == {"prior": weights}
    picture = str(picture_of(tmp_path, networks, weights={"prior": "0" * 64}))
    [note] = trace(picture, recipe.workspace).notes
    assert note.startswith(f"prior {keys['prior']} is not what the picture was made with: ")
    assert weights in note
    assert "0" * 64 in note
    printed = CliRunner().invoke(app, ["lineage", picture, "--workspace", recipe.workspace, "--nearest", "0"]).stdout
    assert f"weights: SHA-256 {weights}" in printed
    assert f"note: {note}" in printed


def test_lineage_takes_artifacts_checkpoints_folders_and_keys(recipe: Recipe, tmp_path: Path) -> None:
    keys = finish(recipe)
    expected = trace(f"{recipe.workspace}/prior/{keys['prior']}").nodes
    assert expected[0].step == "prior"
    assert trace(f"{recipe.workspace}/prior/{keys['prior']}/live/checkpoint").nodes == expected
    assert trace(keys["prior"][:8], recipe.workspace).nodes == expected
    step = next(step for step in make_plan(recipe) if step.name == "prior")
    workspace = Workspace(recipe.workspace)
    write_origin(tmp_path / "exported", recipe, {"prior": artifact_of(workspace, step)})
    assert trace(str(tmp_path / "exported")).nodes == expected
    artifact_of(workspace, step).clear()
    artifact_of(workspace, step).write_bytes("live/checkpoint", b"")
    again = trace(f"{recipe.workspace}/prior/{keys['prior']}")
    assert again.nodes[0].state == "unfinished"  # its inputs are known from the recipe's plan
    assert again.nodes[1:] == expected[1:]


@pytest.mark.parametrize("content", ["{", '{"workspace": "a"}', "[1]"])
def test_a_folder_whose_file_is_damaged_or_of_another_program_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "unclip.json").write_text(content)
    done = CliRunner().invoke(app, ["lineage", str(tmp_path)])
    assert isinstance(done.exception, DataError)
    assert re.match(f"{re.escape(str(tmp_path))}/unclip.json: .*; export the networks again$", str(done.exception))


def test_what_leads_nowhere_is_one_sentence(recipe: Recipe, tmp_path: Path) -> None:
    finish(recipe)
    (tmp_path / "plain.png").write_bytes(to_png(np.zeros((4, 4, 3), np.uint8)))
    for what, workspace, reason in [
        (str(tmp_path / "plain.png"), recipe.workspace, "no picture of this program"),
        (str(picture_of(tmp_path, {"prior": "0" * 16})), "", "--workspace FOLDER"),
        (str(picture_of(tmp_path, {"prior": "0" * 16})), recipe.workspace, "none of its artifacts is in"),
        ("abcdef0", recipe.workspace, "no key in"),
        (str(tmp_path), "", "neither an artifact"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            trace(what, workspace)


def test_the_command_prints_the_lineage(recipe: Recipe, tmp_path: Path) -> None:
    keys = finish(recipe)
    picture = str(picture_of(tmp_path, {"prior": keys["prior"]}))
    text = CliRunner().invoke(app, ["lineage", picture, "--workspace", recipe.workspace])
    assert text.exit_code == 0, text.output
    assert f"prior             {keys['prior']}  made " in text.stdout
    assert "prompt 'a red \N{SNOWMAN}', seed 3" in text.stdout
    assert "note: the nearest training pairs are not known: " in text.stdout  # its index is damaged
    graph = CliRunner().invoke(app, ["lineage", picture, "--workspace", recipe.workspace, "--graph"])
    assert graph.stdout.startswith("graph TD\n")
    data = CliRunner().invoke(app, ["lineage", picture, "--workspace", recipe.workspace, "--json"])
    assert json.loads(data.stdout)["nodes"][0]["key"] == keys["prior"]


def test_lineage_shows_appended_embeddings_and_the_training_that_was_continued(recipe: Recipe, tmp_path: Path) -> None:
    old = parse_recipe(tiny_tables(tmp_path / "workspace", embed={"precision": "bfloat16"}))
    old_keys, keys = finish(old), finish(recipe)
    workspace = Workspace(recipe.workspace)
    index = workspace.artifact("index", keys["index"])
    sources = [f"embed/{one['embed']}" for one in (keys, old_keys)]
    index.write_json("segment_00001/segment.json", {"embedded": {"sources": sources}})
    lineage = trace(index.uri)
    assert lineage.nodes[0].others == (("embed", old_keys["embed"]),)
    assert ("embed", old_keys["embed"]) in {(node.step, node.key) for node in lineage.nodes}
    assert f"  embed_{old_keys['embed']} --> index_{keys['index']}" in mermaid(lineage).splitlines()
    prior = workspace.artifact("prior", keys["prior"])
    manifest = prior.manifest()
    assert manifest is not None
    prior.remove(MANIFEST)
    prior.commit(dataclasses.replace(manifest, metrics={"continued": {"key": old_keys["prior"], "step": 5}}))
    assert trace(prior.uri).nodes[0].others == (("prior", old_keys["prior"]),)
    prior.remove(MANIFEST)
    begun_with = {"name": "prior_2", "key": old_keys["prior"]}
    prior.commit(dataclasses.replace(manifest, metrics={"begun_with": begun_with}))
    others = {node.step: node.others for node in trace(prior.uri).nodes}
    assert others["prior"] == (("prior_2", old_keys["prior"]),)
