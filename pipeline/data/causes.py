"""Why a row failed, in few classes, so that causes can be counted, shown while they come, and tried again by class.

A row's ``error_message`` is its class, or ``class: detail``. Faults of a picture are classes too: they are the reasons
of ``PictureError``.
"""

from __future__ import annotations

ALL = "all"
"""Stands for every class in ``unclip run --retry-failed``."""

CLASSES = {
    "url": "the URL is malformed",
    "scheme": "the URL is not fetched: only http: and https: are, and files in folders that the recipe allows",
    "address": "the host has a private, loopback, link-local or metadata address, which the recipe does not allow",
    "file": "the file cannot be read",
    "dns": "the host's name has no address",
    "connect": "the host does not accept connections",
    "tls": "the TLS connection failed, for example an invalid certificate",
    "timeout": "the host sent nothing for download.timeout_s",
    "deadline": "the URL was not finished within download.deadline_s",
    "lost": "the host closed the connection before it answered",
    "body-cut": "the body ended before its length",
    "body-size": "the body is larger than download.max_body_bytes",
    "encoding": "the body has a content encoding that was not asked for and cannot be undone",
    "protocol": "the answer is not HTTP",
    "redirects": "too many redirects, or one without a target",
    "http": "an HTTP status other than success; the class is http-404, http-503 and so on",
    "x-robots-tag": "opted out by the header X-Robots-Tag",
    "robots-txt": "opted out by the host's robots.txt, or it cannot be read",
    "tdm": "opted out by a TDM reservation: the header or /.well-known/tdmrep.json",
    "boxes": "the list's boxes to blur are malformed, so the picture is not fetched",
    "hash": "the file does not have the checksum that the list gives",
    "forgotten": "the pair was forgotten (`unclip forget`), so it is not fetched",
    "killer": "the picture took its decoder or its worker down, or kept it busy for too long",
    "other": "an unforeseen error; its detail names it",
}
"""Meaning of each class, for people."""

PICTURE_FAULTS = (
    "not a picture",
    "image file is truncated",
    "image cannot be decoded",
    "image area too large",
    "image needs too much memory",
    "image too small",
    "aspect ratio too large",
    "nobody knows which level is white",
)
"""Faults of a file that has come; classes as well."""

_TEMPORARY = frozenset({"connect", "timeout", "lost", "body-cut"})
_TEMPORARY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})


class FetchError(Exception):
    """A URL that brought no picture.

    Args:
        cause: One of ``CLASSES``, or ``http-STATUS``.
        detail: More, for people; without numbers that differ from run to run.
        retry_after_s: How long the host asks to wait before the next request, in seconds.
    """

    def __init__(self, cause: str, detail: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause

    @property
    def is_temporary(self) -> bool:
        """Whether another request may bring the picture."""
        status = self.cause.removeprefix("http-")
        return self.cause in _TEMPORARY or (status.isdigit() and int(status) in _TEMPORARY_STATUSES)


def cause_of(message: str) -> str:
    """The class of an ``error_message``."""
    return message.partition(":")[0]


def is_class(name: str) -> bool:
    """Whether ``unclip run --retry-failed`` knows a class."""
    return name in {ALL, *CLASSES, *PICTURE_FAULTS} or (name.startswith("http-") and name[5:].isdigit())


def is_in_class(cause: str, failed_class: str) -> bool:
    """Whether ``--retry-failed CLASS`` means a cause: ``http`` means every HTTP status, ``all`` every cause."""
    return failed_class in {ALL, cause} or cause.startswith(f"{failed_class}-")
