"""What is said of an error."""

import pytest

from pipeline.errors import StepError, first_line
from pipeline.runtime import dashboard, jobs


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(), "RuntimeError"),
        (OSError("\n \n"), "OSError"),
        (ValueError("\n  one \ntwo"), "one"),
        (KeyError("a"), "'a'"),
    ],
)
def test_the_first_line_of_an_error_is_its_first_words_or_its_class(error: Exception, line: str) -> None:
    assert first_line(error) == line


def _fail(*_: object) -> None:
    raise RuntimeError


def test_a_refusal_of_ray_without_words_is_named_by_its_class() -> None:
    with pytest.raises(StepError, match=r"job demo-1 was not accepted: RuntimeError$"):
        jobs._retrying(_fail, "demo-1")


def test_a_dashboard_that_fails_without_words_is_named_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class _Reply:
        status_code = 200

    monkeypatch.setattr(dashboard.requests, "get", lambda *_, **__: _Reply())
    monkeypatch.setattr(dashboard, "_client", _fail)
    with pytest.raises(StepError, match=r"no Ray cluster answers at http://h:1: .* \(RuntimeError\)$"):
        dashboard.dashboard_client("http://h:1")
