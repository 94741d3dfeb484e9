"""Files of the user's in keys: their content counts, and what a plan says of those that will be removed."""

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.errors import ConfigError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.recipe.user_files import passing_inputs
from pipeline.train.checkpoint import Snapshot
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.recipe import keys_of


def test_initial_weights_count_by_their_content_and_not_by_their_place(tmp_path: Path) -> None:
    def key(folder: str) -> str:
        return keys_of(load_recipe("configs/demo-hour.toml", [f"decoder.init_from={tmp_path / folder}"]))["decoder"]

    for folder, content in (("one", "a"), ("same", "a"), ("other", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_text(content)
    assert key("one") == key("same") != key("other")
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        key("nowhere")


def test_a_checkpoint_that_will_be_removed_is_said_and_its_copy_continues_the_same_training(tmp_path: Path) -> None:
    def recipe(file: Path | str) -> Recipe:
        return load_recipe("configs/demo-hour.toml", [f"decoder.init_from={file}", f"workspace={tmp_path}/workspace"])

    checkpoint, copy = tmp_path / "live/checkpoints/00000004.safetensors", tmp_path / "kept.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("a")
    (note,) = passing_inputs(recipe(checkpoint))
    assert note.startswith(f"decoder: init_from {checkpoint} is removed when its training is beyond it")
    key = keys_of(recipe(checkpoint))["decoder"]
    copy.write_text("a")
    checkpoint.unlink()
    with pytest.raises(
        ConfigError, match=r"decoder: .*00000004\.safetensors does not exist; .* name a copy \(the same"
    ):
        make_plan(recipe(checkpoint))
    assert keys_of(recipe(copy))["decoder"] == key
    assert not passing_inputs(recipe(copy))
    assert not passing_inputs(recipe(""))
    with pytest.raises(ConfigError, match=r"nowhere does not exist; relative paths .* unclip$"):
        make_plan(recipe("nowhere"))


def test_a_copy_of_a_part_of_a_divided_checkpoint_is_refused_until_its_training_has_begun(tmp_path: Path) -> None:
    def recipe(folder: Path) -> Recipe:
        path = folder / "00000004.safetensors"
        return load_recipe("configs/demo-hour.toml", [f"decoder.init_from={path}", f"workspace={tmp_path}/workspace"])

    original, copy = tmp_path / "live/checkpoints", tmp_path / "copy"
    for number in (2, 1, 0):
        part = Snapshot(4, {}, {"ema.a": torch.ones(1)}, {"ema.a": [3]}, number, 3)
        part.publish(Artifact(str(original)), "00000004.safetensors", "key", "attempt")
    assert keys_of(recipe(original))["decoder"]
    (note,) = passing_inputs(recipe(original))
    assert ": copy its 3 files (00000004.*) under their names elsewhere and name the copy" in note
    copy.mkdir()
    for name in ("00000004.safetensors", "00000004.2-of-3.safetensors"):
        shutil.copy(original / name, copy)
    with pytest.raises(
        ConfigError, match=r"decoder: .* is the first of 3 files .* 00000004\.3-of-3\.safetensors is not"
    ):
        make_plan(recipe(copy))
    shutil.copy(original / "00000004.3-of-3.safetensors", copy)
    key = keys_of(recipe(copy))["decoder"]
    (copy / "00000004.2-of-3.safetensors").unlink()
    output = Workspace(f"{tmp_path}/workspace").artifact("decoder", key)
    output.write_bytes("live/progress.json", b"{}")  # it has waited for machines, and not begun
    with pytest.raises(ConfigError, match=r"00000004\.2-of-3\.safetensors is not beside it: copy all of 00000004\.\*"):
        make_plan(recipe(copy))
    output.write_bytes("live/checkpoints/00000002.safetensors", b"")
    assert keys_of(recipe(copy))["decoder"] == key


def test_plan_says_which_checkpoint_will_be_removed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "live/checkpoints/00000004.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("a")
    words = ["--set", f"decoder.init_from={checkpoint}", "--set", f"workspace={tmp_path}/workspace"]
    assert (
        "copy it elsewhere and name the copy"
        in CliRunner().invoke(app, ["plan", "configs/demo-hour.toml", *words]).stdout
    )


def test_make_plan_content_of_the_list_is_part_of_the_key(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    recipe = load_recipe(None, ["pairs.source=list", f"pairs.path={pairs}"])
    with pytest.raises(ConfigError, match="does not exist"):
        make_plan(recipe)
    pairs.write_text("url,caption\nu,c\n")
    first = keys_of(recipe)
    pairs.write_text("url,caption\nu,d\n")
    changed = keys_of(recipe)["pairs"]
    assert changed != first["pairs"]
    moved = pairs.rename(tmp_path / "moved.csv")
    assert keys_of(load_recipe(None, ["pairs.source=list", f"pairs.path={moved}"]))["pairs"] == changed


def test_a_changed_sidecar_and_a_named_column_are_part_of_the_key_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"picture")
    (tmp_path / "1.txt").write_text("a red cat")
    overrides = ["pairs.source=folder", f"pairs.path={tmp_path}"]
    before = keys_of(load_recipe(None, overrides))["pairs"]
    (tmp_path / "1.txt").write_text("a red dog")
    changed = keys_of(load_recipe(None, overrides))["pairs"]
    assert changed != before
    wider = keys_of(load_recipe(None, [*overrides, "download.extra_columns=['punsafe']"]))
    assert wider["pairs"] != changed  # the list has to be read again for its column
    (tmp_path / "1.txt").write_text("a red cat")
    assert keys_of(load_recipe(None, overrides))["pairs"] == before


def test_a_local_clip_counts_by_its_content(tmp_path: Path) -> None:
    def key(*overrides: str) -> str:
        return keys_of(load_recipe(None, ["clip.source=pretrained", *overrides]))["clip"]

    for folder, content in (("one", "a"), ("same", "a"), ("other", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "open_clip_config.json").write_text("{}")
        (tmp_path / folder / "open_clip_model.safetensors").write_text(content)
        (tmp_path / folder / "manifest.json").write_text(folder)
    one, same, other = (key(f"clip.name={tmp_path / folder}") for folder in ("one", "same", "other"))
    assert one == same != other
    checkpoint = tmp_path / "weights.pt"
    checkpoint.write_text("a")
    before = key(f"clip.tag={checkpoint}")
    checkpoint.write_text("b")
    assert key(f"clip.tag={checkpoint}") != before
    assert key("clip.name=hf-hub:owner/one") != key("clip.name=hf-hub:owner/two")
    with pytest.raises(ConfigError, match="clip: no/folder does not exist"):
        key("clip.name=no/folder")
