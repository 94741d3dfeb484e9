"""A step is added to a copy of the tree in the files that docs/extending.md names, and runs there as any other."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny.command import ROOT

_SECTION = '''

@configclass
class TallyConfig(StepSection):
    """Words of the captions, counted."""

    shortest: int = 1
    """Letters of the shortest word that counts."""
'''
_ROW = (
    '    StepRow(name="tally", title="Tally of words", inputs=("pairs",), runner="pipeline.runtime.tally:run_tally"),\n'
)
_RUNNER = '''"""Count the words of all captions."""

from pipeline.data.pairs import Pairs
from pipeline.runtime.context import StepContext, StepResult


def run_tally(context: StepContext) -> StepResult:
    """Count words of ``shortest`` letters or more."""
    pairs = Pairs(context.inputs["pairs"])
    captions = [text for table in pairs.batches(["caption"]) for text in table["caption"].to_pylist()]
    words = [word for text in captions for word in text.split() if len(word) >= context.recipe.tally.shortest]
    context.output.write_json("tally.json", {"words": len(words)})
    return StepResult(metrics={"words": len(words)})
'''

_RUN = """
from pathlib import Path
from pipeline.recipe.plan import make_plan, manifest_of
from pipeline.recipe.recipe import load_recipe
from pipeline.report.report import write_report
from pipeline.runtime import step_task
from pipeline.runtime.context import StepContext
from pipeline.workspace.store import Workspace

recipe = load_recipe(Path("toy.toml"))
for step in make_plan(recipe, until="tally"):
    context = StepContext(recipe, step, recipe.workspace)
    result = step_task.run_step._function(context)  # what Ray calls in the worker
    context.output.commit(manifest_of(step, context.output, result.counts, wall_s=1.0))
write_report(Workspace(recipe.workspace), make_plan(recipe), recipe, Path("report.html"), "toy.toml")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with the toy step, and a recipe that has it."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("models", "pipeline", "jobs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    recipe = root / "pipeline/recipe"
    _edit(recipe / "sections.py", r"\Z", _SECTION)
    _edit(recipe / "steps.py", r"(?m)^\)\n(?=\"\"\"Every step that a recipe may have)", _ROW + ")\n")
    _edit(
        recipe / "recipe.py",
        r"(?m)^    serve: ServeConfig",
        "    tally: TallyConfig | None = None\n    serve: ServeConfig",
    )
    _edit(recipe / "recipe.py", r"(?m)^from pipeline\.recipe\.sections import \(\n", "\\g<0>    TallyConfig,\n")
    (root / "pipeline/runtime/tally.py").write_text(_RUNNER)
    (root / "pairs.csv").write_text("url,caption\nhttp://127.0.0.1/a.png,a red star\nhttp://127.0.0.1/b.png,a cross\n")
    (root / "toy.toml").write_text(
        'name = "toy"\npairs.source = "list"\npairs.path = "pairs.csv"\n[tally]\nshortest = 3\n'
    )
    return root


def _edit(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(), count=1)
    assert count == 1, f"{path}: {pattern}"
    path.write_text(text)


def _unclip(tree: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_files_are_those_of_the_page(tree: Path) -> None:
    section = (ROOT / "docs/extending.md").read_text().partition("## Add a step\n")[2].partition("\n## ")[0]
    named = {name.replace("<name>", "tally") for name in re.findall(r"^\| `([\w/.<>]+)` \|", section, re.MULTILINE)}
    paths = [path.relative_to(tree) for path in (tree / "pipeline").rglob("*.py")]
    changed = [
        path for path in paths if not (ROOT / path).exists() or (ROOT / path).read_text() != (tree / path).read_text()
    ]
    assert {str(path) for path in changed} == named


def test_a_step_is_planned_run_and_reported_by_its_row(tree: Path) -> None:
    plan = json.loads(_unclip(tree, "plan", "toy.toml", "--until", "tally", "--json"))
    assert [row["step"] for row in plan] == ["pairs", "tally"]
    done = subprocess.run([sys.executable, "-c", _RUN], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = (tree / "workspace").glob("tally/*/tally.json")
    assert json.loads(result.read_text()) == {"words": 3}
    (status,) = [row for row in json.loads(_unclip(tree, "status", "toy.toml", "--json")) if row["step"] == "tally"]
    assert status["state"] == "done"
    assert "Tally of words" in (tree / "report.html").read_text()
