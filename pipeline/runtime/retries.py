"""Other tries of failed rows that are asked for; a run that is stopped leaves what it has not tried to the next one."""

from pipeline.data.causes import is_in_class
from pipeline.workspace.store import LIVE, Artifact

_NAME = f"{LIVE}retries.json"


def waiting_retries(output: Artifact) -> list[str]:
    """Classes of the failures that are to be tried again, in their order; the first one may have begun."""
    classes: list[str] | None = output.find_json(_NAME)
    return classes or []


def ask_retry(output: Artifact, failed_class: str) -> None:
    """Note that the failures of a class are to be tried again.

    Args:
        output: The download's artifact.
        failed_class: The class (``pipeline.data.causes``); narrower ones that wait are done with it.
    """
    waiting = waiting_retries(output)
    if not any(is_in_class(failed_class, one) for one in waiting):
        others = [one for one in waiting if not is_in_class(one, failed_class)]
        output.write_json(_NAME, [*others, failed_class])


def end_retry(output: Artifact, failed_class: str) -> None:
    """Note that the failures of a class were tried again."""
    output.write_json(_NAME, [one for one in waiting_retries(output) if one != failed_class])
