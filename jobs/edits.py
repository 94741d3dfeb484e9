"""The commands that edit pictures: each parses its own options, the rest is shared (pipeline/evaluate/edits.py)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.drawing import DrawingWatcher
from jobs.options import AsJson, Overrides, RecipePath, print_json
from pipeline.errors import ConfigError
from pipeline.recipe import load_recipe

ImagePath = Annotated[str, typer.Argument(metavar="IMAGE", help="Picture; its centre square is taken.")]
Prompt = Annotated[str, typer.Argument(metavar='"PROMPT"', help="What the finished picture shows.")]
NumImages = Annotated[int, typer.Option("-n", min=1, help="Pictures.")]
NumFrames = Annotated[int, typer.Option("--frames", min=2, help="Pictures on the way, both ends included.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed draws the same pictures.")]
Out = Annotated[str, typer.Option("--out", help="Folder for the pictures, grid.png and edits.jsonl.")]
NumSteps = Annotated[int, typer.Option("--steps", min=1, help="DDIM steps of the decoder, there and back.")]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", min=0.0, help="Guidance scale; default: 1 from an inverted picture, else the decoder's."
    ),
]


def reconstruct(
    recipe: RecipePath,
    image: ImagePath,
    steps: NumSteps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    out: Out = "out",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Draw a picture again from its latents: z_image by CLIP, x_T by DDIM inversion.

    Example: unclip reconstruct configs/demo.toml photo.png --out out
    """
    _edit("reconstruct", recipe, [image], {"seed": seed}, (steps, guidance), (out, overrides, json))


