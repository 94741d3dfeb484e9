"""The data of the report, from the artifacts that exist: one function for each section of the page.

A section that cannot be shown yet is None; the report says so in one line. Rates are shares (0 to 1) here and
percent on the page.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.addresses import values_without_secrets, without_password
from pipeline.errors import DataError
from pipeline.pictures.frame import thumbnail
from pipeline.pictures.read import decode
from pipeline.recipe.keys import sampling_tables
from pipeline.recipe.pairs_sections import PairsList
from pipeline.recipe.plan import Step
from pipeline.recipe.recipe import Recipe, default_tables
from pipeline.recipe.steps import STEP_ROWS
from pipeline.recipe.tables import flatten, to_dict
from pipeline.report.charts import Curve, line_chart
from pipeline.retrieve.recall import metrics_of
from pipeline.retrieve.versions import FIRST_VERSION, read_version
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import Artifact, Workspace

Json = dict[str, Any]

_LARGEST_PX = 256
_NUM_REPEATED = 3
_NUM_CAUSES = 8


@dataclass(frozen=True)
class Finished:
    """A finished step, with its artifact and manifest."""

    step: Step
    artifact: Artifact
    manifest: Manifest

    @property
    def title(self) -> str:
        """The step's name for people."""
        return STEP_ROWS[self.step.name].title


Done = dict[str, Finished]


def inline_picture(artifact: Artifact, name: str) -> str:
    """A picture of an artifact as a ``data:`` URI: hard-edged small ones as PNG, larger ones as WebP of 256 px at most.

    Raises:
        DataError: If it is missing or cannot be decoded.
    """
    image = thumbnail(decode(artifact.path(name).read_bytes(), where=f"{artifact.uri}/{name}"), _LARGEST_PX)
    buffer = io.BytesIO()
    if max(image.size) <= 64:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "WEBP", quality=88, method=4)
    kind = "png" if max(image.size) <= 64 else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pictures_of(done: Done) -> Json | None:
    """Samples, stages, reconstructions and neighbours of the evaluate step, their files replaced by ``data:`` URIs."""
    if "evaluate" not in done or not done["evaluate"].artifact.exists("pictures.json"):
        return None
    artifact = done["evaluate"].artifact
    pictures: Json = artifact.read_json("pictures.json")
    return {name: [inline_entry(artifact, entry) for entry in entries] for name, entries in pictures.items()}


def inline_entry(artifact: Artifact, entry: Json) -> Json:
    """The entry of a JSON file, with its picture files replaced by ``data:`` URIs, at any depth of lists."""
    inlined: Json = {}
    for name, value in entry.items():
        if name == "file":
            inlined["src"] = inline_picture(artifact, value)
        elif isinstance(value, list):
            inlined[name] = [inline_entry(artifact, item) if isinstance(item, dict) else item for item in value]
        else:
            inlined[name] = value
    return inlined


@dataclass(frozen=True)
class Ablation:
    """A finished ``unclip ablate``."""

    artifact: Artifact
    manifest: Manifest


def newest_ablation(workspace: Workspace, done: Done, recipe: Recipe) -> Ablation | None:
    """The newest ablation of these networks, sampled as the recipe says; None if there is none."""
    keys = {name: finished.step.key for name, finished in done.items()}
    tables = sampling_tables(recipe)
    for manifest in workspace.manifests("ablate")[0]:
        artifact = workspace.artifact("ablate", manifest.key)
        is_same = manifest.inputs.items() <= keys.items() and all(
            manifest.section.get(name) == table for name, table in tables.items()
        )
        if is_same and artifact.exists("ablation.json"):
            return Ablation(artifact, manifest)
    return None


def ablation_of(ablation: Ablation | None) -> Json | None:
    """The numbers of an ablation, and its pictures as ``data:`` URIs."""
    if ablation is None:
        return None
    result: Json = ablation.artifact.read_json("ablation.json")
    return result | {"shown": [inline_entry(ablation.artifact, entry) for entry in result["shown"]]}


def training_of(done: Done, recipe: Recipe) -> list[Json]:
    """Loss curve, steps, parameters and seconds of each trained network that is done.

    No weights are read: from a store they would be fetched whole.
    """
    networks, begun = list[Json](), {row.begins_with for row in STEP_ROWS.values()}
    for name, section in recipe.trained().items():
        if name not in done or not done[name].artifact.exists(METRICS):
            continue
        finished = done[name]
        rows = read_rows(finished.artifact, METRICS)
        curve = Curve([row["step"] for row in rows if "loss" in row], [row["loss"] for row in rows if "loss" in row])
        if len(curve.steps) < 2:
            continue
        validation = [row["val_loss"] for row in rows if "val_loss" in row]
        networks.append(
            {
                "title": finished.title,
                "begins_another": name in begun,
                "svg": line_chart(curve, label=f"Loss of {finished.title} over {curve.steps[-1]} steps"),
                "num_steps": section.train.total_steps,
                "batch_size": section.train.batch_size,
                "num_parameters": finished.manifest.metrics.get("num_parameters", 0),
                "wall_s": finished.manifest.wall_s,
                "loss": curve.values[-1],
                "val_loss": validation[-1] if validation else None,
            }
        )
    return networks


