"""One sample of a tar: what the files of its key say.

The step that lists a tar and every reader of its pictures use this, so that none refuses what another has taken.
"""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from pipeline.data.json_lists import parse_json
from pipeline.data.list_columns import CAPTION_COLUMNS
from pipeline.data.reading import MAX_CELL, has_surrogates
from pipeline.data.rows import make_uid
from pipeline.data.tar_index import AGAIN, pictures_of, shown

Span = tuple[int, int]
"""Offset and size of a file in a tar, in bytes."""


@dataclass(frozen=True)
class TarSample:
    """A sample of a tar that can be read; its picture may still be damaged."""

    key: str
    """The key of its files."""
    url: str
    """Where the picture was found; of a sample without a URL, ``sha256:`` and the SHA-256 of its picture."""
    caption: str
    """Its text; may be empty."""
    record: Mapping[str, Any]
    """Its json; empty if it has none, or one that is no record."""
    span: Span
    """Its picture in the tar."""

    @property
    def uid(self) -> str:
        """The uid of its row."""
        return make_uid(self.url, self.caption)


def sample_of(key: str, files: Mapping[str, Span], read: Callable[[Span], bytes]) -> TarSample:
    """The sample of a key.

    Args:
        key: The key.
        files: Span of each file, by its extension.
        read: Reads a file of the tar.

    Raises:
        ValueError: If it cannot be used: it lacks a picture or a text, or one of them cannot be read, or nothing says
            which of several is meant.
    """
    for name in files:
        if name.startswith(AGAIN):
            raise ValueError(f"two files of one name (.{shown(name.removeprefix(AGAIN))})")
    pictures = pictures_of(files)
    if not pictures:
        raise ValueError("no picture")
    if len(pictures) > 1:
        raise ValueError(f"several pictures ({', '.join(f'.{shown(name)}' for name in pictures)})")
    [picture] = pictures.values()
    if has_surrogates(key):
        raise ValueError("a name that is not UTF-8")
    record = _record(files, read)
    text = _find(files, "txt")
    if text is None and record is None:
        raise ValueError("no text: neither .txt nor a record in .json")
    record = record or {}
    caption = _caption(record, b"" if text is None else read(text))
    # Its content names a picture without a URL: its place would be another one after each change of the folder, and
    # what is forgotten would come back under a new name.
    url = _url(record) or _url_by_content(read(picture))
    (url + caption).encode()  # half of a surrogate pair is no character
    if max(len(url), len(caption)) > MAX_CELL:
        raise ValueError(f"a URL or caption longer than {MAX_CELL} characters")
    return TarSample(key, url, caption, record, picture)


def urls_in(files: Mapping[str, Span], read: Callable[[Span], bytes]) -> list[str]:
    """Under which URLs people may know a sample that cannot be used: that in its json, or those of its pictures.

    Args:
        files: Span of each file of its key, by its extension.
        read: Reads a file of the tar.
    """
    named, urls = [(name.removeprefix(AGAIN), span) for name, span in files.items()], list[str]()
    for name, span in named:
        if name.lower() == "json":
            with contextlib.suppress(ValueError):
                urls.append(_url(_record({"json": span}, read) or {}))
    urls = [url for url in urls if url and not has_surrogates(url)]
    return urls or [_url_by_content(read(span)) for name, span in named if pictures_of({name: span})]


def _url_by_content(picture: bytes) -> str:
    return f"sha256:{hashlib.sha256(picture).hexdigest()}"


def _record(files: Mapping[str, Span], read: Callable[[Span], bytes]) -> dict[str, Any] | None:
    """The json of a sample; None if it has none, or something else than a record, such as a list of boxes.

    Raises:
        ValueError: If it is no JSON.
    """
    span = _find(files, "json")
    value = None if span is None else parse_json(read(span))
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _find(files: Mapping[str, Span], extension: str) -> Span | None:
    """The file with an extension, in small letters or, without one, in others."""
    if extension in files:
        return files[extension]
    return next((span for name, span in files.items() if name.lower() == extension), None)


def _url(record: Mapping[str, Any]) -> str:
    """The URL in the json of a sample, or empty."""
    url = record.get("url")
    return url.strip() if isinstance(url, str) else ""


def _caption(record: Mapping[str, Any], text: bytes) -> str:
    """The caption in the json of a sample, or else its text file.

    Raises:
        ValueError: If the text is not UTF-8.
    """
    caption = next((one for name in CAPTION_COLUMNS if isinstance(one := record.get(name), str)), None)
    return text.decode("utf-8-sig").strip() if caption is None else caption
