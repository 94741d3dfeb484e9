"""The dashboard of a Ray cluster: a client for its jobs, with errors for people."""

import contextlib
import logging
import os
from collections.abc import Generator
from urllib.parse import urlsplit

import requests
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from pipeline.errors import ConfigError, StepError, first_line
from pipeline.runtime.connection import PUT_TOKEN

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_CONNECT_TIMEOUT_S = 5.0
_VERBOSE_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine."""
    return urlsplit(url).hostname in {"127.0.0.1", "localhost", "::1"}


def dashboard_client(address: str) -> tuple[JobSubmissionClient, str]:
    """Ray's client for jobs, and the URL that it calls.

    Args:
        address: URL of the dashboard, or ``host:port``; the environment is ignored.

    Raises:
        ConfigError: If the address is no URL.
        StepError: If no cluster answers there within seconds, or it requires a token.
    """
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(
            f"--address {address}: give the URL of the cluster's dashboard, for example {DEFAULT_ADDRESS}; "
            "a cluster elsewhere is reached through its head: ssh://USER@HOST"
        )
    url = url.rstrip("/")
    no_answer = (
        f"no Ray cluster answers at {url}: start one (`ray start --head`, or `ray up cluster.yaml` and "
        "`ray dashboard cluster.yaml`) or give its dashboard with --address"
    )
    try:
        # Ray's client has no timeout; this request has one.
        reply = requests.get(f"{url}/api/version", timeout=_CONNECT_TIMEOUT_S)
    except requests.exceptions.RequestException as error:
        raise StepError(f"{no_answer} ({type(error).__name__})") from None
    if reply.status_code not in {200, 401, 403}:
        raise StepError(f"{no_answer} (something else does: HTTP {reply.status_code})")
    for name in _VERBOSE_LOGGERS:  # they log every upload and every closed connection
        logging.getLogger(name).setLevel(logging.WARNING)
    # That a token which is there is used needs no notice.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        with _address_is_final():
            return _client(url), url
    except AuthenticationError:
        raise StepError(f"the cluster at {url} asks for its token: {PUT_TOKEN}") from None
    except (ConnectionError, RuntimeError, KeyError, ValueError, requests.exceptions.RequestException) as error:
        raise StepError(f"{no_answer} ({first_line(error)})") from None


def _client(url: str) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(url)
    except AuthenticationError:
        # As `ray start` and `ray.init` do, use an existing token if RAY_AUTH_MODE is not set.
        if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise
        return JobSubmissionClient(url)


@contextlib.contextmanager
def _address_is_final() -> Generator[None]:
    """Keep Ray's client from reading another address from the environment."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
