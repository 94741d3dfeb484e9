"""The neighbour index as a library."""

from pipeline.retrieve.index import Neighbour, NeighbourIndex

__all__ = ["Neighbour", "NeighbourIndex"]
