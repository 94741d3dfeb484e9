"""A job on a machine that lacks something: one message, before anything starts."""

import re
import subprocess
import sys
import tomllib

from pipeline.runtime.packages import DISTRIBUTIONS, LEAST_PYTHON, what_is_missing
from tests.tiny.command import ROOT

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_job_asks_for_what_the_project_depends_on() -> None:
    assert {re.split(r"[\[<>=]", line)[0] for line in _PROJECT["dependencies"]} == DISTRIBUTIONS
    assert _PROJECT["requires-python"] == ">={}.{}".format(*LEAST_PYTHON)


def test_this_interpreter_lacks_nothing() -> None:
    assert not what_is_missing(sys.version_info[:2])


def test_missing_distributions_are_named_together() -> None:
    assert what_is_missing((3, 11), ["ray", "no-such-b", "no-such-a"]) == "lacks no-such-a, no-such-b"
    assert what_is_missing((3, 9)) == "is Python 3.9, and unclip needs 3.11 or newer"


def test_a_machine_without_packages_starts_nothing_and_says_so() -> None:
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import jobs.job as j; j.main()",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(
        r"error: .* lacks .*\bpyarrow, .*faiss-cpu or faiss-gpu: nothing was started; .*\n", done.stderr
    )
