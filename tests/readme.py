"""What the README tells a person to type, for the tests that type it."""

import re
import shlex

from tests.tiny.command import ROOT


def shell_commands() -> list[list[str]]:
    """Arguments of every ``unclip`` line of the README's shell blocks, in order."""
    lines = [line for block in _blocks("") for line in block.splitlines() if line.startswith("unclip ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def python_blocks() -> list[str]:
    """The README's Python blocks."""
    return _blocks("python")


def _blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]
