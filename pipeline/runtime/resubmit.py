"""A run on a cluster that is followed to its end: it is submitted again if its cluster or its driver's machine is lost.

Kubernetes (RayJob's ``backoffLimit``) and Slurm (``--requeue``) do that by themselves; elsewhere the command that
follows the job does. The run then continues with what is finished.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import requests

from pipeline.errors import StepError
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.follow import Write, follow_job
from pipeline.runtime.jobs import LostError, Submission, submit_recipe
from pipeline.runtime.tunnel import reachable
from pipeline.workspace.lock import EXPIRY_S
from pipeline.workspace.progress import duration
from pipeline.workspace.store import Workspace

_LOOK_S = 2.0
_AWAY = (StepError, RuntimeError, requests.exceptions.RequestException)
"""What Ray's client raises at a dashboard that is away, or starts."""


@dataclass(frozen=True)
class Follower:
    """What a person sees of a job."""

    announce: Callable[[Submission], None]
    """Takes each submission."""
    warn: Write
    """Takes lines about losses."""
    write: Write
    """Takes pieces of the job's log."""
    show: Write | None = None
    """Takes the live table; None: nobody looks at it."""


def submit_and_follow(
    recipe: Recipe, follower: Follower, *, address: str, until: str = "", again: bool = False, shown_as: str = ""
) -> int:
    """Submit a recipe and follow its job to the end; see ``submit_recipe`` and ``follow_job``.

    Args:
        recipe: A checked recipe; its ``[job]`` says how often and for how long a lost cluster is waited for.
        follower: Who looks.
        address: URL of the cluster's dashboard, or of its head (``ssh://``).
        until: Last step; empty: all.
        again: Whether it runs again if it has succeeded.
        shown_as: The recipe in the commands that the job proposes.

    Returns:
        The exit code of the last job.

    Raises:
        ConfigError: As ``submit_recipe``.
        StepError: If no cluster answers at first, or within ``job.max_outage_s`` after a loss, or it was lost more than
            ``job.max_resubmissions`` times.
    """
    losses, lost_at = 0, 0.0
    while True:
        try:
            with reachable(address) as url:
                job = submit_recipe(recipe, address=url, until=until, again=again and not losses, shown_as=shown_as)
                follower.announce(job)
                return follow_job(job.job_id, follower.write, url, follower.show)
        except LostError as error:
            losses, lost_at = losses + 1, time.monotonic()
            if losses > recipe.job.max_resubmissions:
                raise StepError(f"{error}; it was lost {losses} times (job.max_resubmissions)") from None
            follower.warn(
                f"{error}; submitted again when the cluster answers ({losses} of {recipe.job.max_resubmissions}), "
                f"within {duration(recipe.job.max_outage_s)}"
            )
            if not Workspace(recipe.workspace).is_local:  # the lock of the lost driver is left until then
                time.sleep(EXPIRY_S)
        except _AWAY:
            if not losses or time.monotonic() - lost_at > recipe.job.max_outage_s:
                raise
            time.sleep(_LOOK_S)
