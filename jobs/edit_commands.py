"""The commands that edit pictures: each declares its own arguments, and ``_command`` adds the shared ones.

The work itself is in pipeline/sampling/edit_pictures.py.
"""

import dataclasses
import functools
import inspect
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.options import AsJson, Next, Overrides, RecipeOrFolder, Seed, print_json, recipe_words
from jobs.watch import SamplingWatcher
from pipeline.errors import ConfigError
from pipeline.recipe.recipe import load_recipe
from pipeline.sampling.edit_options import EditOptions

ImagePath = Annotated[str, typer.Argument(metavar="IMAGE", help="Picture; its centre square is taken.")]
Prompt = Annotated[str, typer.Argument(metavar='"PROMPT"', help="What the finished picture shows.")]
NumImages = Annotated[int, typer.Option("-n", min=1, help="Pictures.")]
NumFrames = Annotated[int, typer.Option("--frames", min=2, help="Pictures on the way, both ends included.")]


@dataclass(frozen=True)
class _Request:
    """Input of one edit: its picture files and its own options."""

    files: tuple[str, ...]
    options: EditOptions


def _edit(
    name: str,
    request: _Request,
    recipe: RecipeOrFolder,
    num_steps: Annotated[int, typer.Option("--steps", min=1, help="DDIM steps of the decoder, there and back.")] = 50,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance", min=0.0, help="Guidance scale; default: 1 from an inverted picture, else the decoder's."
        ),
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        str,
        typer.Option("--out", help="Folder for the pictures, grid.png and edits.jsonl; those of before are replaced."),
    ] = "out",
    overrides: Overrides = None,
    json: AsJson = False,
) -> Next:
    """Do the edit ``name`` and print the folder; from ``recipe`` on, these are parameters of every edit's command."""
    resolved = load_recipe(recipe, overrides or [])

    from models.editor import EditSettings
    from pipeline.sampling.edit_pictures import edit_recipe

    scale = 1.0 if guidance is None else guidance
    settings = EditSettings(num_steps=num_steps, latent_guidance=scale, prompt_guidance=guidance)
    options = dataclasses.replace(request.options, seed=seed)
    with SamplingWatcher() as watcher:
        rows = edit_recipe(resolved, name, request.files, options, settings, out_dir=Path(out), watch=watcher)
    if json:
        print_json(rows)
        return ()
    method = f", sampled by {rows[0]['method']}" if "method" in rows[0] else ""
    count = "1 picture" if len(rows) == 1 else f"{len(rows)} pictures"
    typer.echo(f"{count} in {out}{method}; all at a glance: {Path(out) / 'grid.png'}")
    picture = shlex.quote(str(Path(out) / rows[-1]["file"]))
    words = recipe_words(recipe, overrides)
    return (f"unclip vary {words} {picture} --out {shlex.quote(f'{out}-varied')}", f"unclip serve {words}")


def _command(read: Callable[..., _Request]) -> Callable[..., Next]:
    """The command of an edit: RECIPE, the parameters of ``read``, then those that all edits share.

    Typer takes a command's parameters from its signature and has no groups of them, so this joins two signatures.
    """
    own = inspect.signature(read).parameters
    _, _, recipe, *shared = inspect.signature(_edit).parameters.values()
    parameters = {parameter.name: parameter for parameter in (recipe, *own.values(), *shared)}

    @functools.wraps(read)
    def command(**values: Any) -> Next:
        request = read(**{name: values.pop(name) for name in own})
        return _edit(read.__name__.replace("_", "-"), request, **values)

    command.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()} | {"return": Next}
    setattr(command, "__signature__", inspect.Signature(list(parameters.values())))  # noqa: B010  (unknown to pyright)
    return command


@_command
def reconstruct(image: ImagePath) -> _Request:
    """Reconstruct a picture from its latents: z_image by CLIP, x_T by DDIM inversion.

    Example: unclip reconstruct configs/demo.toml photo.png --out out
    """
    return _Request((image,), EditOptions())


@_command
def vary(
    image: ImagePath,
    num_images: NumImages = 6,
    eta: Annotated[
        float, typer.Option("--eta", min=0.0, max=1.0, help="Noise of DDIM; 0 is the reconstruction.")
    ] = 0.8,
) -> _Request:
    """Make variations of a picture: the same z_image, another layout.

    Example: unclip vary configs/demo.toml photo.png -n 6 --eta 0.8
    """
    return _Request((image,), EditOptions(num_images=num_images, eta=eta))


