"""``python -m jobs.job run RECIPE ...``: the command as a job, on a machine that may lack what it needs.

It says all that is lacking in one message, and starts nothing then. So an old Python must be able to read this file,
and it imports nothing beyond the standard library before it has looked.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from pipeline.runtime.packages import complaint

_EXIT_CODE = 2


def take_secrets() -> None:
    """Put the secrets that came with the job into the environment; Ray calls this in each of its processes."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120  (as the file's head says)
    try:
        with open(os.path.join(package, "secrets.json"), encoding="utf-8") as stream:  # noqa: PTH118, PTH123
            os.environ.update(json.load(stream))
    except FileNotFoundError:
        pass


def main() -> None:
    """Look, then run the command."""
    take_secrets()
    lacks = complaint()
    if lacks:
        sys.stderr.write(
            f"error: {lacks}: nothing was started; start the cluster from an environment with unclip's dependencies, "
            "as the setup_commands of cluster.yaml and the Dockerfile do\n"
        )
        sys.exit(_EXIT_CODE)
    importlib.import_module("jobs.cli").main()


if __name__ == "__main__":
    main()
