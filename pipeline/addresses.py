"""Addresses as people may see them: without the password or the signature that is in them."""

import re
import shlex
from typing import Any, cast

_PASSWORD = re.compile(r"\A((?:[\w+.-]*:)?//)?+([^:/@]*):.*@", re.DOTALL)
"""Scheme, user and password of an address, which may have any letter: rather too much is hidden than a part shown."""
_IN_TEXT = re.compile(r"(?<![\w+.-])[\w+.-]++://(?:[^\s:/@\"]*+:(?!\s)[^/@\"\n]*+@)?+[^\s\"]*[^\s\"'`.,:;<>()\[\]{}]")
"""An address in a sentence, without the sentence's own marks behind it; its password may hold a space."""
_WITHOUT_SCHEME = re.compile(r"(?!hf-hub:|local-dir:)[^\s:/@]+:\S+@[\w.-]+(:\d+)?(/\S*)?")
"""An address with a password that is the whole value of a field, and no sentence with a colon and an @."""
HIDDEN = "*** stands for what your own command has there"
"""For whoever reads a command that was cleaned."""
_BEGINS = re.compile(r"(?:[\w+.-]+:)?//")
"""A text that is an address as a whole: its password may hold a space."""


def without_password(address: str) -> str:
    """An address (``http://user:password@host``, or without its scheme) as people may see it.

    Drivers of databases take a password in the query, and stores a signature; without names it is a pattern of files.
    """
    shown = _PASSWORD.sub(r"\1\2:***@", address)
    place, _, query = shown.partition("?")
    return f"{place}?***" if "=" in query else shown


def without_secrets(text: str) -> str:
    """A text, such as a message, whose addresses (those with a scheme) people may see."""
    return _IN_TEXT.sub(lambda address: without_password(address[0]), text) if "://" in text else text


def words_without_secrets(words: str) -> str:
    """Words of a shell's command as people may see them."""
    return shlex.join(map(_word_without_secrets, shlex.split(words)))


def _word_without_secrets(word: str) -> str:
    name, is_set, value = word.partition("=")
    if not is_set:
        return without_secrets(word)
    is_address = _BEGINS.match(value) or _WITHOUT_SCHEME.fullmatch(value)
    return f"{name}={without_secrets(without_password(value) if is_address else value)}"


def values_without_secrets(value: Any) -> Any:
    """A value of JSON, such as a table of a recipe, whose addresses people may see."""
    if isinstance(value, dict):
        return {name: values_without_secrets(one) for name, one in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [values_without_secrets(one) for one in cast("list[Any]", value)]
    if not isinstance(value, str):
        return value
    return without_secrets(without_password(value) if _BEGINS.match(value) else value)