def vary(
    recipe: RecipePath,
    image: ImagePath,
    num_images: NumImages = 6,
    eta: Annotated[
        float, typer.Option("--eta", min=0.0, max=1.0, help="Noise of DDIM; 0 is the reconstruction.")
    ] = 0.8,
    steps: NumSteps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    out: Out = "out",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Draw variations of a picture: the same z_image, another layout.

    Example: unclip vary configs/demo.toml photo.png -n 6 --eta 0.8
    """
    options = {"seed": seed, "num_images": num_images, "eta": eta}
    _edit("vary", recipe, [image], options, (steps, guidance), (out, overrides, json))


def interpolate(
    recipe: RecipePath,
    image_a: Annotated[str, typer.Argument(metavar="A", help="Picture to start from.")],
    image_b: Annotated[str, typer.Argument(metavar="B", help="Picture to end at.")],
    frames: NumFrames = 8,
    noise: Annotated[
        Literal["slerp", "fixed"],
        typer.Option("--noise", help="slerp: x_T turns along, the ends are A and B; fixed: one x_T, of the seed."),
    ] = "slerp",
    steps: NumSteps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    out: Out = "out",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Draw the way from one picture to another: spherical interpolation of z_image.

    Example: unclip interpolate configs/demo.toml a.png b.png --frames 8
    """
    options = {"seed": seed, "num_frames": frames, "noise": noise}
    _edit("interpolate", recipe, [image_a, image_b], options, (steps, guidance), (out, overrides, json))


def text_diff(
    recipe: RecipePath,
    image: ImagePath,
    source: Annotated[str, typer.Option("--from", help="What the picture shows.")],
    target: Annotated[str, typer.Option("--to", help="What it should show.")],
    theta: Annotated[
        float, typer.Option("--theta", min=0.0, max=1.0, help="How far to turn; the paper: 0.25 to 0.5.")
    ] = 0.4,
    frames: NumFrames = 6,
    steps: NumSteps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    out: Out = "out",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Turn a picture from what one text says towards what another says, from theta 0 on.

    Example: unclip text-diff configs/demo.toml photo.png --from "a red circle" --to "a blue circle" --theta 0.4
    """
    options = {"seed": seed, "source": source, "target": target, "theta": theta, "num_frames": frames}
    _edit("text-diff", recipe, [image], options, (steps, guidance), (out, overrides, json))


def inpaint(
    recipe: RecipePath,
    image: ImagePath,
    mask: Annotated[
        str, typer.Argument(metavar="MASK", help="Picture of the same size: white or transparent is drawn.")
    ],
    prompt: Prompt,
    num_images: NumImages = 4,
    steps: NumSteps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    out: Out = "out",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Draw the masked part of a picture anew; every other pixel stays as it is.

    A decoder trained with inpainting channels (decoder.model.inpainting) reads the rest of the picture ("channels");
    any other has it put back, noised, after each step ("replacement"). The output says which.

    Example: unclip inpaint configs/demo.toml photo.png mask.png "a red circle on a white background"
    """
    options = {"seed": seed, "num_images": num_images, "mask": mask, "prompt": prompt}
    _edit("inpaint", recipe, [image], options, (steps, guidance), (out, overrides, json))


def outpaint(
    recipe: RecipePath,
    image: ImagePath,
    prompt: Prompt,
    margin: Annotated[
        float, typer.Option("--margin", min=0.01, max=0.45, help="Border on each side, as a share of the result.")
    ] = 0.25,
    num_images: NumImages = 4,
    steps: NumSteps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    out: Out = "out",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Make a picture smaller and draw what is around it; see inpaint.

    Example: unclip outpaint configs/demo.toml photo.png "a small red circle" --margin 0.25
    """
    options = {"seed": seed, "num_images": num_images, "margin": margin, "prompt": prompt}
    _edit("outpaint", recipe, [image], options, (steps, guidance), (out, overrides, json))


def sdedit(
    recipe: RecipePath,
    image: ImagePath,
    prompt: Prompt,
    strength: Annotated[
        float, typer.Option("--strength", min=0.0, max=1.0, help="0 returns the picture, 1 forgets it.")
    ] = 0.6,
    num_images: NumImages = 4,
    steps: NumSteps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    out: Out = "out",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Noise a picture, and draw it from there as a prompt says.

    Example: unclip sdedit configs/demo.toml sketch.png "a large red star on a white background" --strength 0.6
    """
    options = {"seed": seed, "num_images": num_images, "prompt": prompt, "strength": strength}
    _edit("sdedit", recipe, [image], options, (steps, guidance), (out, overrides, json))


def pca_reconstruct(
    recipe: RecipePath,
    image: ImagePath,
    components: Annotated[
        str, typer.Option("--components", help="Numbers of components, with commas between them.")
    ] = "20,40,80,160",
    steps: NumSteps = 50,
    guidance: Guidance = None,
    seed: Seed = 0,
    out: Out = "out",
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Draw what more and more principal components of a picture's z_image hold, from one noise.

    Example: unclip pca-reconstruct configs/demo.toml photo.png --components 4,8,16,32
    """
    counts = [part.strip() for part in components.split(",")]
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise ConfigError(f"--components {components}: whole numbers above 0, for example 20,40,80,160")
    options = {"seed": seed, "components": tuple(int(count) for count in counts)}
    _edit("pca-reconstruct", recipe, [image], options, (steps, guidance), (out, overrides, json))


def _edit(
    name: str,
    recipe: str,
    files: Sequence[str],
    options: dict[str, Any],
    walk: tuple[int, float | None],
    output: tuple[str, list[str] | None, bool],
) -> None:
    num_steps, guidance = walk
    out, overrides, json = output
    resolved = load_recipe(recipe, overrides or [])

    from models.edits import EditSettings
    from pipeline.evaluate.edits import EditOptions, edit_recipe

    scale = 1.0 if guidance is None else guidance
    settings = EditSettings(num_steps=num_steps, latent_guidance=scale, prompt_guidance=guidance)
    with DrawingWatcher() as watcher:
        rows = edit_recipe(resolved, name, files, EditOptions(**options), settings, out_dir=Path(out), watch=watcher)
    if json:
        print_json(rows)
        return
    method = f", drawn by {rows[0]['method']}" if "method" in rows[0] else ""
    count = "1 picture" if len(rows) == 1 else f"{len(rows)} pictures"
    typer.echo(f"{count} in {out}{method}; all at a glance: {Path(out) / 'grid.png'}")
