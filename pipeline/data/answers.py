"""What a host's answer says beside its body: where it leads, when to ask again, and of which class a failure is."""

from __future__ import annotations

import email.utils
import os
import time
from collections.abc import Mapping

import aiohttp

from pipeline.data.causes import FetchError
from pipeline.data.urls import Url, parse_url


def target_of(response: aiohttp.ClientResponse, url: Url) -> Url:
    """The URL to which an answer redirects.

    Raises:
        FetchError: If it names none.
    """
    location = response.headers.get("Location", "")
    if not location:
        raise FetchError("redirects", f"http-{response.status} without Location")
    return parse_url(location, url)


def asked_wait_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; the date is compared with the server's own."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    retry_at, now = _seconds_of(value), _seconds_of(headers.get("Date", ""))
    return None if retry_at is None else max(0.0, retry_at - (time.time() if now is None else now))


def _seconds_of(date: str) -> float | None:
    """A date of a header in seconds since the epoch; None if it is none."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ArithmeticError, LookupError, TypeError, ValueError):  # years and hours of any number of digits
        return None


def translate(error: Exception) -> FetchError:  # noqa: PLR0911  (a table of classes)
    """The class of a client's error; details are the system's words, which do not differ from run to run."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else ""
    if isinstance(error, aiohttp.ServerTimeoutError | TimeoutError):
        return FetchError("timeout")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return FetchError("tls", str(getattr(error.certificate_error, "verify_message", "")) or "certificate")
    if isinstance(error, aiohttp.ClientSSLError):
        return FetchError("tls")
    if isinstance(error, aiohttp.ClientConnectorError):
        return FetchError("connect", reason)
    if isinstance(error, aiohttp.ClientPayloadError):
        return FetchError("body-cut")
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return FetchError("connect", f"proxy: http-{error.status}")
    if isinstance(error, aiohttp.ClientResponseError):
        return FetchError("protocol")
    if isinstance(error, aiohttp.InvalidURL):
        return FetchError("url")
    if isinstance(error, aiohttp.ClientConnectionError | ConnectionError):
        return FetchError("lost", reason)
    return FetchError("other", type(error).__name__)
