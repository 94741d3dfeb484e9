"""One cache for the users of a machine, on a disk that the recipe names."""

import multiprocessing
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.errors import ConfigError, StepError
from pipeline.recipe.recipe import load_recipe, parse_recipe
from pipeline.runtime.connection import connect
from pipeline.workspace import cache, stored_files
from pipeline.workspace.objects import ObjectStore
from pipeline.workspace.store import Artifact

_GROUP, _FIRST, _SECOND = 54321, 54322, 54323
_CONTENT = b"of a store" * 100
_URI = "memory://shared/step/key"


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache is named, and what a test names is gone after it."""
    for name in ("UNCLIP_CACHE", "UNCLIP_CACHE_GB", "UNCLIP_CACHE_SHARED"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(cache, "_set_by_recipe", dict[str, str]())


@pytest.fixture
def shared_folder(variables: None, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """A folder of a group, where users of any other id can come."""
    parent = Path(tempfile.mkdtemp(dir="/tmp"))
    parent.chmod(0o755)
    shared = parent / "cache"
    shared.mkdir()
    if os.getuid() == 0:
        os.chown(shared, 0, _GROUP)
    shared.chmod(0o2770)
    monkeypatch.setenv("UNCLIP_CACHE", str(shared))
    monkeypatch.setenv("UNCLIP_CACHE_SHARED", "1")
    yield shared
    shutil.rmtree(parent)


def _as_user(number: int, group: int, do: Callable[[], Any]) -> Any:
    """Call a function in a process of another user."""

    def run(answers: Any) -> None:
        os.setgroups([])
        os.setgid(group)
        os.setuid(number)
        os.umask(0o077)  # the strictest that a user may have
        try:
            answers.put(do())
        except Exception as error:  # noqa: BLE001  (whatever it is, the test sees it)
            answers.put(repr(error))

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=run, args=(answers,))
    process.start()
    process.join(60)
    assert not answers.empty()
    return answers.get()


def _read() -> bytes:
    return Artifact(_URI).path("0.tar").read_bytes()


def _read_without_store() -> bytes:
    def fail(*_: object) -> None:
        raise AssertionError("fetched again")

    ObjectStore.get_file = fail  # in this process alone
    return Artifact(_URI).path("0.tar").read_bytes()


def _write() -> bytes:
    artifact = Artifact(_URI)
    artifact.write_bytes("1.tar", _CONTENT)
    with artifact.write("2.tar") as path:
        path.write_bytes(_CONTENT)
    return artifact.path("2.tar").read_bytes()


def _read_in_little_room() -> list[str]:
    cache._GRACE_S = 0.0
    os.environ["UNCLIP_CACHE_GB"] = str(1.5 * len(_CONTENT) / 1e9)
    Artifact(_URI).path("1.tar")
    return sorted(path.name for path in Path(os.environ["UNCLIP_CACHE"]).rglob("*.tar"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_users_of_one_group_share_a_cache(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_files, "stamp_of", lambda info: str(info["created"]))  # the memory's files have no ETag
    for name in ("0.tar", "1.tar"):
        Artifact(_URI).write_bytes(name, _CONTENT)
    assert _as_user(_FIRST, _GROUP, _read) == _CONTENT
    assert _as_user(_SECOND, _GROUP, _read_without_store) == _CONTENT
    assert _as_user(_SECOND, _GROUP, _write) == _CONTENT
    assert _as_user(_FIRST, _GROUP, _write) == _CONTENT
    modes = {path.stat().st_mode for path in shared_folder.rglob("*")}
    assert {stat.S_IMODE(mode) for mode in modes} == {0o2770, 0o660}
    assert _as_user(_SECOND, _GROUP, _read_in_little_room) == ["1.tar"]
    assert "install -d -g GROUP" in _as_user(_FIRST, _FIRST, _read)  # of another group


def test_a_cache_is_shared_only_in_a_folder_of_a_group(shared_folder: Path) -> None:
    shared_folder.chmod(0o2777)
    with pytest.raises(StepError, match=r"no folder that a group shares.*install -d -g GROUP -m 2770"):
        cache.lookup(f"{_URI}/file", cache.Version("1", 1))
    shared_folder.chmod(0o700)
    with pytest.raises(StepError, match="no folder that a group shares"):
        cache.lookup(f"{_URI}/file", cache.Version("1", 1))


def test_a_recipe_names_the_disk_of_the_cache_on_every_machine(variables: None, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[cache]\nfolder = "{tmp_path}/nvme"\ngb = 1.5\n')
    load_recipe(recipe)
    artifact = Artifact("memory://named/step/key")
    artifact.write_bytes("file", _CONTENT)
    assert artifact.path("file").is_relative_to(tmp_path / "nvme")
    assert cache.limit_bytes(0, tmp_path) == 1_500_000_000
    assert cache.recipe_variables() == {"UNCLIP_CACHE": f"{tmp_path}/nvme", "UNCLIP_CACHE_GB": "1.5"}


def test_workers_of_a_cluster_use_the_cache_of_the_recipe(
    variables: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = dict[str, Any]()
    monkeypatch.setattr("pipeline.runtime.connection._require_listener", lambda _: None)
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[cache]\nfolder = "/local/cache"\n')
    load_recipe(recipe)
    with connect("10.0.0.1:6379"):
        assert asked["runtime_env"] == {"env_vars": {"UNCLIP_CACHE": "/local/cache"}}


@pytest.mark.parametrize(
    ("table", "message"),
    [({"folder": "cache"}, "write a whole path"), ({"shared": True}, "shared needs a folder"), ({"gb": -1}, "gb")],
)
def test_a_cache_that_no_machine_could_have_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe({"cache": table})


def test_the_cache_of_another_user_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    artifact = Artifact("memory://cached/step/key")
    artifact.write_bytes("file", b"mine")
    first = artifact.path("file")
    assert first.read_bytes() == b"mine"
    assert first.is_relative_to(tmp_path / f"unclip-cache-{os.getuid()}")
    assert (tmp_path / f"unclip-cache-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    other = os.getuid() + 1
    monkeypatch.setattr("os.getuid", lambda: other)
    (tmp_path / f"unclip-cache-{other}").mkdir()  # under this user's own id: for the other it is a stranger's
    with pytest.raises(StepError, match=rf"unclip-cache-{other} belongs to another user; .*TMPDIR"):
        artifact.path("file")
