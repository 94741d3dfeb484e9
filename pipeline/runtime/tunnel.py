"""A dashboard that only the head node reaches, through an SSH tunnel that a command opens for itself."""

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from urllib.parse import SplitResult, urlsplit

from pipeline.errors import ConfigError, StepError
from pipeline.machine import free_port

_SCHEME = "ssh"
_DASHBOARD_PORT = 8265
_LONGEST_START_S = 120.0
"""A person may have to type a passphrase."""
_LOOK_EVERY_S = 0.05
_NO_KEY = "(publickey"
"""What sshd takes, behind `Permission denied`: none of the keys that ssh has tried."""
_KEYS_OF_RAY_UP = "of a cluster of `ray up`, first `ssh-add ~/.ssh/ray-autoscaler_*.pem`"


@contextlib.contextmanager
def reachable(address: str) -> Generator[str]:
    """The address of a dashboard that can be called inside the block.

    Args:
        address: ``ssh://[USER@]HOST[:PORT][/DASHBOARD_PORT]``, for which a tunnel is opened by the machine's ``ssh``,
            with its configuration, keys and questions; any other address is returned as it is.

    Raises:
        ConfigError: If the address names no host or no port, or there is no ``ssh``.
        StepError: If ssh ends, or the tunnel is not open in time. Errors of the block name the address, not the tunnel.
    """
    parts = urlsplit(address)
    if parts.scheme != _SCHEME:
        yield address
        return
    with _open_tunnel(address, parts) as url:
        try:
            yield url
        except StepError as error:
            raise type(error)(str(error).replace(url, address)) from None


@contextlib.contextmanager
def _open_tunnel(address: str, parts: SplitResult) -> Generator[str]:
    port, command = free_port(), _command(address, parts)
    forward = f"127.0.0.1:{port}:127.0.0.1:{_dashboard_port(address, parts)}"
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen([*command[:1], "-L", forward, *command[1:]], stderr=errors)
        except FileNotFoundError:
            raise ConfigError(f"--address {address}: there is no `ssh` on this machine; install OpenSSH") from None
        try:
            _wait(process, port, address)
            yield f"http://127.0.0.1:{port}"
        except _SshEndedError:
            errors.seek(0)
            lines = errors.read().split("\n")
            reason = next((line for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
            mend = f"try `{' '.join(command)}`"
            if _NO_KEY in reason:
                mend = f"{_KEYS_OF_RAY_UP}, or {mend}"
            raise StepError(f"--address {address}: ssh ended: {reason.strip()}; {mend}") from None
        finally:
            process.terminate()
            process.wait()


def _command(address: str, parts: SplitResult) -> list[str]:
    """The ssh command without the forwarded port."""
    try:
        host, ssh_port = parts.hostname, parts.port
    except ValueError:
        host = ssh_port = None
    if not host:
        raise ConfigError(f"--address {address}: give ssh://USER@HOST, or ssh://USER@HOST:PORT")
    port = ["-p", str(ssh_port)] if ssh_port else []
    user = f"{parts.username}@" if parts.username else ""
    return ["ssh", "-N", "-o", "ExitOnForwardFailure=yes", *port, "--", f"{user}{host}"]


def _dashboard_port(address: str, parts: SplitResult) -> int:
    text = parts.path.strip("/")
    if text and not text.isdecimal():
        raise ConfigError(f"--address {address}: after the host comes the dashboard's port, such as /{_DASHBOARD_PORT}")
    return int(text or _DASHBOARD_PORT)


class _SshEndedError(Exception):
    """ssh has ended before its tunnel was open."""


def _wait(process: subprocess.Popen[bytes], port: int, address: str) -> None:
    deadline = time.monotonic() + _LONGEST_START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _SshEndedError
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(_LOOK_EVERY_S)
    raise StepError(f"--address {address}: ssh has opened no tunnel within {_LONGEST_START_S:g} s")
