"""An index that was built of several embeddings outlives those whose pairs are all forgotten."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.rows import make_uid
from pipeline.errors import DataError
from pipeline.forget.forget import finish
from pipeline.retrieve import NeighbourIndex
from pipeline.workspace.forgotten import Pending
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Artifact
from tests.forget.made import BY_URL, Made, forget_names, unlocked
from tests.retrieve.conftest import unit
from tests.retrieve.segments import append
from tests.tiny.shards import make_embeddings

_FIRST, _NUM_ROWS = 100, 6


def _append(made: Made) -> Artifact:
    """Append embeddings of six more pairs, two shards, to the index."""
    embed, index = made.workspace.artifact("embed", "more"), made.artifact("index")
    width = NeighbourIndex.open(index).embed_dim
    vectors = unit(np.random.default_rng(0).normal(size=(_NUM_ROWS, width)))
    make_embeddings(embed, vectors, vectors, rows_per_shard=3, first=_FIRST)
    inputs = {"clip": made.artifact("clip").key}
    embed.commit(Manifest(step="embed", key="more", step_version=1, section={}, inputs=inputs))
    append(index, embed, made.recipe.index)
    return embed


def _uids() -> list[str]:
    return [make_uid(f"http://a/{number}", f"caption {number}") for number in range(_FIRST, _FIRST + _NUM_ROWS)]


def test_embeddings_of_which_all_is_forgotten_leave_the_index(made: Made) -> None:
    index, num_rows = made.artifact("index"), NeighbourIndex.open(made.artifact("index")).num_rows
    embed = _append(made)
    assert NeighbourIndex.open(index).num_rows == num_rows + _NUM_ROWS
    forget_names(made, *_uids())
    made.finish()
    opened = NeighbourIndex.open(index)
    assert (opened.num_rows, len(opened.sources)) == (num_rows, 1)
    assert sum(record.counts["ok"] for record in embed.shard_records().values()) == 0
    assert Pending.read(made.workspace.root) is None


def test_an_index_of_which_all_is_forgotten_is_removed_and_named(made: Made) -> None:
    index = made.artifact("index")
    forget_names(made, *made.uids)
    done = made.finish()
    assert done is not None
    assert ("index", index.key) in done.removals
    assert index.names() == []
    assert Pending.read(made.workspace.root) is None


def test_an_index_whose_embeddings_are_being_made_anew_is_removed(made: Made) -> None:
    index, embed, said = made.artifact("index"), _append(made), list[str]()
    made.artifact("filter_embeddings").clear()
    forget_names(made, BY_URL)
    done = finish(made.workspace, made.compact, unlocked, said.append)
    assert said == [
        f"index/{index.key} is removed, and built by the next run: without the rows that were appended; bring them back "
        f"afterwards: unclip append RECIPE {embed.uri}"
    ]
    assert done is not None
    assert ("index", index.key) in done.removals
    assert index.names() == []


def test_embeddings_that_are_away_are_asked_for(made: Made, tmp_path: Path) -> None:
    embed = Path(_append(made).uri)
    shutil.move(embed, tmp_path / "away")
    forget_names(made, BY_URL)
    with pytest.raises(DataError, match=r"embed/more is gone, and rows of .* come from it: bring it back"):
        made.finish()
    shutil.move(tmp_path / "away", embed)
    assert made.finish() is not None
    assert NeighbourIndex.open(made.artifact("index")).num_rows == 27 + _NUM_ROWS
