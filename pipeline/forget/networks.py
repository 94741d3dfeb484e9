"""Which networks were trained on some pairs, or began with weights that were."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.retries import Before
from pipeline.recipe.steps import STEP_ROWS
from pipeline.train.origin import source_of
from pipeline.workspace.forgotten import TrainedOn, Training, most_pairs, trainings_of
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import INPUTS, Artifact, Workspace

Json = dict[str, Any]
Place = tuple[str, str]
"""Step and key of an artifact."""

_ROWS_OF_NETWORK = ("filter_embeddings", "embed", "filter", "download")
"""Inputs of a training; the first that it has says which rows it reads."""


@dataclass(frozen=True)
class NetworksOn:
    """The networks of a workspace whose weights have seen some pairs; see ``Search`` for the fields."""

    networks: tuple[TrainedOn, ...]
    earlier: tuple[TrainedOn, ...]
    begun_with: tuple[tuple[Place, Place], ...]
    finished: frozenset[Place]
    """The finished ones, be it by their own training or by weights with which they began."""


@dataclass(frozen=True)
class _Network:
    """A network of the workspace, finished or not."""

    place: Place
    contents: dict[str, str]
    """Of its inputs."""
    sources: Json
    """Where its first weights come from, as in its metrics."""

    @property
    def trainings(self) -> list[Training]:
        """Those that its weights have been through, its own first."""
        return list(trainings_of(*self.place, self.contents, self.sources))


def networks_on(
    workspace: Workspace, manifests: Mapping[str, Mapping[str, Manifest]], pairs: Mapping[Place, int]
) -> NetworksOn:
    """Find the networks that were trained on some pairs, or began with weights that were.

    Args:
        workspace: The workspace.
        manifests: The finished artifacts of each step, by key.
        pairs: The artifacts with rows of these pairs that a training reads, and how many they are.
    """
    contents = {
        (step, content): count
        for (step, key), count in pairs.items()
        for content in _contents_of(workspace.artifact(step, key), manifests[step].get(key))
    }
    finished = {
        (row.name, manifest.key): manifest
        for row in STEP_ROWS.values()
        if row.trains
        for manifest in manifests[row.name].values()
    }
    under_way = list(_under_way(workspace, finished)) if contents else []
    networks = (*_trained(finished.values(), pairs), *_by_content(under_way, contents))
    complete = [_Network(place, one.input_contents, one.metrics) for place, one in finished.items()]
    earlier = tuple(_earlier([*complete, *under_way], contents, networks))
    trainings = (*networks, *earlier)
    begun_with = tuple(_begun_with([*complete, *under_way], trainings))
    places = frozenset(one.place for one in complete if most_pairs(trainings, one.trainings))
    return NetworksOn(networks, earlier, begun_with, places)


def continued_by(dirty: Iterable[Manifest], networks: Iterable[TrainedOn]) -> list[Place]:
    """The networks that some of ``dirty`` have continued."""
    origins = {(one.step, one.metrics["continued"]["key"]) for one in dirty if "continued" in one.metrics}
    return [(one.step, one.key) for one in networks if (one.step, one.key) in origins]


def _under_way(workspace: Workspace, finished: Mapping[Place, Manifest]) -> Iterator[_Network]:
    """The networks that are being trained."""
    for row in STEP_ROWS.values():
        for key in workspace.keys(row.name) if row.trains else ():
            artifact = workspace.artifact(row.name, key)
            if (row.name, key) not in finished and artifact.exists(INPUTS):
                source = source_of(artifact)
                yield _Network((row.name, key), source["input_contents"], source)


def _trained(finished: Iterable[Manifest], pairs: Mapping[Place, int]) -> Iterator[TrainedOn]:
    """The finished networks that were trained on the pairs."""
    for manifest in finished:
        source = _source_of(manifest.inputs)
        if count := pairs.get((source, manifest.inputs.get(source, ""))):
            content = manifest.input_contents.get(source, "")
            yield TrainedOn(manifest.step, manifest.key, count, source, content)


def _by_content(networks: Iterable[_Network], contents: Mapping[Place, int]) -> Iterator[TrainedOn]:
    """Those of the networks that are trained on the pairs; their inputs are known by content alone."""
    for one in networks:
        source = _source_of(one.contents)
        content = one.contents.get(source, "")
        if count := contents.get((source, content)):
            yield TrainedOn(*one.place, count, source, content)


def _earlier(
    networks: Iterable[_Network], contents: Mapping[Place, int], others: Iterable[TrainedOn]
) -> Iterator[TrainedOn]:
    """The trainings on the pairs that weights come from, without ``others``: such a one is gone, or was made anew."""
    listed = {(one.step, one.key, one.content) for one in others}
    for step, key, inputs in (training for one in networks for training in one.trainings[1:]):
        for one in _by_content([_Network((step, key), inputs or {}, {})], contents):
            if (step, key, one.content) not in listed:
                listed.add((step, key, one.content))
                yield one


def _begun_with(networks: Iterable[_Network], trainings: Sequence[TrainedOn]) -> Iterator[tuple[Place, Place]]:
    """The networks that began with weights of such trainings, each with the network of these weights.

    Not those that begin with an input: they are made from it anyway.
    """
    for one in networks:
        source = one.sources.get("begun_with")
        if source and source["name"] != STEP_ROWS[one.place[0]].begins_with:
            name, key = source["name"], source["key"]
            if most_pairs(trainings, list(trainings_of(name, key, source.get("input_contents"), source))):
                yield one.place, (name, key)


def _source_of(inputs: Mapping[str, str]) -> str:
    """The input that says which rows a training reads; empty if it reads none."""
    return next((name for name in _ROWS_OF_NETWORK if name in inputs), "")


def _contents_of(artifact: Artifact, manifest: Manifest | None) -> tuple[str, ...]:
    """The contents of which a training may say that it reads them; also of a download that was opened again."""
    before = Before.read(artifact) if manifest is None else Before.of(manifest)
    return () if before is None else (before.content, *before.former_contents)
