"""The time that `unclip plan --time` says of a recipe, and the time that its run then takes.

    python -m benchmarks.forecast [configs/demo.toml]

Both in a new workspace, one after the other. `said_s` is the time of a step as the plan says it, `ran_s` the `wall_s`
of its manifest, without the waiting for CPUs; the last row is the whole run by the clock, with the start of Ray. `off`
is their difference as a share of `ran_s`. Floor: at most 25 %, for the run and for steps of half a minute or more; of
shorter ones the start of processes decides.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import publish
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.store import Workspace

Json = dict[str, Any]
ROOT = Path(__file__).parents[1]
MOST_OFF = 0.25
_SHORT_S = 30.0


def run(recipe: Path, workspace: str) -> list[Json]:
    """Measure a recipe, run it in a new workspace, and compare: a row for each step, and one for the run."""
    change = f"workspace={workspace}"
    said: Json = json.loads(_unclip("plan", str(recipe), "--time", "--json", "--set", change))
    start = time.monotonic()
    _unclip("run", str(recipe), "--set", change)
    ran_s = {"run": time.monotonic() - start}
    for step in make_plan(load_recipe(recipe, [change])):
        manifest = artifact_of(Workspace(workspace), step).manifest()
        assert manifest is not None
        ran_s[step.name] = manifest.wall_s
    return compare(said, ran_s)


def compare(said: Json, ran_s: Mapping[str, float]) -> list[Json]:
    """The rows.

    Args:
        said: What `unclip plan --time --json` prints.
        ran_s: Seconds of each step, and of the ``run``.
    """
    spans = {row["step"]: row["end_s"] - row["start_s"] for row in said["steps"] if "end_s" in row}
    rows: list[Json] = []
    for name, said_s in (spans | {"run": said["run_s"]}).items():
        off = abs(said_s - ran_s[name]) / ran_s[name]
        at_most = MOST_OFF if ran_s[name] >= _SHORT_S or name == "run" else None
        rows.append({"step": name, "said_s": said_s, "ran_s": ran_s[name], "off": off, "at_most": at_most})
    return rows


def _unclip(*words: str) -> str:
    """Run the command; returns what it prints on standard output."""
    command = [sys.executable, "-m", "jobs.cli", *words]
    return subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Measure, run, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=ROOT / "configs" / "demo.toml")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unclip-forecast-") as folder:
        rows = run(args.recipe.resolve(), f"{folder}/workspace")
    publish("forecast", rows, {"recipe": args.recipe.stem})


if __name__ == "__main__":
    main()
