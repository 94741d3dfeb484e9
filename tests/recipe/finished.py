"""A recipe whose steps are all committed, without a run, and a picture that names its networks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.pictures.png import to_png, with_texts
from pipeline.recipe.last_run import write_last_run
from pipeline.recipe.plan import Step, artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Artifact, Workspace


def finish(recipe: Recipe) -> dict[str, str]:
    """Commit every step of a recipe with a file that is no network; the key of each step."""
    workspace = Workspace(recipe.workspace)
    write_last_run(recipe)
    steps = make_plan(recipe)
    for step in steps:
        output = artifact_of(workspace, step)
        output.write_bytes("00000.bin", step.name.encode())
        output.commit(manifest_of(step, output, {"in": 3, "ok": 3}))
    return {step.name: step.key for step in steps}


def commit_step(workspace: Workspace, step: Step) -> None:
    """Commit the artifact of a step as it is."""
    artifact = artifact_of(workspace, step)
    artifact.commit(manifest_of(step, artifact))


def commit_index(index: Artifact, *segments: list[str], contents: Mapping[str, str] | None = None) -> None:
    """Commit an index that has only the descriptions of its segments, by the sources of each."""
    names = [f"segment_{number:05d}" for number in range(len(segments))]
    for name, sources in zip(names, segments, strict=True):
        embedded = {"sources": sources, "contents": [(contents or {}).get(source, "") for source in sources]}
        index.write_json(f"{name}/segment.json", {"embedded": embedded})
    index.write_json("index.json", {"segments": names[:1]})
    index.write_json("changes/000001.json", {"segments": names})
    index.commit(Manifest(step="index", key=index.key, step_version=1, section={}, inputs={}))


def picture_of(folder: Path, networks: dict[str, str], **others: Any) -> Path:
    facts = {"prompt": "a red \N{SNOWMAN}", "seed": 3, "networks": networks, **others}
    png = with_texts(to_png(np.zeros((4, 4, 3), np.uint8)), {"unclip": json.dumps(facts, ensure_ascii=False)})
    (folder / "picture.png").write_bytes(png)
    return folder / "picture.png"
