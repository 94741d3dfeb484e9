"""Equal shares for clients, and for the requests of one client: of the room to wait, and of the work.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): whoever has been served least is next. A newcomer starts level
with the least served, so it neither waits for the others nor catches up on what it did not ask for.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


def is_full(requests: Mapping[str, int], client: str, most: int) -> bool:
    """Whether one more request of a client is too many.

    Args:
        requests: Of each client that has some, how many.
        client: Who asks.
        most: Requests of all clients from which on nobody gets more than a share, as large as that of each other client
            that has some. Whoever has less of them is let in beside what is there, until there are twice as many.
    """
    num_all, num_clients = sum(requests.values()), len({*requests, client})
    share = max(1, most // num_clients)
    return num_all >= most and (requests.get(client, 0) >= share or num_all >= 2 * most)


@dataclass
class _Share(Generic[Item]):
    """The waiting items of one client, and how much each, and all of them, have been served."""

    items: dict[Item, float] = field(default_factory=dict[Item, float])
    served: float = 0.0


class FairQueue(Generic[Item]):
    """Items that are served in portions. Time grows with the number of waiting items; memory too."""

    def __init__(self) -> None:
        self._clients: dict[str, _Share[Item]] = {}

    def __len__(self) -> int:
        return sum(len(share.items) for share in self._clients.values())

    def __iter__(self) -> Iterator[Item]:
        return (item for share in self._clients.values() for item in share.items)

    def add(self, item: Item, client: str) -> None:
        """Let ``item`` wait as one of ``client``'s."""
        least = min((share.served for share in self._clients.values()), default=0.0)
        share = self._clients.setdefault(client, _Share(served=least))
        share.items[item] = min(share.items.values(), default=0.0)

    def next(self) -> Item:
        """The item whose turn it is; IndexError if none waits."""
        if not self._clients:
            raise IndexError("nothing waits")
        share = min(self._clients.values(), key=lambda share: share.served)
        return min(share.items, key=share.items.__getitem__)

    def serve(self, item: Item, cost: float) -> None:
        """Count a portion of ``item``, in any unit that is the same for all."""
        share = self._share(item)
        share.served += cost
        share.items[item] += cost

    def remove(self, item: Item) -> None:
        """Let ``item`` wait no longer; nothing happens if it does not wait."""
        for client, share in list(self._clients.items()):
            share.items.pop(item, None)
            if not share.items:
                del self._clients[client]

    def _share(self, item: Item) -> _Share[Item]:
        return next(share for share in self._clients.values() if item in share.items)
