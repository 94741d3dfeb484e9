"""Builds and searches the neighbour index."""

from pipeline.retrieve.index import Neighbour, NeighbourIndex

__all__ = ["Neighbour", "NeighbourIndex"]
