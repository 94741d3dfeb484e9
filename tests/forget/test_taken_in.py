"""Shards that were taken in: the workspace's own copy of a tar loses forgotten pairs, its owner's tar does not."""

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from pipeline.data.make_pairs import PairsMaker
from pipeline.data.pairs import Pairs
from pipeline.data.shards import StoredPictures
from pipeline.data.sources import Source
from pipeline.data.tar_index import index_tar
from pipeline.forget.forget import finish, forget
from pipeline.forget.search import search
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.runtime.context import StepContext
from pipeline.runtime.taken_in import TakeInWorker
from pipeline.workspace.forgotten import Forgotten
from pipeline.workspace.store import Artifact, Workspace
from tests.data.conftest import make_picture
from tests.forget.made import commit, unlocked
from tests.tiny.recipe import tiny_tables

_LONG = "folder/" * 50
"""Of which a tar writes a header of its own."""
_ROWS = {f"{_LONG if row == 2 else ''}{row:04d}": row for row in range(6)}
_DAMAGED = "0008"


def _url(row: int) -> str:
    return f"http://a/{row if row == 8 else row % 5}.jpg"  # the last sample but one repeats the first


def _tar_of(files: Iterable[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _tar() -> bytes:
    files = list[tuple[str, bytes]]()
    for key, row in [*_ROWS.items(), (_DAMAGED, 8)]:
        record = json.dumps({"url": _url(row), "caption": f"caption {row % 5}"}).encode()
        picture = b"no picture" if key == _DAMAGED else make_picture(row % 5)
        files += [(f"{key}.jpg", picture), (f"{key}.json", record)]
    return _tar_of(files)


def _recipe(workspace: str, source: str) -> Recipe:
    tables = tiny_tables(Path("replaced"), pairs={"source": "shards", "path": source, "validation_prob": 0.0})
    return parse_recipe(tables | {"workspace": workspace})


def _take_in(recipe: Recipe) -> Artifact:
    """The download of a recipe whose list of pairs and shards are finished."""
    pairs, download = (StepContext(recipe, step, recipe.workspace) for step in make_plan(recipe, until="download"))
    maker = PairsMaker(Source(recipe.pairs), pairs.output, Forgotten.read(recipe.workspace))
    for names in maker.phases():
        for name in names:
            maker.make(name)
    maker.finish()
    commit(pairs)
    with contextlib.closing(TakeInWorker(download)) as worker:
        for part in Pairs(pairs.output).parts:
            worker(part.name)
    commit(download)
    return download.output


def _forget(recipe: Recipe, *rows: int) -> None:
    workspace = Workspace(recipe.workspace)
    forget(workspace, search(workspace, map(_url, rows)), unlocked)
    finish(workspace, pytest.fail, unlocked)


def _require_rows(download: Artifact, *rows: int) -> None:
    """The tar, the table and the manifest have these rows, and nothing of others."""
    tar, manifest = download.path("00000.tar"), download.manifest()
    assert sorted(index_tar(tar)) == sorted([_DAMAGED, *(key for key, row in _ROWS.items() if row in rows)])
    content = tar.read_bytes()
    assert [row for row in range(5) if _url(row).encode() in content] == [row for row in rows if row < 5]
    assert manifest is not None
    for name in manifest.files:
        Artifact(download.uri).verify(name)
    pictures = StoredPictures(download, by_ranges=True)
    table = [row for row in pq.read_table(download.path("00000.parquet")).to_pylist() if row["uid"]]
    [damaged] = [row for row in table if row["status"] == "failed_to_resize"]
    assert (damaged["key"], damaged["picture_offset"]) == (_DAMAGED, None)
    table.remove(damaged)
    assert [row["key"] for row in table] == sorted(key for key, row in _ROWS.items() if row in rows and row < 5)
    for row in table:
        place, size = row["picture_offset"], row["picture_bytes"]
        assert content[place : place + size] == make_picture(_ROWS[row["key"]])
        assert pictures.read("00000", row["key"], row["uid"]) == make_picture(_ROWS[row["key"]])


@pytest.fixture(params=["workspace", "tar"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    """One whose workspace, or whose tar, is in a store."""
    store, here = f"memory://{tmp_path.name}", tmp_path / "in"
    if request.param == "workspace":
        here.mkdir()
        (here / "0.tar").write_bytes(_tar())
        return _recipe(f"{store}/w", str(here))
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/in/0.tar", _tar())
    return _recipe(str(tmp_path / "w"), f"{store}/in")


def test_a_copy_of_a_tar_loses_forgotten_pairs_and_keeps_the_others(recipe: Recipe) -> None:
    download = _take_in(recipe)
    _require_rows(download, 0, 1, 2, 3, 4, 5)
    before = download.path("00000.tar").read_bytes()
    _forget(recipe, 2)
    _require_rows(download, 0, 1, 3, 4, 5)
    _forget(recipe, 0, 3)  # with the sample that repeats the first, which is no row
    _require_rows(download, 1, 4)
    # A kill between table and tar leaves the old tar beside the new table.
    download.write_bytes("00000.tar", before)
    workspace = Workspace(recipe.workspace)
    forget(workspace, search(workspace, [_url(1)]), unlocked)
    download.commit_shard(replace(download.shard_record("00000"), files={}))
    finish(workspace, pytest.fail, unlocked)
    _require_rows(download, 4)


def test_a_copy_of_a_tar_has_no_pairs_that_were_forgotten_before(recipe: Recipe) -> None:
    Forgotten("salt").add([_url(0), _url(2)], 0.0, {}, []).write(recipe.workspace)
    _require_rows(_take_in(recipe), 1, 3, 4)


def test_a_copy_of_a_tar_has_no_forgotten_sample_that_cannot_be_used(tmp_path: Path) -> None:
    jsons = {row: json.dumps({"url": _url(row), "caption": f"caption {row}"}).encode() for row in range(3)}
    pictures = [make_picture(number) for number in range(4)]
    samples = {
        "good": [("jpg", pictures[0]), ("json", jsons[0])],
        "twice": [("jpg", pictures[0]), ("jpg", pictures[1]), ("json", jsons[1])],
        "several": [("jpg", pictures[0]), ("png", pictures[1]), ("json", jsons[1])],
        "other": [("jpg", pictures[0]), ("png", pictures[1]), ("json", jsons[2])],
        "damaged": [("jpg", pictures[0]), ("png", pictures[1]), ("json", b'{"url": "\\ud800"'), ("txt", b"text")],
        "half": [("jpg", pictures[0]), ("png", pictures[1]), ("json", b'{"url": "\\ud800"}'), ("txt", b"text")],
        "unnamed": [("jpg", pictures[2]), ("png", pictures[3]), ("txt", b"text")],
    }
    content = _tar_of([(f"{key}.{end}", data) for key, files in samples.items() for end, data in files])
    fsspec.filesystem("memory").pipe_file(f"/{tmp_path.name}/in/0.tar", content)
    recipe = _recipe(str(tmp_path / "w"), f"memory://{tmp_path.name}/in")
    by_content = f"sha256:{hashlib.sha256(pictures[3]).hexdigest()}"
    Forgotten("salt").add([_url(1), by_content], 0.0, {}, []).write(recipe.workspace)
    assert list(index_tar(_take_in(recipe).path("00000.tar"))) == ["good", "other", "damaged", "half"]


def test_the_tar_of_its_owner_stays(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").write_bytes(_tar())
    recipe = _recipe(str(tmp_path / "w"), str(tmp_path / "in"))
    download = _take_in(recipe)
    _forget(recipe, 2)
    assert download.is_link("00000.tar")
    assert (tmp_path / "in/0.tar").read_bytes() == _tar()
    assert [row["uid"] != "" for row in pq.read_table(download.path("00000.parquet")).to_pylist()].count(True) == 5
