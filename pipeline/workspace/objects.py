"""A file system of fsspec, made fit for object stores: fresh, patient, and with errors for people.

Nothing is kept of what a store once listed, because other machines write to it. A request that fails for a reason that
passes (500, 503, a closed connection, a server that is down for a while) is made again. What does not pass becomes one
sentence: a package, a credential, a bucket or an endpoint that is missing.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import fsspec

from pipeline.errors import ConfigError, DataError, StepError
from pipeline.workspace.outage import Outage
from pipeline.workspace.ranged_file import RangedFile
from pipeline.workspace.store_errors import (
    NO_CREDENTIALS,
    REFUSED_FILE,
    explained,
    is_beyond_end,
    is_of_wrong_clock,
    passes,
    response_of,
)

Json = dict[str, Any]
_Part = tuple[str, int | None, int | None]
"""Path, first byte and end; None: the whole file."""
T = TypeVar("T")

_STAMPS = ("md5Hash", "ETag", "etag", "checksum", "generation", "LastModified", "last_modified", "updated", "mtime")
"""What stores say of a content, the surest first."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_FIRST_PATIENCE_S = 10.0
_PATIENCE_S = 300.0
_LONGEST_WAIT_S = 15.0
_BATCH = 1000
_CONNECTIONS = 64  # S3's driver has 10 by default: a thousand small files one hundred times one after the other
_PART_BYTES = 50 << 20
_PARTS_AT_ONCE = 4  # so much of a file is in memory while it comes

_answered = set[str]()
"""Stores that have answered this process once: then a failure is no wrong setting."""


