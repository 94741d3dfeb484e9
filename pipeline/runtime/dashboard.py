"""The dashboard of a Ray cluster: where jobs are sent, and the errors on the way there in words."""

import contextlib
import logging
import os
from collections.abc import Generator
from urllib.parse import urlsplit

import requests
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from pipeline.errors import ConfigError, StepError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_CONNECT_TIMEOUT_S = 5.0
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine."""
    return urlsplit(url).hostname in {"127.0.0.1", "localhost", "::1"}


def dashboard_client(address: str) -> tuple[JobSubmissionClient, str]:
    """Ray's client for jobs, and the URL it speaks to.

    Args:
        address: URL of the dashboard, or ``host:port``; the environment is not asked.

    Raises:
        ConfigError: If the address is no URL.
        StepError: If no cluster answers there within seconds, or it wants a token.
    """
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(
            f"--address {address}: give the URL of the cluster's dashboard, for example {DEFAULT_ADDRESS}; "
            "a cluster elsewhere is reached through `ray dashboard cluster.yaml` or an SSH tunnel"
        )
    url = url.rstrip("/")
    nothing = (
        f"no Ray cluster answers at {url}: start one (`ray start --head`, or `ray up cluster.yaml` and "
        "`ray dashboard cluster.yaml`) or give its dashboard with --address"
    )
    try:
        # Ray's client waits without a limit; this look does not.
        reply = requests.get(f"{url}/api/version", timeout=_CONNECT_TIMEOUT_S)
    except requests.exceptions.RequestException as error:
        raise StepError(f"{nothing} ({type(error).__name__})") from None
    if reply.status_code not in {200, 401, 403}:
        raise StepError(f"{nothing} (something else does: HTTP {reply.status_code})")
    for name in _TALKATIVE:  # they tell of every upload and every closed connection
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with _address_is_final():
            return _client(url), url
    except AuthenticationError:
        raise StepError(
            f"the cluster at {url} asks for its token: put it into ~/.ray/auth_token, or into a file that "
            "RAY_AUTH_TOKEN_PATH names; on the head node `ray get-auth-token` prints it"
        ) from None
    except (ConnectionError, RuntimeError, KeyError, ValueError, requests.exceptions.RequestException) as error:
        raise StepError(f"{nothing} ({str(error).splitlines()[0]})") from None


def _client(url: str) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(url)
    except AuthenticationError:
        # As `ray start` and `ray.init` do: a token that is there is used where RAY_AUTH_MODE says nothing.
        if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise
        return JobSubmissionClient(url)


@contextlib.contextmanager
def _address_is_final() -> Generator[None]:
    """Keep Ray's client from taking another address out of the environment."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
