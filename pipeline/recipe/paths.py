"""Local paths of a recipe, for processes that run in other folders: jobs of a cluster, and replicas of a server."""

import dataclasses
from pathlib import Path

from pipeline.recipe.recipe import Recipe
from pipeline.recipe.train_sections import NetworkStepConfig


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with its local paths made absolute."""
    clip = recipe.clip
    if clip.source == "pretrained":
        clip = dataclasses.replace(clip, name=_existing(clip.name), tag=_existing(clip.tag))
    networks = {
        name: dataclasses.replace(section, init_from=_absolute(section.init_from))
        for name, section in recipe.trained().items()
        if isinstance(section, NetworkStepConfig)
    }
    lists = tuple(dataclasses.replace(one, path=_absolute(one.path)) for one in recipe.pairs.lists)
    return dataclasses.replace(
        recipe,
        **networks,
        workspace=_absolute(recipe.workspace),
        pairs=dataclasses.replace(recipe.pairs, path=_absolute(recipe.pairs.path), lists=lists),
        clip=clip,
        evaluate=dataclasses.replace(
            recipe.evaluate,
            prompts_path=_absolute(recipe.evaluate.prompts_path),
            features_path=_absolute(recipe.evaluate.features_path),
        ),
        serve=dataclasses.replace(
            recipe.serve,
            keys=_absolute(recipe.serve.keys),
            access_log=_absolute(recipe.serve.access_log),
            provenance=_absolute(recipe.serve.provenance),
        ),
        tracking=dataclasses.replace(recipe.tracking, uri=_absolute_database(recipe.tracking.uri)),
    )


def _absolute(path: str) -> str:
    return path if not path or "://" in path else str(Path(path).absolute())


def _existing(path: str) -> str:
    return _absolute(path) if path and Path(path).exists() else path


def _absolute_database(uri: str) -> str:
    scheme, separator, path = uri.partition(":///")
    if separator and scheme == "sqlite" and not path.startswith("/"):
        return f"{scheme}:///{Path(path).absolute()}"
    return uri
