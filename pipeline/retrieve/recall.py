"""The recall of an index as it was measured: in numbers for the report, and in a sentence if the target is missed.

The metrics of the first segment stand in the manifest of the step, those of a segment that a change added beside its
files. An earlier release wrote none of the latter: then ``segment.json`` says what it says.
"""

import re
from collections.abc import Iterable
from typing import Any

from pipeline.retrieve.segment import MODALITIES
from pipeline.retrieve.versions import BASE_SEGMENT, Version
from pipeline.workspace.store import Artifact

Json = dict[str, Any]

_METRICS = "metrics.json"
_RECALL = re.compile(r"(image|text)_recall_at_(\d+)")
_WORDS = {"image": "pictures", "text": "captions"}


def write_metrics(index: Artifact, segment: str, metrics: Json) -> None:
    """Keep what the build of a later segment has measured, before a version names the segment."""
    index.write_json(f"{segment}/{_METRICS}", metrics)


def metrics_of(index: Artifact, version: Version, of_first: Json) -> list[Json]:
    """What was measured of each segment of a version when it was built.

    Args:
        index: The index.
        version: The version.
        of_first: The metrics of the index's manifest.

    Raises:
        DataError: If a file is missing or damaged.
    """
    return [_of_segment(index, segment, of_first) for segment in version.segments]


def recalls(metrics: Json) -> list[tuple[str, int, float]]:
    """Modality, K and recall at K, K ascending for each modality; empty if a segment had nothing to measure."""
    matches = [(match, value) for name, value in metrics.items() if (match := _RECALL.fullmatch(name))]
    return sorted((match[1], int(match[2]), float(value)) for match, value in matches)


def lowest_recall(segments: Iterable[Json]) -> tuple[float, int] | None:
    """The lowest recall of any modality and segment at its smallest K, and that K; None if nothing was measured."""
    firsts = list[tuple[float, int]]()
    for metrics in segments:
        by_modality: dict[str, tuple[float, int]] = {}
        for modality, k, recall in recalls(metrics):
            by_modality.setdefault(modality, (recall, k))
        firsts += by_modality.values()
    return min(firsts, default=None)


def missed_target(metrics: Json) -> str:
    """A sentence if a segment does not reach the recipe's recall target; empty if it does."""
    if metrics.get("reaches_recall_target", True):
        return ""
    numbers = "; ".join(
        f"{words} " + ", ".join(f"{value:g} at {k}" for modality, k, value in recalls(metrics) if modality == side)
        for side, words in _WORDS.items()
    )
    return (
        f"the recall target of {metrics['recall_target']:g} is not reached, or not surely (measured: {numbers}); a "
        "larger index.memory_gb or another index.kind comes nearer, more index.num_recall_queries measure it better"
    )


def _of_segment(index: Artifact, segment: str, of_first: Json) -> Json:
    if segment == BASE_SEGMENT and "recall_target" in of_first:
        return of_first
    return index.find_json(f"{segment}/{_METRICS}") or _described(index.read_json(f"{segment}/segment.json"))


def _described(description: Json) -> Json:
    """Metrics of a segment by its description, which holds neither times nor what else was tried."""
    metrics = {name: description[name] for name in ("num_rows", "recall_target")}
    for modality in MODALITIES:
        side = description[modality]
        metrics[f"{modality}_kind"] = side["kind"]
        metrics |= {f"{modality}_recall_at_{effort['k']}": effort["recall"] for effort in side["efforts"]}
    return metrics
