"""The interface between the API and the networks: plain calls, so that Ray Serve can run them in another process.

This module imports no torch, because the process that speaks HTTP does not need it.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.request import SampleRequest

Images = NDArray[np.uint8]
Vectors = NDArray[np.float32]


class NotServing(Exception):
    """No networks are there to answer: they start, end, or have died."""


class OtherNetworks(NotServing):
    """Other networks are there than those that a request means: some are being swapped."""


class Overloaded(Exception):
    """Too many requests wait; try again later.

    Args:
        reason: What is full, for people.
        retry_after_s: Estimate of when there is room again, in seconds; 0: not known.
    """

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason, retry_after_s)  # both, because Ray rebuilds an error from these arguments
        self.reason = reason
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.reason


class TooLittleTime(Overloaded):
    """A request would not be finished within its own timeout, so it is not begun."""


class DeadlinePassed(Exception):
    """The time of a request is up before its pictures are sampled.

    Args:
        reason: What has taken it, for people.
    """

    def __init__(self, reason: str = "the time of the request was up before it was finished") -> None:
        super().__init__(reason)


@dataclass(frozen=True)
class SampledPictures:
    """The answer to a request for pictures."""

    images: Images
    """(n, H, W, 3)."""
    z_image: Vectors | None
    """(n, D), the prior's embeddings; None without a prior."""
    num_steps: int = 0
    """Network steps that the pictures took, summed over pictures and stages."""


@dataclass(frozen=True)
class Accepted:
    """A request will be sampled: nothing of it is refused any more."""


@dataclass(frozen=True)
class Preview:
    """What a picture would be if it ended now: the x0 prediction of the first stage that makes pictures."""

    index: int
    """Number of the picture in its request."""
    number: int
    """Number of the preview, from 0."""
    image: Images
    """(H, W, 3), of that stage's size."""


Event = Accepted | Preview | SampledPictures
"""What a stream yields: ``Accepted`` first, previews, and the pictures last."""


class PictureModel(Protocol):
    """The networks: an ``engine.Engine``, or those of other processes."""

    async def sample(self, request: SampleRequest, client: str = "") -> SampledPictures:
        """The pictures of a request, one for each seed; cancelling drops the request.

        Args:
            request: What to sample.
            client: Who asks; clients get equal shares.

        Raises:
            ValueError: If the networks cannot do what is requested.
            Overloaded: If too many requests wait, or ``TooLittleTime``.
            DeadlinePassed: If its time is up.
            NotServing: If there is no engine.
        """
        ...

    def stream(self, request: SampleRequest, client: str = "", num_previews: int = 0) -> AsyncGenerator[Event]:
        """As ``sample``, with ``num_previews`` previews of each picture; ending the iteration drops the request."""
        ...

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """z_text of n texts, (n, D), each of length one."""
        ...

    async def embed_image(self, image: Images) -> Vectors:
        """z_image of a picture (H, W, 3), (D,), of length one."""
        ...

    async def reduce_image(self, image: Images, components: Sequence[int]) -> tuple[tuple[int, ...], Vectors]:
        """z_image of a picture (H, W, 3) with its first principal components alone, and last with all D of them.

        Args:
            image: The picture.
            components: How many; none: 20, 40, 80 and 160, as far as there are more.

        Returns:
            The numbers of components, n of them, and the embeddings (n, D), each of length one.

        Raises:
            ValueError: If there are fewer components, or too few training embeddings.
        """
        ...

    async def cut_at(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text that CLIP reads, start and end included, if it has more; 0: CLIP reads all of it."""
        ...

    async def stats(self) -> dict[str, int]:
        """Counts of the engine; empty if it is not running."""
        ...

    async def metrics(self) -> dict[str, str]:
        """Samples for Prometheus of each replica, by its name."""
        ...


@dataclass(frozen=True)
class NeighbourRow:
    """One neighbour."""

    id: int
    similarity: float
    columns: dict[str, Any]
    """uid, url, caption, key, shard, split."""
    picture: bytes | None = None
    """The stored picture as a JPEG file, if it was asked for and can be read."""

    def is_near_copy(self, limit: float | None) -> bool | None:
        """Whether a picture of this similarity nearly copies this row: only what was trained on can be copied.

        Args:
            limit: See ``Neighbours.near_copy``; None: nobody can tell, and neither can this.
        """
        return None if limit is None else self.columns["split"] == "train" and self.similarity > limit


class Neighbours(Protocol):
    """Nearest-neighbour search over the training pictures, here or in another process."""

    async def embed_dim(self) -> int:
        """Width D of a query, in features."""
        ...

    async def near_copy(self) -> float | None:
        """The cosine above which a picture is a near copy of a training row's; None: too few held-out rows to say."""
        ...

    async def search(
        self,
        vectors: Vectors,
        k: int,
        modality: Literal["image", "text"],
        *,
        distinct: bool = False,
        where: str = "",
        num_pictures: int = 0,
    ) -> list[list[NeighbourRow]]:
        """The ``k`` rows nearest to each of Q vectors (Q, D) of length one, the nearest first.

        Args:
            vectors: The queries.
            k: Rows of each.
            modality: What of the rows is compared.
            distinct: Leave out rows whose picture is nearly that of a nearer row.
            where: Leave out rows for which this filter by columns (retrieve/where.py) does not hold; empty: none.
            num_pictures: Rows of each query, from the nearest, that come with their stored pictures.

        Raises:
            NotServing: If the index is elsewhere, and does not answer.
        """
        ...

    async def rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The columns of rows by number.

        Raises:
            ValueError: If there is no such row.
            NotServing: As ``search``.
        """
        ...
