"""What was measured of an index is kept for every segment, and a missed target is a sentence."""

from typing import Any

import numpy as np
import pytest

from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import NeighbourIndex, kinds
from pipeline.retrieve.build import SegmentBuild, build_index
from pipeline.retrieve.changes import publish_segment, segment_of_all
from pipeline.retrieve.recall import lowest_recall, metrics_of, missed_target
from pipeline.retrieve.versions import read_version
from pipeline.workspace.store import Workspace
from tests.retrieve.conftest import unit
from tests.retrieve.segments import append, build_segment, commit_embed

_LISTS = IndexConfig(kind="ivf_rabitq", num_recall_queries=40, recall_target=0.99)


def test_each_segment_keeps_what_was_measured_of_it(index: Any) -> None:
    output, workspace, vectors = index
    first = {"num_rows": 24, "recall_target": 0.95, "image_kind": "flat"}
    assert metrics_of(output, read_version(output), first) == [first]
    append(output, commit_embed(workspace, "more", vectors[24:40], first=24))
    one, two = metrics_of(output, read_version(output), first)
    assert (one, two["num_rows"], two["image_kind"], two["image_recall_at_10"]) == (first, 16, "flat", 1.0)
    build = segment_of_all(SegmentBuild((), output, _LISTS, 0))
    summary = build_segment(build)
    publish_segment(build, summary, replaces=True)
    [whole] = metrics_of(output, read_version(output), first)
    assert whole == summary.metrics
    assert (whole["num_rows"], whole["text_kind"]) == (40, "ivf_rabitq")
    assert {"image_latency_ms", "image_tried", "image_memory_bytes", "reaches_recall_target"} <= whole.keys()
    files = output.read_json("segment_00002/files.json")
    assert files["segment_00002/metrics.json"] == output.describe("segment_00002/metrics.json")
    NeighbourIndex.open(output, is_verified=True)


def test_of_a_segment_of_an_earlier_release_its_description_tells(index: Any) -> None:
    output, workspace, vectors = index
    append(output, commit_embed(workspace, "more", vectors[24:40], first=24))
    output.remove("segment_00001/metrics.json")
    one, two = metrics_of(output, read_version(output), {})
    expected = {"recall_target": 0.95, "image_kind": "flat", "text_kind": "flat"}
    expected |= {"image_recall_at_10": 1.0, "text_recall_at_10": 1.0}
    assert (one, two) == (expected | {"num_rows": 24}, expected | {"num_rows": 16})
    assert lowest_recall([one, two]) == (1.0, 10)
    assert missed_target(one) == ""


def test_a_target_that_is_missed_is_a_sentence_with_what_was_measured(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, workspace = unit(np.random.default_rng(0).normal(size=(600, 8))), Workspace(str(tmp_path))
    embed = commit_embed(workspace, "e", vectors)
    reached = build_index(embed, workspace.artifact("index", "1"), _LISTS, seed=0).metrics
    assert missed_target(reached) == ""
    monkeypatch.setattr(kinds, "candidates", lambda _kind, _k: [1])  # without a choice of rows to compare exactly
    missed = build_index(embed, workspace.artifact("index", "2"), _LISTS, seed=0).metrics
    sentence = missed_target(missed)
    assert sentence.startswith("the recall target of 0.99 is not reached, or not surely (measured: ")
    for modality, words in (("image", "pictures"), ("text", "captions")):
        at_10, at_100 = (missed[f"{modality}_recall_at_{k}"] for k in (10, 100))
        assert f"{words} {at_10:g} at 10, {at_100:g} at 100" in sentence
    recall, k = lowest_recall([reached, missed]) or (1.0, 0)
    assert (recall, k) == (min(missed["image_recall_at_10"], missed["text_recall_at_10"]), 10)
    assert recall < 0.9
