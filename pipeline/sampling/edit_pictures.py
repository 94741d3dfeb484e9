"""Edits of pictures by a recipe's cascade: PNG files, a labelled grid, and one line of JSON for each picture.

Every edit is one entry of ``EDITS``: a function from pictures to frames. All edits share files, grid and settings.
The mathematics is in models/editor.py.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from models.cascade import CascadeResult
from models.editor import Editor, EditSettings, Latents
from models.pca import Pca, PcaSums
from models.request import EditError
from models.stage import Watch
from pipeline.data.vectors import training_batches
from pipeline.errors import ConfigError
from pipeline.grid import Block, draw_grid
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.pictures.frame import square
from pipeline.pictures.png import to_png, with_texts
from pipeline.pictures.read import read_file
from pipeline.recipe.garbage import in_use_of
from pipeline.recipe.picture_card import ModelCard, model_card, texts_of
from pipeline.recipe.plan import artifact_of, finished_artifacts, make_plan
from pipeline.recipe.provenance import C2PA_EDITED
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.sampling.edit_options import EditOptions, evenly, shown_components
from pipeline.sampling.masks import masked_pixels
from pipeline.sampling.preview import Preview
from pipeline.sampling.sample import GRID
from pipeline.workspace.disk import translate_os_errors
from pipeline.workspace.hashing import sha256_of
from pipeline.workspace.store import Artifact, Workspace

Json = dict[str, Any]
Pixels = NDArray[np.uint8]

EDITS_FILE = "edits.jsonl"
_OF_A_PART = ("inpaint", "outpaint")
"""Edits that leave a part of the picture as it is."""
_WRITTEN = re.compile(r"(\d{3,}|source-\d+|grid|preview)\.png")
"""Names of the pictures that an edit writes; each of an earlier edit may be replaced."""
_CELL_PX = (128, 256)
_COLUMNS = 10
"""Most pictures side by side in the grid."""


@dataclass(frozen=True)
class Sources:
    """The pictures of one call."""

    files: tuple[str, ...]
    pictures: tuple[Image.Image, ...]
    embed: Artifact
    """The embed step, for its principal components."""
    digests: tuple[str, ...] = ()
    """SHA-256 of the files."""

    @property
    def names(self) -> list[str]:
        """File names without their folders, for labels."""
        return [Path(file).name for file in self.files]

    def square(self, side_px: int, device: torch.device) -> torch.Tensor:
        """The first picture's centre, uint8 (1, side, side, 3)."""
        return torch.from_numpy(square(self.pictures[0], side_px))[None].to(device)


@dataclass(frozen=True)
class Frames:
    """The result of an edit."""

    result: CascadeResult
    label: str
    tags: list[str]
    """Text under each frame."""
    rows: list[Json]
    """The seed of each frame, and its own values."""
    are_made: bool = True
    """Whether networks made them; else they are the picture itself, and their files name no networks."""


def edit_recipe(
    recipe: Recipe,
    edit: str,
    files: Sequence[str],
    options: EditOptions,
    settings: EditSettings,
    *,
    out_dir: Path,
    watch: Watch | None = None,
) -> list[Json]:
    """Edit pictures with the trained cascade of a recipe; write the frames, ``grid.png`` and ``edits.jsonl``.

    Args:
        recipe: A recipe whose networks are trained.
        edit: A name of ``EDITS``.
        files: The pictures.
        options: Options of the edit.
        settings: Settings of the decoder's sampler.
        out_dir: Folder, created if missing; files of an earlier call are replaced.
        watch: Called after each step of each stage; ``preview.png`` shows the steps.

    Returns:
        The rows of ``edits.jsonl``.

    Raises:
        ConfigError: If a file is not a picture, or stands where a picture will be written; if a network is not trained
            yet, or the edit cannot be done.
        StepError: If the folder cannot be written.
    """
    pictures = tuple(read_file(file) for file in files)
    _require_apart(out_dir, [*files, options.mask])
    with in_use_of(recipe, (*CASCADE_STEPS, "embed")):
        artifacts = finished_artifacts(recipe, CASCADE_STEPS)
        embed = next(step for step in make_plan(recipe, until="embed") if step.name == "embed")
        digests = tuple(sha256_of(Path(file)) for file in files)
        sources = Sources(tuple(files), pictures, artifact_of(Workspace(recipe.workspace), embed), digests)
        cascade = load_cascade(artifacts, recipe.evaluate.resources.accelerator, network_configs(recipe))
        with translate_os_errors(str(out_dir)):
            out_dir.mkdir(parents=True, exist_ok=True)
            with Preview(out_dir, watch) as preview:
                try:
                    editor = Editor(cascade, settings, preview)
                    frames = EDITS[edit](editor, sources, options)
                except EditError as error:
                    raise ConfigError(f"{edit}: {error}") from None
            return _write(out_dir, edit, editor, sources, frames, model_card(recipe, artifacts))


