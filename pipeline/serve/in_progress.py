"""A request in progress: the phase that is sampled now, its pictures, and the previews that it shows of them."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from models.cascade import Phase
from models.pixels import to_uint8
from models.request import SampleRequest
from models.stage import PIXELS, Batch, Chain, Stage
from pipeline.serve.protocols import Preview
from pipeline.serve.traces import EngineSpans


@dataclass(eq=False)
class Pending:
    """A request without an answer yet."""

    phase: Phase
    """What is sampled now."""
    request: SampleRequest
    client: str
    """Who asks."""
    num_previews: int = 0
    """Previews of each picture."""
    show: Callable[[Preview], None] | None = None
    """Called with each preview, by the engine's thread."""
    spans: EngineSpans = field(default_factory=EngineSpans)
    """Its part of the request's trace."""
    future: Future[Any] = field(default_factory=Future[Any])
    """``SampledPictures``, or ``Work`` for another engine."""
    arrived_s: float = field(default_factory=time.monotonic)
    """When it came, by ``time.monotonic``; earlier by the time that it was in the engines before."""
    ends_s: float = math.inf
    """When its time is up, by ``time.monotonic``."""
    num_steps: int = 0
    """Steps that its pictures have taken."""
    rest: tuple[int, ...] = ()
    """Stages of the phase that another engine has, by number."""
    is_last: bool = True
    """Whether the phase is the request's last."""
    cost: float = 1.0
    """Of one picture of the phase, for fair shares; see cost.py."""
    batch: Batch | None = None
    """All items of the phase, with the captions encoded; None before the first is admitted."""
    pictures: list["Picture"] = field(default_factory=list["Picture"])
    """The phase's pictures in progress or finished, in the order of its items."""

    @property
    def num_waiting(self) -> int:
        """Pictures of the phase that are not admitted yet."""
        return self.phase.num_items - len(self.pictures)

    @property
    def finished(self) -> bool:
        """Whether all pictures of the phase are sampled."""
        return not self.num_waiting and all(picture.finished for picture in self.pictures)


@dataclass(eq=False)
class Picture:
    """One picture in the cascade."""

    pending: Pending
    batch: Batch
    """One item."""
    stage: int = 0
    """Number of its stage among those of its phase."""
    chain: Chain | None = None
    """Its state in that stage; None before its first step there."""
    arrived_s: float = field(default_factory=time.monotonic)
    """When it came to that stage."""
    moved_s: float = field(default_factory=time.monotonic)
    """When it came there, or took its last step there."""

    @property
    def finished(self) -> bool:
        """Whether it has left its last stage."""
        return self.stage == len(self.pending.phase.stages)

    @property
    def position(self) -> int:
        """Steps taken in its stage; -1 before it enters."""
        return self.chain.position if self.chain else -1

    def saved(self) -> Callable[[], None]:
        """See ``Chain.saved``; a picture that has not entered its stage enters it again."""
        return self.chain.saved() if self.chain else partial(setattr, self, "chain", None)


def show_preview(stage: Stage, picture: Picture) -> None:
    """Show a picture's present state if it is time for one of its previews."""
    pending, chain = picture.pending, picture.chain
    if (
        pending.show is None
        or pending.future.done()
        or chain is None
        or chain.finished
        or PIXELS in picture.batch.values
    ):
        return
    places = _preview_places(len(chain.timesteps), pending.num_previews)
    if stage.makes == PIXELS and chain.position in places:
        image = to_uint8(stage.preview(chain))[0].cpu().numpy()
        pending.show(Preview(pending.pictures.index(picture), places.index(chain.position), image))


def _preview_places(num_steps: int, num_previews: int) -> list[int]:
    """The numbers of steps after which previews are shown: the first after a tenth of a chain, the others evenly."""
    places = {max(1, round(num_steps * (0.1 + 0.9 * number / num_previews))) for number in range(num_previews)}
    return sorted(place for place in places if place < num_steps)
