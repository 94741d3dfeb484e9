"""What the edits of pictures read. Apart from what does them, so that a command's ``--help`` loads no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EditOptions:
    """What the edits read, each what it needs; ranges are checked by the command."""

    seed: int = 0
    """Of the first frame; where frames are several draws of one thing, the others have the next ones."""
    num_images: int = 4
    """vary, inpaint, outpaint, sdedit: pictures."""
    num_frames: int = 8
    """interpolate, text-diff: pictures on the way, both ends included."""
    eta: float = 0.8
    """vary: noise of DDIM."""
    noise: Literal["slerp", "fixed"] = "slerp"
    """interpolate: whether x_T turns along."""
    source: str = ""
    """text-diff: what the picture shows."""
    target: str = ""
    """text-diff: what it should show."""
    theta: float = 0.4
    """text-diff: how far the last frame is turned."""
    prompt: str = ""
    """inpaint, outpaint, sdedit: what the finished picture shows."""
    mask: str = ""
    """inpaint: file of the mask."""
    margin: float = 0.25
    """outpaint: width of the border on each side, as a share of the finished picture."""
    strength: float = 0.6
    """sdedit: share of the walk."""
    components: tuple[int, ...] = ()
    """pca-reconstruct: numbers of components; empty: those of 20, 40, 80 and 160 that the embeddings have."""
