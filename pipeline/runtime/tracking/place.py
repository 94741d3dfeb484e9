"""Where the records of one workspace for one tracker are, and what was said so far."""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import threading
import urllib.parse
from collections.abc import Generator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from pipeline.addresses import without_password
from pipeline.errors import ConfigError
from pipeline.recipe.champion import read_promotions
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.tracking.outbox import RECORDS, SENT, Outbox, count_waiting
from pipeline.runtime.tracking.tracker import Tracker, make_database
from pipeline.workspace.disk import flock
from pipeline.workspace.store import Artifact, Workspace

Json = dict[str, Any]

OFF = "off"
_DATABASE = "mlflow.db"
_STATE = "state.json"
_FILES = (SENT, RECORDS, _STATE)
"""In the order in which they are copied. A kill between two of them makes records be sent twice, which changes nothing;
in another order, records that nobody has sent would count as sent."""
_SCHEMES = {"http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks"}


class Place:
    """Where the records of one workspace for one tracker are, and what was said so far.

    Args:
        recipe: Its ``tracking`` table names the server.
        workspace: Holds the outbox, and the sqlite database where no server is named; both are published at each end of
            a step to an object store.
    """

    def __init__(self, recipe: Recipe, workspace: Workspace) -> None:
        self.owns_database = not recipe.tracking.uri
        self.uri = recipe.tracking.uri or f"sqlite:///{workspace.local_root}/{_DATABASE}"
        self.is_local = self.uri.startswith("sqlite")
        self.shown_uri = without_password(self.uri)
        self.experiment = recipe.tracking.experiment or recipe.name
        self.root = workspace.root
        self._workspace = workspace
        tracker = hashlib.sha256(f"{recipe.tracking.uri} {self.experiment}".encode()).hexdigest()[:8]
        self._folder = f"tracking/{tracker}"
        self._lock = threading.Lock()
        self._use: TextIOWrapper | None = None
        self.state: Json = {"attempts": {}, "curves": {}}

    def open(self) -> Outbox:
        """Bring what another machine published here, and read it.

        A workspace that was copied or moved begins runs of its own, and sends what waits in it, too.
        """
        self._take_database()
        folder = self._workspace.local_root / self._folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _STATE).exists():
            for name in _FILES:
                self._workspace.restore(f"{self._folder}/{name}")
        outbox, where = Outbox(folder), self._identity(folder)
        with contextlib.suppress(FileNotFoundError, ValueError):
            self.state |= json.loads((folder / _STATE).read_text())
        if self.state.get("place") != where:
            self.state = {"place": where, "attempts": {}, "curves": {}}
            self.save()
        elif not self._workspace.is_local:
            # A killed run may have written points that were not published, or into a database that was not.
            for curves in self.state["curves"].values():
                curves["last"] = {}
        return outbox

    @property
    def has_far_database(self) -> bool:
        """Whether no server is named and the workspace is in an object store: each machine has a copy of the database.

        What another machine publishes takes the place of all that is there.
        """
        return self.owns_database and not self._workspace.is_local

    def _take_database(self) -> None:
        """Bring the workspace's own database here, unless a process of this machine has its copy open.

        All recipes of the workspace write into one copy, so this lock is not the one of an outbox.
        """
        if not self.has_far_database:
            return
        path = self._workspace.local_root / f"{_DATABASE}.lock"
        use = path.open("a+")  # NFS gives a shared lock only to who may read
        try:
            with contextlib.suppress(BlockingIOError):
                flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB, str(path))
                self._workspace.restore(_DATABASE)
            flock(use, fcntl.LOCK_SH, str(path))
        except BaseException:
            use.close()
            raise
        self._use = use

    def close(self) -> None:
        """Say that this process has no database open any more."""
        if self._use is not None:
            self._use.close()
            self._use = None

    @contextlib.contextmanager
    def database_to_read(self) -> Generator[str]:
        """The address of a tracker that is only read: for a database in an object store that of a copy of its own."""
        if not self.has_far_database:
            yield self.uri
            return
        with tempfile.TemporaryDirectory() as folder:
            self._workspace.restore(_DATABASE, Path(folder))
            yield f"sqlite:///{folder}/{_DATABASE}"

    def save(self) -> None:
        """Write what was said so far."""
        path = self._workspace.local_root / self._folder / _STATE
        with self._lock:
            new = path.with_suffix(".new")
            new.write_text(json.dumps(self.state, sort_keys=True))
            new.replace(path)

    def publish(self) -> None:
        """Bring database and outbox into the workspace, if it is in an object store."""
        names = [f"{self._folder}/{name}" for name in _FILES]
        for name in [*names, *([_DATABASE] if self.owns_database else [])]:
            self._workspace.publish(name)
        if self._use is not None:
            os.utime(self._use.fileno())  # what empties temporary folders goes by age

    def tracker(self) -> Tracker:
        """Open the server."""
        if not self.is_local:
            return Tracker(self.uri, self.experiment, champion_of=self._champion_of)
        database = Path(urllib.parse.urlsplit(self.uri).path[1:]).absolute()
        make_database(database)
        return Tracker(self.uri, self.experiment, database.parent / "mlflow", self._champion_of)

    def _champion_of(self, recipe: str) -> str:
        """Key of the evaluation that is a recipe's champion now; empty: it has none."""
        champion = read_promotions(self._workspace, recipe).champion
        return champion.evaluate if champion else ""

    def num_waiting(self) -> int:
        """Records that the tracker does not have yet: of this machine, or what another published; changes nothing."""
        folder = Artifact(f"{self._workspace.local_root}/{self._folder}")
        if not folder.exists(_STATE):
            folder = Artifact(f"{self.root}/{self._folder}")
        if self.uri == OFF or not folder.exists(RECORDS):
            return 0
        return count_waiting(folder.path(RECORDS), folder.path(SENT) if folder.exists(SENT) else None)

    @property
    def kept_in(self) -> str:
        """Where records wait."""
        return without_password(f"{self.root}/{self._folder}/{RECORDS}")

    def _identity(self, folder: Path) -> str:
        """Another one for a copy, because its folder is another one."""
        return f"{self.root} {folder.stat().st_ino}" if self._workspace.is_local else self.root


def check_scheme(uri: str) -> None:
    """Refuse an address that no tracker can have.

    Raises:
        ConfigError: If it is one.
    """
    try:
        scheme = urllib.parse.urlsplit(uri).scheme.partition("+")[0]
    except ValueError:  # half of an IPv6 address
        scheme = ""
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"tracking.uri {without_password(uri)}: no such kind of tracker; "
            '"http://host:5000", "sqlite:///file.db" or "off"'
        )
