"""Arrays written to files, whole or with an error.

NumPy's own ``tofile``, through which ``np.save`` writes to an open file, closes a copy of that file and does not look
whether this went well: on a full disk up to 4 KB at the end of the array are lost without a word.
"""

from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.workspace.hashing import HashedFile


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as NumPy's ``.npy``.

    Raises:
        OSError: If the disk has no room for it.
    """
    with HashedFile(path) as stream:  # no file to NumPy, which calls its ``write``
        np.save(stream, array, allow_pickle=False)


def write_values(stream: IO[bytes], array: NDArray[Any]) -> None:
    """Write the values of an array, and nothing else, at the end of a file.

    Raises:
        OSError: If the disk has no room for them; some are noticed when the file is closed.
    """
    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
