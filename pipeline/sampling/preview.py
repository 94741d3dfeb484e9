"""``preview.png`` shows pictures while they are sampled; it is replaced on the way and removed at the end."""

import time
from pathlib import Path

from models.pixels import to_uint8
from models.stage import StageStep, Watch
from pipeline.grid import Block, draw_grid
from pipeline.pictures.png import to_png

PREVIEW = "preview.png"
_MAX_PICTURES = 16


class Preview:
    """A ``Watch`` that writes ``preview.png`` into a folder, and passes each step on.

    Args:
        folder: An existing folder.
        watch: Another ``Watch``, called at each step.
        every_s: Least time between two previews, in seconds.
    """

    def __init__(self, folder: Path, watch: Watch | None = None, *, every_s: float = 2.0) -> None:
        self._path = folder / PREVIEW
        self._watch = watch
        self._every_s = every_s
        self._written = time.monotonic()

    def __enter__(self) -> "Preview":
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)

    def __call__(self, step: StageStep) -> None:
        """Write the pictures of a step, if it has any."""
        if self._watch is not None:
            self._watch(step)
        if step.x0.ndim != 4 or step.x0.shape[1] != 3 or time.monotonic() - self._written < self._every_s:
            return
        pictures = list(to_uint8(step.x0[:_MAX_PICTURES]).cpu().numpy())
        page = draw_grid(
            [Block([picture]) for picture in pictures], columns=4, title=f"{step.stage} {step.done}/{step.total}"
        )
        new = self._path.with_suffix(".tmp")
        new.write_bytes(to_png(page))
        new.replace(self._path)  # so that a reader never sees half a file
        self._written = time.monotonic()