def _require_apart(out_dir: Path, files: Sequence[str]) -> None:
    """Refuse a folder in which an edit would replace what it starts from, also by way of a link."""
    sources = [file for file in files if Path(file).is_file()]
    for path in out_dir.glob("*.png"):
        if _WRITTEN.fullmatch(path.name) and path.exists() and any(path.samefile(file) for file in sources):
            raise ConfigError(f"{path}: the edit starts from it and would replace it; choose another --out")


def _write(out_dir: Path, edit: str, editor: Editor, sources: Sources, frames: Frames, card: ModelCard) -> list[Json]:
    originals = [square(picture, editor.side_px) for picture in sources.pictures]
    for number, original in enumerate(originals):
        (out_dir / f"source-{number}.png").write_bytes(to_png(original))
    rows: list[Json] = []
    pictures: list[Pixels] = list(frames.result.images.numpy())
    for number, (picture, row) in enumerate(zip(pictures, frames.rows, strict=True)):
        name, settings = f"{number:03d}.png", {"settings": asdict(editor.settings)}
        own = {key: value for key, value in row.items() if key not in {"prompt", "seed"}}
        made_by = {"kind": edit, "sources": list(sources.digests), **own, **settings}
        facts = {
            "prompt": row.get("prompt", ""),
            "negative_prompt": "",
            "seed": row["seed"],
            "side_px": editor.side_px,
            "sampling": {**card.sampling, "decoder": _sampler(editor, row)},
            "edit": made_by,
            **(C2PA_EDITED if edit in _OF_A_PART else {}),
        }
        file = to_png(picture)
        (out_dir / name).write_bytes(with_texts(file, texts_of(card, facts)) if frames.are_made else file)
        about = {"file": name, "edit": edit, "sources": list(sources.files), "label": frames.label}
        rows.append(about | row | settings)
    (out_dir / EDITS_FILE).write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows), encoding="utf-8")
    # An interpolation is shown between its two pictures.
    before, after = originals[:1], originals[1:]
    shown = [*before, *pictures, *after]
    tags = ["source"] * len(before) + frames.tags + ["source"] * len(after)
    starts = range(0, len(shown), _COLUMNS)
    blocks = [Block(shown[start : start + _COLUMNS], "", tags[start : start + _COLUMNS]) for start in starts]
    blocks[-1] = Block(blocks[-1].pictures, frames.label, blocks[-1].tags)
    cell_px = min(max(editor.side_px, _CELL_PX[0]), _CELL_PX[1])
    (out_dir / GRID).write_bytes(to_png(draw_grid(blocks, cell_px=cell_px)))
    return rows


def _sampler(editor: Editor, row: Json) -> Json:
    """How the decoder was sampled for a frame."""
    walk, usual, scale = asdict(editor.latent_walk.sampler), editor.decoder.sampler, editor.settings.prompt_guidance
    if "prompt" not in row:
        return walk | {"eta": row.get("eta", walk["eta"])}
    guidance_scale = usual.guidance_scale if scale is None else scale
    return walk | {"guidance_scale": guidance_scale, "clip_guidance_scale": usual.clip_guidance_scale}


# ---- the edits -----------------------------------------------------------------------------------


def _reconstruct(editor: Editor, sources: Sources, options: EditOptions) -> Frames:
    result = editor.reconstruct(_encode(editor, sources.pictures[0]), [options.seed])
    return Frames(result, sources.names[0], ["reconstruction"], [{"seed": options.seed}])


def _vary(editor: Editor, sources: Sources, options: EditOptions) -> Frames:
    seeds = _seeds(options)
    result = editor.vary(_encode(editor, sources.pictures[0]), seeds, eta=options.eta)
    rows: list[Json] = [{"seed": seed, "eta": options.eta} for seed in seeds]
    return Frames(result, f"{sources.names[0]}, eta {options.eta:g}", _seed_tags(seeds), rows)


def _interpolate(editor: Editor, sources: Sources, options: EditOptions) -> Frames:
    a, b = (_encode(editor, picture) for picture in sources.pictures)
    shares = evenly(1.0, options.num_frames)
    result = editor.interpolate(a, b, shares, options.seed, noise=options.noise)
    rows: list[Json] = [{"seed": options.seed, "share": share, "noise": options.noise} for share in shares]
    label = f"{sources.names[0]} -> {sources.names[1]}, noise {options.noise}"
    return Frames(result, label, [f"{share:.2f}" for share in shares], rows)


def _text_diff(editor: Editor, sources: Sources, options: EditOptions) -> Frames:
    thetas = evenly(options.theta, options.num_frames)
    latents = _encode(editor, sources.pictures[0])
    result = editor.text_diff(latents, options.source, options.target, thetas, options.seed)
    rows: list[Json] = [
        {"seed": options.seed, "theta": theta, "from": options.source, "to": options.target} for theta in thetas
    ]
    return Frames(result, f"{options.source} -> {options.target}", [f"theta {theta:.2f}" for theta in thetas], rows)


def _inpaint(editor: Editor, sources: Sources, options: EditOptions) -> Frames:
    masked = masked_pixels(read_file(options.mask, alpha=True), sources.pictures[0], options.mask, sources.files[0])
    mask = torch.from_numpy(masked)[None]
    image = sources.square(editor.side_px, editor.device)
    return _inpaint_masked(editor, image, mask.to(editor.device), options)


