"""``unclip promote``: by the evaluation's measures, with a reason that stays."""

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.errors import ConfigError
from pipeline.recipe import champion
from pipeline.recipe.champion import MEASURES, read_promotions
from pipeline.recipe.garbage import find_garbage
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.workspace.lock import locked_workspace
from pipeline.workspace.store import MANIFEST, Workspace
from tests.tiny.command import ROOT
from tests.tiny.recipe import tiny_tables


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tiny_tables(tmp_path / "w", tracking={"uri": "off"})))
    return path


def _network(number: int) -> str:
    """A change that trains another decoder, of the same data and by the same CLIP."""
    return f"decoder.train.num_steps={number}"


def _measure(recipe: Recipe, **measures: float) -> str:
    workspace = Workspace(recipe.workspace)
    for step in make_plan(recipe):
        artifact = artifact_of(workspace, step)
        artifact.write_bytes("file", b"bytes")
        numbers = {name.replace("__", "."): value for name, value in measures.items()}
        metrics = numbers if step.name == "evaluate" else {}
        artifact.commit(dataclasses.replace(manifest_of(step, artifact), metrics=metrics))
    return make_plan(recipe)[-1].key


def _promote(path: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["promote", str(path), *words])


def test_a_cascade_that_was_not_measured_is_refused_with_the_command_that_measures(path: Path) -> None:
    with pytest.raises(ConfigError, match=f"first: unclip evaluate {path}"):
        CliRunner().invoke(app, ["promote", str(path)], catch_exceptions=False)


def test_the_better_cascade_becomes_champion_and_the_worse_one_only_by_force(path: Path) -> None:
    first, better, worse = (load_recipe(str(path), [_network(number)]) for number in (1, 2, 3))
    keys = [
        _measure(recipe, clip_score__generated=score, cmmd__generated=10 * score)
        for recipe, score in ((first, 0.3), (better, 0.4), (worse, 0.2))
    ]
    workspace = Workspace(first.workspace)
    done = _promote(path, "--set", _network(1), "--json")
    assert json.loads(done.stdout)["evaluate"] == keys[0]
    assert _promote(path, "--set", _network(2), "--reason", "sharper").exit_code == 0
    choice = read_promotions(workspace, "tiny").champion
    assert choice is not None
    assert choice.reason == f"clip_score.generated 0.4 against 0.3 of {keys[0]}; sharper"
    assert "no better (higher is better)" in str(_promote(path, "--set", _network(3)).exception)
    assert "no better" not in str(_promote(path, "--set", _network(3), "--by", "cmmd.generated").exception)  # lower is
    assert _promote(path, "--set", _network(2), "--force", "--reason", "sharper").exit_code == 0
    assert "with --reason" in str(_promote(path, "--set", _network(3), "--force").exception)
    choices = read_promotions(workspace, "tiny").promotions
    assert [choice.evaluate for choice in choices] == [keys[0], keys[1], keys[2], keys[1]]
    again = json.loads(_promote(path, "--set", _network(2), "--json").stdout)
    assert again["changed"] is False
    assert len(read_promotions(workspace, "tiny").promotions) == 4


