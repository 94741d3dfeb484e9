"""Our own Ray beside a server: if the server is killed, Ray goes on with the networks loaded, and the next joins it.

The process that starts Ray holds it and does nothing else. It is forked before anything is imported, and ends Ray when
the server's keeper ends.
"""

import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, suppress
from typing import NoReturn

import psutil

from pipeline.errors import StepError
from pipeline.serve.keeper import Kept, Notes

_LOOK_EVERY_S = 0.05
_LONGEST_START_S = 120.0


class KeptRay:
    """A Ray that one process holds and others join; made before they are forked.

    Args:
        announce: Takes lines for people, in the process that holds it.
        has_spare: Whether an idle process is kept in which a replica that was killed is started again.
    """

    def __init__(self, announce: Callable[[str], None], *, has_spare: bool) -> None:
        self._notes = Notes()
        self._announce = announce
        self._has_spare = has_spare

    def hold(self, kept: Kept) -> None:
        """Start Ray, and hold it until the keeper ends or this process is interrupted.

        Args:
            kept: What this process has of its keeper.
        """
        import ray

        from pipeline.runtime.connection import connect, own_servers
        from pipeline.runtime.spare import keeping_spare, load_ahead

        if self._has_spare:
            load_ahead()
        try:
            with suppress(KeyboardInterrupt), connect():
                servers = own_servers()
                pids = [server.pid for server in servers]
                self._notes.write({"address": ray.get_runtime_context().gcs_address, "servers": pids})
                with keeping_spare(servers, self._announce) if self._has_spare else nullcontext():
                    kept.wait_until_keeper_ends()
        except StepError as error:
            self._notes.write({"error": str(error)})

    @contextmanager
    def join(self) -> Generator[list[psutil.Process]]:
        """Connect to Ray inside a block; its servers. If they end in the block, its error ends the process.

        Raises:
            StepError: If Ray could not be started, or has ended.
        """
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

        from pipeline.runtime.connection import are_alive, connect, require_alive

        deadline_s = time.monotonic() + _LONGEST_START_S
        while not (note := self._notes.read()):
            if time.monotonic() > deadline_s:
                raise StepError(f"serve: Ray has not started within {_LONGEST_START_S:g} s; run the command again")
            time.sleep(_LOOK_EVERY_S)
        if "error" in note:
            raise StepError(note["error"])
        try:
            servers = [psutil.Process(server) for server in note["servers"]]
        except psutil.NoSuchProcess as error:
            raise StepError(
                f"serve: Ray has ended with the server (process {error.pid}); start the server anew"
            ) from None
        require_alive(servers)
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as it was for the process that holds Ray
        with connect(note["address"]):
            try:
                yield servers
            except StepError as error:
                if not are_alive(servers):
                    _end_process(error)
                raise


def _end_process(error: StepError) -> NoReturn:
    """Say what is wrong, and end at once: to disconnect from a Ray that is gone takes Ray a minute and a half."""
    sys.stderr.write(f"error: {error}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code)