@_command
def interpolate(
    image_a: Annotated[str, typer.Argument(metavar="A", help="Picture to start from.")],
    image_b: Annotated[str, typer.Argument(metavar="B", help="Picture to end at.")],
    num_frames: NumFrames = 8,
    noise: Annotated[
        Literal["slerp", "fixed"],
        typer.Option(
            "--noise", help="slerp: x_T is interpolated too, the ends are A and B; fixed: one x_T, from the seed."
        ),
    ] = "slerp",
) -> _Request:
    """Interpolate between two pictures: spherical interpolation of z_image.

    Example: unclip interpolate configs/demo.toml a.png b.png --frames 8
    """
    return _Request((image_a, image_b), EditOptions(num_frames=num_frames, noise=noise))


@_command
def text_diff(
    image: ImagePath,
    source: Annotated[str, typer.Option("--from", help="What the picture shows.")],
    target: Annotated[str, typer.Option("--to", help="What it should show.")],
    theta: Annotated[
        float, typer.Option("--theta", min=0.0, max=1.0, help="How far to turn; the paper: 0.25 to 0.5.")
    ] = 0.4,
    num_frames: NumFrames = 6,
) -> _Request:
    """Turn a picture from what one text says towards what another says, from theta 0 on.

    Example: unclip text-diff configs/demo.toml photo.png --from "a red circle" --to "a blue circle" --theta 0.4
    """
    return _Request((image,), EditOptions(source=source, target=target, theta=theta, num_frames=num_frames))


@_command
def inpaint(
    image: ImagePath,
    mask: Annotated[
        str, typer.Argument(metavar="MASK", help="Picture of the same size: white or transparent pixels are filled.")
    ],
    prompt: Prompt,
    num_images: NumImages = 4,
) -> _Request:
    """Fill the masked part of a picture; every other pixel stays as it is.

    A decoder trained with inpainting channels (decoder.model.inpainting) reads the rest of the picture ("channels").
    For any other decoder, the rest is noised and put back after each step ("replacement"). The output says which.

    Example: unclip inpaint configs/demo.toml photo.png mask.png "a red circle on a white background"
    """
    return _Request((image,), EditOptions(mask=mask, prompt=prompt, num_images=num_images))


@_command
def outpaint(
    image: ImagePath,
    prompt: Prompt,
    margin: Annotated[
        float, typer.Option("--margin", min=0.01, max=0.45, help="Border on each side, as a share of the result.")
    ] = 0.25,
    num_images: NumImages = 4,
) -> _Request:
    """Shrink a picture and fill the border around it; see inpaint.

    Example: unclip outpaint configs/demo.toml photo.png "a small red circle" --margin 0.25
    """
    return _Request((image,), EditOptions(prompt=prompt, margin=margin, num_images=num_images))


@_command
def sdedit(
    image: ImagePath,
    prompt: Prompt,
    strength: Annotated[
        float, typer.Option("--strength", min=0.0, max=1.0, help="0 returns the picture, 1 ignores it.")
    ] = 0.6,
    num_images: NumImages = 4,
) -> _Request:
    """Add noise to a picture, then denoise it to a prompt.

    Example: unclip sdedit configs/demo.toml sketch.png "a large red star on a white background" --strength 0.6
    """
    return _Request((image,), EditOptions(prompt=prompt, strength=strength, num_images=num_images))


@_command
def pca_reconstruct(
    image: ImagePath,
    components: Annotated[
        str,
        typer.Option(
            "--components", help="Numbers, with commas between them; default: 20,40,80,160, up to the size of z_image."
        ),
    ] = "",
) -> _Request:
    """Show what more and more principal components of a picture's z_image hold, from one noise.

    Example: unclip pca-reconstruct configs/demo.toml photo.png --components 4,8,16,32
    """
    counts = [part.strip() for part in components.split(",")] if components else []
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise ConfigError(f"--components {components}: whole numbers above 0, for example 20,40,80,160")
    return _Request((image,), EditOptions(components=tuple(int(count) for count in counts)))
