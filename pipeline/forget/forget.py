"""Forgets pairs: at once in every index and for all that comes later, and then in the files that hold their rows."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from pipeline.errors import StepError
from pipeline.forget.rewrite import rewrite
from pipeline.forget.search import Search
from pipeline.recipe.appended import notes_on_appended
from pipeline.recipe.garbage import read_artifacts
from pipeline.recipe.steps import STEPS
from pipeline.retrieve.changes import delete, has_rows, remove_earlier_versions, sources_of
from pipeline.retrieve.takedown import Takedown
from pipeline.train.results import RESULTS
from pipeline.workspace.forgotten import Forgotten, Pending
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import Artifact, Workspace

REPORT = "report.html"


def forget(workspace: Workspace, search: Search, check: Callable[[], None]) -> None:
    """Let no search return the pairs, and no later step read them; their rows leave the files with ``finish``.

    Stopped anywhere, it is only done again.

    Args:
        workspace: The workspace, locked.
        search: The pairs, and what the workspace holds of them.
        check: Raises StepError if the lock was lost; called before each commit.

    Raises:
        DataError: If a file of an index is damaged.
    """
    root, before = workspace.root, Pending.read(workspace.root) or Pending()
    check()
    # First: it holds no names, and to rewrite what is not forgotten is harmless.
    before.merge(search.pending).write(root)
    names, forgotten = sorted({*search.names, *search.uids}), Forgotten.read(root)
    if not all(forgotten.has(names)):  # what is only done again counts once
        forgotten.add(names, time.time(), search.rows, [*search.networks, *search.earlier]).write(root)
    listed = Takedown.read(root)
    if set(names) & set(listed.names):
        listed.remove(names).write(root)  # that file has them in words
    for key in search.pending.indexes:
        delete(workspace.artifact("index", key), names, check)


def finish(
    workspace: Workspace,
    compact_index: Callable[[str], None],
    check: Callable[[], None],
    say: Callable[[str], object] = lambda _text: None,
) -> Pending | None:
    """Rewrite everything that still holds forgotten rows; nothing to do if there is nothing.

    Stopped anywhere, it goes on with the shards that were left half a minute before.

    Args:
        workspace: The workspace, locked.
        compact_index: Builds one segment from all of an index, by its key.
        check: Raises StepError if the lock was lost; called before each commit.
        say: Receives every half minute, in words, how far it is.

    Returns:
        What was done; None if nothing was to be done. Its removals have also the indexes of which no row is left, and
        those whose embeddings are being made anew.

    Raises:
        DataError: If a file is damaged.
        StepError: If somebody reads what is to be rewritten.
    """
    work = Pending.read(workspace.root)
    if work is None:
        return None
    _require_unread(workspace, work)
    forgotten, pending = Forgotten.read(workspace.root), replace(work, has_begun=True)
    _write(workspace, pending, check)
    for one in work.rewrites:
        note = partial(_note_left, workspace, pending, check, say)
        rewrite(workspace.artifact(one.step, one.key), one, forgotten, check, note)
        pending = replace(pending, rewrites=pending.rewrites[1:])
        _write(workspace, pending, check)
    for step, key in work.removals:
        check()
        workspace.artifact(step, key).destroy()
    if work.rewrites:
        _remove_grids(workspace, check)
    for key in work.indexes:
        check()
        index = workspace.artifact("index", key)
        if (manifest := index.manifest()) is None:  # somebody has removed it since
            index.destroy()
        elif _can_be_built(workspace, index, manifest):
            compact_index(key)
            remove_earlier_versions(index)
        else:
            for note in notes_on_appended(index, manifest.inputs, is_made_anew=True):
                say(f"index/{key} is removed, and built by the next run: {note}")
            index.destroy()
            work = replace(work, removals=(*work.removals, ("index", key)))
        pending = replace(pending, indexes=pending.indexes[1:])
        _write(workspace, pending, check)
    check()
    root = Artifact(workspace.root)
    root.remove(REPORT)  # it shows pictures; the next run writes it anew
    (workspace.local_root / REPORT).unlink(missing_ok=True)
    pending.remove(workspace.root)
    return work


def _can_be_built(workspace: Workspace, index: Artifact, manifest: Manifest) -> bool:
    """Whether the embeddings of an index have rows, and its own are not being made anew: then so will be the index."""
    inputs = [workspace.artifact(*one) for one in manifest.inputs.items()]
    return all(one.manifest() is not None for one in inputs) and any(map(has_rows, sources_of(index)))


def _remove_grids(workspace: Workspace, check: Callable[[], None]) -> None:
    """Remove what trainings under way show beside the true pictures of some rows; the next validations show others."""
    for row in STEPS:
        for key in workspace.keys(row.name) if row.trains else ():
            artifact = workspace.artifact(row.name, key)
            check()
            artifact.remove_all(
                [name for name in artifact.names() if name.startswith(RESULTS) and name.endswith(".png")]
            )


def _write(workspace: Workspace, pending: Pending, check: Callable[[], None]) -> None:
    check()
    pending.write(workspace.root)


def _note_left(
    workspace: Workspace, pending: Pending, check: Callable[[], None], say: Callable[[str], object], left: Sequence[str]
) -> None:
    """Keep which shards of the first artifact are left."""
    one, *others = pending.rewrites
    _write(workspace, replace(pending, rewrites=(replace(one, shards=tuple(left)), *others)), check)
    say(f"forgotten rows leave {one.step}: {len(one.shards) - len(left)} of {len(one.shards)} shards are rewritten")


def _require_unread(workspace: Workspace, pending: Pending) -> None:
    """Refuse to rewrite embeddings and indexes of which somebody knows the places of rows.

    Raises:
        StepError: If somebody reads one of them.
    """
    embeddings = [(one.step, one.key) for one in pending.rewrites if one.step in {"embed", "filter_embeddings"}]
    indexes = [("index", key) for key in pending.indexes]
    places: Sequence[tuple[str, str]] = [*embeddings, *indexes, *pending.removals]
    used = read_artifacts(workspace) if places else {}
    for step, key in places:
        if owner := used.get((step, key)):
            raise StepError(
                f"{step}/{key} holds rows that are to be forgotten, and is in use by {owner}; end it, then: "
                f"unclip forget --compact --workspace {shlex.quote(workspace.root)}"
            )
