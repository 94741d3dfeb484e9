"""What a person sees while a recipe runs and while pictures are sampled."""

import io
import re
import sys
from dataclasses import replace

import pytest
import torch

from jobs import watch
from jobs.watch import Follower, SamplingWatcher, Watcher, is_reading
from models.stage import StageStep
from pipeline.recipe.estimate import Remaining
from pipeline.recipe.plan import Step
from pipeline.recipe.schedule import Span
from pipeline.recipe.status import StepStatus
from pipeline.workspace.manifest import Manifest
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
    watcher = Watcher(recipe="my.toml --set seed=2")
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


def test_what_a_step_waits_for_is_said_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = replace(
        _READING, done=0, total=1, unit="", message="waiting for 1 x 4 CPU and 1 GPU; no machine has that"
    )
    for every_s, num_lines in ((60.0, 1), (-1.0, 3)):
        monkeypatch.setattr(watch, "_EVERY_S", every_s)
        watcher = Watcher()
        watcher.started(_DECODER)
        for state in (waiting, replace(waiting, message=""), waiting):
            watcher.progressed(_DECODER, state)
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["  0:00  decoder: starts", *[f"  0:00  decoder: {waiting.message}"] * 2][:num_lines]


def test_a_run_names_the_steps_of_unknown_time_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "_EVERY_S", -1.0)
    _watch_run(Remaining({"decoder": Span(0, 60)}, ("evaluate",)))
    first, _, last = capsys.readouterr().err.splitlines()
    assert first.endswith(
        "run: at least 60 s to go besides evaluate; `unclip plan my.toml --set seed=2 --time` measures it"
    )
    assert last.endswith("2 min to go; run: at least 60 s to go")


def test_what_a_warning_proposes_is_for_the_recipe_as_it_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    Watcher(recipe="my.toml").warned("the alias champion comes by `unclip promote RECIPE`")
    assert capsys.readouterr().err.endswith("warning: the alias champion comes by `unclip promote my.toml`\n")


def test_how_far_a_takedown_is_is_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    Watcher().reported("forgotten rows leave download: 12 of 100 shards are rewritten")
    assert capsys.readouterr().err == "  0:00  forgotten rows leave download: 12 of 100 shards are rewritten\n"


class _Terminal(io.StringIO):
    """A terminal that knows the codes of ``LiveLines``; ``screen`` is what a person sees."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        lines, row = [""], 0
        for code, up, text in re.findall(r"(\x1b\[(\d*)[AJK])|([^\x1b]+)", self.getvalue()):
            if code.endswith("A"):
                row -= int(up)
                assert row >= 0
            elif code.endswith("J"):
                del lines[row:]
                lines.append("")
            for part in re.findall(r"\n|[^\n\r]+", text):
                if part == "\n":
                    row += 1
                    lines += [""] * (row + 1 - len(lines))
                else:
                    lines[row] = part
        return lines


def _statuses(*names: str) -> list[StepStatus]:
    return [StepStatus(Step(name, 1, {}, {}), "todo", (), None) for name in names]


def test_a_terminal_has_a_table_of_what_runs_and_waits_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_DRAW_S", -1.0)
    monkeypatch.setenv("COLUMNS", "78")
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    watcher = Watcher(_statuses("clip", "decoder", "evaluate"))
    watcher.started(Step("clip", 1, {}, {}))
    watcher.started(_DECODER)
    watcher.remaining(Remaining({"decoder": Span(0, 300)}))
    watcher.progressed(_DECODER, replace(_READING, workers={"node-a": 2}))
    assert terminal.screen == [
        "  0:00  clip: starts",
        "  0:00  decoder: starts",
        "  0:00  run: 5 min to go",
        "  0:00  run: 5 min to go; 0 of 3 steps done",
        "        clip              starts",
        "        decoder           50/100 steps (50 %), 0.5/s, 2 min to go; workers: 2",  # 76 columns
        "        next              evaluate",
        "",
    ]
    watcher.finished(Step("clip", 1, {}, {}), Manifest(step="clip", key="0", step_version=1, section={}, inputs={}))
    watcher.failed(_DECODER, {"decoder", "evaluate"})
    watcher.warned("it failed")
    watcher.close()
    assert terminal.screen[3:] == ["  0:00  clip: done in 0.0 s", "  0:00  warning: it failed", ""]


def test_a_follower_has_the_table_of_the_run_that_it_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[str] = []
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(watch, "_EVERY_S", -1.0)
    watcher = Watcher(_statuses("decoder", "evaluate"), published.append)
    watcher.started(_DECODER)
    watcher.progressed(_DECODER, _READING)
    log = sys.stderr.getvalue()
    assert "decoder: 50/100 steps" in log
    monkeypatch.setattr(watch, "_EVERY_S", 60.0)
    with Follower(terminal := _Terminal()) as follower:
        follower.write("  0:00  run: 5 m")
        follower.show(published[-1])
        follower.write("in to go\n" + log)
        assert terminal.screen == [
            "  0:00  run: 5 min to go",
            "  0:00  decoder: starts",
            "  0:00  run: 0 of 2 steps done",
            "        decoder           50/100 steps (50 %), 0.5/s, 2 min to go",
            "        next              evaluate",
            "",
        ]
        monkeypatch.setattr(watch, "_EVERY_S", -1.0)
        follower.show(published[-1])
        assert terminal.screen[2].endswith("; last heard 0 s ago")
        follower.write("report: x\nnext")
    assert terminal.screen[2:] == ["report: x", "next"]


def test_a_follower_without_a_table_says_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "  0:15  decoder: 50/100 steps (50 %), 0.5/s, 2 min to go\n"
    for words in ("starting", "waiting for 1 x 1 CPU", "choosing rows: 1 of 2 shards"):
        assert is_reading(f"  0:15  decoder: {words}")
    assert is_reading(line)
    others = ("  0:00  decoder: starts", "  0:15  decoder: done in 4 s (50 in, 50 ok)", "decoder: 50/100 (50 %), x")
    assert not any(map(is_reading, (*others, line[8:])))
    with Follower(terminal := _Terminal()) as follower:
        follower.write(line)
        follower.show("of another release")
    assert terminal.screen == [line.rstrip(), ""]
    with Follower(plain := io.StringIO()) as follower:
        assert not follower.is_live
        follower.write(line)
    assert plain.getvalue() == line
