"""What something was made from: an artifact, a checkpoint, an exported folder, or a picture, back to its pairs."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.addresses import values_without_secrets
from pipeline.errors import ConfigError, DataError
from pipeline.recipe import provenance
from pipeline.recipe.last_run import Planned, read_last_run
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import STEP_ROWS, STEPS
from pipeline.recipe.tables import flatten
from pipeline.workspace.manifest import Manifest, read_record
from pipeline.workspace.store import Artifact, Workspace

Json = dict[str, Any]

ORIGIN = "unclip.json"
"""File of an exported folder that says which artifacts its networks are."""
_KEY = re.compile(r"[0-9a-f]{16}")
_KEY_START = re.compile(r"[0-9a-f]{6,16}")
_SHARD = re.compile(r"\d{5,}")
_SHOWN = ("source", "name", "tag", "init_from", "train.num_steps", "train.batch_size", "seed")
"""Fields of a section that say most about what was done."""


@dataclass(frozen=True)
class Node:
    """One artifact in the lineage."""

    step: str
    key: str
    state: str
    """done, unfinished, or missing: nothing of it is in the workspace."""
    inputs: dict[str, str]
    """Key of each input, by step name."""
    others: tuple[tuple[str, str], ...] = ()
    """Step and key of what it reads beside its inputs: the embeddings of an index to which others were appended, the
    training that one with more phases continued, and the network with whose weights one began by ``init_from``."""
    recipes: tuple[str, ...] = ()
    """Names of the recipes of this workspace whose plan holds it."""
    created: float = 0.0
    """Commit time, in seconds since the epoch."""
    wall_s: float = 0.0
    counts: dict[str, int] = field(default_factory=dict[str, int])
    num_shards: int = 0
    settings: Json = field(default_factory=dict[str, Any])
    """The fields of its section that say most about it."""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    """Of the project and of the packages that shaped its bytes."""
    tracking_run_id: str = ""
    """MLflow run, or empty."""
    weights: str = ""
    """SHA-256 of a network's file of weights; empty for other steps."""


