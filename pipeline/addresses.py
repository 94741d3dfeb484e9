"""Addresses as people may see them: without the password or the signature that is in them."""

import re
import shlex
from typing import Any, cast

_PASSWORD = re.compile(r"\A((?:[\w+.-]*:)?//)?+([^:/@]*):.*@", re.DOTALL)
"""Scheme, user and password of an address, which may have any letter: rather too much is hidden than a part shown."""
_IN_TEXT = re.compile(r"(?<![\w+.-])[\w+.-]++://[^\s\"]*[^\s\"'`.,:;<>()\[\]{}]")
"""An address in a sentence, without the sentence's own marks behind it."""
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
    # In ``name=value`` the address may lack its scheme.
    return f"{name}={without_secrets(without_password(value))}" if is_set else without_secrets(word)


def values_without_secrets(value: Any) -> Any:
    """A value of JSON, such as a table of a recipe, whose addresses people may see."""
    if isinstance(value, dict):
        return {name: values_without_secrets(one) for name, one in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [values_without_secrets(one) for one in cast("list[Any]", value)]
    if not isinstance(value, str):
        return value
    return without_secrets(without_password(value) if _BEGINS.match(value) else value)
