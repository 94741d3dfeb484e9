"""What to do about a damaged file of a shard, without losing what cannot be made again."""

from pathlib import Path
from typing import IO

from pipeline.workspace.cache import is_cached

_MAKE_AGAIN = (
    "bring it back from a copy; without one, remove manifest.json and the shard's .done.json next to it and run again: "
    "the shard is made again, and if its bytes are others then, as those of the web may be, so is all that was made "
    "from it, trainings too"
)


def repair_hint(file: Path | IO[bytes] | str) -> str:
    """What to do about a damaged file of a shard.

    Args:
        file: A local path, what ``Artifact.ranged`` gives, or a URI.
    """
    if not isinstance(file, Path):
        return _MAKE_AGAIN
    if file.is_symlink():  # a tar that was taken in
        return f"it is a link to {file.resolve()}: bring that file back from a copy"
    if is_cached(file):
        return (
            "it is this machine's copy of a file in a store: remove it, and it is fetched again; if it comes back the "
            f"same, the store's own is damaged: {_MAKE_AGAIN}"
        )
    return _MAKE_AGAIN
