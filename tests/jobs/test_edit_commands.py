"""The commands that edit pictures, in this process: help, options, mistakes."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.tables import to_dict
from pipeline.sampling.edit_pictures import EDITS

RECIPE = "configs/demo.toml"
ARGUMENTS = {
    "interpolate": ["a.png", "b.png"],
    "text-diff": ["a.png", "--from", "a red circle", "--to", "a blue circle"],
    "inpaint": ["a.png", "mask.png", "a red circle"],
    "outpaint": ["a.png", "a red circle"],
    "sdedit": ["a.png", "a red circle"],
}
OPTIONS = {
    "reconstruct": set[str](),
    "vary": {"-n", "--eta"},
    "interpolate": {"--frames", "--noise"},
    "text-diff": {"--from", "--to", "--theta", "--frames"},
    "inpaint": {"-n"},
    "outpaint": {"-n", "--margin"},
    "sdedit": {"-n", "--strength"},
    "pca-reconstruct": {"--components"},
}
SHARED = {"--steps", "--guidance", "--seed", "--out", "--set", "--json", "-h"}


@pytest.mark.parametrize("command", EDITS)
def test_every_edit_is_a_command_with_an_example_its_options_and_those_of_all(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert f"Example: unclip {command}" in " ".join(shown.output.split())
    assert "  RECIPE <str>" in shown.output
    assert set(re.findall(r"^  (--?\w+)", shown.output, re.MULTILINE)) == OPTIONS[command] | SHARED


@pytest.mark.parametrize("command", EDITS)
def test_a_picture_that_is_not_there_is_named(command: str) -> None:
    done = CliRunner().invoke(app, [command, RECIPE, *ARGUMENTS.get(command, ["a.png"])])
    assert "a.png: no such file" in str(done.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["text-diff", RECIPE, *ARGUMENTS["text-diff"], "--theta", "1.5"],
        ["sdedit", RECIPE, *ARGUMENTS["sdedit"], "--strength", "-0.1"],
        ["vary", RECIPE, "a.png", "--eta", "2"],
        ["outpaint", RECIPE, *ARGUMENTS["outpaint"], "--margin", "0.5"],
        ["interpolate", RECIPE, "a.png", "b.png", "--frames", "1"],
        ["interpolate", RECIPE, "a.png", "b.png", "--noise", "loud"],
        ["pca-reconstruct", RECIPE, "a.png", "--components", "3,x"],
        ["text-diff", RECIPE, "a.png", "--from", "a red circle"],
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_read(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0
    assert "no such file" not in str(done.exception)


def test_edit_prints_its_rows_as_json_and_says_how_it_inpainted(tiny: Recipe, tmp_path: Path) -> None:
    path, out = tmp_path / "resolved.json", tmp_path / "out"
    path.write_text(json.dumps(to_dict(tiny)))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    shared = ["--out", str(out), "--steps", "2", "--seed", "4", "--guidance", "1.25"]
    done = CliRunner().invoke(app, ["reconstruct", str(path), str(tmp_path / "a.png"), *shared, "--json"])
    [row] = json.loads(done.stdout)
    assert (row["seed"], row["settings"]["num_steps"], row["settings"]["latent_guidance"]) == (4, 2, 1.25)
    files = [str(tmp_path / name) for name in ("a.png", "mask.png")]
    done = CliRunner().invoke(app, ["inpaint", str(path), *files, "a red circle", "-n", "1", *shared])
    assert "1 picture in" in done.stdout
    assert "sampled by replacement" in done.stdout
