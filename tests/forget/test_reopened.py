"""A download that is opened for another try of failed rows, before or while pairs are forgotten."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.data.retries import end_retry
from pipeline.errors import StepError
from pipeline.forget.forget import finish
from pipeline.forget.search import search
from pipeline.recipe.plan import make_plan
from pipeline.recipe.status import plan_status
from pipeline.runtime import run
from pipeline.runtime.context import StepResult
from pipeline.runtime.step_task import commit_step, forget_if_inputs_changed
from pipeline.workspace.manifest import Manifest, add_counts
from pipeline.workspace.store import INPUTS, Artifact
from tests.filter.planted import make_context
from tests.forget.made import BY_UID, BY_URL, Made, forget_names


def _states(made: Made) -> dict[str, str]:
    """Without what shows a forgotten pair, which is made anew."""
    statuses = plan_status(made.workspace, make_plan(made.recipe))
    return {status.step.name: status.state for status in statuses if status.step.name != "evaluate"}


def _reopen(made: Made) -> Artifact:
    [status] = [one for one in plan_status(made.workspace, make_plan(made.recipe)) if one.step.name == "download"]
    run._reopened(made.workspace, status, "http")
    assert made.artifact("download").manifest() is None
    return made.artifact("download")


class _NoTracking:
    def finished(self, *_arguments: object) -> str:
        return ""


def _end(made: Made) -> Manifest:
    """End the try, as a run does."""
    context = make_context(Path(made.workspace.root), "download", made.recipe)
    forget_if_inputs_changed(context, pytest.fail)
    end_retry(context.output, "http")
    counts = add_counts([record.counts for record in context.output.shard_records().values()])
    return commit_step(context, StepResult(counts), cast("Any", _NoTracking()))


def _gain(download: Artifact) -> None:
    """Give a shard other bytes, as when a row came."""
    record = next(iter(download.shard_records().values()))
    name = f"{record.shard}.parquet"
    download.write_bytes(f"{record.shard}.tar", download.read_bytes(f"{record.shard}.tar") + bytes(512))
    files = record.files | {f"{record.shard}.tar": download.describe(f"{record.shard}.tar")}
    download.commit_shard(replace(record, files=files | {name: download.describe(name)}))


def test_a_try_that_gains_nothing_makes_nothing_anew_after_pairs_were_forgotten(made: Made) -> None:
    forget_names(made, BY_URL)
    made.finish()
    before, manifest = _states(made), made.artifact("download").manifest()
    assert manifest is not None
    assert set(before.values()) == {"done"}
    _reopen(made)
    assert _end(made).former_contents == manifest.former_contents
    assert _states(made) == before
    _gain(_reopen(made))
    assert _end(made).former_contents == ()
    assert _states(made)["embed"] == "todo"


@pytest.mark.parametrize("num_checks", [6, 7, 8])
def test_pairs_may_be_forgotten_while_the_download_is_open(made: Made, num_checks: int) -> None:
    forget_names(made, BY_URL)
    made.finish()
    before = _states(made)
    _reopen(made)
    forget_names(made, made.uids[BY_UID])
    checks = iter(range(num_checks))

    def check() -> None:
        if next(checks, None) is None:
            raise StepError("the lock was lost")

    with pytest.raises(StepError, match="the lock was lost"):
        finish(made.workspace, made.compact, check)
    made.finish()
    assert len(_end(made).former_contents) == 2
    assert _states(made) == before


def test_rows_that_came_before_pairs_were_forgotten_make_the_rest_anew(made: Made) -> None:
    _gain(_reopen(made))
    forget_names(made, BY_URL)
    made.finish()
    assert _end(made).former_contents == ()
    assert _states(made)["embed"] == "todo"


def test_a_training_on_the_pairs_of_an_open_download_is_named(made: Made) -> None:
    decoder = made.artifact("decoder")
    manifest = decoder.manifest()
    assert manifest is not None
    decoder.clear()
    decoder.write_json(INPUTS, {"download": manifest.input_contents["download"]})
    _reopen(made)
    assert [one.key for one in search(made.workspace, [BY_URL]).networks if one.step == "decoder"] == [decoder.key]
