"""The table of steps, one row for each; the plan, the run, the report and the docs derive from it.

A row is plain data: this module imports no heavy package, so that the commands that read it start fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """What the project knows about one kind of step, independent of the recipe."""

    name: str
    """Name of the step, of its folder in the workspace, and of the recipe's field that configures it."""
    title: str
    """Its name on the report."""
    version: int = 1
    """Version of its code; raised whenever the same recipe would give other bytes. It is part of the key."""
    inputs: tuple[str, ...] = ()
    """Steps whose artifacts it reads; a step that the recipe does not have is no input."""
    inputs_of_own_rows: tuple[str, ...] = ()
    """Inputs that it reads only where the embeddings were made from the download: imported ones are of other rows."""
    runner: str
    """``module:function`` that runs it; the function takes a StepContext and returns a StepResult."""
    role: str = "embed"
    """Role of the machines that do its work, where a cluster's machines have roles: download (network and CPU), embed
    (one small GPU), or train (many GPUs)."""
    seeded: bool = True
    """Whether the recipe's seed is part of its key."""
    trains: str = ""
    """Family of the network that it trains, by its row in the table of networks; empty: it trains none."""
    begins_with: str = ""
    """Input whose weights its network begins with, if the recipe has that step; empty: none."""
    in_cascade: bool = False
    """Whether its network takes part in sampling a picture."""
    samples: bool = False
    """Whether it samples the trained networks, so that their samplers are part of its key."""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """Fields that may name a user's file, each with the name of its fingerprint in the key."""
    reads: tuple[str, ...] = ()
    """Fields of other sections that it reads, by their dotted name; they are part of its key unless they are empty."""


_TRAINING = "pipeline.runtime.train:run_training"
_INIT_FILES = {"init_from": "content"}

# Each row comes after its inputs. Steps that become ready together start in this order while workers are scarce: the
# decoder takes longest.
_BEFORE_EVALUATE = (
    StepRow(
        name="pairs",
        title="Pairs",
        version=4,
        runner="pipeline.runtime.pairs:run_pairs",
        role="download",
        files={"path": "content"},
        reads=("download.extra_columns", "download.blur_column", "download.hash_column"),
    ),
    StepRow(
        name="download",
        title="Download",
        version=6,
        inputs=("pairs",),
        runner="pipeline.runtime.download:run_download",
        role="download",
        seeded=False,
    ),
    StepRow(
        name="filter",
        title="Filter",
        version=2,
        inputs=("download",),
        runner="pipeline.runtime.filter:run_filter",
        role="download",
        seeded=False,
    ),
    StepRow(
        name="clip",
        title="CLIP",
        version=4,
        inputs=("download", "filter"),
        runner="pipeline.runtime.train:run_clip",
        role="train",
        trains="clip",
        in_cascade=True,
        files={"name": "content", "tag": "content"},
    ),
    StepRow(
        name="embed",
        title="Embeddings",
        version=3,
        inputs=("download", "filter", "clip"),
        runner="pipeline.runtime.data:run_embed",
        seeded=False,
        files={"import_from": "import_content"},
    ),
    StepRow(
        name="filter_embeddings",
        title="Filter by embeddings",
        inputs=("download", "embed"),
        inputs_of_own_rows=("download",),
        runner="pipeline.runtime.filter_embeddings:run_filter_embeddings",
        files={"aesthetic_weights": "aesthetic_content", "nsfw_weights": "nsfw_content"},
    ),
    StepRow(
        name="first_decoder",
        title="First decoder",
        inputs=("download", "clip", "embed", "filter_embeddings"),
        runner=_TRAINING,
        role="train",
        trains="decoder",
        files=_INIT_FILES,
    ),
    StepRow(
        name="decoder",
        title="Decoder",
        version=5,
        inputs=("download", "clip", "embed", "filter_embeddings", "first_decoder"),
        runner=_TRAINING,
        role="train",
        trains="decoder",
        begins_with="first_decoder",
        in_cascade=True,
        files=_INIT_FILES,
    ),
    StepRow(
        name="index",
        title="Index",
        version=5,
        inputs=("embed", "filter_embeddings"),
        runner="pipeline.runtime.index:run_index",
    ),
    StepRow(
        name="prior",
        title="Prior",
        version=4,
        inputs=("clip", "embed", "filter_embeddings"),
        runner=_TRAINING,
        role="train",
        trains="prior",
        in_cascade=True,
        files=_INIT_FILES,
    ),
    StepRow(
        name="prior_2",
        title="Prior 2",
        version=4,
        inputs=("clip", "embed", "filter_embeddings"),
        runner=_TRAINING,
        role="train",
        trains="prior",
        files=_INIT_FILES,
    ),
    StepRow(
        name="noisy_clip",
        title="Noisy CLIP",
        version=4,
        inputs=("download", "filter", "clip", "filter_embeddings"),
        runner=_TRAINING,
        role="train",
        trains="noisy_clip",
        in_cascade=True,
    ),
    *(
        StepRow(
            name=f"upsampler_{number}",
            title=f"Upsampler {number}",
            version=4,
            inputs=("download", "filter", "filter_embeddings"),
            runner=_TRAINING,
            role="train",
            trains="upsampler",
            in_cascade=True,
            files=_INIT_FILES,
        )
        for number in (1, 2)
    ),
)

STEPS = (
    *_BEFORE_EVALUATE,
    StepRow(
        name="evaluate",
        title="Evaluation",
        version=9,
        inputs=tuple(row.name for row in _BEFORE_EVALUATE),
        runner="pipeline.runtime.data:run_evaluate",
        samples=True,
        files={"prompts_path": "content", "features_path": "features_content"},
    ),
)
"""Every step that a recipe may have, each after its inputs."""

STEP_ROWS = {row.name: row for row in STEPS}
"""The same rows by name."""

CASCADE_STEPS = tuple(row.name for row in STEPS if row.in_cascade)
"""Steps whose networks take part in sampling a picture."""
