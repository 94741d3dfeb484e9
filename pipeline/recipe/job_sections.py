"""The environment of a submitted job, beside what the cluster's machines have already."""

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from models.configclass import configclass

Extra = Literal["cpu", "gpu", "hf", "s3", "gcs", "azure", "traces"]
"""Optional dependencies of pyproject.toml, for users."""
Variable = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
_SECRET = re.compile("SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|API_?KEY|PRIVATE_KEY", re.IGNORECASE)


@configclass
class JobConfig:
    """What `unclip submit` brings to every process of its job; changes no artifact."""

    extras: tuple[Extra, ...] = ()
    """Extras of unclip that the cluster's machines lack, such as "s3" or "hf": pip installs their packages on each
    machine, into an environment that this job alone uses and that has all of the machine's own packages."""
    pip: tuple[str, ...] = ()
    """Further packages, each as a line of a requirements file, such as "my-safety==1.0"."""
    env: dict[Variable, str] = field(default_factory=dict[str, str])
    """Environment variables and their values. A recipe is written beside the artifacts: for a password or a key, give
    the variable's name to ``secrets``."""
    secrets: tuple[Variable, ...] = ()
    """Environment variables whose values `unclip submit` takes from its own environment. No recipe, artifact or log has
    the values; with `--manifest` they come from the Kubernetes secret ``unclip-job``."""

    max_resubmissions: NonNegativeInt = 3
    """How often `unclip submit --follow` submits the recipe again after its cluster, or the machine of its driver, was
    lost; the run then continues. With `--manifest`, how often Kubernetes does (backoffLimit)."""
    max_outage_s: NonNegativeFloat = 1800.0
    """Seconds that `unclip submit --follow` waits for a lost cluster to answer again."""

    boot_s: NonNegativeFloat = 300.0
    """Seconds that machines of the cluster take to start. So long before a step begins, as far as the end of the steps
    that it reads is foreseen, Ray's autoscaler is told what it needs; 0: when it begins."""

    def __post_init__(self) -> None:
        for name in self.env:
            if name.startswith("UNCLIP_CACHE"):
                raise ValueError(f"env.{name}: the cache has a table of its own, [cache]")
            if _SECRET.search(name):
                raise ValueError(
                    f"env.{name}: a recipe is written beside the artifacts and sent to the tracker; put the name into "
                    "job.secrets, and the value into the environment of `unclip submit`"
                )
        if both := set(self.env) & set(self.secrets):
            raise ValueError(f"env and secrets both name {', '.join(sorted(both))}")
