"""Which kinds of index are built and measured for so many rows, and with how many lists."""

from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import kinds

_FLAT_BELOW_ROWS = 4_000
_FLAT_UP_TO_ROWS = 50_000
_GRAPH_UP_TO_ROWS = 20_000  # in order, on one thread: a second for 2,000 rows, longer for each as they get more
ROWS_PER_LIST = 39  # with a smaller sample, FAISS warns


def kinds_to_try(config: IndexConfig, num_rows: int, embed_dim: int) -> list[kinds.Kind]:
    """The kinds that are built and measured, of which the fastest is kept; one bit a feature if nothing fits."""
    if config.kind != "auto":
        return [config.kind]
    reasons = kinds_left_out(config, num_rows, embed_dim)
    return [kind for kind in kinds.KINDS if kind not in reasons] or ["ivf_rabitq"]


def kinds_left_out(config: IndexConfig, num_rows: int, embed_dim: int) -> dict[kinds.Kind, str]:
    """Why the other kinds are not measured, by kind; for the manifest."""
    if config.kind != "auto":
        return {kind: f"index.kind is {config.kind}" for kind in kinds.KINDS if kind != config.kind}
    if num_rows < _FLAT_BELOW_ROWS:
        reason = f"fewer than {_FLAT_BELOW_ROWS:,} rows are compared one by one faster than anything else is searched"
        return {kind: reason for kind in kinds.KINDS if kind != "flat"}
    reasons: dict[kinds.Kind, str] = {}
    if num_rows > _FLAT_UP_TO_ROWS:
        reasons["flat"] = f"more than {_FLAT_UP_TO_ROWS:,} rows take longer to compare one by one than lists to visit"
    if num_rows > _GRAPH_UP_TO_ROWS:
        reasons["hnsw"] = f"a graph of more than {_GRAPH_UP_TO_ROWS:,} rows takes too long to build"
    for kind in kinds.KINDS:
        memory_gb = num_rows * kinds.row_bytes(kind, embed_dim) / 1e9
        if kind not in reasons and memory_gb > config.memory_gb:
            reasons[kind] = f"it takes {memory_gb:.1f} GB; index.memory_gb is {config.memory_gb:g}"
    return reasons


def choose_num_lists(config: IndexConfig, num_rows: int) -> int:
    """The number of lists: four times the root of the rows, as far as the training sample allows."""
    return max(1, min(round(4 * num_rows**0.5), min(config.num_train_rows, num_rows) // ROWS_PER_LIST))
