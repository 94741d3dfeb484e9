"""Ports for servers that a test starts in a moment."""

import contextlib
import random
import socket

_RANGE = range(20_000, 32_000)
"""Above the ports of Ray's workers (from 10002), below those that the system gives to connections (from 32768): a port
that ``bind`` to 0 finds is one of the latter, and somebody's connection may have it before the server does."""


def free_ports(number: int) -> list[int]:
    """Numbers of TCP ports that nobody listens on at 127.0.0.1."""
    ports: list[int] = []
    draw = random.SystemRandom()  # two test processes seed theirs alike
    with contextlib.ExitStack() as stack:
        while len(ports) < number:
            item, port = stack.enter_context(socket.socket()), draw.choice(_RANGE)
            with contextlib.suppress(OSError):
                item.bind(("127.0.0.1", port))
                ports.append(port)
    return ports


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
