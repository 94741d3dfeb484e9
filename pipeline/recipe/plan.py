"""The recipe as steps: what is done, what remains, and why.

A step is a pure description. Its key is the hash of the step's version, its section and the keys of its inputs, so a
finished step is never run again and a changed field re-runs only what depends on it.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.recipe.recipe import SAMPLING, Recipe, to_dict, without_resources
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Artifact, Workspace, fingerprint

Json = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One submittable job: reads the artifacts of its inputs, writes one artifact."""

    name: str
    version: int
    section: Json
    inputs: dict[str, str]
    """Key of each input, by step name."""

    @property
    def key(self) -> str:
        """16 hex digits over everything that can change the artifact's bytes."""
        content = json.dumps([self.name, self.version, self.section, self.inputs], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StepStatus:
    """Where a step stands in a workspace."""

    step: Step
    state: str
    """done, partial (committed shards or checkpoints wait to be continued), or todo."""
    reasons: tuple[str, ...]
    """Why it has to run: the fields that differ from the newest artifact of the step."""
    manifest: Manifest | None


@dataclass(frozen=True)
class _Spec:
    name: str
    version: int
    inputs: tuple[str, ...]
    section: Callable[[Recipe], Any]
    seeded: bool = True


_SPECS = (
    _Spec("pairs", 2, (), lambda r: r.pairs),
    _Spec("download", 1, ("pairs",), lambda r: r.download, seeded=False),
    _Spec("clip", 1, ("download",), lambda r: r.clip),
    _Spec("embed", 1, ("download", "clip"), lambda r: r.embed, seeded=False),
    # The decoder is the longest: where workers are short, steps that become ready together run in this order.
    _Spec("decoder", 1, ("download", "clip", "embed"), lambda r: r.decoder),
    _Spec("index", 1, ("embed",), lambda r: r.index),
    _Spec("prior", 1, ("clip", "embed"), lambda r: r.prior),
    _Spec("prior_2", 1, ("clip", "embed"), lambda r: r.prior_2),
    _Spec("noisy_clip", 1, ("download", "clip"), lambda r: r.noisy_clip),
    _Spec("upsampler_1", 1, ("download",), lambda r: r.upsampler_1),
    _Spec("upsampler_2", 1, ("download",), lambda r: r.upsampler_2),
    _Spec(
        "evaluate",
        2,
        (
            *("pairs", "download", "clip", "embed", "index", "prior", "prior_2"),
            *("decoder", "noisy_clip", "upsampler_1", "upsampler_2"),
        ),
        lambda r: r.evaluate,
    ),
)

STEP_NAMES = tuple(spec.name for spec in _SPECS)
CASCADE_STEPS = ("clip", "prior", "decoder", "noisy_clip", "upsampler_1", "upsampler_2")
"""Steps whose networks draw a picture."""
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}
_NEWER = {"loss": "simple", "timestep_draws": "uniform"}
"""Fields that came to the diffusion tables later, with what was done before them: at that they are no part of a key, so
that what was trained without them is not trained again."""


def make_plan(recipe: Recipe, *, until: str = "") -> list[Step]:
    """The steps of a recipe, each after its inputs.

    Args:
        recipe: A checked recipe.
        until: Last step wanted; the plan holds it and what it needs. Empty: all.

    Raises:
        ConfigError: If ``until`` is no step of this recipe, or a local input does not exist.
    """
    steps: dict[str, Step] = {}
    for spec in _SPECS:
        section = spec.section(recipe)
        if section is None:
            continue
        tables = _without_newer(without_resources(to_dict(section)))
        if spec.seeded:
            tables["seed"] = recipe.seed
        tables |= _local_inputs(spec.name, tables)
        tables = tables | sampling_tables(recipe) if spec.name == "evaluate" else _without_sampling(tables)
        inputs = {name: steps[name].key for name in spec.inputs if name in steps}
        if spec.name == "clip" and recipe.clip.source == "pretrained":
            inputs = {}
        steps[spec.name] = Step(spec.name, spec.version, tables, inputs)
    if not until:
        return list(steps.values())
    if until not in steps:
        raise ConfigError(f"--until {until}: no such step in this recipe; it has {', '.join(steps)}")
    wanted = {until}
    for step in reversed(list(steps.values())):
        if step.name in wanted:
            wanted |= set(step.inputs)
    return [step for step in steps.values() if step.name in wanted]


def sampling_tables(recipe: Recipe) -> Json:
    """How every network of a recipe is sampled: what those steps depend on that draw."""
    models = {name: to_dict(section)["model"] for name, section in recipe.trained().items()}
    found = {name: {field: model[field] for field in SAMPLING if field in model} for name, model in models.items()}
    return {name: {"model": fields} for name, fields in found.items() if fields}


