"""Embeddings that ``unclip append`` added to an index: no input of its step, so no key and no plan follows them."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.workspace.manifest import content_of, read_record
from pipeline.workspace.store import Artifact

CHANGE = re.compile(r"changes/\d{6}\.json")
"""Names of the versions of an index behind the first, in their order, the last two; each names its segments."""


@dataclass(frozen=True)
class Appended:
    """Some embeddings that an index took in."""

    uri: str
    """Of their artifact."""
    content: str
    """``content_of`` them when their rows were taken; empty if they were not finished then."""

    @property
    def command(self) -> str:
        """What takes them in again, for people."""
        return f"unclip append RECIPE {shlex.quote(self.uri)}"


@dataclass(frozen=True)
class _Segments:
    """What a plan reads of a version of an index."""

    segments: tuple[str, ...]


def newest_change(index: Artifact) -> tuple[str, bytes] | None:
    """Name and content of the newest version of an index behind the first; None if it has no other.

    Raises:
        DataError: If it was listed, and is not there.
    """
    before = ""
    while changes := [name for name in index.names() if CHANGE.fullmatch(name)]:
        name = changes[-1]
        content = index.find_bytes(name)
        if content is not None:
            return name, content
        if name == before:
            raise DataError(f"{index.uri}/{name}: not there, though it is listed; {index.mend()}")
        before = name  # two changes since it was listed have removed it
    return None


def appended_embeddings(index: Artifact, inputs: Mapping[str, str]) -> list[Appended]:
    """What the newest version of an index reads beside the inputs of its step, in the order of its segments.

    Args:
        index: The index step's artifact.
        inputs: Key of each input of its step, by step name.

    Raises:
        DataError: If a file of the index is missing or damaged.
    """
    change = newest_change(index)
    own, root = {f"{step}/{key}" for step, key in inputs.items()}, index.uri.rsplit("/", 2)[0]
    appended = dict[Appended, None]()
    segments = read_record(_Segments, change[1], f"{index.uri}/{change[0]}", index.mend()).segments if change else ()
    for segment in segments:
        embedded = index.read_json(f"{segment}/segment.json")["embedded"]
        contents = embedded.get("contents") or [""] * len(embedded["sources"])  # an earlier release wrote none
        for source, content in zip(embedded["sources"], contents, strict=True):
            if source not in own:
                uri = source if source.startswith("/") or "://" in source else f"{root}/{source}"
                appended[Appended(uri, content)] = None
    return list(appended)


def notes_on_appended(index: Artifact, inputs: Mapping[str, str], *, is_made_anew: bool) -> tuple[str, ...]:
    """What a plan says of the embeddings that an index took in, or what is wrong with the index.

    Args:
        index: The index step's artifact.
        inputs: Key of each input of its step, by step name.
        is_made_anew: Whether the index is made anew, or may be: then without them.
    """
    try:
        appended = appended_embeddings(index, inputs)
        if is_made_anew:
            commands = dict.fromkeys(one.command for one in appended)
            return tuple(f"without the rows that were appended; bring them back afterwards: {one}" for one in commands)
        now = {uri: Artifact(uri).manifest() for uri in dict.fromkeys(one.uri for one in appended)}
    except DataError as error:
        return (str(error),)
    notes = list[str]()
    for one in appended:
        today = now[one.uri]
        if today is None:
            notes.append(f"{one.uri}, which was appended, is not finished or is gone: run its recipe first")
        elif content_of(today) != one.content:
            notes.append(f"{one.uri} was made anew since it was appended: unclip compact RECIPE")
    return tuple(dict.fromkeys(notes))
