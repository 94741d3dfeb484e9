"""The steps of the demo, before a run."""

from pathlib import Path

from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.runtime.context import StepContext
from tests.tiny.command import ROOT

DEMO = ROOT / "configs" / "demo.toml"


def demo_contexts(workspace: Path, *overrides: str) -> dict[str, StepContext]:
    """The context of each step, by its name."""
    recipe = load_recipe(DEMO, [f"workspace={workspace}", *overrides])
    return {step.name: StepContext(recipe, step, recipe.workspace) for step in make_plan(recipe)}
