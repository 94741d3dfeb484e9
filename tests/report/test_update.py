"""The page that commands point to is this recipe's, of the results that there are now."""

from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.evaluate.ablate import ablation_step
from pipeline.pictures.png import to_png
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.report.report import REPORT, update_report
from pipeline.workspace.store import Workspace
from tests.report.finished_run import fill_workspace, make_recipe, recipe_tables
from tests.report.test_ablation import RESULT


def _update(recipe: Recipe, words: str = "r.toml") -> str:
    workspace = Workspace(recipe.workspace)
    where = update_report(workspace, make_plan(recipe), recipe, words)
    assert where == str(workspace.local_root / REPORT)
    return Path(where).read_text(encoding="utf-8")


def test_the_page_is_written_again_only_where_it_would_change(recipe: Recipe) -> None:
    fill_workspace(recipe, until="decoder")
    page = Path(recipe.workspace) / REPORT
    first = _update(recipe)
    assert "evaluate" in first.partition("sections that need")[2][:400]
    marked = first + "<!-- kept -->"
    page.write_text(marked)
    assert _update(recipe) == marked
    fill_workspace(recipe)
    whole = _update(recipe)
    assert "sections that need" not in whole
    assert "a-word.toml" in _update(recipe, "a-word.toml")  # the commands at its end name the recipe
    page.unlink()
    assert _update(recipe) == whole


def test_a_recipe_that_shares_the_workspace_gets_a_page_of_its_own(recipe: Recipe) -> None:
    fill_workspace(recipe)
    ours = _update(recipe)
    other = make_recipe(Path(recipe.workspace), name="hour", decoder=_longer())
    fill_workspace(other)
    assert "<title>hour" in _update(other)
    assert _update(recipe) == ours


def test_a_page_that_shows_a_forgotten_pair_is_written_again(recipe: Recipe) -> None:
    """Forgetting keeps the time of a manifest, and takes the pair out of its measures and files."""
    steps = {step.name: step for step in fill_workspace(recipe)}
    assert "www.example.com/none.png" in _update(recipe)
    download = artifact_of(Workspace(recipe.workspace), steps["download"])
    manifest = download.manifest()
    assert manifest is not None
    download.write_json("manifest.json", replace(manifest, metrics=manifest.metrics | {"repeated": []}).to_dict())
    assert "www.example.com/none.png" not in _update(recipe)


def _longer() -> dict[str, object]:
    decoder = recipe_tables(Path())["decoder"]
    return decoder | {"train": {"num_steps": 2400}}


def test_a_later_ablation_is_on_the_page(recipe: Recipe) -> None:
    fill_workspace(recipe)
    assert 'id="ablation"' not in _update(recipe)
    step = ablation_step(recipe, num_prompts=60, num_shown=1)
    artifact = artifact_of(Workspace(recipe.workspace), step)
    artifact.write_bytes("samples/a.png", to_png(Image.new("RGB", (32, 32))))
    shown = [{"prompt": "a blue cross", "pictures": [{"file": "samples/a.png", "label": "prior"}]}]
    artifact.write_json("ablation.json", RESULT | {"shown": shown})
    artifact.commit(manifest_of(step, artifact))
    assert 'id="ablation"' in _update(recipe)


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_a_command_that_finds_nothing_to_do_points_to_a_page_of_these_results(tmp_path: Path, command: str) -> None:
    """As after a kill between the last commit and the page, and after another recipe of the workspace."""
    path = tmp_path / "r.toml"
    path.write_text(tomli_w.dumps(recipe_tables(tmp_path / "w", tracking={"uri": "off"})))
    fill_workspace(load_recipe(str(path)))
    page = tmp_path / "w" / REPORT
    for _ in range(2):
        done = CliRunner().invoke(app, [command, str(path)], catch_exceptions=False)
        assert done.exit_code == 0
        assert f"report: {page}" in done.stdout
        assert "<title>demo" in page.read_text()
        page.write_text("<title>hour</title>")
