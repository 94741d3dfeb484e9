"""Keys of a server, in a file that holds their digests alone, and what each may use a minute.

The file is JSON: ``{"keys": [{"name", "sha256", "scopes", "requests", "pixels", "bytes", "created"}]}``. A key is 256
random bits, so a plain digest is enough: nobody can guess what it is of.
"""

import hashlib
import json
import logging
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.errors import ConfigError
from pipeline.workspace.lock import locked

Scope = Literal["images", "search", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
Unit = Literal["requests", "pixels", "bytes"]
Uses = dict[tuple[str, Unit], float]
"""Amounts by the digest of a key and the unit."""
Limit = Annotated[int, Field(ge=0)]
UNREADABLE = "the server's keys cannot be read"
"""For whoever asks; the log says more."""
_PREFIX = "unclip-"
_MINUTE_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """What the file says of a key."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # a limit with a wrong name would be none
    name: str
    """Whose it is; stands in the access log."""
    sha256: str
    """Digest of the key, in hexadecimal."""
    scopes: tuple[Scope, ...] = SCOPES
    """What it opens."""
    requests: Limit = 0
    """Most requests a minute; 0: no limit."""
    pixels: Limit = 0
    """Most pixels of pictures a minute; 0: no limit."""
    bytes: Limit = 0
    """Most bytes of bodies, received and sent, a minute; 0: no limit."""
    created: str = ""
    """UTC, ISO 8601."""


_KEY, _ROWS = TypeAdapter(Key), TypeAdapter(list[Any])


def add_key(path: Path, name: str, scopes: Sequence[Scope] = SCOPES, **limits: int) -> str:
    """Add a key to a file, which is made if it is not there.

    Args:
        path: The file.
        name: Whose it is.
        scopes: What it opens.
        **limits: Most ``requests``, ``pixels`` and ``bytes`` a minute.

    Returns:
        The key, which stands nowhere else.

    Raises:
        ConfigError: If the file cannot be read, or written with its owner and mode, or has a key of that name.
        StepError: If another process changes it at this moment.
    """
    with _changing(path):
        keys = read_keys(path) if path.exists() else []
        if any(key.name == name for key in keys):
            raise ConfigError(f"{path}: has a key named {name!r}; revoke it first, or take another name")
        secret = _PREFIX + secrets.token_urlsafe(32)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        key = Key(name, digest_of(secret), tuple(scopes), **limits, created=created)
        _write(path, [asdict(one) for one in (*keys, key)])
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of a file; running servers notice at their next request.

    The other keys stay as they are, also one with a mistake, which must not keep a key that has leaked.

    Raises:
        ConfigError: If the file cannot be read, or written with its owner and mode, or has no key of that name.
        StepError: If another process changes it at this moment.
    """
    _read_rows(path)  # a path that was mistyped gets no folder for a lock
    with _changing(path):
        rows = _read_rows(path)
        rest = [row for row in rows if _words_of(row).get("name") != name]
        if len(rest) == len(rows):
            names = ", ".join(str(_words_of(row).get("name") or "one without a name") for row in rows) or "none"
            raise ConfigError(f"{path}: has no key named {name!r}; its keys: {names}")
        _write(path, rest)


def read_keys(path: Path) -> list[Key]:
    """The keys of a file.

    Raises:
        ConfigError: If it is not there, or not such a file, or a key has an unknown word or a wrong number.
    """
    keys, mistakes = _read(path)
    if mistakes:
        raise ConfigError("; ".join(mistake.message for mistake in mistakes))
    return keys


@dataclass(frozen=True)
class _Mistake:
    """A key in the file that is not what it should be."""

    sha256: Any
    """As the file has it."""
    message: str
    """Names the file, the key and the word."""


def _read(path: Path) -> tuple[list[Key], list[_Mistake]]:
    """The keys of a file that are right, and those that are not.

    Raises:
        ConfigError: If it is not there, or not such a file.
    """
    keys, mistakes = list[Key](), list[_Mistake]()
    for number, row in enumerate(_read_rows(path), 1):
        try:
            keys.append(_KEY.validate_python(row))
        except ValidationError as error:
            words = _words_of(row)
            which = f"the key {words['name']!r}" if words.get("name") else f"key number {number}"
            mistakes.append(_Mistake(words.get("sha256"), f"{path}: {which}: {_reason(error)}"))
    return keys, mistakes


def _read_rows(path: Path) -> list[Any]:
    """The keys of a file as it has them.

    Raises:
        ConfigError: If it is not there, or not such a file.
    """
    try:
        return _ROWS.validate_python(json.loads(path.read_bytes())["keys"])
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file of keys; first: unclip keys add {path} NAME") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a file of keys, as `unclip keys` writes it ({type(error).__name__})") from None


