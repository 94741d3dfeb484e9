"""Addresses as people may see them: without the password or the signature that is in them."""

import re
import shlex
import tomllib
from typing import Any, cast

_PASSWORD = re.compile(r"\A((?:[\w+.-]*:)?//)?+([^:/@]*):.*@", re.DOTALL)
"""Scheme, user and password of an address, which may have any letter: rather too much is hidden than a part shown."""
_IN_TEXT = re.compile(
    r"(?<![\w+.-])[\w+.-]++://"
    r"(?:[^\s:/@\"\[]*+:(?!\d{0,5}+[;,.:?!'`)>\]}]*+\s)[^/@\"\n]*+@)?+"
    r"[^\s\"]*[^\s\"'`.,:;<>()\[\]{}]"
)
"""An address in a sentence, without the sentence's own marks behind it. Its password may hold a space; but after a port
and a space the sentence goes on, whatever @ it has later."""
_FIELD = re.compile(
    r"(?:\A|[._])(?:workspace|uri|url|path|folder|from|address|endpoint|proxy|traces)s?\Z", re.IGNORECASE
)
"""The name of a field, or of a variable, whose value is an address: there a password may have any form."""
_WHOLE = re.compile(r"(?:[\w+.-]+:)?//.*|(?!hf-hub:|local-dir:)[^\s:/@]*+:[^\s@]*+@\S*+", re.DOTALL)
"""A text that is an address as a whole in whatever field, and no sentence with a colon and an @."""
_DOTTED = re.compile(r"\s*[\w.-]+\s*")
_QUOTED = re.compile(r"""((?:([\w-]+)\s*=\s*)?["'])((?<=")(?:\\.|[^"\\])*+|(?<=')[^']*+)""")
"""A text in TOML, with its name if that is beside it."""
HIDDEN = "*** stands for what your own command has there"
"""For whoever reads a command that was cleaned."""


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
    if not is_set or not _DOTTED.fullmatch(name):
        return _shown(word)
    try:  # as --set reads it: what is no TOML is a text
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return f"{name}={_shown(value, name)}"
    return f"{name}={_QUOTED.sub(lambda text: text[1] + _shown(text[3], text[2] or name), value)}"


def values_without_secrets(value: Any, name: str = "") -> Any:
    """A value of JSON, such as a table of a recipe, whose addresses people may see.

    Args:
        value: The value.
        name: Of its field, which says whether it is an address.
    """
    if isinstance(value, dict):
        return {name: values_without_secrets(one, name) for name, one in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [values_without_secrets(one, name) for one in cast("list[Any]", value)]
    return _shown(value, name) if isinstance(value, str) else value


def _shown(text: str, name: str = "") -> str:
    is_address = _FIELD.search(name.strip()) or _WHOLE.fullmatch(text.strip())
    return without_secrets(without_password(text) if is_address else text)
