"""What the replicas of all deployments do when Ray Serve configures them with what they cannot load.

Ray Serve ends a replica whose ``reconfigure`` raises, and starts another one, which has to load the same. So at an
update the good networks would go, and nothing would come in their place.
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager

from pipeline.runtime.draining import named

_log = logging.getLogger(__name__)


@contextmanager
def keeping_what_is_served(*, is_serving: bool) -> Generator[None]:
    """Log an error of the block instead of raising it, if something is served, which then goes on."""
    try:
        yield
    except Exception as error:
        if not is_serving:
            raise
        _log.error("not swapped, what was served before goes on: %s", named(error))
