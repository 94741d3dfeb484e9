"""URLs as browsers read them, and the addresses to which a list may lead.

A list comes from strangers, and a worker stands inside somebody's network: without rules, a row could read the worker's
disk, its neighbours' services or a cloud's metadata. The rules hold for every hop of a redirect, and for addresses
after the name is resolved, so a name that points elsewhere the second time (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, unquote_to_bytes

import idna

from pipeline.data.causes import FetchError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_STRIPPED = "".join(map(chr, range(0x21)))
_PATH_SAFE = "%!$&'()*+,/:;=@[]|\\"
_QUERY_SAFE = "%!$&()*+,/:;=@[]|\\?^`{}"
_FORBIDDEN_IN_HOST = re.compile(r"[\x00-\x20\x7f#%/:<>?@\[\\\]^|]")
_IPV4_LIKE = re.compile(r"(?:.*\.)?(?:0[xX][0-9A-Fa-f]*|[0-9]+)\.?")
_DOT, _DOTS = {".", "%2e"}, {"..", ".%2e", "%2e.", "%2e%2e"}
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LONE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Halves of a character, without those that stand for the bytes of a header (surrogateescape)."""
_KEPT_HOSTS = 4096
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "fec0::/10")
)
"""What Python's tables hold for public: Azure's host agent, IETF's protocols (Oracle's metadata is 192.0.0.192), relays
of 6to4, documentation, and the private addresses of before 2004."""
_EMBEDDED = {ipaddress.ip_network("64:ff9b::/96"): 0, ipaddress.ip_network("2002::/16"): 80}
"""IPv6 networks (NAT64, 6to4) with the place of the IPv4 address in theirs, in bits from the right."""


@dataclass(frozen=True)
class Url:
    """An absolute http or https URL, as it goes over the wire."""

    scheme: str
    host: str
    """Name in ASCII (punycode) or address, without brackets."""
    port: int
    target: str
    """Path and query, percent-encoded."""
    login: bytes = b""
    """User and password, as ``user:password``; empty: none."""

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    @property
    def text(self) -> str:
        """The whole URL, without its login."""
        return self.origin + self.target

    @property
    def path(self) -> str:
        """The path alone."""
        return self.target.partition("?")[0]


def parse_url(text: str, base: Url | None = None) -> Url:
    """Read a URL as browsers do (WHATWG URL): spaces, non-ASCII letters, backslashes, IDN hosts and user names.

    Args:
        text: URL of a list, or of a redirect.
        base: The URL that redirects; ``text`` may then be relative.

    Raises:
        FetchError: If it has another scheme than http and https, or no valid host.
    """
    text = _LONE.sub("\ufffd", text).strip(_STRIPPED)
    for unwanted in "\t\n\r":
        text = text.replace(unwanted, "")
    match = _SCHEME.fullmatch(text)
    if base is not None and match is None:
        match = _SCHEME.fullmatch(_absolute(text, base))
    if match is None:
        raise FetchError("url", "it has no scheme (http: or https:)")
    scheme = match[1].lower()
    if scheme not in _DEFAULT_PORTS:
        raise FetchError("scheme", f"{scheme}: URLs are not fetched")
    rest = re.sub(r"^[/\\]*", "", match[2].partition("#")[0])
    authority = re.match(r"[^/\\?]*", rest)
    assert authority is not None
    userinfo, _, host_port = authority[0].rpartition("@")
    host, port = _read_host(host_port, _DEFAULT_PORTS[scheme])
    target = _encode_target(rest[authority.end() :])
    return Url(scheme, host, port, target, _read_login(userinfo))


def file_path(text: str) -> Path | None:
    """The path of a ``file:`` URL of this machine; None if it has another scheme."""
    match = re.fullmatch(r"file:(?://(?:localhost)?(?=/))?(/[^?#]*)", text.strip(_STRIPPED), re.IGNORECASE)
    return Path(unquote(match[1], errors="surrogateescape")) if match else None


