"""The pairs of its own training that a sampled picture is nearest to."""

from pipeline.recipe.lineage import Lineage
from pipeline.retrieve.index import Neighbour
from pipeline.retrieve.queries import Query
from pipeline.retrieve.search import Searcher, SearchOptions
from pipeline.workspace.store import Workspace

_EMBEDDINGS = ("filter_embeddings", "embed")
"""Steps whose rows a network may be trained on, the later one first: an index is built from the same."""


def nearest_pairs(picture: str, lineage: Lineage, count: int) -> list[Neighbour]:
    """The ``count`` training pairs whose pictures are nearest to a picture, by the CLIP of its lineage.

    Args:
        picture: Path of the picture.
        lineage: Its lineage.
        count: Most pairs.

    Returns:
        The pairs, the nearest first; none if the workspace has no finished index of these embeddings.

    Raises:
        DataError: If a file of the index is missing or damaged.
    """
    workspace = Workspace(lineage.workspace)
    keys = {node.step: node.key for node in lineage.nodes if node.state == "done"}
    source = next((name for name in _EMBEDDINGS if name in keys), "")
    for manifest in workspace.manifests("index")[0]:
        if source and "clip" in keys and manifest.inputs.get(source) == keys[source]:
            artifacts = {name: workspace.artifact(name, keys.get(name, manifest.key)) for name in ("clip", "index")}
            options = SearchOptions(count, where="split == 'train'")
            return list(Searcher(artifacts).search([Query("image", picture, 1.0)], options).neighbours)
    return []
