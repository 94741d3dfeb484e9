"""What a person sees while pictures are drawn."""

import sys

import pytest
import torch

from jobs import watch
from jobs.watch import SamplingWatcher
from models.stage import StageStep

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
