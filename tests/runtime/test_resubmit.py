"""How often, and for how long, a lost run is submitted again; a real head that is killed is in tests/faults."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import StepError
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime import resubmit
from pipeline.runtime.jobs import LostError, Submission
from pipeline.runtime.resubmit import Follower, submit_and_follow
from tests.tiny.recipe import tiny_tables


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: list[str]) -> Callable[..., int]:
    """Follow a run whose submissions and jobs end as given: by an error, or with a value."""
    monkeypatch.setattr(resubmit, "_LOOK_S", 0.01)

    def run(submissions: list[object], jobs: list[object], **job: float) -> int:
        def submit(*_: object, **options: object) -> Submission:
            lines.append(f"again={options['again']}")
            return Submission(str(_next(answers)), "submitted", "http://h:1")

        answers, ends = iter(submissions), iter(jobs)
        monkeypatch.setattr(resubmit, "submit_recipe", submit)
        monkeypatch.setattr(resubmit, "follow_job", lambda *_: _next(ends))
        follower = Follower(lambda one: lines.append(one.job_id), lines.append, lines.append)
        recipe = parse_recipe(tiny_tables(tmp_path, job=job))
        return submit_and_follow(recipe, follower, address="http://h:1", again=True)

    return run


def _next(values: Iterator[object]) -> object:
    value = next(values)
    if isinstance(value, Exception):
        raise value
    return value


def test_a_lost_run_is_submitted_again_when_the_cluster_answers(follow: Callable[..., int], lines: list[str]) -> None:
    away = [StepError("no cluster"), RuntimeError("503")]
    assert follow(["a", *away, "b", "c"], [LostError("gone"), LostError("gone too"), 3]) == 3
    assert lines == [
        "again=True",
        "a",
        "gone; submitted again when the cluster answers (1 of 3), within 30 min",
        *["again=False"] * 3,
        "b",
        "gone too; submitted again when the cluster answers (2 of 3), within 30 min",
        "again=False",
        "c",
    ]


def test_it_is_submitted_again_only_so_often_and_waited_for_only_so_long(follow: Callable[..., int]) -> None:
    with pytest.raises(StepError, match=r"gone; it was lost 2 times \(job.max_resubmissions\)"):
        follow(["a", "b"], [LostError("gone")] * 2, max_resubmissions=1)
    with pytest.raises(StepError, match="no cluster"):
        follow(["a", StepError("no cluster")], [LostError("gone")], max_outage_s=0)
    with pytest.raises(StepError, match="no cluster"):  # it was never there
        follow([StepError("no cluster")], [])