def test_the_champion_is_promoted_again_for_a_tracker_that_does_not_have_it(path: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    key = _measure(load_recipe(str(path)), clip_score__generated=0.3)
    assert _promote(path).exit_code == 0  # tracking is off
    for name in ("first.db", "replaced.db"):
        uri = f"sqlite:///{tmp_path / name}"
        done = _promote(path, "--set", f"tracking.uri={uri}")
        assert "it was the champion already" in done.stdout
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        for _ in range(2):
            version = client.get_model_version_by_alias("tiny", "champion")
            assert version.tags["unclip.key"] == key
            assert version.description == "clip_score.generated 0.3, the first champion"
            assert _promote(path, "--set", f"tracking.uri={uri}").exit_code == 0
        assert len(client.search_model_versions("name = 'tiny'")) == 1


def test_the_lineage_that_is_proposed_is_found_in_the_workspace_that_was_used(path: Path, tmp_path: Path) -> None:
    change = f"workspace={tmp_path / 'another one'}"
    key = _measure(load_recipe(str(path), [change]), clip_score__generated=0.3)
    done = _promote(path, "--set", change)
    command = next(line for line in done.stderr.splitlines() if "unclip lineage" in line)
    assert shlex.split(command) == ["unclip", "lineage", key, "--workspace", str(tmp_path / "another one")]


def test_measures_of_other_settings_do_not_compare_and_unknown_ones_are_named(path: Path) -> None:
    _measure(load_recipe(str(path)), clip_score__generated=0.3)
    assert _promote(path).exit_code == 0
    few = "evaluate.num_prompts=8"
    _measure(load_recipe(str(path), [few]), clip_score__generated=0.9)
    assert "num_prompts of [evaluate] was another" in str(_promote(path, "--set", few).exception)
    assert "it has clip_score.generated" in str(_promote(path, "--by", "beauty").exception)


def test_measures_of_two_releases_that_measure_differently_do_not_compare(path: Path) -> None:
    recipe = load_recipe(str(path), [_network(1)])
    key = _measure(recipe, clip_score__generated=0.3)
    artifact = Workspace(recipe.workspace).artifact("evaluate", key)
    manifest = artifact.manifest()
    assert manifest is not None
    artifact.remove(MANIFEST)
    artifact.commit(dataclasses.replace(manifest, step_version=manifest.step_version - 1))
    assert _promote(path, "--set", _network(1)).exit_code == 0
    _measure(load_recipe(str(path)), clip_score__generated=0.9)
    assert "do not compare: the version of the evaluation was another" in str(_promote(path).exception)
    assert _promote(path, "--force", "--reason", "a new release").exit_code == 0


def test_every_field_of_an_evaluation_is_a_measure_or_says_what_was_measured(path: Path) -> None:
    """The page's fields are those of a finished run, which tests/e2e compares."""
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8").partition("\n`metrics.json`: ")[2]
    table = text.split("\n\n")[1]
    fields = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    about = {"num_prompts", "num_prompts_in_file", "prompts", "rows"}
    assert fields == MEASURES.keys() | about
    _measure(load_recipe(str(path)), clip_score__generated=0.3, num_prompts=8)
    refusal = str(_promote(path, "--by", "num_prompts").exception)
    assert refusal == "--by num_prompts: the evaluation has no such measure; it has clip_score.generated"


_DRAWN, _LIST = (), ("pairs.source=list", "pairs.path={rows}")
_OTHER_CLIP, _OTHER_ROWS, _OTHER_EMBED = "clip.train.num_steps=7", "download.image_px=64", "embed.precision=bfloat16"


@pytest.mark.parametrize(
    ("data", "change", "by", "other"),
    [
        (_DRAWN, _OTHER_CLIP, "clip_score.generated", "the CLIP that measures"),
        (_DRAWN, _OTHER_CLIP, "decoder.reconstruction", "the CLIP that measures"),
        (_DRAWN, _OTHER_CLIP, "pixel_check.one_object.colour", ""),
        (_DRAWN, _OTHER_CLIP, "frechet_features.generated", ""),
        (_DRAWN, _OTHER_CLIP, "upsampler_1.real_sharpness", ""),
        (_DRAWN, _OTHER_EMBED, "prior.z_image", "the set of measured rows"),
        (_DRAWN, _OTHER_EMBED, "clip_score.generated", ""),
        (_LIST, _OTHER_ROWS, "frechet_features.generated", "the set of measured rows"),
        (_LIST, _OTHER_EMBED, "clip_score.generated", "the set of measured rows"),
        (_LIST, _OTHER_EMBED, "frechet_features.generated", ""),
        ((*_LIST, "evaluate.prompts_path={rows}"), _OTHER_EMBED, "clip_score.generated", ""),
        ((*_LIST, "evaluate.prompts_path={rows}"), _OTHER_EMBED, "prior.z_image", "the set of measured rows"),
    ],
)
def test_measures_by_another_clip_or_on_other_rows_do_not_compare(
    path: Path, tmp_path: Path, data: tuple[str, ...], change: str, by: str, other: str
) -> None:
    (tmp_path / "rows.csv").write_text("url,caption\nhttp://a/1.jpg,a\n")
    sets = [one.format(rows=tmp_path / "rows.csv") for one in data]
    words = [word for one in sets for word in ("--set", one)]
    _measure(load_recipe(str(path), sets), **{by: 0.3})
    assert _promote(path, *words, "--by", by).exit_code == 0
    _measure(load_recipe(str(path), [*sets, change]), **{by: 0.4})
    refusal = str(_promote(path, *words, "--set", change, "--by", by).exception or "")
    assert refusal.partition("do not compare: ")[2].partition(" was another")[0] == other
    assert _promote(path, *words, "--set", change, "--by", by, "--force", "--reason", "new").exit_code == 0


def test_two_who_promote_at_once_do_not_lose_a_choice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written whole: the second one would put back what it has read."""
    recipes = [load_recipe(str(path), [_network(number)]) for number in (1, 2)]
    keys = [_measure(recipe, clip_score__generated=0.1 * number) for number, recipe in enumerate(recipes, 1)]
    compare, others = champion._compare, list[str]()

    def compare_slowly(*arguments: Any, **options: Any) -> str:
        monkeypatch.setattr(champion, "_compare", compare)
        others.append(str(_promote(path, "--set", _network(2)).exception))
        return compare(*arguments, **options)

    monkeypatch.setattr(champion, "_compare", compare_slowly)
    assert _promote(path, "--set", _network(1)).exit_code == 0
    assert "another champion is being chosen (process" in others[0]
    assert _promote(path, "--set", _network(2)).exit_code == 0
    assert [one.evaluate for one in read_promotions(Workspace(recipes[0].workspace), "tiny").promotions] == keys


def test_a_champion_is_chosen_beside_a_run(path: Path) -> None:
    recipe = load_recipe(str(path))
    _measure(recipe, clip_score__generated=0.3)
    with locked_workspace(Workspace(recipe.workspace), pytest.fail):
        assert _promote(path).exit_code == 0


def test_a_measure_that_is_no_number_becomes_champion_by_force_and_stays_for_no_other(path: Path) -> None:
    for number, score in ((1, math.nan), (2, 0.3)):
        _measure(load_recipe(str(path), [_network(number)]), clip_score__generated=score)
    assert "the evaluation measured nan" in str(_promote(path, "--set", _network(1)).exception)
    assert _promote(path, "--set", _network(1), "--force", "--reason", "sharper").exit_code == 0
    assert _promote(path, "--set", _network(2)).exit_code == 0
    assert "the evaluation measured nan" in str(_promote(path, "--set", _network(1)).exception)


def test_gc_leaves_the_champion_with_all_that_it_was_made_from(path: Path) -> None:
    best, other = load_recipe(str(path), ["seed=1"]), load_recipe(str(path), ["seed=2"])
    key = _measure(best, clip_score__generated=0.3)
    _measure(other, clip_score__generated=0.3)
    workspace = Workspace(other.workspace)
    garbage, _ = find_garbage(workspace, [other])
    assert key in {one.key for one in garbage}
    assert _promote(path, "--set", "seed=1").exit_code == 0
    garbage, kept = find_garbage(workspace, [other])
    assert garbage == []
    assert {one.why for one in kept} == {"in use by recipe tiny, whose champion it is"}
    assert {"evaluate", "decoder"} <= {one.step for one in kept}
