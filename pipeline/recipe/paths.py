"""Paths of a recipe, for processes that run in other folders: jobs and replicas."""

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import STEPS, StepRow


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its local paths made absolute: the files that its steps read, and those of server and tracker."""
    steps = {row.name: _with_absolute_files(section, row) for row in STEPS if (section := getattr(recipe, row.name))}
    lists = tuple(dataclasses.replace(one, path=_absolute(one.path)) for one in recipe.pairs.lists)
    return dataclasses.replace(
        recipe,
        **steps | {"pairs": dataclasses.replace(steps["pairs"], lists=lists)},
        workspace=_absolute(recipe.workspace),
        serve=dataclasses.replace(
            recipe.serve,
            keys=_absolute(recipe.serve.keys),
            access_log=_absolute(recipe.serve.access_log),
            provenance=_absolute(recipe.serve.provenance),
        ),
        tracking=dataclasses.replace(recipe.tracking, uri=_absolute_database(recipe.tracking.uri)),
    )


def _with_absolute_files(section: Any, row: StepRow) -> Any:
    """The section of a step with the files that its row names."""
    return dataclasses.replace(
        section, **{name: _absolute(path) for name, path in section.local_paths(row.files).items()}
    )


def _absolute(path: str) -> str:
    return path if not path or "://" in path else str(Path(path).absolute())


def _absolute_database(uri: str) -> str:
    scheme, separator, path = uri.partition(":///")
    if separator and scheme == "sqlite" and not path.startswith("/"):
        return f"{scheme}:///{Path(path).absolute()}"
    return uri
