"""The process that keeps a server's address, and starts the server again if it is killed.

``keep`` forks: the child serves, and the parent holds the listening socket and does nothing else that could fail. A
child that ends by itself ends the parent too, with its exit code. If it is killed (kill -9, out of memory), a process
between answers 503 on the same socket, in the API's form, until the next child listens. Signals of the parent go to the
child, which has a process group of its own, so that Ctrl-C reaches it once. SIGHUP is noted until the child has time
for it, also while it starts. What a killed child must not take along
runs in a companion process, which the parent ends last, or stands in notes, which the next child reads.
"""

import errno
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from pipeline.errors import StepError
from pipeline.recipe.serve_sections import ServeConfig
from pipeline.serve.gate import Gate
from pipeline.serve.guards import Guards, GuardSettings, require_keys
from pipeline.serve.http_server import HttpServer, listen

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LISTENS = signal.SIGUSR1
"""What a child sends to the parent once it answers itself."""
_STEADY_S = 60.0
"""A child that lived for less was killed early."""
_MOST_EARLY_DEATHS = 5
_LOOK_EVERY_S = 0.2


class Notes:
    """What a process leaves for others that are forked by the same one: a table, of which the last one counts."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (open in all processes, until the last one ends)

    def write(self, note: dict[str, Any]) -> None:
        """Add a note; one that is cut off by the end of the process is none.

        Raises:
            OSError: If it cannot be written, as on a full disk; the note before it is then the last one.
        """
        line = b"\n" + json.dumps(note).encode() + b"\n"
        os.lseek(self._file.fileno(), 0, os.SEEK_END)
        if os.write(self._file.fileno(), line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), tempfile.gettempdir())

    def read(self) -> dict[str, Any]:
        """The last whole note; empty if there is none."""
        size = os.fstat(self._file.fileno()).st_size
        *lines, _ = os.pread(self._file.fileno(), size, 0).split(b"\n")
        return next((json.loads(line) for line in reversed(lines) if line.startswith(b"{")), {})


class SwapRequests:
    """SIGHUP asks a server to swap to the networks of its recipe as it is then; noted until it has time for that."""

    def __init__(self) -> None:
        self._is_requested = False

    def listen(self) -> None:
        """Note the signals from now on: without that SIGHUP would end the process."""
        signal.signal(signal.SIGHUP, self.note)

    def note(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Take a request."""
        self._is_requested = True

    def take(self) -> bool:
        """Whether there was a request since the last call."""
        is_requested, self._is_requested = self._is_requested, False
        return is_requested


@dataclass(frozen=True)
class Kept:
    """What a child has of its keeper."""

    listener: socket.socket
    """Where it answers."""
    keeper: int
    """Process id of the parent."""
    notes: Notes = field(default_factory=Notes)
    """What a child leaves for the next one."""
    swap_requests: SwapRequests = field(default_factory=SwapRequests)
    """Heard from the start of a child on."""

    def note_listening(self) -> None:
        """Say that this process answers; end it if its keeper dies."""
        os.kill(self.keeper, _LISTENS)
        threading.Thread(target=self._end_with_keeper, name="unclip-keeper", daemon=True).start()

    def wait_until_keeper_ends(self) -> None:
        """Wait in a child."""
        while os.getppid() == self.keeper:
            time.sleep(_LOOK_EVERY_S)

    def _end_with_keeper(self) -> None:
        self.wait_until_keeper_ends()
        os.kill(os.getpid(), signal.SIGTERM)


def keep(config: ServeConfig, announce: Callable[[str], None], companion: Callable[[Kept], None] | None = None) -> Kept:
    """Listen, fork, and return in the child. The parent returns never: it ends as its last child does.

    Args:
        config: Where the server listens.
        announce: Takes lines for people.
        companion: Runs in a process of its own, until the parent interrupts it or has ended.

    Raises:
        ConfigError: If the server would be open to other machines without keys.
        StepError: If the address cannot be listened on; in the parent, if children are killed again and again.
        SystemExit: In the parent, with the exit code of a child that ended by itself.
    """
    require_keys(config)
    return _Keeper(config, announce, companion).run()


class _Keeper:
    def __init__(
        self, config: ServeConfig, announce: Callable[[str], None], companion: Callable[[Kept], None] | None
    ) -> None:
        self._kept = Kept(listen(config.host, config.port), os.getpid())
        self._accompany = companion
        self._hosts = config.hosts
        self._announce = announce
        self._child = self._stand_in = self._companion = 0
        """Process ids of the server, of what answers in its place, and of what outlives it; 0: there is none."""
        self._is_ending = False
        self._handlers: dict[signal.Signals, Any] = {}

    def run(self) -> Kept:
        """See ``keep``."""
        num_early_deaths = 0
        for number in (*_PASSED_ON, _LISTENS):
            self._handlers[number] = signal.signal(number, self._handle)
        if self._accompany and self._is_child("_companion"):
            self._kept.listener.close()
            self._accompany(self._kept)
            os._exit(0)
        while True:
            started_s = time.monotonic()
            if self._is_child("_child"):
                return self._kept
            if self._is_ending:  # while there was no child that could be told
                os.kill(self._child, signal.SIGTERM)
            _, status = os.waitpid(self._child, 0)
            self._child, code = 0, os.waitstatus_to_exitcode(status)
            if code >= 0 or self._is_ending:
                self._end_others()
                raise SystemExit(code if code >= 0 else 128 - code)
            killer = signal.Signals(-code).name
            num_early_deaths = num_early_deaths + 1 if time.monotonic() - started_s < _STEADY_S else 0
            if num_early_deaths == _MOST_EARLY_DEATHS:
                self._end_others()
                raise StepError(f"serve: the server was killed {num_early_deaths} times by {killer}; is memory enough?")
            self._announce(f"the server was killed by {killer}; it is started again, requests are answered with 503")
            if not self._stand_in and self._is_child("_stand_in"):
                self._stand_in_for_it()
                os._exit(0)

    def _stand_in_for_it(self) -> None:
        gate = Gate()
        gate.close("the server was killed, and is started again")
        with HttpServer(Guards(gate, GuardSettings(self._hosts)), self._kept.listener):
            self._kept.wait_until_keeper_ends()

    def _is_child(self, name: str) -> bool:
        """Fork: True in the child, which has the signal handlers of before; the parent keeps its id as ``name``."""
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._handlers)
        pid = os.fork()
        if pid:
            setattr(self, name, pid)
            if name == "_child":
                self._kept.swap_requests.take()  # the child has it
        else:
            os.setpgid(0, 0)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            if name == "_child":
                self._kept.swap_requests.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._handlers)
        return not pid

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == _LISTENS:
            self._end_stand_in()
            return
        self._is_ending |= number != signal.SIGHUP
        if self._child:
            with suppress(ProcessLookupError):  # it has ended, and ``run`` is about to learn of it
                os.kill(self._child, number)
        elif number == signal.SIGHUP:
            self._kept.swap_requests.note()  # for the next one

    def _end_others(self) -> None:
        self._end_stand_in()
        if self._companion:
            with suppress(ProcessLookupError):
                os.kill(self._companion, signal.SIGTERM)
            os.waitpid(self._companion, 0)

    def _end_stand_in(self) -> None:
        stand_in, self._stand_in = self._stand_in, 0  # a signal may come in between
        if stand_in:
            os.kill(stand_in, signal.SIGKILL)
            os.waitpid(stand_in, 0)
