"""Measuring without the processes beside it, for tests of what is measured in this one."""

import contextlib

import pytest


def start_no_companion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``measure`` take a second for the start of a process, and no time of workers side by side."""
    monkeypatch.setattr("pipeline.timing.measure.start_of_a_process_s", lambda: 1.0)
    monkeypatch.setattr("pipeline.timing.measure.companions", lambda *_: contextlib.nullcontext())
