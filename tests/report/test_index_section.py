"""The report's card of the index: the recall of what is searched now, and whether it is what was requested."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.recipe.plan import artifact_of
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import IndexConfig
from pipeline.report.report import REPORT, update_report
from pipeline.retrieve import kinds
from pipeline.retrieve.changes import delete
from pipeline.workspace.store import Workspace
from tests.report.finished_run import NUM_EMBEDDED, fill_workspace
from tests.retrieve.conftest import unit
from tests.retrieve.segments import append, commit_embed, compact, uid_of


def _card(recipe: Recipe) -> str:
    workspace = Workspace(recipe.workspace)
    update_report(workspace, fill_workspace(recipe, until="index"), recipe, "r.toml")
    page = (Path(recipe.workspace) / REPORT).read_text(encoding="utf-8")
    return page.partition("<h3>Neighbour index</h3>")[2].partition("</div></div>")[0].partition("</p>")[0]


def test_the_report_has_the_recall_of_the_index_that_is_there(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    card = _card(recipe)
    assert "100.0 % <small>recall at 10</small>" in card
    assert f"flat index of {NUM_EMBEDDED} rows, measured against exact search" in card
    workspace = Workspace(recipe.workspace)
    steps = {step.name: step for step in fill_workspace(recipe, until="index")}
    index, embed = (artifact_of(workspace, steps[name]) for name in ("index", "embed"))
    delete(index, [uid_of(0)])
    assert f"flat index of {NUM_EMBEDDED} rows, those deleted since included, measured" in _card(recipe)

    vectors = unit(np.random.default_rng(1).normal(size=(600, 8)))
    manifest = embed.manifest()
    assert manifest is not None
    more = commit_embed(workspace, "more", vectors, clip=manifest.inputs["clip"], first=NUM_EMBEDDED)
    monkeypatch.setattr(kinds, "candidates", lambda _kind, _k: [1])
    append(index, more, IndexConfig(kind="ivf_rabitq", num_recall_queries=40))
    card = _card(recipe)
    assert "100.0 %" not in card
    assert f"flat and ivf_rabitq index of {NUM_EMBEDDED + 600} rows" in card
    assert "by caption of 2 segments; the lowest of these." in card
    assert "The recall target of 0.95 is not reached, or not surely (measured: " in card

    monkeypatch.undo()
    compact(index, recipe.index)
    card = _card(recipe)
    assert "100.0 % <small>recall at 10</small>" in card
    assert f"flat index of {NUM_EMBEDDED + 599} rows" in card
    assert "recall target" not in card


def test_an_index_without_rows_has_a_card_without_recall(recipe: Recipe) -> None:
    steps = {step.name: step for step in fill_workspace(recipe, until="index")}
    index = artifact_of(Workspace(recipe.workspace), steps["index"])
    delete(index, [uid_of(row) for row in range(NUM_EMBEDDED)])
    compact(index, recipe.index)
    card = _card(recipe)
    assert "0 <small>rows</small>" in card
    assert "flat index, too few rows to measure recall." in card