def _words_of(row: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", row) if isinstance(row, dict) else {}


def _reason(error: ValidationError) -> str:
    """What is wrong with a key, with the value where that cannot be a secret."""
    first = error.errors(include_url=False, include_context=False)[0]
    word, value = str(first["loc"][0]) if first["loc"] else "", first["input"]
    match first["type"]:
        case "unexpected_keyword_argument":
            return f"unknown word {word!r}; one of {', '.join(one.name for one in fields(Key))}"
        case "literal_error":
            return f"{word}: {value!r} is none of {', '.join(SCOPES)}"
        case "greater_than_equal":
            return f"{word}: {value} is below 0, which is no limit"
        case _:
            return f"{word}: {first['msg']}" if word else "not an object"


def digest_of(secret: str) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


@contextmanager
def _changing(path: Path) -> Generator[None]:
    """Let one process read and write the file: of two, neither may bring back what the other one has revoked."""
    file = path.resolve()
    lock = file.with_name(f".{file.name}.lock")
    with locked(str(lock), f"{path}: another command is changing it", warn=lambda _: None):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _write(path: Path, rows: Sequence[Any]) -> None:
    """Replace the file, or the one that a link leads to; who could read it can read it afterwards."""
    file = path.resolve()
    text = json.dumps({"keys": rows}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # its mode is 0600
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text + "\n")
            if file.exists():
                status = file.stat()
                temporary.chmod(stat.S_IMODE(status.st_mode))
                os.chown(temporary, status.st_uid, status.st_gid)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except PermissionError as error:
        reason = f"{error.strerror}; run the command as its owner, or as root"
        raise ConfigError(f"{path}: cannot be written: {reason}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


class KeyRing:
    """The keys of a file, read again when it changes.

    A key that is wrong holds as it was read before, if it was, and all others as they are now. What is amiss is said
    once in the log. A process that is started again must not stop at a mistake that the one before it could bear, so
    whoever starts a server calls ``read_keys`` first.

    Args:
        path: The file.
        before: What has held in this process until now; that of another file counts for nothing.

    Raises:
        ConfigError: If it is not there, or not such a file.
    """

    def __init__(self, path: Path, before: "KeyRing | None" = None) -> None:
        self._path = path
        self._keys = before._keys if before is not None and before._path == path else dict[str, Key]()
        self._logged = ""
        """What is amiss, as the log says it; empty: nothing."""
        self._stamp: tuple[int, ...] | None = self._stamp_of_file()
        self._take(*_read(path))

    def look(self) -> str:
        """Read the file again if it has changed.

        Returns:
            What is amiss although the server has keys, for whoever asks; empty: nothing.

        Raises:
            ConfigError: If the file cannot be read any more: then nobody comes in.
        """
        stamp = self._stamp_of_file()
        if stamp != self._stamp:
            try:
                keys, mistakes = _read(self._path)
            except ConfigError as error:
                self._stamp = None  # the same file may come back
                self._say(f"{error}; until it can be read, requests are refused")
                raise ConfigError(UNREADABLE) from None
            self._stamp = stamp
            self._take(keys, mistakes)
        return "a change of the server's keys has a mistake and does not hold" if self._logged else ""

    def find(self, secret: str) -> Key | None:
        """The key that a client sends; None if there is none, or it was revoked; raises as ``look``."""
        self.look()
        return self._keys.get(digest_of(secret))

    def of_digest(self, sha256: str) -> Key | None:
        """The key with a digest, as the file was when it was read last."""
        return self._keys.get(sha256)

    def _take(self, keys: Sequence[Key], mistakes: Sequence[_Mistake]) -> None:
        """Let these keys hold, and say what is wrong."""
        before, self._keys = self._keys, {key.sha256: key for key in keys}
        for one in mistakes:
            if isinstance(one.sha256, str) and one.sha256 in before:
                self._keys.setdefault(one.sha256, before[one.sha256])
        amiss = "; ".join(one.message for one in mistakes)
        self._say(f"{amiss} - until that is mended, such a key holds as it was read before, if it was" if amiss else "")

    def _say(self, amiss: str) -> None:
        """Log what is amiss, or that nothing is any more."""
        if amiss and amiss != self._logged:
            _log.error("serve.keys: %s", amiss)
        elif self._logged and not amiss:
            _log.warning("serve.keys: %s is read again", self._path)
        self._logged = amiss

    def _stamp_of_file(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError:
            return ()
        return status.st_ino, status.st_mtime_ns, status.st_size


@dataclass
class _Bucket:
    level: float
    filled_s: float


@dataclass
class Meter:
    """What the keys have used: a bucket for each key and unit, which holds a minute's limit and fills evenly."""

    clock: Callable[[], float] = time.monotonic
    _buckets: dict[tuple[str, Unit], _Bucket] = field(default_factory=dict[tuple[str, Unit], _Bucket])
    _uses: Uses = field(default_factory=dict[tuple[str, Unit], float])
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def wait_s(self, key: Key, unit: Unit, amount: float = 1.0) -> float:
        """Seconds until ``amount`` may be used; 0: now. More than a whole bucket may be used when it is full."""
        bucket, limit = self._filled(key, unit)
        if bucket is None:
            return 0.0
        return max(0.0, (min(amount, limit) - bucket.level) / limit * _MINUTE_S)

    def use(self, key: Key, unit: Unit, amount: float) -> None:
        """Take out of a bucket, below its bottom if need be."""
        with self._lock:
            if getattr(key, unit):
                self._uses[key.sha256, unit] = self._uses.get((key.sha256, unit), 0.0) + amount
            self.charge(key, unit, amount)

    def charge(self, key: Key, unit: Unit, amount: float) -> None:
        """Take out of a bucket what was used in another process."""
        with self._lock:
            bucket, _ = self._filled(key, unit)
            if bucket is not None:
                bucket.level -= amount

    def uses(self) -> Uses:
        """What was used here since the start, of what has a limit."""
        with self._lock:
            return dict(self._uses)

    def rest(self, key: Key, unit: Unit) -> int:
        """What is left in a bucket."""
        bucket, _ = self._filled(key, unit)
        return 0 if bucket is None else max(0, int(bucket.level))

    def _filled(self, key: Key, unit: Unit) -> tuple[_Bucket | None, float]:
        limit: Any = getattr(key, unit)
        if not limit:
            return None, 0.0
        with self._lock:
            now = self.clock()
            bucket = self._buckets.setdefault((key.sha256, unit), _Bucket(float(limit), now))
            bucket.level = min(float(limit), bucket.level + (now - bucket.filled_s) * limit / _MINUTE_S)
            bucket.filled_s = now
            return bucket, float(limit)
