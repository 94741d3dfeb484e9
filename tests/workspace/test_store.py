"""Files of an artifact: atomic, listed as they are, whole on a full disk."""

import errno
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pipeline.errors import DataError, StepError
from pipeline.workspace.disk import translate_os_errors
from pipeline.workspace.store import Artifact, Workspace
from tests.workspace.conftest import make_manifest


def test_write_publishes_only_on_success(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    with artifact.write("sub/a.bin") as path:
        path.write_bytes(b"abc")
        assert artifact.names() == []
    assert artifact.path("sub/a.bin").read_bytes() == b"abc"
    with pytest.raises(TypeError), artifact.write("b.bin") as path:
        path.write_bytes("half")  # pyright: ignore[reportArgumentType]
    assert artifact.names() == ["sub/a.bin"]
    assert [entry.name for entry in (tmp_path / "step/key").rglob("*") if entry.is_file()] == ["a.bin"]


def test_write_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("a.bin", b"old")
    code = (
        "import time; from pipeline.workspace.store import Artifact\n"
        f"with Artifact({artifact.uri!r}).write('a.bin') as path:\n"
        "    path.write_bytes(b'new'); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert artifact.path("a.bin").read_bytes() == b"old"
    assert artifact.names() == ["a.bin"]
    assert len(list((tmp_path / "step/key").iterdir())) == 2
    artifact.clear_temporaries()
    assert len(list((tmp_path / "step/key").iterdir())) == 1


def _write_half(artifact: Artifact) -> None:
    with artifact.write("big.bin") as path:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_write_full_disk_is_one_message_and_loses_nothing(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("kept.bin", b"kept")
    with pytest.raises(StepError, match="disk is full") as caught:
        _write_half(artifact)
    assert "big.bin" in str(caught.value)
    assert artifact.names() == ["kept.bin"]


def _save_weights(path: Path) -> None:
    """Writes beside the path, so /dev/full does not stop it: what it says on a full tmpfs."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _save_index(path: Path) -> None:
    index = faiss.IndexFlatIP(8)
    index.add(np.zeros((10_000, 8), np.float32))
    with path.open("wb", buffering=0) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _save_table(path: Path) -> None:
    pq.write_table(pa.table({"row": np.random.default_rng(0).random(10_000)}), path)


@pytest.mark.parametrize("save", [_save_weights, _save_index, _save_table])
def test_write_reports_a_full_disk_in_one_way_for_every_library(save: Callable[[Path], None], tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))

    def write() -> None:
        with artifact.write("file") as path:
            path.symlink_to("/dev/full")
            save(path)

    with pytest.raises(StepError, match=rf"^{tmp_path}/file: the disk is full"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST])
def test_translate_os_errors_names_the_place(code: int) -> None:
    with pytest.raises(StepError, match="/data/file"), translate_os_errors("/data/file"):
        raise OSError(code, "no")


def test_translate_os_errors_leaves_others_alone() -> None:
    with pytest.raises(FileNotFoundError), translate_os_errors("x"):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_a_commit_removes_what_killed_writers_left(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("a.tmp-b.bin", b"a name that only looks like it")
    for name in ("sub", "live/checkpoints", ".tmp-folder"):
        folder = tmp_path / "step/key" / name
        folder.mkdir(parents=True)
        (folder / ".tmp-0123-half").write_bytes(b"half")
    artifact.commit(make_manifest())
    left = [str(path.relative_to(artifact.uri)) for path in Path(artifact.uri).rglob("*") if path.is_file()]
    assert sorted(left) == ["a.tmp-b.bin", "manifest.json"]
    assert not (tmp_path / "step/key/.tmp-folder").exists()


def test_a_file_that_is_written_again_has_another_stamp(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    assert artifact.stamps("live/checkpoints/") == {}
    for name in ("1.bin", "live/checkpoints/1.bin", "live/checkpoints/2.bin", "live/checkpoints/.tmp-0123-3.bin"):
        artifact.write_bytes(name, b"1")
    first = artifact.stamps("live/checkpoints/")
    assert sorted(first) == ["live/checkpoints/1.bin", "live/checkpoints/2.bin"]
    assert artifact.stamps("live/checkpoints/") == first
    artifact.write_bytes("live/checkpoints/2.bin", b"22")
    second = artifact.stamps("live/checkpoints/")
    assert [name for name in first if first[name] != second[name]] == ["live/checkpoints/2.bin"]


def test_a_listing_has_links_and_hidden_files_and_follows_nothing(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    assert artifact.names() == []
    assert artifact.sizes() == {}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    for name in ("b/2.bin", "b-/1.bin", "a.bin", ".hidden"):
        artifact.write_bytes(name, b"12")
    for name, target in (("folder", elsewhere), ("broken", tmp_path / "none")):
        (Path(artifact.uri) / name).symlink_to(target)
    files, base = fsspec.url_to_fs(artifact.uri)
    names = [path[len(base) + 1 :] for path in files.find(base)]
    assert artifact.names() == sorted(names) == [".hidden", "a.bin", "b-/1.bin", "b/2.bin", "broken", "folder"]
    assert artifact.sizes() == {name: 0 if name in {"broken", "folder"} else 2 for name in names}
    assert not artifact.exists("broken")
    assert Artifact(f"{artifact.uri}/a.bin").names() == []


def test_read_json_malformed_names_the_file(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/step/key")
    artifact.write_bytes("x.json", b"{")
    with pytest.raises(DataError, match=r"x\.json"):
        artifact.read_json("x.json")
    with pytest.raises(DataError, match="no file"):
        artifact.path("none")


def test_published_files_may_be_read_by_whoever_the_umask_allows(tmp_path: Path) -> None:
    artifact = Artifact(str(tmp_path))
    with artifact.write("weights.safetensors") as path:
        save_file({"weight": np.zeros(2)}, path)
    artifact.write_bytes("plain", b"")
    (tmp_path / "by-hand").touch()
    modes = {name: (tmp_path / name).stat().st_mode for name in ("weights.safetensors", "plain", "by-hand")}
    assert len(set(modes.values())) == 1, modes


def test_artifact_works_on_an_object_store_and_survives_pickling() -> None:
    artifact = Workspace("memory://bucket/prefix").artifact("step", "key")
    artifact.write_bytes("sub/data.bin", b"123")
    artifact.commit(make_manifest(created=time.time(), files=artifact.describe_files()))
    again = pickle.loads(pickle.dumps(artifact))
    assert again.path("sub/data.bin").read_bytes() == b"123"
    assert again.manifest().files["sub/data.bin"]["bytes"] == 3
    manifests, damages = Workspace("memory://bucket/prefix").manifests("step")
    assert ([manifest.created for manifest in manifests], damages) == ([again.manifest().created], [])


def test_write_json_is_stable_bytes(tmp_path: Path) -> None:
    artifact = Artifact(f"{tmp_path}/s/k")
    artifact.write_json("a.json", {"b": 1, "a": 2})
    artifact.write_json("b.json", {"a": 2, "b": 1})
    assert artifact.read_bytes("a.json") == artifact.read_bytes("b.json")
    assert artifact.read_json("a.json") == {"a": 2, "b": 1}
