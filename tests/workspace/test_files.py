"""A user's files, here, in an object store and on a web server."""

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Generator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.make_pairs import write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.sources import Source
from pipeline.errors import ConfigError, DataError
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.digests import fingerprint, unseen_files
from pipeline.workspace.files import exists, find_files, local_copy, open_file
from pipeline.workspace.store import Artifact
from pipeline.workspace.trees import Tree


@contextlib.contextmanager
def _web_server(folder: Path) -> Generator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _write_list(path: Path) -> None:
    rows = [{"URL": f"http://a/{number}", "TEXT": f"caption {number}"} for number in range(50)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        text = "\n".join(["URL,TEXT", *(",".join(row.values()) for row in rows)])
        path.write_bytes(pa.compress(text.encode(), codec="gzip" if path.suffix == ".gz" else "zstd", asbytes=True))


def test_files_of_a_folder_that_cannot_be_read_are_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.parquet").touch()
    assert len(find_files(str(tmp_path))) == 2
    _refuse(str(tmp_path / "b"), monkeypatch)
    for path in (str(tmp_path), f"{tmp_path}/**/*.parquet"):
        with pytest.raises(DataError, match=rf"^{tmp_path}/b: cannot be read: Permission denied; allow this user"):
            find_files(path)


def _refuse(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody read a folder; root, as whom tests may run, may read every one."""
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_a_disk_that_is_mounted_where_the_files_are_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a").mkdir()
    for name in ("a/part.parquet", "a/1.jpg"):
        (tmp_path / name).touch()
    _refuse(str(tmp_path / "lost+found"), monkeypatch)
    for path in (str(tmp_path), f"{tmp_path}/**/*.parquet"):
        assert f"{tmp_path}/a/part.parquet" in [file.uri for file in find_files(path)]
    assert list(Tree(str(tmp_path)).files()) == ["a/1.jpg", "a/part.parquet"]


@pytest.mark.parametrize("name", ["list.parquet", "list.csv.gz", "list.csv.zst"])
@pytest.mark.parametrize("place", ["here", "store", "web"])
def test_a_list_is_read_wherever_it_is(name: str, place: str, tmp_path: Path) -> None:
    _write_list(tmp_path / name)
    with contextlib.ExitStack() as stack:
        if place == "here":
            path = str(tmp_path / name)
        elif place == "web":
            path = f"{stack.enter_context(_web_server(tmp_path))}/{name}"
        else:
            path = f"memory://lists-{name}"
            fsspec.filesystem("memory").pipe(f"/lists-{name}/deep/{name}", (tmp_path / name).read_bytes())
        output = Artifact(str(tmp_path / "out"))
        summary = write_pairs(Source(PairsConfig(source="list", path=path)), output)
        assert summary.counts == {"in": 50, "ok": 50}
        assert Pairs(output).read(49, 50, ["caption"]).to_pylist() == [{"caption": "caption 49"}]


def test_a_plan_sees_a_remote_list_change_and_says_what_it_cannot_see(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/plan/list.csv", b"url,caption\nhttp://a/1,one\n")
    recipe = load_recipe(None, ["pairs.source=list", "pairs.path=memory://plan/list.csv", f"workspace={tmp_path}"])
    before = make_plan(recipe)[0].key
    assert make_plan(recipe)[0].key == before
    store.pipe("/plan/list.csv", b"url,caption\nhttp://a/1,one and more\n")
    assert make_plan(recipe)[0].key != before
    with pytest.raises(ConfigError, match=r"memory://plan/other.csv does not exist"):
        make_plan(load_recipe(None, ["pairs.source=list", "pairs.path=memory://plan/other.csv"]))
    with _web_server(tmp_path) as url:
        (tmp_path / "list.csv").write_text("url,caption\n")
        assert exists(f"{url}/list.csv")
        assert unseen_files(f"{url}/list.csv") == [f"{url}/list.csv"]
        before = fingerprint(f"{url}/list.csv")
        (tmp_path / "list.csv").write_text("url,caption\nhttp://a/1,one\n")
        assert fingerprint(f"{url}/list.csv") != before


def test_a_missing_package_of_a_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def url_to_fs(uri: str, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", url_to_fs)
    with pytest.raises(
        ConfigError, match=r"s3://bucket/list: a package for s3:// is missing: \S+ -m pip install 'unclip\[s3\]'"
    ):
        find_files("s3://bucket/list")


def test_an_unknown_scheme_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="nowhere://x: Protocol not known: nowhere"):
        find_files("nowhere://x")


def test_a_server_that_does_not_answer_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"http://127.0.0.1:1/list.csv: cannot be looked at"):
        find_files("http://127.0.0.1:1/list.csv")


def test_a_local_copy_of_a_remote_file_is_removed_and_a_local_file_is_its_own(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/copy/x.tar", b"data")
    with local_copy("memory://copy/x.tar") as path:
        assert (path.name, path.read_bytes()) == ("x.tar", b"data")
    assert not path.exists()
    (tmp_path / "y.tar").write_bytes(b"data")
    with local_copy(str(tmp_path / "y.tar")) as path:
        assert path == tmp_path / "y.tar"
    assert path.exists()
    with open_file("memory://copy/x.tar") as stream:
        assert stream.read() == b"data"


def test_a_users_file_is_published_by_a_link_or_by_a_copy(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"data")
    artifact = Artifact(str(tmp_path / "artifact"))
    for _ in range(2):
        artifact.link("00000.tar", str(tmp_path / "x.tar"))
    assert artifact.path("00000.tar").resolve() == tmp_path / "x.tar"
    assert artifact.names() == ["00000.tar"]
    artifact.remove("00000.tar")
    assert (tmp_path / "x.tar").exists()
    fsspec.filesystem("memory").pipe("/link/x.tar", b"far")
    artifact.link("00001.tar", "memory://link/x.tar")
    assert artifact.path("00001.tar").read_bytes() == b"far"
    remote = Artifact("memory://link/artifact")
    remote.link("00000.tar", str(tmp_path / "x.tar"))
    assert remote.exists("00000.tar")
    with pytest.raises(DataError, match=r"memory://link/no.tar: no such file"):
        artifact.link("00002.tar", "memory://link/no.tar")
