"""What waits for a tracker: written, read and published through kills, and sent by one process."""

from pathlib import Path

import tomli_w
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import load_recipe
from pipeline.runtime.tracking.outbox import RECORDS, SENT, Outbox
from pipeline.runtime.tracking.place import Place
from pipeline.runtime.tracking.records import new_points
from pipeline.workspace.store import Workspace
from tests.runtime.tracked import recipe_of, runs_of
from tests.tiny.recipe import tiny_tables


def test_outbox_keeps_records_through_kills_at_every_place(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.append([{"n": 1}, {"n": 2}])
    (_, first), _ = outbox.read(10)
    outbox.mark_sent(first)
    with (tmp_path / RECORDS).open("ab") as file:
        file.write(b'{"n": 3')  # killed in the middle of a line
    assert [record for record, _ in Outbox(tmp_path).read(10)] == [{"n": 2}]
    outbox.append([{"n": 4}])
    assert [record for record, _ in outbox.read(10)] == [{"n": 2}, None, {"n": 4}]
    assert outbox.num_records == 3
    outbox.mark_sent(outbox.read(10)[-1][1])
    outbox.compact()
    assert outbox.num_bytes == 0
    outbox.append([{"n": 5}])
    assert [record for record, _ in outbox.read(10)] == [{"n": 5}]


def test_outbox_is_delivered_by_one_process(tmp_path: Path) -> None:
    with Outbox(tmp_path).delivering() as first, Outbox(tmp_path).delivering() as second:
        assert (first, second) == (True, False)


def test_a_kill_between_two_files_that_are_published_makes_nothing_count_as_sent(tmp_path: Path) -> None:
    """The bytes of an older file that were sent must not meet the records of a newer one."""
    published: list[str] = []

    class Recorder(Workspace):
        def publish(self, name: str) -> str:
            published.append(name.rpartition("/")[2])
            return name

    Place(recipe_of("http://127.0.0.1:1"), Recorder(str(tmp_path))).publish()
    assert published.index(SENT) < published.index(RECORDS) < published.index("state.json")


def test_a_run_whose_steps_are_all_done_sends_what_waits(database: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tiny_tables(tmp_path / "w", tracking={"uri": database, "experiment": "done"})))
    recipe = load_recipe(str(path))
    workspace = Workspace(recipe.workspace)
    for step in make_plan(recipe):
        artifact = artifact_of(workspace, step)
        artifact.commit(manifest_of(step, artifact))
    place = Place(recipe, workspace)
    start = {"op": "start", "run": ["attempt", ""], "name": "late", "params": {}, "tags": {}, "time_ms": 1}
    place.open().append([start])
    assert place.num_waiting() == 1
    done = CliRunner().invoke(app, ["run", str(path)])
    assert "nothing to do" in done.stdout
    assert place.num_waiting() == 0
    assert [one.info.run_name for one in runs_of(database, "done")] == ["late"]


def test_points_are_new_by_curve_because_a_step_writes_its_validation_later() -> None:
    last: dict[str, int] = {}
    assert new_points(['{"step": 2, "time": 7.5, "loss": 1.0, "begun": 5}'], last) == [["loss", 1.0, 7500, 2]]
    lines = ['{"step": 2, "time": 7.5, "loss": 1.0}', '{"step": 2, "time": 8, "val_loss": 3}']
    assert new_points(lines, last) == [["val_loss", 3.0, 8000, 2]]
