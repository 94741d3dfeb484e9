"""URLs of any text: read as browsers read them, or refused; and no spelling of an address leads to our side."""

import ipaddress
import string
from urllib.parse import urljoin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.causes import FetchError
from pipeline.data.urls import AddressRules, Url, file_path, is_address, parse_url

_RULES = AddressRules()
_TEXT = st.text(st.sampled_from("/\\?#%@:[]. \t\n\x00aA0\u00e9\u65e5\U0001f408\udcff|<>\"'"), max_size=20) | st.text(
    max_size=20
)
_HOSTS = st.sampled_from(
    ["a.example", "b\u00fccher.example", "\u4f8b\u3048.test", "8.8.8.8", "[2606:4700::1111]", "0x08080808"]
)
_SEGMENT = st.text(string.ascii_letters + string.digits + "-_~", min_size=1, max_size=6)
_PATH = st.lists(_SEGMENT, max_size=5).map("/".join)
_REFERENCE = st.lists(_SEGMENT | st.sampled_from([".", ".."]), max_size=5).map("/".join)
_NEAR = st.sampled_from(
    ["0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
     "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
     "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"]
).flatmap(lambda network: st.ip_addresses(v=4, network=network))  # fmt: skip
"""Addresses that are not of the public internet: all of IANA's list of special ones, and a cloud's metadata."""
_NEAR_6 = st.sampled_from(
    ["::/128", "::1/128", "::ffff:0:0:0/96", "64:ff9b:1::/48", "100::/64", "2001:2::/48", "2001:db8::/32", "3fff::/20",
     "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"]
).flatmap(lambda network: st.ip_addresses(v=6, network=network))  # fmt: skip
_DIGITS = st.sampled_from("019").flatmap(lambda digit: st.integers(0, 6000).map(lambda count: digit * count))
"""Python's int() refuses more than 4,300 digits."""


def _spellings(address: ipaddress.IPv4Address) -> list[str]:
    """Ways to write an address that browsers and the system understand."""
    number, parts = int(address), list(address.packed)
    rest = int.from_bytes(address.packed[1:])
    return [
        str(address),
        f"{address}.",
        str(number),
        f"0x{number:x}",
        f"0X{number:08X}",
        ".".join(f"0{part:o}" for part in parts),
        ".".join(hex(part) for part in parts),
        f"{parts[0]}.{rest}",
        f"%3{str(address)[0]}{str(address)[1:]}",
        "".join(chr(ord(digit) + 0xFEE0) if digit.isdecimal() else digit for digit in str(address)),
        f"[::ffff:{address}]",
        f"[64:ff9b::{address}]",
        f"[2002:{number >> 16:x}:{number & 0xFFFF:x}::1]",
    ]


@given(_TEXT, _TEXT, _HOSTS)
def test_any_text_is_a_url_that_reads_the_same_again_or_is_refused(start: str, end: str, host: str) -> None:
    for text in (start, f"http://{start}", f"HTTPS:{start}//{host}/{end}", f" http://{host}{end}"):
        try:
            url = parse_url(text)
        except FetchError:
            continue
        assert url.scheme in {"http", "https"}
        assert url.text.isascii()
        assert not any(character <= " " or character == "\x7f" for character in url.text)
        assert "#" not in url.text
        assert url.path.startswith("/")
        assert not {".", ".."} & set(url.path.split("/"))
        assert parse_url(url.text) == Url(url.scheme, url.host, url.port, url.target)


@given(_TEXT, _HOSTS, _DIGITS)
def test_any_login_and_any_port_are_read_or_refused(login: str, host: str, digits: str) -> None:
    try:
        url = parse_url(f"http://{login}@{host}:{digits}/")
    except FetchError:
        return
    assert url.port <= 65535
    if not set("/\\?#") & set(login):  # else it ends there
        assert url.port == (int(digits.lstrip("0") or "0") if digits else 80)


@given(_TEXT, st.sampled_from(["%00", "%ff", "\ud800", "../", "x" * 300, ""]))
def test_any_path_of_a_file_is_refused_or_inside_of_the_folders(text: str, odd: str) -> None:
    for folders in ([], ["/usr/lib"]):
        for start in ("file:///usr/lib/", "file://localhost/", "FILE:/"):
            path = file_path(f"{start}{text}{odd}")
            if path is None:
                continue
            try:
                AddressRules(folders=folders).require_file(path)
            except FetchError as error:
                assert error.cause in {"scheme", "file"}  # noqa: PT017  (others may be allowed)
            else:
                assert path.resolve().is_relative_to(*folders)


@given(_HOSTS, _TEXT)
def test_a_url_with_a_name_of_a_host_and_any_path_is_never_refused(host: str, path: str) -> None:
    assert parse_url(f"http://{host}/{path}").host == parse_url(f"http://{host}").host


@given(base=_PATH, reference=_REFERENCE | _REFERENCE.map(lambda path: f"/{path}"), query=st.none() | _SEGMENT)
def test_a_relative_redirect_leads_where_pythons_own_reader_says(base: str, reference: str, query: str | None) -> None:
    start, target = f"http://a.example/{base}", reference + ("" if query is None else f"?{query}")
    assert parse_url(target, parse_url(start)).text == parse_url(urljoin(start, target)).text


@given(
    address=_NEAR,
    user=st.sampled_from(["", "user@", "user:word@", "8.8.8.8@"]),
    scheme=st.sampled_from(["http", "https"]),
)
def test_no_spelling_of_an_address_of_our_side_is_fetched(
    address: ipaddress.IPv4Address, user: str, scheme: str
) -> None:
    for text in _spellings(address):
        url = parse_url(f"{scheme}://{user}{text}:8080/a.jpg")
        assert is_address(url.host), text
        with pytest.raises(FetchError, match="address"):
            _RULES.require_url(url)


@given(_NEAR_6)
def test_no_address_of_version_6_of_our_side_is_fetched(address: ipaddress.IPv6Address) -> None:
    with pytest.raises(FetchError, match="address"):
        _RULES.require_url(parse_url(f"http://[{address}]:8080/a.jpg"))


@given(st.ip_addresses(v=4).filter(lambda address: address.is_global and not address.is_multicast))
def test_every_spelling_of_a_public_address_is_the_same_address(address: ipaddress.IPv4Address) -> None:
    urls = [parse_url(f"http://{text}/") for text in _spellings(address)[:-3]]
    assert {url.host for url in urls} == {str(address)}
    is_special = any(address in ipaddress.ip_network(network) for network in ("192.0.0.0/24", "192.88.99.0/24"))
    assert _RULES.allows(str(address)) or str(address) == "168.63.129.16" or is_special
