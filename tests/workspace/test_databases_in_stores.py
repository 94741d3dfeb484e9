"""A workspace in an object store: its database, its outbox, its report and its champion."""

import contextlib
import shutil
import sqlite3
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.recipe.champion import Promotion, Promotions
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.tracking.aliases import evaluation_of
from pipeline.runtime.tracking.place import Place
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.recipe import merge
from tests.tiny.workspace import evaluated_tables


def test_a_database_and_a_report_are_in_the_store_and_come_back_on_another_machine(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for machine in ("one", "two"):
        (tmp_path / machine).mkdir()
    workspace = Workspace(f"{bucket}/prefix")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "one"))
    with sqlite3.connect(workspace.local_root / "mlflow.db") as database:
        database.execute("CREATE TABLE runs (name TEXT)")
        database.execute("INSERT INTO runs VALUES ('decoder')")
        database.commit()
        database.execute("INSERT INTO runs VALUES ('half')")  # a run that is being written
        assert workspace.publish("mlflow.db") == f"{bucket}/prefix/mlflow.db"
    database.close()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "two"))
    workspace.restore("mlflow.db")
    with contextlib.closing(sqlite3.connect(workspace.local_root / "mlflow.db")) as copy:
        assert copy.execute("SELECT name FROM runs").fetchall() == [("decoder",)]
    assert str(workspace.local_root).startswith(str(tmp_path / "two"))
    assert not workspace.publish("report.html").startswith("s3://")  # there is none
    (workspace.local_root / "report.html").write_text("<html>")
    assert workspace.publish("report.html") == f"{bucket}/prefix/report.html"
    assert Artifact(f"{bucket}/prefix").path("report.html").read_text() == "<html>"


def test_tracking_keeps_its_database_and_its_outbox_in_the_store(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    recipe = parse_recipe(merge(evaluated_tables(tmp_path), {"workspace": f"{bucket}/prefix"}))
    workspace = Workspace(recipe.workspace)
    place = Place(recipe, workspace)
    place.open().append([{"op": "finish"}])
    place.state["attempts"]["tiny"] = {"name": "a"}
    place.save()
    with contextlib.closing(sqlite3.connect(workspace.local_root / "mlflow.db")) as database:
        database.execute("CREATE TABLE runs (name TEXT)")
    place.publish()
    place.close()
    shutil.rmtree(workspace.local_root)  # the next run is on another machine
    place = Place(recipe, workspace)
    assert [record for record, _ in place.open().read(9)] == [{"op": "finish"}]
    assert place.state["attempts"] == {"tiny": {"name": "a"}}
    assert (workspace.local_root / "mlflow.db").exists()
    place.close()


def test_the_database_of_a_run_is_replaced_by_nobody_on_its_machine(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tables = merge(evaluated_tables(tmp_path), {"workspace": f"{bucket}/prefix"})
    run, promotion = (parse_recipe(merge(tables, {"name": name})) for name in ("run", "promotion"))
    workspace = Workspace(run.workspace)
    writer, other = Place(run, workspace), Place(promotion, workspace)
    writer.open()
    with contextlib.closing(sqlite3.connect(workspace.local_root / "mlflow.db")) as database:
        database.execute("CREATE TABLE runs (name TEXT)")
        database.commit()
        writer.publish()
        database.execute("INSERT INTO runs VALUES ('young')")
        database.commit()
        other.open()
        with other.database_to_read() as uri:
            path = uri.removeprefix("sqlite:///")
            with contextlib.closing(sqlite3.connect(path)) as copy:
                assert copy.execute("SELECT * FROM runs").fetchall() == []
        assert not Path(path).exists()
        assert database.execute("SELECT * FROM runs").fetchall() == [("young",)]
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    writer.close()
    other.close()
    writer.open()  # nobody has it open: what was published counts
    with contextlib.closing(sqlite3.connect(workspace.local_root / "mlflow.db")) as database:
        assert database.execute("SELECT * FROM runs").fetchall() == []
    writer.close()


def test_the_champion_of_a_workspace_in_a_store_is_what_the_workspace_says(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    recipe = parse_recipe(merge(evaluated_tables(tmp_path), {"workspace": f"{bucket}/prefix"}))
    with pytest.raises(ConfigError, match=r"has no champion in s3://.* `unclip promote RECIPE`"):
        evaluation_of(recipe, "champion")
    choices = [Promotion(key, {}, {}, {}, "clip_score.generated", "", 0.0) for key in ("a" * 16, "b" * 16)]
    artifact = Workspace(recipe.workspace).artifact("recipes", recipe.name)
    artifact.write_json("champion.json", asdict(Promotions(tuple(choices))))
    assert evaluation_of(recipe, "champion") == ("what `unclip promote` has chosen", "b" * 16)
    assert not (Workspace(recipe.workspace).local_root / "mlflow.db").exists()