def _outpaint(editor: Editor, sources: Sources, options: EditOptions) -> Frames:
    border_px = max(1, round(options.margin * editor.side_px))
    inner_px = editor.side_px - 2 * border_px
    if inner_px < 1:
        raise ConfigError(f"--margin {options.margin}: leaves nothing of a picture of {editor.side_px} px")
    around = (border_px, border_px)
    # The border repeats the picture's edge, so that a resize mixes no other colour into the unmasked part.
    canvas = np.pad(square(sources.pictures[0], inner_px), (around, around, (0, 0)), mode="edge")
    border = np.pad(np.zeros((inner_px, inner_px), bool), (around, around), constant_values=True)
    image, mask = (torch.from_numpy(part)[None].to(editor.device) for part in (canvas, border))
    return _inpaint_masked(editor, image, mask, options)


def _inpaint_masked(editor: Editor, image: torch.Tensor, mask: torch.Tensor, options: EditOptions) -> Frames:
    seeds = _seeds(options)
    result = editor.inpaint(image, mask, options.prompt, seeds)
    rows: list[Json] = [{"seed": seed, "prompt": options.prompt, "method": editor.inpaint_method} for seed in seeds]
    return Frames(result, f"{options.prompt} (by {editor.inpaint_method})", _seed_tags(seeds), rows)


def _sdedit(editor: Editor, sources: Sources, options: EditOptions) -> Frames:
    seeds = _seeds(options)
    image = sources.square(editor.side_px, editor.device)
    result = editor.sdedit(image, options.prompt, seeds, strength=options.strength)
    rows: list[Json] = [{"seed": seed, "prompt": options.prompt, "strength": options.strength} for seed in seeds]
    label, are_made = f"{options.prompt}, strength {options.strength:g}", editor.num_steps_of(options.strength) > 0
    return Frames(result, label, _seed_tags(seeds), rows, are_made=are_made)


def _pca_reconstruct(editor: Editor, sources: Sources, options: EditOptions) -> Frames:
    """Section 4 and figure 7: more and more components of z_image, last all of them, sampled from one noise."""
    pca, z_image = training_pca(sources.embed), editor.embed(_as_tensor(sources.pictures[0]))
    try:
        shown = shown_components(options.components, z_image.shape[1])
    except EditError as error:
        raise ConfigError(f"--{error}") from None
    counts = [*shown, z_image.shape[1]]
    result = editor.sample_embeddings(pca.reduce(z_image, shown), options.seed)
    rows: list[Json] = [{"seed": options.seed, "components": count} for count in counts]
    return Frames(result, sources.names[0], [*(str(count) for count in shown), "all"], rows)


EDITS: dict[str, Callable[[Editor, Sources, EditOptions], Frames]] = {
    "reconstruct": _reconstruct,
    "vary": _vary,
    "interpolate": _interpolate,
    "text-diff": _text_diff,
    "inpaint": _inpaint,
    "outpaint": _outpaint,
    "sdedit": _sdedit,
    "pca-reconstruct": _pca_reconstruct,
}


# ---- embeddings ----------------------------------------------------------------------------------


def training_pca(embed: Artifact, check: Callable[[], None] = lambda: None, *, most_rows: int = 0) -> Pca:
    """Principal components of the training pictures' embeddings.

    Memory grows with the width (D x D sums) and a batch of rows, but not with the rows of a shard, nor their number: a
    part of imported embeddings may have a million rows (see ``training_batches``).

    Args:
        embed: The embed step.
        check: Called for each batch of a shard; what it raises ends the search.
        most_rows: If there are more rows than that, about as many are read, in shards from all over the data; 0: all.

    Raises:
        ConfigError: If fewer than two training rows are embedded under this recipe.
        DataError: If a shard is damaged.
    """
    records = embed.shard_records()
    num_rows = sum(record.counts.get("ok", 0) for record in records.values())
    num_shards = max(1, len(records) * most_rows // num_rows) if 0 < most_rows < num_rows else len(records)
    sums: PcaSums | None = None
    for shard in [list(records)[number * len(records) // num_shards] for number in range(num_shards)]:
        for [rows] in training_batches(embed.ranged(f"{shard}.parquet"), ["z_image"]):
            check()
            sums = sums or PcaSums(rows.shape[1])
            sums.update(torch.from_numpy(rows))
    if sums is None or sums.num_rows < 2:
        raise ConfigError(
            "embed: too few training embeddings for principal components; run `unclip run RECIPE --until embed`"
        )
    return sums.pca()


def _encode(editor: Editor, picture: Image.Image) -> Latents:
    return editor.encode(_as_tensor(picture))


def _as_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture))[None]


def _seeds(options: EditOptions) -> list[int]:
    return [options.seed + number for number in range(options.num_images)]


def _seed_tags(seeds: Sequence[int]) -> list[str]:
    return [f"seed {seed}" for seed in seeds]