def file_system(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it; a local path gives fsspec's own local file system.

    Raises:
        ConfigError: If no file system has this scheme, or its package or a setting is missing; names it.
    """
    if "://" not in uri or uri.startswith("file://"):
        files, path = fsspec.url_to_fs(uri)
        return files, str(path)
    store = ObjectStore(uri)
    return store, store.path


class ObjectStore:
    """The store that a URI names; its methods take paths in it, as fsspec writes them.

    Args:
        uri: Any URI of the store.

    Raises:
        ConfigError: As ``file_system``.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._scheme = uri.partition("://")[0]
        self._kind = _EXTRAS.get(self._scheme, "")
        try:
            _, path = fsspec.url_to_fs(uri, use_listings_cache=False)
        except ImportError as error:
            mend = f"{sys.executable} -m pip install 'unclip[{self._kind}]'" if self._kind else str(error)
            raise ConfigError(f"{uri}: a package for {self._scheme}:// is missing: {mend}") from None
        except ValueError as error:
            raise ConfigError(f"{uri}: {error}") from None
        self.path = str(path)
        self.is_s3 = self._kind == "s3"
        # s3fs would ask for the size first, to read a large file in several requests.
        self._one_request = {"max_concurrency": 1} if self._kind == "s3" else {}
        self._name = f"{self._scheme}://{self.path.strip('/').partition('/')[0]}"

    @property
    def _files(self) -> Any:
        files = fsspec.url_to_fs(self._uri, use_listings_cache=False)[0]  # one object for each process: fork-safe
        if self.is_s3:
            files.config_kwargs.setdefault("max_pool_connections", _CONNECTIONS)  # before its first request
        return files

    def check(self) -> None:
        """Make one request.

        Raises:
            ConfigError: If the bucket does not exist or may not be read, or the endpoint does not answer.
        """
        bucket = self.path.strip("/").partition("/")[0]
        if self._kind and self._ask(lambda: self._files.info(bucket), missing=None) is None:
            raise ConfigError(f"{self._uri}: there is no bucket {bucket}; create it, or correct the URI")

    def info(self, path: str) -> dict[str, Any] | None:
        """What the store says of a file or folder; None if there is none."""
        return self._ask(lambda: cast("dict[str, Any]", self._files.info(path)), missing=None)

    def file_info(self, path: str) -> dict[str, Any] | None:
        """What the store says of a file; None if there is none."""
        if self._kind != "s3":
            return self.info(path)
        bucket, _, key = path.partition("/")

        # s3fs would list a folder of this name where there is no file: a second request, and one that costs more.
        def look() -> dict[str, Any]:
            head: Json = self._files.call_s3("head_object", self._files.kwargs, Bucket=bucket, Key=key)
            return {"ETag": head.get("ETag"), "LastModified": head.get("LastModified"), "size": head["ContentLength"]}

        return self._ask(look, missing=None)

    def exists(self, path: str) -> bool:
        """Whether there is a file."""
        return self.file_info(path) is not None

    def find(self, path: str) -> dict[str, dict[str, Any]]:
        """All files below a folder at any depth, by path."""
        return self._ask(lambda: cast("dict[str, dict[str, Any]]", self._files.find(path, detail=True)), missing={})

    @property
    def lists_from_any_name(self) -> bool:
        """Whether ``page`` can begin behind any name: names come in order, as they do not from a directory bucket."""
        return self.is_s3 and not self.path.strip("/").partition("/")[0].endswith("--x-s3")

    def page(
        self, path: str, start: str = "", *, after: str = "", deep: bool = False, most: int = 0
    ) -> tuple[list[dict[str, Any]], str]:
        """Some of what is in a folder, sorted by path, as ``info`` describes it.

        S3 gives a thousand entries. Other drivers have no pages: they give the whole folder.

        Args:
            path: The folder; one that is not there is empty.
            start: What the call before returned; empty: from the beginning.
            after: A path behind which the entries begin, whether it exists or not; of S3 alone.
            deep: The files at any depth, in place of the folder's own files and folders.
            most: Most entries of S3; 0: a thousand.

        Returns:
            The entries, and where the next ones start; empty: these were the last.
        """
        if not self.is_s3:
            entries = list(self.find(path).values()) if deep else self._ask(lambda: self._files.ls(path), missing=[])
            return sorted(entries, key=lambda entry: str(entry["name"])), ""
        bucket, _, prefix = path.strip("/").partition("/")
        request: Json = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "Delimiter": "" if deep else "/"}
        request |= {"MaxKeys": most or _BATCH} | ({"ContinuationToken": start} if start else {})
        request |= {"StartAfter": after.partition("/")[2]} if after and not start else {}
        files = self._files
        page: Json = self._ask(lambda: files.call_s3("list_objects_v2", files.req_kw, **request), missing={})
        entries = [
            entry | {"name": f"{bucket}/{entry['Key']}", "size": entry["Size"]} for entry in page.get("Contents", [])
        ]
        folders = [f"{bucket}/{entry['Prefix'][:-1]}" for entry in page.get("CommonPrefixes", [])]
        entries += [{"name": name, "size": 0, "type": "directory"} for name in folders]
        return sorted(entries, key=lambda entry: entry["name"]), page.get("NextContinuationToken", "")

    def glob(self, pattern: str) -> dict[str, dict[str, Any]]:
        """What matches a pattern, by path."""
        return self._ask(lambda: cast("dict[str, dict[str, Any]]", self._files.glob(pattern, detail=True)), missing={})

    def folders(self, path: str) -> list[str]:
        """Names of the folders and files directly in a folder."""
        entries = self._ask(lambda: cast("list[str]", self._files.ls(path, detail=False)), missing=[])
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)

    def cat_file(self, path: str) -> bytes:
        """The content of a small file.

        Raises:
            FileNotFoundError: If there is none.
        """
        return self._ask(lambda: cast("bytes", self._files.cat_file(path, **self._one_request)))

    def cat_files(self, paths: Sequence[str]) -> list[bytes]:
        """The contents of small files, many requests at a time; what fails in a way that passes is asked for again.

        Raises:
            FileNotFoundError: If one is not there.
        """
        return _all_there(paths, self.find_files(paths))

    def find_files(self, paths: Sequence[str]) -> list[bytes | None]:
        """As ``cat_files``; None in the place of a file that is not there."""
        return self._cat([(path, None, None) for path in paths], **self._one_request)

    def cat_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Parts of files, (path, start, stop) in bytes; as ``cat_files``. A part is shorter where its file ends.

        Raises:
            FileNotFoundError: If a file is not there.
        """
        return _all_there([path for path, _, _ in parts], self._cat(parts))

    def _cat(self, parts: Sequence[_Part], **options: int) -> list[bytes | None]:
        contents = dict[_Part, bytes | None]()
        for start in range(0, len(parts), _BATCH):
            self._ask(functools.partial(self._cat_missing, parts[start : start + _BATCH], contents, options))
        return [contents[part] for part in parts]

    def _cat_missing(
        self, parts: Sequence[_Part], contents: dict[_Part, bytes | None], options: Mapping[str, int]
    ) -> None:
        """Add the parts to ``contents`` that are not in it yet, also if others of them fail."""
        missing = [part for part in dict.fromkeys(parts) if part not in contents]
        paths, starts, stops = ([part[place] for part in missing] for place in range(3))
        # Not `cat`, which takes a name with brackets for a pattern.
        answers: list[bytes | Exception] = self._files.cat_ranges(paths, starts, stops, **options)
        errors = list[Exception]()
        for part, answer in zip(missing, answers, strict=True):
            if not isinstance(answer, Exception):
                contents[part] = answer
            elif isinstance(answer, FileNotFoundError) and not isinstance(answer.__cause__, OSError):
                contents[part] = None
            elif part[1] is not None and is_beyond_end(answer):
                contents[part] = b""
            else:
                errors.append(answer)
        if errors:
            raise errors[0]

    def open(self, path: str, buffer_bytes: int = 64 << 10) -> Any:
        """Open a file for reading by ranges: only what is read is fetched, ``buffer_bytes`` at the least.

        A web server, which may know neither ranges nor the file's size, is read from the beginning.

        Raises:
            FileNotFoundError: If there is none.
            DataError: While it is read, if another process replaces the file.
        """
        if self._scheme in {"http", "https"}:
            return self._ask(lambda: self._files.open(path, "rb"))
        return RangedFile(self, path, buffer_bytes)

    def get_file(self, path: str, local: str, num_bytes: int = 0) -> None:
        """Fetch a file whole.

        Args:
            path: The file.
            local: Where it is written.
            num_bytes: Its size, if it is known: a large file comes in parts, several at a time.

        Raises:
            FileNotFoundError: If there is none.
        """
        if self._kind != "s3" or num_bytes <= _PART_BYTES:
            self._ask(lambda: self._files.get_file(path, local, **self._one_request))
            return
        # s3fs would ask for the whole file first, to learn its size, and throw away what came of it.
        starts = range(0, num_bytes, _PART_BYTES)
        with open(local, "wb") as file:  # noqa: PTH123  (a string, as fsspec takes)
            for first in range(0, len(starts), _PARTS_AT_ONCE):
                some = list(starts[first : first + _PARTS_AT_ONCE])
                stops = [min(start + _PART_BYTES, num_bytes) for start in some]
                file.writelines(self.read_ranges(path, some, stops))

    def read_ranges(self, path: str, starts: list[int], stops: list[int]) -> list[bytes]:
        """Parts of a file, from ``starts`` to ``stops`` in bytes: a request each, many at a time.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        return self._ask(functools.partial(self._ranges, path, starts, stops))

    def _ranges(self, path: str, starts: list[int], stops: list[int]) -> list[bytes]:
        return self._files.cat_ranges([path] * len(starts), starts, stops, max_gap=None, on_error="raise")

    def put_file(self, local: str, path: str) -> None:
        """Upload a file whole: a reader sees the old content until the upload is complete."""
        self._put(lambda: self._files.put_file(local, path))

    def pipe_file(self, path: str, data: bytes) -> None:
        """Upload a small file."""
        self._put(lambda: self._files.pipe_file(path, data))

    def create(self, path: str, data: bytes) -> bool:
        """Upload a small file if there is none: of several who try, one succeeds; False for the others."""
        try:
            self._put(lambda: self._files.pipe_file(path, data, mode="create"))
        except FileExistsError:
            # A request whose answer was lost is made again, and meets its own file.
            return self.cat_file(path) == data
        return True

    def rm_file(self, path: str) -> None:
        """Remove a file if it is there."""
        self._ask(lambda: self._files.rm_file(path), missing=None)

    def rm_files(self, paths: Sequence[str]) -> None:
        """Remove files if they are there, many with one request where the store can."""
        for start in range(0, len(paths), _BATCH):
            batch = list(paths[start : start + _BATCH])
            try:
                self._ask(lambda batch=batch: self._files.rm(batch))
            except (FileNotFoundError, StepError):  # one is gone, or the store takes no such request
                for path in batch:
                    self.rm_file(path)

    def mv(self, path: str, target: str) -> None:
        """Move a file.

        Raises:
            FileNotFoundError: If there is none.
        """
        self._ask(lambda: self._files.cp_file(path, target))
        self.rm_file(path)  # apart: if its answer is lost, it is made again, and nothing is copied

    def modified(self, path: str) -> float:
        """When a file was written by the store's own clock, in seconds since the epoch.

        Raises:
            FileNotFoundError: If there is none.
        """
        return float(self._ask(lambda: self._files.modified(path)).timestamp())

    def abort_uploads(self, path: str) -> None:
        """Give up the uploads in parts below a folder that killed writers began: they are billed, and never listed.

        Only S3 needs it; the others forget such parts by themselves after some days. A role without the right to list
        or to give up uploads leaves them: no run depends on it.
        """
        files = self._files
        if not hasattr(files, "list_multipart_uploads"):
            return
        bucket, _, prefix = path.partition("/")
        request: Json = {"Bucket": bucket, "Prefix": f"{prefix}/"}
        while True:
            look = functools.partial(files.call_s3, "list_multipart_uploads", **request)
            page = self._ask(lambda look=look: _permitted(look), missing={})
            for upload in page.get("Uploads", []):
                abort = functools.partial(files.abort_mpu, bucket, upload["Key"], upload["UploadId"])
                self._ask(lambda abort=abort: _permitted(abort), missing={})
            if not page.get("IsTruncated"):
                return
            request |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def driver(self, num_connections: int, timeout_s: float) -> Any:
        """A file system of fsspec of its own, for many files at once by somebody who tries again himself.

        On S3 a request is then made once. The other drivers have a few tries of their own.

        Args:
            num_connections: Most requests at once.
            timeout_s: Longest wait for one network operation, in seconds.
        """
        files = fsspec.url_to_fs(self._uri, use_listings_cache=False, skip_instance_cache=True)[0]
        if self.is_s3:
            files.retries = 1
            files.config_kwargs = files.config_kwargs | {
                "retries": {"total_max_attempts": 1},
                "max_pool_connections": num_connections,
                "connect_timeout": timeout_s,
                "read_timeout": timeout_s,
            }
        return files

    def fault_of_all(self, error: Exception) -> Exception | None:
        """What a person is told of a driver's error that any file of the store has: no credentials, or a wrong clock.

        None if it is of one file, or may pass.
        """
        names = {cls.__name__ for cls in type(error).__mro__}
        code = str(response_of(error).get("Error", {}).get("Code", ""))
        is_refused = isinstance(error, PermissionError)
        is_of_one = (not code or code in REFUSED_FILE) if is_refused else not names & NO_CREDENTIALS
        return None if is_of_one and not is_of_wrong_clock(error) else self._explain(error)

    def unstrip_protocol(self, path: str) -> str:
        """The URI of a path."""
        return str(self._files.unstrip_protocol(path))

    def opened(self, path: str) -> tuple[Any, int]:
        """An open file of fsspec without a buffer, and its size in bytes."""
        file = self._ask(lambda: self._files.open(path, "rb", cache_type="none"))
        return file, int(file.size or 0)

    def read_range(self, file: Any, start: int, stop: int) -> bytes:
        """Bytes of an opened file."""

        def read() -> bytes:
            file.seek(start)
            return cast("bytes", file.read(stop - start))

        return self._ask(read)

    def _put(self, action: Callable[[], Any]) -> None:
        try:
            self._ask(action)
        except FileNotFoundError:
            raise ConfigError(f"{self._uri}: there is no bucket {self._name}; create it, or correct the URI") from None

    def _ask(self, action: Callable[[], T], **missing: T) -> T:
        """Make a request, again while its failure may pass; ``missing`` is the answer if there is no such file."""
        wait_s, outage = 0.2, Outage(self._name)
        while True:
            try:
                answer = action()
            except FileExistsError:
                raise
            except FileNotFoundError as error:
                if isinstance(error.__cause__, OSError):  # a web server that does not answer
                    raise DataError(f"{self._uri}: cannot be looked at: {error.__cause__}") from None
                if "missing" in missing:
                    return missing["missing"]
                raise
            except Exception as error:
                patience_s = _PATIENCE_S if self._name in _answered else _FIRST_PATIENCE_S
                if not passes(error) or outage.lasted_s > patience_s:
                    raise self._explain(error) from error
                outage.wait(wait_s, error)
            else:
                _answered.add(self._name)
                return answer
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _explain(self, error: Exception) -> Exception:
        has_answered = self._name in _answered
        return explained(error, self._uri, self._kind, has_answered=has_answered, patience_s=_PATIENCE_S)


def _permitted(action: Callable[[], Any]) -> Json:
    """The answer to a request that a role need not be permitted to make; empty if it is not."""
    try:
        return action() or {}
    except PermissionError:
        return {}


def stamp_of(info: dict[str, Any]) -> str:
    """What a store says about a file's content: its checksum or ETag, else its time; empty if it says nothing."""
    return next((f"{key}={info[key]}" for key in _STAMPS if info.get(key)), "")


def _all_there(paths: Sequence[str], contents: Sequence[bytes | None]) -> list[bytes]:
    if None in contents:
        raise FileNotFoundError(paths[contents.index(None)])
    return cast("list[bytes]", contents)