class AddressRules:
    """The addresses and files that a list may name.

    Args:
        networks: Networks (CIDR) that are allowed beside the public internet, such as ``127.0.0.1/32``.
        folders: Folders whose files URLs may name: ``file:`` URLs those of a path (``/`` allows all), others those of a
            URI, such as ``s3://bucket/folder``.
    """

    def __init__(self, networks: Sequence[str] = (), folders: Sequence[str] = ()) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]
        self._folders = [Path(folder).resolve() for folder in folders if "://" not in folder]
        self._stored = [folder.rstrip("/") for folder in folders if "://" in folder]

    def allows(self, address: str) -> bool:
        """Whether a connection to an IP address is allowed."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        if ip.version == 6:
            if ip.ipv4_mapped is not None:
                return self.allows(str(ip.ipv4_mapped))
            inner = [
                ipaddress.IPv4Address(int(ip) >> bits & 0xFFFFFFFF) for net, bits in _EMBEDDED.items() if ip in net
            ]
            if not all(self.allows(str(address)) for address in inner):
                return False
        if any(ip in network for network in self._networks):
            return True
        is_refused = ip.is_multicast or ip.is_reserved or any(ip in network for network in _NOT_PUBLIC)
        return ip.is_global and not is_refused

    def require_url(self, url: Url) -> None:
        """Refuse a URL whose host is an address that is not allowed; names are checked once they are resolved.

        Raises:
            FetchError: If the address is not allowed.
        """
        if is_address(url.host) and not self.allows(url.host):
            raise refused_address(url.host)

    def require_file(self, path: Path) -> None:
        """Refuse a file outside of the allowed folders; where none is, the disk is not looked at.

        Raises:
            FetchError: If the file, its links followed, is in none of them, or no file can have such a path.
        """
        try:
            is_inside = any(path.resolve().is_relative_to(folder) for folder in self._folders)
        except (OSError, RuntimeError, ValueError):  # links that go round; zero bytes, and halves of characters
            raise FetchError("file", "it has no path of a file") from None
        if not is_inside:
            raise FetchError("scheme", "file: URLs are not fetched; download.allowed_folders allows a folder")

    def stored(self, text: str) -> tuple[str, str] | None:
        """The allowed folder of a store that a URL is in, and its path from there; None: it is of no such store.

        Raises:
            FetchError: If it is of a store of which other folders are allowed.
        """
        scheme, _, rest = text.partition("://")
        if not any(folder.startswith(f"{scheme}://") for folder in self._stored):
            return None
        # A server, or what is on the way to it, may resolve dots.
        if not {"", ".", ".."} & set(rest.split("/")):
            for folder in self._stored:
                if text.startswith(f"{folder}/"):
                    return folder, text[len(folder) + 1 :]
        raise FetchError("scheme", f"{scheme}: URLs are not fetched outside of the folders that the recipe names")


def refused_address(address: str) -> FetchError:
    """The error of a host whose address is not allowed."""
    return FetchError("address", f"{address} is not public; download.allowed_networks allows a network")


@functools.lru_cache(_KEPT_HOSTS)
def is_address(host: str) -> bool:
    """Whether a host is an IP address and no name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _absolute(text: str, base: Url) -> str:
    """A reference of a redirect as an absolute URL; its dots are resolved later."""
    path = text.replace("\\", "/")
    if path.startswith("//"):
        return f"{base.scheme}:{text}"
    if path.startswith("/"):
        return base.origin + text
    if not text or text[0] in "?#":
        return base.origin + (base.path if text.startswith("?") else base.target) + text
    return f"{base.origin}{base.path.rpartition('/')[0]}/{text}"


@functools.lru_cache(_KEPT_HOSTS)
def _read_host(text: str, default_port: int) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]*))?", text)
    if match is None or not match[1]:
        raise FetchError("url", "it has no valid host")
    port = int(match[2].lstrip("0")[:6] or "0") if match[2] else default_port  # six digits are too many already
    if port > 65535:
        raise FetchError("url", "its port is above 65535")
    return _read_name(match[1]), port


def _read_login(userinfo: str) -> bytes:
    user, _, password = userinfo.encode("utf-8", "surrogateescape").partition(b":")
    return unquote_to_bytes(user) + b":" + unquote_to_bytes(password) if user or password else b""


def _read_name(text: str) -> str:
    if text.startswith("["):
        try:
            return str(ipaddress.IPv6Address(text[1:-1]))
        except ValueError:
            raise FetchError("url", "its host is no IPv6 address") from None
    name = unquote_to_bytes(text.encode("utf-8", "surrogateescape")).decode("utf-8", "replace")
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode()
        except (idna.IDNAError, UnicodeError):
            raise FetchError("url", "its host is no valid name") from None
    name = name.lower()
    if not name.strip(".") or _FORBIDDEN_IN_HOST.search(name):
        raise FetchError("url", "its host is no valid name")
    if _IPV4_LIKE.fullmatch(name):  # 127.1, 0x7f000001 and 2130706433 are 127.0.0.1 for browsers and for the system
        try:
            return socket.inet_ntoa(socket.inet_aton(name.rstrip(".")))
        except OSError:
            raise FetchError("url", "its host is no IPv4 address") from None
    return name


def _encode_target(text: str) -> str:
    path, mark, query = text.partition("?")
    segments: list[str] = []
    parts = path.replace("\\", "/").split("/")[1:] or [""]
    for number, part in enumerate(parts, start=1):
        if part.lower() in _DOTS:
            segments = segments[:-1]
        elif part.lower() not in _DOT:
            segments.append(part)
            continue
        if number == len(parts):
            segments.append("")
    # Bytes of a redirect that are no UTF-8 come as surrogates; they go out as they came in.
    encoded = quote("/" + "/".join(segments), safe=_PATH_SAFE, errors="surrogateescape")
    return encoded + mark + quote(query, safe=_QUERY_SAFE, errors="surrogateescape")
