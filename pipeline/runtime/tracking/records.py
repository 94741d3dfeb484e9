"""The records of a run as JSON: what its step was made from, how, and by which code."""

import contextlib
import getpass
import hashlib
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.addresses import values_without_secrets, without_password
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.tables import flatten, to_dict
from pipeline.runtime.context import StepContext
from pipeline.runtime.tracking.tracker import now_ms
from pipeline.workspace.manifest import content_of

Json = dict[str, Any]


def version_record(recipe: Recipe, context: StepContext, run: list[str], alias: str) -> Json:
    """A measured cascade as a version of the registered model.

    Args:
        recipe: The recipe.
        context: Its evaluation.
        run: The run of the evaluation; empty: none.
        alias: Which alias the version gets.
    """
    networks = {f"unclip.{name}": key for name, key in context.step.inputs.items() if name in recipe.trained()}
    record = model_record("version", "cascade", context, run)
    return record | {"alias": alias, "tags": record["tags"] | networks, "time_ms": now_ms()}


def model_record(op: str, name: str, context: StepContext, run: list[str]) -> Json:
    """What a step has trained, or measured, by its key and its inputs; the weights stay in the workspace."""
    step, uri = context.step, without_password(context.output.uri)
    facts = {"step": step.name, "key": step.key, "artifact": uri, "inputs": step.inputs}
    tags = {"unclip.key": step.key, "unclip.artifact": uri}
    return {"op": op, "run": run, "name": name, "tags": tags, "text": json.dumps(facts, indent=1)}


def datasets_of(context: StepContext) -> list[Json]:
    """The inputs of a step with the digests of their content; of the first step, the list that it reads."""
    datasets: list[Json] = []
    for name, artifact in context.inputs.items():
        manifest = artifact.manifest()
        if manifest is not None:
            source = json.dumps({"uri": without_password(artifact.uri)})
            profile = json.dumps({"rows": manifest.counts, "key": manifest.key})
            datasets.append({"name": name, "digest": content_of(manifest), "source": source, "profile": profile})
    if not context.step.inputs:
        digest = hashlib.sha256(json.dumps(context.step.section, sort_keys=True).encode()).hexdigest()[:16]
        source = json.dumps(values_without_secrets(context.step.section), sort_keys=True)
        datasets.append({"name": context.step.name, "digest": digest, "source": source, "profile": "{}"})
    return datasets


def begun_at(lines: list[str]) -> float:
    """When a training has begun: at another time, if it has begun anew; 0 if its curves have no row yet."""
    return json.loads(lines[0]).get("begun", 0.0) if lines else 0.0


def new_points(lines: list[str], last: dict[str, int]) -> list[list[Any]]:
    """Points [name, value, time in ms, step] beyond the last step of each curve, which moves on."""
    points: list[list[Any]] = []
    for row in map(json.loads, lines):
        step, time_ms = int(row["step"]), int(1000 * row.get("time", 0)) or now_ms()
        for name, value in row.items():
            if name in {"step", "time", "begun"} or not isinstance(value, int | float) or step <= last.get(name, -1):
                continue
            points.append([name, float(value), time_ms, step])
            last[name] = step
    return points


def params_of(tables: Json) -> dict[str, str]:
    """Tables of settings as texts, by dotted name, without passwords of addresses."""
    fields = flatten(values_without_secrets(tables))
    return {name: json.dumps(value) if isinstance(value, list) else str(value) for name, value in fields.items()}


def tracked(recipe: Recipe) -> Json:
    """The resolved recipe without its tracker, which makes no run another one."""
    return {name: value for name, value in to_dict(recipe).items() if name != "tracking"}


def code_tags() -> dict[str, str]:
    """Which code runs, and who runs it."""
    tags = {"unclip.version": version("unclip"), "mlflow.source.name": "unclip run", "mlflow.source.type": "JOB"}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    tree = Path(__file__).parents[3]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (tree / ".git").exists():
            tags["mlflow.source.git.commit"] = _git(tree, "rev-parse", "HEAD")
            tags["unclip.changed_files"] = str(len(_git(tree, "status", "--porcelain").splitlines()))
    return tags


def _git(tree: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
