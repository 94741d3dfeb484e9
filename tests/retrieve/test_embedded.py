"""The embeddings that an index was built from: made anew, imported, or of another CLIP."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import DataError, StepError
from pipeline.recipe.appended import Appended, appended_embeddings
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.build import SegmentBuild, build_index
from pipeline.retrieve.changes import publish_segment, segment_of_more
from pipeline.retrieve.embedded import content_now
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Artifact, Workspace
from tests.retrieve.conftest import unit
from tests.retrieve.segments import CONFIG, DIM, SHARD_ROWS, append, build_segment, commit_embed, compact, rows_of
from tests.tiny.shards import make_embeddings


def _make_anew(
    embed: Artifact, vectors: NDArray[np.float32], first: int = 0, rows_per_shard: int = SHARD_ROWS - 1
) -> None:
    """Embeddings of the same rows, in other places, as after a retry that gained some."""
    manifest = embed.manifest()
    assert manifest is not None
    embed.clear()
    make_embeddings(embed, vectors, vectors, rows_per_shard=rows_per_shard, first=first)
    embed.commit(replace(manifest, files=embed.describe_files()))


def test_an_index_of_embeddings_that_were_made_anew_is_not_searched(index: Any) -> None:
    output, workspace, vectors = index
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={"embed": "base"}))
    base = workspace.artifact("embed", "base")
    base.clear()
    with pytest.raises(StepError, match=r"embed/base, which is not finished; make both anew: unclip run RECIPE"):
        NeighbourIndex.open(output)
    commit_embed(workspace, "base", vectors[:24])  # with the bytes of before
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(24))
    _make_anew(base, vectors[:24])
    with pytest.raises(StepError, match=r"embed/base, which was made anew since; make both anew: unclip run RECIPE"):
        NeighbourIndex.open(output)
    with pytest.raises(StepError, match="made anew since"):
        NeighbourIndex.open(output, version_number=0)
    compact(output)
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(24))


def test_appended_embeddings_that_were_made_anew_are_put_together_again(index: Any) -> None:
    output, workspace, vectors = index
    more = commit_embed(workspace, "more", vectors[24:], first=24)
    append(output, more)
    assert appended_embeddings(output, {"embed": "base"}) == [Appended(more.uri, content_now(more))]
    _make_anew(more, vectors[24:], first=24)
    with pytest.raises(StepError, match=r"embed/more, which was appended, and made anew since; .*: unclip compact"):
        NeighbourIndex.open(output)
    more.remove("manifest.json")
    with pytest.raises(StepError, match=r"and is not finished or is gone; run the recipe of these embeddings first"):
        NeighbourIndex.open(output)
    _make_anew(commit_embed(workspace, "more", vectors[24:], first=24), vectors[24:], first=24)
    compact(output)
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(48))
    assert appended_embeddings(output, {"embed": "base"}) == [Appended(more.uri, content_now(more))]


def test_a_segment_that_does_not_say_what_it_was_built_from_is_put_together_again(index: Any) -> None:
    output, _, vectors = index
    description = output.read_json("segment_00000/segment.json")
    del description["embedded"]["contents"]
    output.write_json("segment_00000/segment.json", description)
    with pytest.raises(StepError, match=r"segment_00000: an earlier release built it, .*: unclip compact RECIPE"):
        NeighbourIndex.open(output)
    compact(output)
    assert rows_of(NeighbourIndex.open(output), vectors) == set(range(24))


def test_a_build_that_was_stopped_does_not_keep_parts_of_embeddings_that_were_made_anew(index: Any) -> None:
    _, workspace, vectors = index
    embed = commit_embed(workspace, "all", vectors)
    build = SegmentBuild((embed,), workspace.artifact("index", "j"), CONFIG, 0)
    build.prepare()
    build.output.commit_shard(build.add_part(build.parts()[0]))
    build.prepare()
    assert build.output.shard_records()
    _make_anew(embed, vectors[::-1].copy(), rows_per_shard=SHARD_ROWS)  # as many rows in each shard, of other vectors
    build.prepare()
    assert not build.output.shard_records()


def test_embeddings_of_another_clip_are_refused(index: Any) -> None:
    output, workspace, vectors = index
    with pytest.raises(DataError, match="of another CLIP"):
        append(output, commit_embed(workspace, "other", vectors[24:], clip="d", first=24))


def _imported(workspace: Workspace, name: str, vectors: NDArray[np.float32], *, first: int = 0) -> Artifact:
    artifact = workspace.artifact("embed", name)
    make_embeddings(artifact, vectors, vectors, rows_per_shard=SHARD_ROWS, first=first)
    section = {"import_from": "", "import_content": name}
    artifact.commit(Manifest(step="embed", key=name, step_version=1, section=section, inputs={}))
    return artifact


def _clip(workspace: Workspace, key: str, sha256: str = "") -> Artifact:
    """A CLIP step, finished if there is a checksum of its weights."""
    clip = workspace.artifact("clip", key)
    if sha256:
        files = {"open_clip_model.safetensors": {"bytes": 1, "sha256": sha256}}
        clip.commit(Manifest(step="clip", key=key, step_version=1, section={}, inputs={}, files=files))
    return clip


def test_imported_embeddings_are_appended_if_their_recipe_names_the_same_clip(tmp_path: Path) -> None:
    workspace, vectors = Workspace(str(tmp_path)), unit(np.random.default_rng(0).normal(size=(48, DIM)))
    output = workspace.artifact("index", "i")
    build_index(_imported(workspace, "first", vectors[:24]), output, CONFIG, seed=0)
    output.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={"embed": "first"}))
    more, own = _imported(workspace, "more", vectors[24:], first=24), _clip(workspace, "c", "a" * 64)

    def check(embed: Artifact, clip_of_more: Artifact | None, clip_of_index: Artifact | None = own) -> SegmentBuild:
        return segment_of_more(SegmentBuild((embed,), output, CONFIG, 0), clip_of_index, clip_of_more)

    with pytest.raises(DataError, match=r"more: embeddings that were imported, .* give their recipe"):
        check(more, None)
    with pytest.raises(DataError, match=r"more: perhaps embeddings of another CLIP .*/clip/d to compare with; first:"):
        check(more, _clip(workspace, "d"))
    with pytest.raises(DataError, match="more: embeddings of another CLIP"):
        check(more, _clip(workspace, "e", "b" * 64))
    with pytest.raises(DataError, match="index/i: not the finished embeddings of an embed step"):
        check(output, own)
    narrow = _imported(workspace, "narrow", vectors[:, :4])
    with pytest.raises(DataError, match=r"narrow: embeddings of width 4; those of the index, .*, have 8"):
        check(narrow, own)
    computed = commit_embed(workspace, "computed", vectors[24:], clip="c", first=24)
    assert check(computed, None).segment == "segment_00001"
    for same in (own, _clip(workspace, "f", "a" * 64)):
        assert check(more, same).segment == "segment_00001"
    filtered = workspace.artifact("filter_embeddings", "filtered")
    make_embeddings(filtered, vectors[24:], vectors[24:], rows_per_shard=SHARD_ROWS, first=24)
    filtered.commit(
        Manifest(step="filter_embeddings", key="filtered", step_version=1, section={}, inputs={"embed": "more"})
    )
    build = check(filtered, own)
    publish_segment(build, build_segment(build), replaces=False)
    assert NeighbourIndex.open(output).num_rows == 48
