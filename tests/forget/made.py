"""A workspace whose data steps are finished, from which pairs are forgotten."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.rows import make_uid
from pipeline.data.selection import embeddings_of
from pipeline.data.shard_tables import split_counts
from pipeline.forget.forget import finish, forget
from pipeline.forget.search import Search, search
from pipeline.recipe.last_run import write_last_run
from pipeline.recipe.plan import artifact_of, inputs_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe
from pipeline.retrieve.build import build_index
from pipeline.runtime.context import StepContext
from pipeline.runtime.filter import run_filter
from pipeline.runtime.filter_embeddings import run_filter_embeddings
from pipeline.workspace.forgotten import Pending
from pipeline.workspace.manifest import content_of
from pipeline.workspace.store import Artifact, Workspace
from tests.filter.planted import embed_by_eye, make_context, planted_pairs, tiny_recipe
from tests.retrieve.segments import compact
from tests.tiny.pairs import write_parts
from tests.tiny.token_states import add_states

BY_URL, BY_UID = "http://a/clean-5", "http://a/clean-9"
"""Two pairs to forget; the first is copied by others, which the filter leaves out as its copies."""
_SECTIONS: dict[str, Any] = {
    "filter": {"min_caption_words": 2, "duplicates": "near", "num_examples": 3},
    "filter_embeddings": {"min_clip_score": 0.0},
    "index": {"kind": "flat", "num_recall_queries": 4},
    "pairs": {"validation_prob": 0.0},
    "tracking": {"uri": "off"},
}


@dataclasses.dataclass
class Made:
    """A workspace whose data steps are finished, by their own code; its networks have manifests alone."""

    recipe: Recipe
    pictures: dict[str, bytes]
    uids: dict[str, str]

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.recipe.workspace)

    def artifact(self, name: str) -> Artifact:
        return artifact_of(self.workspace, next(step for step in make_plan(self.recipe) if step.name == name))

    def inputs(self, name: str) -> dict[str, Artifact]:
        return inputs_of(self.workspace, next(step for step in make_plan(self.recipe) if step.name == name))

    def compact(self, key: str) -> None:
        compact(self.workspace.artifact("index", key), self.recipe.index)

    def finish(self) -> Pending | None:
        return finish(self.workspace, self.compact, unlocked)


def unlocked() -> None:
    """The check of a caller who is alone."""


def commit(context: StepContext, counts: dict[str, int] | None = None) -> None:
    manifests = {name: artifact.manifest() for name, artifact in context.inputs.items()}
    contents = {name: content_of(manifest) for name, manifest in manifests.items() if manifest}
    manifest = manifest_of(context.step, context.output, counts)
    context.output.commit(dataclasses.replace(manifest, input_contents=contents, node_s=3600.0))


def make_workspace(folder: Path) -> Made:
    recipe = tiny_recipe(folder, **_SECTIONS)
    planted = planted_pairs(num_clean=24)
    for name, sample in planted.pairs.items():
        planted.pairs[name] = dataclasses.replace(sample, columns=dict(sample.columns) | {"error_message": ""})
    made = Made(
        recipe,
        {sample.url: sample.picture or b"" for sample in planted.pairs.values()},
        {sample.url: make_uid(sample.url, sample.caption) for sample in planted.pairs.values()},
    )
    rows = {"uid": list(made.uids.values()), "url": list(made.uids)}
    rows |= {"caption": [sample.caption for sample in planted.pairs.values()], "split": ["train"] * len(made.uids)}
    for step in make_plan(recipe):
        context = make_context(folder, step.name, recipe)
        counts: dict[str, int] | None = None
        if step.name == "pairs":
            write_parts(Path(context.output.uri), [pa.table(rows)])
        elif step.name == "download":
            planted.write(context.output)
            for name, record in context.output.shard_records().items():
                files = {file: context.output.describe(file) for file in (f"{name}.tar", f"{name}.parquet")}
                context.output.write_json(f"{name}_stats.json", {"status_dict": {}, "start_time": 1.0})
                splits = split_counts(context.output.path(f"{name}.parquet"))
                context.output.commit_shard(dataclasses.replace(record, files=files, splits=splits))
        elif step.name == "filter":
            counts = run_filter(context).counts
        elif step.name == "embed":
            embed_by_eye(context)
            add_states(context.output)
        elif step.name == "filter_embeddings":
            counts = run_filter_embeddings(context).counts
        elif step.name == "index":
            build_index(embeddings_of(context.inputs), context.output, recipe.index, seed=0)
        elif step.name == "evaluate":
            nearest = {"uid": made.uids[BY_URL], "similarity": 1.0}
            context.output.write_bytes("samples.jsonl", json.dumps({"nearest": nearest}).encode())
        commit(context, counts)
    write_last_run(recipe)
    return made


def copy_of(one: Made, folder: Path) -> Made:
    shutil.copytree(one.workspace.root, folder)
    return dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, workspace=str(folder)))


def texts_of(workspace: Workspace) -> str:
    """Everything that stands in the files of a workspace, after the name of each."""
    texts: list[str] = []
    for path in sorted(Path(workspace.root).rglob("*")):
        texts.append(str(path))
        if path.suffix == ".parquet":
            texts.append(repr(pq.read_table(path).to_pylist()))
        elif path.suffix == ".arrow":
            texts.append(repr(pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_pylist()))
        elif path.is_file():
            texts.append(path.read_bytes().decode("latin-1"))
    return "\n".join(texts)


def forget_names(made: Made, *names: str) -> Search:
    result = search(made.workspace, names)
    forget(made.workspace, result, unlocked)
    return result


def without_none(tables: Any) -> Any:
    if isinstance(tables, dict):
        return {name: without_none(value) for name, value in tables.items() if value is not None}
    return tables