def _without_newer(tables: Json) -> Json:
    """The tables less the fields of ``_NEWER`` that a recipe leaves as they always were."""
    model = tables.get("model", {})
    if "diffusion" not in model:
        return tables
    diffusion = {name: value for name, value in model["diffusion"].items() if _NEWER.get(name) != value}
    return tables | {"model": model | {"diffusion": diffusion}}


def _without_sampling(tables: Json) -> Json:
    """The tables less how the trained network is sampled: no weight depends on that.

    Of the analytic sampler the training measures the variance, step by step of its walk.
    """
    model = tables.get("model", {})
    if model.get("sampler", {}).get("method") == "analytic":
        return tables
    return (
        tables | {"model": {name: value for name, value in model.items() if name not in SAMPLING}} if model else tables
    )


def artifact_of(workspace: Workspace, step: Step) -> Artifact:
    """Where a step's artifact stands."""
    return workspace.artifact(step.name, step.key)


def inputs_of(workspace: Workspace, step: Step) -> dict[str, Artifact]:
    """The artifacts that a step reads, by step name."""
    return {name: workspace.artifact(name, key) for name, key in step.inputs.items()}


def manifest_of(step: Step, output: Artifact, counts: dict[str, int] | None = None, *, wall_s: float = 0.0) -> Manifest:
    """The commit of a step whose files are all written: what it was made from, and what stands there.

    Args:
        step: The step.
        output: Where its files are.
        counts: Rows, of a step that has some.
        wall_s: Time it took, in seconds.
    """
    return Manifest(
        step=step.name,
        key=step.key,
        step_version=step.version,
        section=step.section,
        inputs=step.inputs,
        counts=counts or {},
        files=output.describe_files(),
        wall_s=round(wall_s, 3),
        created=time.time(),
    )


def plan_status(workspace: Workspace, steps: list[Step]) -> list[StepStatus]:
    """What is done, what remains and why."""
    statuses: list[StepStatus] = []
    for step in steps:
        artifact = artifact_of(workspace, step)
        manifest = artifact.manifest()
        if manifest is not None:
            statuses.append(StepStatus(step, "done", (), manifest))
            continue
        newest = next(iter(workspace.artifacts(step.name)), None)
        previous = newest.manifest() if newest else None
        reasons = _differences(previous, step) if previous else ("never run",)
        state = "partial" if artifact.names() else "todo"
        statuses.append(StepStatus(step, state, tuple(reasons), None))
    return statuses


def _local_inputs(name: str, tables: Json) -> Json:
    """Content of the user's files that a section names by path: it stands in the key in place of the path.

    A folder of pictures keeps its (absolute) path too, for that is what its URLs are made of.
    """
    named = {
        "pairs": {"path": "content"},
        "clip": _local_clip(tables),
        "evaluate": {"prompts_path": "content", "features_path": "features_content"},
    }
    found: Json = {}
    fields = named.get(name, {"init_from": "content"})
    for field, content in fields.items():
        path = tables.get(field, "")
        if not path or "://" in path:
            continue
        if not Path(path).exists():
            raise ConfigError(f"{name}: {path} does not exist; relative paths start at the folder where you run unclip")
        found |= {field: str(Path(path).resolve()) if tables.get("source") == "folder" else ""}
        # Networks of one shape have files of one size: what tells them apart is inside.
        if name == "clip" and Path(path).is_dir():
            weights = sorted(file for file in Path(path).iterdir() if file.suffix in _WEIGHTS)
            found[content] = [fingerprint(str(file)) for file in (Path(path) / "open_clip_config.json", *weights)]
        else:
            found[content] = fingerprint(f"{path}/model.safetensors" if field == "init_from" else path)
    return found


def _local_clip(tables: Json) -> dict[str, str]:
    """Fields of the clip section that name files of this machine: a folder, or a checkpoint beside a known name."""
    if tables.get("source") != "pretrained" or tables["name"].startswith("hf-hub:"):
        return {}
    if "/" in tables["name"] or Path(tables["name"]).is_dir():
        return {"name": "content"}
    return {"tag": "content"} if Path(tables["tag"]).is_file() else {}


def _differences(previous: Manifest, step: Step) -> list[str]:
    reasons = [f"{name} changed" for name, key in step.inputs.items() if previous.inputs.get(name) != key]
    if previous.step_version != step.version:
        reasons.append(f"step version {previous.step_version} -> {step.version}")
    old, new = _flatten(previous.section, step.name), _flatten(step.section, step.name)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return reasons + [f"{name}: {old.get(name)} -> {new.get(name)}" for name in changed]


def _flatten(tables: Json, prefix: str) -> Json:
    flat: Json = {}
    for name, value in tables.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}.{name}")
        else:
            flat[f"{prefix}.{name}"] = value
    return flat
