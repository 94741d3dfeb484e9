"""What a training asks of an object store every few seconds, counted by a server, and by hand in docs/scaling.md."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime import run, stopping, validate
from pipeline.runtime.context import StepContext
from pipeline.runtime.stopping import is_stop_requested
from pipeline.runtime.tracking.run import Tracking
from pipeline.runtime.validate import Validations
from pipeline.train import job
from pipeline.train.job import MetricsLog
from pipeline.train.resume import checkpoint_name
from pipeline.workspace.fence import begin_attempt
from pipeline.workspace.progress import Progress
from tests.s3_server import S3Server
from tests.scaling_page import asked_by_the_clock
from tests.tiny.command import ROOT
from tests.tiny.recipe import tiny_tables

_DAY_S = 86_400
_EVERY_S = (run._POLL_S, 1.0, stopping._POLL_S, job._FLUSH_S, job._FLUSH_S, validate._POLL_S)
"""In the order of the page's rows; the second is the default of ``Progress``."""
_READ_USD, _WRITE_USD = 0.4e-6, 5e-6


class _Nobody:
    def progressed(self, *_: object) -> None:
        """A reading."""


def _training(workspace: str) -> StepContext:
    """A training on a store, as a start of it writes it."""
    recipe = parse_recipe(tiny_tables(Path("replaced")) | {"workspace": workspace})
    step = next(step for step in make_plan(recipe) if step.name == "decoder")
    context = StepContext(recipe, step, recipe.workspace, attempt="this")
    begin_attempt(context.output, context.attempt)
    return context


def _tracking(recipe: Recipe, context: StepContext, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    """With an outbox that nobody empties."""
    tracking = Tracking(recipe, context.workspace, pytest.fail)
    monkeypatch.setattr(tracking, "_outbox", tracking._place.open())
    return tracking


def test_a_training_asks_by_the_clock_what_the_page_counts_by_hand(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = _training(f"{bucket}/w")
    output, own = context.output, context.own_output
    log, progress = MetricsLog(own, 0), Progress(own)
    tracking = _tracking(context.recipe, context, monkeypatch)

    def publish(step: int) -> None:
        log.rows.append({"step": step, "time": float(step), "loss": 1.0})
        log.flush(step)

    def write_progress() -> None:
        progress.update(1, 2, "steps", force=True)

    def read() -> None:
        run._readings([context], cast("Any", _Nobody()), tracking, {})

    def counted(*actions: Any) -> dict[str, int]:
        s3_server.counted()
        for action in actions:
            action()
        return dict(Counter(one.kind for one in s3_server.counted()))

    output.write_bytes(checkpoint_name(2), b"whole")
    beside = Validations(output, cast("Any", pytest.fail), lambda: "no room", limit_s=60)
    publish(1)
    write_progress()
    read()
    reading = counted(read)
    published = counted(lambda: publish(2))
    of_new_curve = Counter(counted(read))
    of_new_curve.subtract(reading)
    asked = [
        reading,
        counted(write_progress),
        counted(lambda: is_stop_requested(output)),
        published,
        {kind: number for kind, number in of_new_curve.items() if number},
        counted(beside.look),
    ]
    page = list(asked_by_the_clock().values())
    assert [float(row["every s"]) for row in page] == list(_EVERY_S)
    kinds = ("GET", "HEAD", "PUT", "LIST")
    assert asked == [{kind: int(row[kind]) for kind in kinds if row[kind] != "0"} for row in page]


def test_the_sums_of_a_day_are_those_of_the_table() -> None:
    sentence = (
        (ROOT / "docs/scaling.md").read_text().partition("In a day these are at most ")[2].partition(" US dollars")[0]
    )
    said = {kind: int(text.replace(",", "")) for text, kind in re.findall(r"([\d,]+) (GET|HEAD|PUT|LIST)", sentence)}
    rows = asked_by_the_clock().values()
    assert said == {kind: sum(int(row[kind]) * _DAY_S / float(row["every s"]) for row in rows) for kind in said}
    assert len(said) == 4
    money = _READ_USD * (said["GET"] + said["HEAD"]) + _WRITE_USD * (said["PUT"] + said["LIST"])
    assert float(sentence.rpartition(" ")[2]) == pytest.approx(money, abs=0.005)
