"""The neighbour index as a library."""

from pipeline.retrieve.index import Neighbour, NeighbourIndex, read_picture

__all__ = ["Neighbour", "NeighbourIndex", "read_picture"]