def read_rows(artifact: Artifact, name: str) -> list[Json]:
    """The lines of a JSON-lines file.

    Raises:
        DataError: If a line is not a JSON object; names the file and the line.
    """
    rows: list[Json] = []
    for number, line in enumerate(artifact.path(name).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{artifact.uri}/{name}: line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{artifact.uri}/{name}: line {number}: not a JSON object")
        rows.append(row)
    return rows


_ODD_ROWS = {
    "malformed": "could not be read",
    "duplicate": "repeated",
    "missing_url": "without a URL",
}
_ODD_CAPTIONS = {
    "empty_captions": "empty captions",
    "captions_from_name": "captions from the picture's name alone",
    "metadata_without_picture": "names in metadata without a picture",
    "annotations_not_compared": "names in annotations not compared with the pictures (the folder is read in parts)",
    "malformed_metadata": "captions in metadata and annotations that could not be read",
    "metadata_not_read": "files of metadata or annotations that were not read",
}


def pairs_of(done: Done, lists: Sequence[PairsList] = ()) -> Json | None:
    """Rows of the list, or of each list, what was left out or is odd, and the first rows that could not be read."""
    if "pairs" not in done:
        return None
    counts, metrics = done["pairs"].manifest.counts, done["pairs"].manifest.metrics
    odd = [(words, counts.get(name, 0)) for name, words in _ODD_ROWS.items()]
    odd += [(words, metrics.get(name, 0)) for name, words in _ODD_CAPTIONS.items()]
    if num_long := metrics.get("long_captions"):
        words = f"captions ({100 * metrics['long_caption_share']:.1f} %) longer than {metrics['context_length']} tokens"
        words += ", whose ends are not read"
        if (measured := metrics["captions_measured"]) < (ok := counts.get("ok", 0)):
            num_long = round(metrics["long_caption_share"] * ok)
            words += f" (estimated from {measured:,} captions)"
        odd.append((words, num_long))
    return {
        "total": counts.get("in", 0),
        "ok": counts.get("ok", 0),
        "validation": metrics.get("validation", 0),
        "lists": [
            f"list {number} ({without_password(one.path)}): {rows['ok']:,} of {rows['in']:,} rows, "
            f"{rows['duplicate']:,} came before; weight {one.weight:g}"
            for number, (one, rows) in enumerate(zip(lists, metrics.get("lists", []), strict=False), 1)
        ],
        "odd": [{"words": words, "count": count} for words, count in odd if count],
        "malformed": metrics.get("malformed_rows", []),
    }


def download_of(done: Done) -> Json | None:
    """Rows by outcome, the classes of failures, odd pictures, and the size of what was stored.

    All of it is in the manifest: 100M pairs have 10,000 shards, whose files would be read one after the other.
    """
    if "download" not in done:
        return None
    manifest = done["download"].manifest
    total, ok = (manifest.counts.get(name, 0) for name in ("in", "ok"))
    causes: dict[str, int] = manifest.metrics.get("failures", {})
    errors = sorted(causes.items(), key=lambda pair: (-pair[1], pair[0]))[:_NUM_CAUSES]
    others = total - ok - sum(count for _, count in errors)
    errors += [("other causes", others)] if others > 0 else []
    most = max((count for _, count in errors), default=1)
    return {
        "total": total,
        "ok": ok,
        "errors": [{"reason": reason, "count": count, "share": count / most} for reason, count in errors],
        "bytes": sum(info["bytes"] for name, info in manifest.files.items() if name.endswith(".tar")),
        "num_shards": sum(name.endswith(".tar") for name in manifest.files),
        "odd": _odd_pictures(manifest.metrics),
    }


def _odd_pictures(metrics: Json) -> list[str]:
    """Sentences about pictures of one pixel, and about files that several URLs share: most often placeholders."""
    repeated = [
        f"at least {one['urls']:,} URLs gave one file, such as {one['url']}" for one in metrics.get("repeated", [])
    ]
    one_pixel = metrics.get("one_pixel", 0)
    return [*([f"{one_pixel:,} pictures have one pixel"] if one_pixel else []), *repeated[:_NUM_REPEATED]]


def index_of(done: Done) -> Json | None:
    """What was measured of each segment of the newest version of the index, and whether rows were deleted."""
    if "index" not in done or not done["index"].artifact.exists(FIRST_VERSION):
        return None
    artifact, metrics = done["index"].artifact, done["index"].manifest.metrics
    version = read_version(artifact)
    return {"has_deleted": bool(version.deleted), "segments": metrics_of(artifact, version, metrics)}


def times_of(done: Done) -> Json | None:
    """Seconds of each step, and of the whole run (steps run in parallel, so less than their sum)."""
    if not done:
        return None
    longest = max(finished.manifest.wall_s for finished in done.values()) or 1.0
    bars = [
        {"title": finished.title, "wall_s": finished.manifest.wall_s, "share": finished.manifest.wall_s / longest}
        for finished in done.values()
    ]
    spans = [(f.manifest.created - f.manifest.wall_s, f.manifest.created) for f in done.values()]
    return {"bars": bars, "total_s": covered_s(spans)}


def covered_s(spans: list[tuple[float, float]]) -> float:
    """Length of the union of time spans, in seconds."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def recipe_changes(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Fields of the recipe that are not at their default: dotted name, value, default."""
    tables = to_dict(recipe)
    defaults, values = flatten(default_tables(tables)), flatten(tables)
    return [
        (name, _text(values_without_secrets(value, name)), _text(defaults[name]) if name in defaults else "")
        for name, value in values.items()
        if value is not None and defaults.get(name) != value
    ]


def _text(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value or '""'
