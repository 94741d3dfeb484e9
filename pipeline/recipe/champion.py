"""The champion of a recipe: the measured cascade that a person has chosen, with the measures and the reason."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import ConfigError
from pipeline.recipe.plan import Step, artifact_of, make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.steps import CASCADE_STEPS, STEPS
from pipeline.recipe.tables import to_dict
from pipeline.workspace.lock import locked
from pipeline.workspace.manifest import Manifest, read_record
from pipeline.workspace.store import Artifact, Workspace

Json = dict[str, Any]

DEFAULT_MEASURE = "clip_score.generated"
_FILE = "champion.json"
_LOCK = ".promotions"
_CONFIG = "config.json"
"""Of a network's artifact."""
_CHANGES_LITTLE = {"seed", "batch_size", "num_shown", "num_images_per_shown"}
"""Settings of an evaluation whose measures compare all the same."""
_VERSION = "step_version"
"""Among the settings: which release's numbers they are."""
_ROWS = {"pairs", "download", "filter", "filter_embeddings"}
"""Steps that decide which rows are embedded."""


@dataclass(frozen=True)
class Measure:
    """How the numbers of one field of an evaluation's ``metrics.json`` compare."""

    is_lower_better: bool = False
    is_of_clip: bool = True
    """Whether a CLIP takes them."""
    is_of_rows: bool = False
    """Whether they are of embedded rows, whatever the prompts are."""


MEASURES = {
    "pixel_check": Measure(is_of_clip=False),
    "held_out": Measure(is_of_clip=False),
    "clip_score": Measure(),
    "r_precision": Measure(),
    "preference": Measure(),
    "frechet_clip": Measure(is_lower_better=True),
    "frechet_features": Measure(is_lower_better=True, is_of_clip=False),
    "cmmd": Measure(is_lower_better=True),
    "precision": Measure(),
    "recall": Measure(),
    "prior": Measure(is_of_rows=True),
    "prior_2": Measure(is_of_rows=True),
    "decoder": Measure(is_of_rows=True),
    "upsampler_1": Measure(is_of_clip=False, is_of_rows=True),
    "upsampler_2": Measure(is_of_clip=False, is_of_rows=True),
    "bits_per_dim": Measure(is_lower_better=True, is_of_clip=False, is_of_rows=True),
    "memorisation": Measure(is_lower_better=True, is_of_rows=True),
}
"""By field of ``metrics.json``; its other fields say what was measured."""


@dataclass(frozen=True)
class Promotion:
    """One choice of a champion."""

    evaluate: str
    """Key of the evaluation that measured it."""
    artifacts: dict[str, str]
    """Key of each step that the evaluation read, by name."""
    measures: dict[str, float]
    """What the evaluation measured, by dotted name."""
    settings: Json
    """How it was measured: the evaluation's own settings, and the version of its step."""
    by: str
    """The measure that decided."""
    reason: str
    time: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Promotions:
    """All choices, the newest last."""

    promotions: tuple[Promotion, ...] = field(default=())

    @property
    def champion(self) -> Promotion | None:
        """The present champion."""
        return self.promotions[-1] if self.promotions else None


def read_promotions(workspace: Workspace, name: str) -> Promotions:
    """The choices for a recipe, by its name.

    Raises:
        DataError: If their file is damaged.
    """
    home = _home(workspace, name)
    content = home.find_bytes(_FILE)
    if content is None:
        return Promotions()
    return read_record(Promotions, content, f"{home.uri}/{_FILE}", "bring it back from a copy")


def champions(workspace: Workspace) -> dict[tuple[str, str], str]:
    """Each artifact, by step and key, that a present champion is made from or was measured in; and whose it is."""
    artifacts: dict[tuple[str, str], str] = {}
    for name in workspace.keys("recipes"):
        champion = read_promotions(workspace, name).champion
        if champion is not None:
            keys = champion.artifacts | {"evaluate": champion.evaluate}
            artifacts |= dict.fromkeys(keys.items(), f"recipe {name}, whose champion it is")
    return artifacts


def evaluated(recipe: Recipe, shown: str) -> tuple[Step, Manifest]:
    """The evaluation of a recipe's cascade.

    Args:
        recipe: The recipe.
        shown: The recipe in the command that is proposed.

    Raises:
        ConfigError: If the cascade, as the recipe is now, was not measured.
    """
    step = make_plan(recipe, until="evaluate")[-1]
    manifest = artifact_of(Workspace(recipe.workspace), step).manifest()
    if manifest is None:
        raise ConfigError(f"the cascade of this recipe, as it is now, was not measured; first: unclip evaluate {shown}")
    return step, manifest


def measured_cascade(recipe: Recipe, key: str, names: Collection[str]) -> tuple[Recipe, dict[str, Artifact]]:
    """A cascade as it was measured: its networks and how they were sampled, in the rest of a recipe.

    Args:
        recipe: What is not said by the evaluation is taken from here; its workspace holds the networks.
        key: Of the evaluation.
        names: Steps that are looked for; those that are not networks may be missing.

    Returns:
        The recipe with these networks, and the artifacts that are there, by step.

    Raises:
        ConfigError: If the workspace does not have the evaluation, or a network of it.
    """
    workspace = Workspace(recipe.workspace)
    manifest = workspace.artifact("evaluate", key).manifest()
    if manifest is None:
        raise ConfigError(
            f"the evaluation {key} is not in {workspace.root}: it was made in another workspace, or removed"
        )
    artifacts = {name: workspace.artifact(name, own) for name, own in manifest.inputs.items() if name in names}
    artifacts = {name: artifact for name, artifact in artifacts.items() if artifact.manifest() is not None}
    tables = to_dict(recipe)
    for begun in filter(None, (row.begins_with for row in STEPS)):
        tables[begun] = None  # the recipe's, and perhaps of another shape than the networks
    for name in CASCADE_STEPS:
        if name not in manifest.inputs:
            tables[name] = None
        elif name not in artifacts:
            raise ConfigError(f"{name} of the evaluation {key} is not in {workspace.root} any more")
        elif name != "clip":
            sampling = manifest.section.get(name, {}).get("model", {})
            section: Json = tables[name] or {}
            tables[name] = section | {"model": artifacts[name].read_json(_CONFIG)["config"] | sampling}
    return parse_recipe({name: table for name, table in tables.items() if table is not None}), artifacts


