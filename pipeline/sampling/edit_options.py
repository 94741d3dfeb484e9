"""Options of the edits of pictures, apart from the edits, so that a command's ``--help`` imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from models.request import EditError

NUM_COMPONENTS = (20, 40, 80, 160)
"""Principal components shown by default; the paper's figure 7 goes from 20 to 320."""


@dataclass(frozen=True)
class EditOptions:
    """Options of all edits; each edit reads those that name it. The command checks the ranges."""

    seed: int = 0
    """Seed of the first frame; if the frames are samples of one request, the others have the following seeds."""
    num_images: int = 4
    """vary, inpaint, outpaint, sdedit: number of pictures."""
    num_frames: int = 8
    """interpolate, text-diff: number of pictures, both ends included."""
    eta: float = 0.8
    """vary: noise of DDIM."""
    noise: Literal["slerp", "fixed"] = "slerp"
    """interpolate: interpolate x_T too, or take the seed's for every frame."""
    source: str = ""
    """text-diff: what the picture shows."""
    target: str = ""
    """text-diff: what it should show."""
    theta: float = 0.4
    """text-diff: theta of the last frame."""
    prompt: str = ""
    """inpaint, outpaint, sdedit: what the finished picture shows."""
    mask: str = ""
    """inpaint: file of the mask."""
    margin: float = 0.25
    """outpaint: width of the border on each side, as a share of the finished picture."""
    strength: float = 0.6
    """sdedit: share of the timesteps."""
    components: tuple[int, ...] = ()
    """pca-reconstruct: numbers of components; empty: 20, 40, 80 and 160, as far as the embeddings have them."""


def evenly(last: float, count: int) -> tuple[float, ...]:
    """``count`` numbers from 0 to ``last``, both ends included; a single one is ``last``."""
    return tuple(last * number / (count - 1) for number in range(count)) if count > 1 else (last,)


def shown_components(components: Sequence[int], most: int) -> tuple[int, ...]:
    """The numbers of principal components that are shown, before all of them.

    Args:
        components: Those that are requested; none: ``NUM_COMPONENTS``, as far as the embeddings have them.
        most: Components that the embeddings have.

    Raises:
        EditError: If more are requested.
    """
    if max(components, default=0) > most:
        raise EditError(f"components {max(components)}: these embeddings have {most} components")
    return tuple(components) or tuple(count for count in NUM_COMPONENTS if count < most)
