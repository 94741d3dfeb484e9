"""Input and result of a step, shared by the modules that run steps on Ray."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.recipe.plan import Step, artifact_of, inputs_of
from pipeline.recipe.recipe import Recipe
from pipeline.workspace.fence import FencedArtifact
from pipeline.workspace.store import Artifact, Workspace


@dataclass(frozen=True)
class StepContext:
    """One step to run; travels between processes."""

    recipe: Recipe
    step: Step
    root: str
    """The workspace's root."""
    retry_failed: str = field(default="", kw_only=True)
    """Class of the download's failures that are tried again; empty: none."""
    notice: str = field(default="", kw_only=True)
    """Why the step begins again, for people; empty: it does not."""
    can_grow: bool = field(default=True, kw_only=True)
    """Whether machines may join the Ray on which it runs."""
    attempt: str = field(default="", kw_only=True)
    """Which start of a training this is; empty: none that another one may follow."""

    @property
    def workspace(self) -> Workspace:
        """The workspace."""
        return Workspace(self.root)

    @property
    def output(self) -> Artifact:
        """The artifact to write."""
        return artifact_of(self.workspace, self.step)

    @property
    def own_output(self) -> Artifact:
        """The artifact to write, for the workers of one start: they cannot once another start has begun."""
        return FencedArtifact(self.output.uri, self.attempt) if self.attempt else self.output

    @property
    def inputs(self) -> dict[str, Artifact]:
        """The committed artifacts to read, by step name."""
        return inputs_of(self.workspace, self.step)


@dataclass(frozen=True)
class StepResult:
    """What goes into the manifest."""

    counts: dict[str, int] = field(default_factory=dict[str, int])
    """Rows: ``in`` = ``ok`` + each kind of failure."""
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the step measured."""
    num_workers: int = 1
    """Workers at a time, for node seconds; those of a training, which may change, are counted by its progress."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Size and SHA-256 of files, known where they were written; the others are read for the manifest."""
    warnings: tuple[str, ...] = ()
    """What the user of a run should know when the step is done; a sentence each."""