def promote(
    recipe: Recipe,
    step: Step,
    manifest: Manifest,
    warn: Callable[[str], None],
    *,
    by: str,
    reason: str,
    force: bool,
) -> tuple[Promotion, bool]:
    """Make a measured cascade the champion if it is better than the present one.

    Args:
        recipe: The recipe.
        step: Its evaluation.
        manifest: The evaluation's commit.
        warn: Receives a sentence if the lock of a dead process is broken.
        by: The measure that decides, by its dotted name.
        reason: A person's words; stored with the two numbers.
        force: Promote it whatever the measure says; needs a reason.

    Returns:
        The choice, and whether it changes anything.

    Raises:
        ConfigError: If there is no such measure, it is no number, the present champion is as good, or was measured in
            another way: with other settings, by another CLIP or on other rows.
        StepError: If another process promotes a cascade of this workspace at the moment.
    """
    measures = {
        name: float(value)
        for name, value in manifest.metrics.items()
        if isinstance(value, int | float) and _field_of(name) in MEASURES
    }
    if by not in measures:
        raise ConfigError(f"--by {by}: the evaluation has no such measure; it has {', '.join(sorted(measures))}")
    if force and not reason:
        raise ConfigError("--force: say why, with --reason; it is stored")
    settings = {
        name: value
        for name, value in manifest.section.items()
        if not isinstance(value, dict) and name not in _CHANGES_LITTLE
    } | {_VERSION: manifest.step_version}
    workspace = Workspace(recipe.workspace)
    # A lock of its own: the workspace's is held by runs, for weeks.
    with locked(f"{workspace.root}/{_LOCK}", f"{workspace.root}: another champion is being chosen", warn) as lock:
        promotions = read_promotions(workspace, recipe.name)
        before = promotions.champion
        if before is not None and before.evaluate == step.key:
            return before, False
        numbers = _compare(before, measures, settings, _basis_of(recipe, step, by), by, force=force)
        new = Promotion(
            step.key, step.inputs, measures, settings, by, f"{numbers}; {reason}" if reason else numbers, time.time()
        )
        file = {"promotions": [asdict(one) for one in (*promotions.promotions, new)]}
        lock.check()
        _home(workspace, recipe.name).write_json(_FILE, file)
    return new, True


def _basis_of(recipe: Recipe, step: Step, by: str) -> dict[str, str | None]:
    """The keys of what a measure depends on beside the cascade: the CLIP that takes it, and the rows that it is of."""
    measure = MEASURES[_field_of(by)]
    is_of_rows = measure.is_of_rows or (recipe.pairs.source != "drawn" and not recipe.evaluate.prompts_path)
    names = set[str]()
    if is_of_rows:
        names |= _ROWS
    if measure.is_of_clip:
        names |= {"clip", "embed"} if is_of_rows else {"clip"}
    return {name: step.inputs.get(name) for name in names}


def _compare(
    before: Promotion | None,
    measures: dict[str, float],
    settings: Json,
    basis: Mapping[str, str | None],
    by: str,
    *,
    force: bool,
) -> str:
    """The two numbers in words.

    Raises:
        ConfigError: If the champion stays.
    """
    now = measures[by]
    if not math.isfinite(now) and not force:
        raise ConfigError(f"--by {by}: the evaluation measured {now}; --force and a --reason promote it anyway")
    if before is None:
        return f"{by} {now:.4g}, the first champion"
    if by not in before.measures:
        if force:
            return f"{by} {now:.4g}, which the champion {before.evaluate} was not measured by"
        raise ConfigError(f"--by {by}: the champion {before.evaluate} was not measured by it; --force promotes anyway")
    numbers = f"{by} {now:.4g} against {before.measures[by]:.4g} of {before.evaluate}"
    changed = sorted(name for name in settings | before.settings if settings.get(name) != before.settings.get(name))
    others = {name for name, key in basis.items() if before.artifacts.get(name) != key}
    if (changed or others) and not force:
        reasons = list(map(_setting, changed))
        reasons += ["the CLIP that measures" if "clip" in others else "the set of measured rows"] if others else []
        raise ConfigError(
            f"{numbers} do not compare: {', '.join(reasons)} was another; measure both alike, or promote it anyway "
            "with --force and a --reason"
        )
    is_lower = MEASURES[_field_of(by)].is_lower_better
    is_better = now < before.measures[by] if is_lower else now > before.measures[by]
    is_better = is_better or not math.isfinite(before.measures[by])
    if not is_better and not force:
        rule = "lower" if is_lower else "higher"
        raise ConfigError(f"{numbers}: no better ({rule} is better); promote it anyway with --force and a --reason")
    return numbers


def _field_of(name: str) -> str:
    """The field of ``metrics.json`` of a measure's dotted name."""
    return name.partition(".")[0]


def _setting(name: str) -> str:
    return "the version of the evaluation" if name == _VERSION else f"{name} of [evaluate]"


def _home(workspace: Workspace, name: str) -> Artifact:
    return workspace.artifact("recipes", name)
