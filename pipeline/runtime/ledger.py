"""What the HTTP processes of one server tell each other, so that a key's limits hold over all of them.

Each process counts by itself and answers at once. Every half second it says what keys have used since its start, and
hears it of the others. So a key may go above a limit by what it uses elsewhere within half a second, and a process that
starts later begins as if nothing had been used: what others had used when it first heard of them may be of hours ago.
"""

import logging
import threading
import time
import uuid
from typing import Any

from ray.serve.handle import DeploymentHandle

from pipeline.serve.keys import KeyRing, Meter, Uses

_log = logging.getLogger(__name__)

_EVERY_S = 0.5
_PATIENCE_S = 5.0
_FORGOTTEN_S = 600.0
"""A process that says nothing for so long has ended; its uses are those of minutes that are over."""


class Ledger:
    """Holds what each process has used; a deployment with one replica. If it dies, the processes tell the next one."""

    def __init__(self) -> None:
        self._uses: dict[str, tuple[float, Uses]] = {}

    async def exchange(self, who: str, uses: Uses) -> dict[str, Uses]:
        """Take what a process has used since its start; what the others have, by process."""
        now_s = time.monotonic()
        self._uses[who] = now_s, uses
        self._uses = {name: one for name, one in self._uses.items() if now_s - one[0] < _FORGOTTEN_S}
        return {name: one for name, (_, one) in self._uses.items() if name != who}


class Exchange:
    """The exchange of one process, in a thread of its own until ``close``.

    Args:
        ledger: The deployment.
        meter: What the keys have used here.
        keys: The keys.
    """

    def __init__(self, ledger: DeploymentHandle[Any], meter: Meter, keys: KeyRing) -> None:
        self._ledger, self._meter = ledger, meter
        self.keys = keys
        self._who = uuid.uuid4().hex
        self._heard = dict[str, Uses]()
        """What each of the others has used, by process."""
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="unclip-ledger", daemon=True).start()

    def close(self) -> None:
        """End after the exchange that is under way."""
        self._closed.set()

    def _run(self) -> None:
        is_failing, wait_s = False, 0.0  # at once: before anything is used here, for others that hear it first then
        while not self._closed.wait(wait_s):
            wait_s = _EVERY_S
            try:
                others = self._ledger.exchange.remote(self._who, self._meter.uses()).result(timeout_s=_PATIENCE_S)
            except Exception as error:  # noqa: BLE001  (limits then count for each process alone, until it is back)
                if not is_failing:
                    _log.warning("limits of keys are not shared (%s) until the ledger answers", type(error).__name__)
                is_failing = True
                continue
            is_failing = False
            self.hear(others)

    def hear(self, others: dict[str, Uses]) -> None:
        """Charge what other processes have used since they were heard last.

        The first report of a process is charged nothing, whenever it comes: with a new ledger it is chance who reports
        first.
        """
        for who, uses in others.items():
            before = self._heard.get(who, uses)
            for (digest, unit), amount in uses.items():
                key = self.keys.of_digest(digest)
                if key is not None:
                    self._meter.charge(key, unit, amount - before.get((digest, unit), 0.0))
            self._heard[who] = uses
