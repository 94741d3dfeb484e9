"""Evaluations of lists, and of recipes without validation rows."""

from pathlib import Path

from pipeline.evaluate.prompts import choose_rows
from pipeline.report.report import format_metrics
from pipeline.workspace.store import Artifact
from tests.evaluate.conftest import evaluate_inputs, run_evaluate
from tests.tiny.workspace import evaluated_workspace


def test_other_sources_are_measured_on_validation_captions_without_a_pixel_check(tmp_path: Path) -> None:
    pairs = {"source": "list", "path": str(tmp_path / "list.csv")}
    (tmp_path / "list.csv").write_text("url,caption\n")
    absent = dict.fromkeys(("upsampler_1", "upsampler_2", "prior_2"))
    recipe = evaluated_workspace(tmp_path / "workspace", pairs=pairs, **absent)
    output = Artifact(str(tmp_path / "out"))
    work, metrics = run_evaluate(recipe, output)
    validation = choose_rows(evaluate_inputs(recipe)["embed"], 100, "validation")
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
    _, metrics = run_evaluate(recipe, Artifact(str(tmp_path / "out")))
    assert (metrics["prompts"], metrics["rows"]) == ("training captions", "training")
    assert set(metrics["memorisation"]) == {"generated"}
    text = format_metrics(metrics)
    assert "Captions of training pictures: there are no validation rows, so these were trained on." in text
    assert "Memorisation rate" not in text


def test_drawn_pictures_are_unseen_without_validation_rows_too(tmp_path: Path) -> None:
    absent = dict.fromkeys(("upsampler_1", "upsampler_2", "prior_2"))
    recipe = evaluated_workspace(tmp_path / "workspace", has_validation=False, **absent)
    _, metrics = run_evaluate(recipe, Artifact(str(tmp_path / "out")))
    assert (metrics["prompts"], metrics["rows"]) == ("drawn", "training")
    assert set(metrics["memorisation"]) == {"generated", "real", "closer_than_real"}