@dataclass(frozen=True)
class Lineage:
    """Where something comes from."""

    what: str
    """What was asked for."""
    facts: Json
    """What it says of itself: the prompt and the seed of a picture."""
    workspace: str
    nodes: tuple[Node, ...]
    """The last step first; each before its inputs."""
    notes: tuple[str, ...]
    """What could not be found out, and weights that are not those that the picture names."""

    def to_dict(self) -> Json:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Origin:
    """Which artifacts the networks of an exported folder are."""

    recipe: str
    workspace: str
    networks: dict[str, str]
    """Key of each, by step name."""
    weights: dict[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of the file of weights of each."""


def write_origin(folder: Path, recipe: Recipe, artifacts: Mapping[str, Artifact]) -> None:
    """Say in an exported folder which artifacts its networks are, and what SHA-256 their files of weights have."""
    networks = {name: artifact.key for name, artifact in artifacts.items()}
    manifests = {name: manifest for name, artifact in artifacts.items() if (manifest := artifact.manifest())}
    weights = {name: weights_of(manifest) for name, manifest in manifests.items()}
    origin = _Origin(recipe.name, Workspace(recipe.workspace).root, networks, weights)
    Artifact(str(folder.resolve())).write_json(ORIGIN, asdict(origin))


def exported_weights(network: Artifact) -> str:
    """SHA-256 of the file of weights of a network in an exported folder, as it was exported; empty for another one."""
    exported = exported_network(network)
    return "" if exported is None else exported[2]


def exported_network(network: Artifact) -> tuple[str, str, str] | None:
    """Step, key and ``exported_weights`` of a network in an exported folder; None for another one."""
    folder, _, name = network.uri.rpartition("/")
    origin = _read_origin(folder) if folder else None
    if origin is None or name not in origin.networks:
        return None
    return name, origin.networks[name], origin.weights.get(name, "")


def _read_origin(folder: str) -> _Origin | None:
    """What an exported folder says of its networks; None if it is none.

    Raises:
        DataError: If its file is damaged, or another program's; names it.
    """
    place = Artifact(folder)
    content = place.find_bytes(ORIGIN)
    mend = "export the networks again"
    return None if content is None else read_record(_Origin, content, f"{place.uri}/{ORIGIN}", mend)


def trace(what: str, workspace: str = "") -> Lineage:
    """Find out what something was made from.

    Args:
        what: Path or URI of an artifact, of a file in it, of an exported folder or of a picture; or a key's beginning.
        workspace: Where the artifacts are; empty: where ``what`` says.

    Raises:
        ConfigError: If nothing is known of it, or the workspace is needed and was not given.
        DataError: If a manifest, or the file of an exported folder, cannot be read.
    """
    root, roots, facts = _identify(what, workspace)
    place = Workspace(root)
    plans, notes = _plans(place)
    nodes: dict[tuple[str, str], Node] = {}
    waiting = list(roots.items())
    while waiting:
        step, key = waiting.pop()
        if (step, key) not in nodes:
            nodes[step, key] = _node(place, step, key, plans)
            waiting += [*nodes[step, key].inputs.items(), *nodes[step, key].others]
    if all(node.state == "missing" for node in nodes.values()):
        raise ConfigError(f"{what}: none of its artifacts is in {place.root}; name their workspace with --workspace")
    notes += _other_weights(facts.get("weights", {}), [nodes[root] for root in roots.items()])
    order = {row.name: number for number, row in enumerate(STEPS)}
    ordered = sorted(
        nodes.values(), key=lambda node: -order.get(node.step, len(order))
    )  # of one step, as they were reached
    return Lineage(what, facts, place.root, tuple(ordered), tuple(notes))


def _other_weights(weights: Mapping[str, str], networks: Sequence[Node]) -> list[str]:
    """A note on each network whose weights are not those that a picture names."""
    return [
        f"{node.step} {node.key} is not what the picture was made with: its weights have the SHA-256 {node.weights}, "
        f"those of the picture {weights[node.step]}"
        for node in networks
        if node.weights and weights.get(node.step, node.weights) != node.weights
    ]


def mermaid(lineage: Lineage) -> str:
    """The lineage as a mermaid graph, from the data down."""
    lines = ["graph TD"]
    for node in reversed(lineage.nodes):
        shape = f'["{node.step}<br/>{node.key}"]' if node.state == "done" else f'("{node.step}<br/>{node.state}")'
        lines.append(f"  {node.step}_{node.key}{shape}")
        lines += [f"  {name}_{key} --> {node.step}_{node.key}" for name, key in [*node.inputs.items(), *node.others]]
    return "\n".join(lines)


def _identify(what: str, workspace: str) -> tuple[str, dict[str, str], Json]:
    """The workspace, the artifacts by step, and what the thing says of itself."""
    path = Path(what)
    if "://" not in what and path.is_file() and path.suffix.lower() == ".png":
        facts = _picture_facts(path)
        return _require(workspace, what), facts.pop("networks"), facts
    if "://" not in what and (origin := _read_origin(str(path.absolute()))):
        return workspace or origin.workspace, origin.networks, {"recipe": origin.recipe}
    parts = (what if "://" in what else str(path.absolute())).rstrip("/").split("/")
    for place in range(len(parts) - 1, 0, -1):
        if _KEY.fullmatch(parts[place]) and parts[place - 1] in STEP_ROWS:
            return "/".join(parts[: place - 1]), {parts[place - 1]: parts[place]}, {}
    if _KEY_START.fullmatch(what):
        return _by_key(what, _require(workspace, what))
    raise ConfigError(
        f"{what}: neither an artifact (WORKSPACE/STEP/KEY), a file in one, an exported folder nor a picture of this "
        "program; its key's first six digits do, too"
    )


def _by_key(start: str, root: str) -> tuple[str, dict[str, str], Json]:
    place = Workspace(root)
    matches = [(row.name, key) for row in STEPS for key in place.keys(row.name) if key.startswith(start)]
    if len(matches) == 1:
        return root, dict(matches), {}
    names = ", ".join(f"{step}/{key}" for step, key in matches)
    raise ConfigError(f"{start}: {f'more than one key begins so: {names}' if matches else f'no key in {root}'}")


def _require(workspace: str, what: str) -> str:
    if not workspace:
        raise ConfigError(f"{what}: say where the artifacts are: --workspace FOLDER, or --recipe RECIPE")
    return workspace


def _picture_facts(path: Path) -> Json:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()  # a chunk may stand behind the pixels
            facts = json.loads(image.info["unclip"])
            weights = dict(facts.get("weights", {}))
            return {**facts, **_signature(image), "networks": dict(facts["networks"]), "weights": weights}
    except (OSError, UnidentifiedImageError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: no picture of this program, or another one has removed its metadata") from None


def _signature(image: Any) -> Json:
    """What a picture's signature says; nothing if it has none."""
    chunk = image.info.get(provenance.CHUNK)
    if chunk is None:
        return {}
    try:
        key = provenance.verify(chunk, image.size, image.convert("RGB").tobytes(), image.info["unclip"])
    except ValueError as error:
        return {"signed": str(error)}
    return {"signed": f"by the key {key}, and unchanged since"}


def _node(workspace: Workspace, step: str, key: str, plans: Mapping[str, Planned]) -> Node:
    artifact = workspace.artifact(step, key)
    manifest = artifact.manifest()
    planned = {name: plan.steps[step] for name, plan in plans.items() if (step, key) in plan.keys}
    if manifest is not None:
        return _done(artifact, manifest, tuple(planned))
    state = "unfinished" if artifact.names() else "missing"
    one = next(iter(planned.values()), None)
    inputs, section = (one.inputs, one.section) if one else ({}, {})
    return Node(step, key, state, inputs, recipes=tuple(planned), settings=_settings(section))


def indexed_embeddings(step: str, artifact: Artifact) -> list[tuple[str, str]]:
    """Step and key of the embeddings that the segments of an index read; none for an artifact of another step."""
    if step != "index":
        return []
    names = [name for name in artifact.names() if name.endswith("/segment.json")]
    sources = dict.fromkeys(source for name in names for source in artifact.read_json(name)["embedded"]["sources"])
    return [(parts[-2], parts[-1]) for source in sources if len(parts := source.split("/")) >= 2]


def _done(artifact: Artifact, manifest: Manifest, recipes: tuple[str, ...]) -> Node:
    others = [one for one in indexed_embeddings(manifest.step, artifact) if one not in manifest.inputs.items()]
    sources = [manifest.metrics[name] for name in ("continued", "begun_with") if name in manifest.metrics]
    weights_from = [(source.get("name", manifest.step), source["key"]) for source in sources]
    others += [one for one in weights_from if one not in manifest.inputs.items()]
    shards = {name.rpartition("/")[2].partition(".")[0] for name in manifest.files}
    return Node(
        manifest.step,
        manifest.key,
        "done",
        manifest.inputs,
        tuple(others),
        recipes,
        created=manifest.created,
        wall_s=manifest.wall_s,
        counts=manifest.counts,
        num_shards=sum(bool(_SHARD.fullmatch(shard)) for shard in shards),
        settings=_settings(manifest.section),
        versions=manifest.versions,
        tracking_run_id=manifest.tracking_run_id,
        weights=weights_of(manifest),
    )


def weights_of(network: Manifest) -> str:
    """SHA-256 of the only file of weights of a network; empty if it has none, or several."""
    files = [name for name in network.files if "/" not in name and name.endswith(".safetensors")]
    return network.files[files[0]]["sha256"] if len(files) == 1 else ""


def _settings(section: Json) -> Json:
    fields = flatten(section)
    return values_without_secrets({name: fields[name] for name in _SHOWN if fields.get(name) not in {None, ""}})


def _plans(workspace: Workspace) -> tuple[dict[str, Planned], list[str]]:
    """The plan of each recipe that was run in the workspace, as it was at its last run."""
    plans: dict[str, Planned] = {}
    notes: list[str] = []
    for name in workspace.keys("recipes"):
        try:
            plan = read_last_run(workspace, name)
        except DataError as error:
            notes.append(f"recipe {name}: what its last run made is not known: {error}")
        else:
            plans |= {} if plan is None else {name: plan}
    return plans, notes
