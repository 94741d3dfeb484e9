"""What a person sees while a recipe runs and while pictures are sampled."""

import sys

import pytest
import torch

from jobs import watch
from jobs.watch import SamplingWatcher, Watcher
from models.stage import StageStep
from pipeline.recipe.estimate import Remaining
from pipeline.recipe.plan import Step
from pipeline.recipe.schedule import Span
from pipeline.workspace.progress import ProgressState

STEPS = [StageStep(stage, done, 12, torch.zeros(0)) for stage, done in (("decoder", 12), ("prior", 3))]


def test_a_terminal_shows_one_line_that_is_wiped_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with SamplingWatcher() as watcher:
        for step in STEPS:
            watcher(step)
    shown = capsys.readouterr()
    assert shown.err == "\rdecoder 12/12\rprior 3/12   \r" + " " * 13 + "\r"
    assert not shown.out


def test_elsewhere_a_line_is_said_only_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for every_s, lines in ((15.0, ""), (-1.0, "decoder 12/12\nprior 3/12\n")):
        monkeypatch.setattr(watch, "_EVERY_S", every_s)
        with SamplingWatcher() as watcher:
            for step in STEPS:
                watcher(step)
        assert capsys.readouterr().err == lines


_DECODER = Step("decoder", 1, {}, {})
_READING = ProgressState(50, 100, "steps", 0.5, 100.0, "", 100.0, 0.0)


def _watch_run(rest: Remaining) -> None:
    watcher = Watcher()
    watcher.remaining(rest)
    watcher.started(_DECODER)
    watcher.remaining(rest)
    watcher.progressed(_DECODER, _READING)
    watcher.close()


def test_a_run_says_its_time_to_go_at_its_start_and_beside_each_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "_EVERY_S", -1.0)
    _watch_run(Remaining({"decoder": Span(0, 60), "evaluate": Span(60, 300)}))
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == [
        "0:00  run: 5 min to go",
        "0:00  decoder: starts",
        "0:00  decoder: 50/100 steps (50 %), 0.5/s, 2 min to go; run: 5 min to go",
    ]


def test_a_run_names_the_steps_of_unknown_time_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "_EVERY_S", -1.0)
    _watch_run(Remaining({"decoder": Span(0, 60)}, ("evaluate",)))
    first, _, last = capsys.readouterr().err.splitlines()
    assert first.endswith("run: at least 60 s to go besides evaluate; `unclip plan RECIPE --time` measures it")
    assert last.endswith("2 min to go; run: at least 60 s to go")


def test_a_terminal_shows_the_time_to_go_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _watch_run(Remaining({"decoder": Span(0, 300)}))
    assert "\rrun: 5 min to go  decoder 50/100 steps" in capsys.readouterr().err
