"""Edits as requests: the phases of a request that starts from pictures, so that a server joins it with others.

An inpainting, or a picture to start from, is one more input of the decoder's own stage; so is the z_image of a picture,
in place of the prior's. Such requests share every forward pass with requests for pictures of a prompt. Others begin
with a phase that inverts their pictures; their frames are sampled by DDIM, as ``Editor`` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.cascade import Phase, up_to
from models.decoder.inpainting import MASK, PICTURE
from models.decoder.stage import START, STRENGTH, X_T
from models.editor import ETA, X_0, Editor, Latents, slerp
from models.pixels import resize_crop, to_pixels
from models.request import (
    EditError,
    Inpainting,
    Interpolation,
    PcaReconstruction,
    RawMask,
    RawPicture,
    SampleRequest,
    StartPicture,
    TextDiff,
    Variation,
)
from models.stage import PIXELS, Z_IMAGE, Batch, Stage


def edit_phase(editor: Editor, request: SampleRequest) -> Phase:
    """The first phase of a request that starts from pictures.

    Args:
        editor: Of the cascade that answers.
        request: With an ``edit``.

    Raises:
        EditError: If it has none.
        ValueError: If the cascade cannot do what is requested.
    """
    match request.edit:
        case Inpainting(picture, mask):
            phase = _prompted(editor, request, lambda: {PICTURE: _tensor(picture), MASK: _mask(mask)})
        case StartPicture(picture, 0):
            phase = _untouched(editor, request, picture)
        case StartPicture(picture, strength):
            phase = _prompted(editor, request, lambda: {START: _tensor(picture), STRENGTH: torch.tensor([strength])})
        case Variation(picture, None):
            stages = up_to(editor.cascade.after(Z_IMAGE), request.side_px)
            phase = _frames(editor, request, stages, lambda: _repeat({Z_IMAGE: _embed(editor, picture)}, request))
        case Interpolation(pictures, _, "fixed"):
            phase = _walked(editor, request, lambda: torch.cat([_embed(editor, one) for one in pictures]), None)
        case Interpolation(pictures):
            phase = _inverted(editor, request, pictures)
        case PcaReconstruction(_, _, z_image):
            phase = _walked(editor, request, lambda: _rows(z_image, len(request.seeds)).to(editor.device), None)
        case Variation(picture) | TextDiff(picture):
            phase = _inverted(editor, request, [picture])
        case None:
            raise EditError("the request has no picture to start from")
    return phase


def _prompted(editor: Editor, request: SampleRequest, values: Callable[[], Mapping[str, Tensor]]) -> Phase:
    """The stages of a prompt, of which the decoder reads ``values`` too."""
    phase = editor.cascade.phase_of(request)

    def batch() -> Batch:  # pictures are copied to the device here: a request that is refused copies none
        on_device = {name: value.to(editor.device) for name, value in values().items()}
        return phase.batch().with_values(**_repeat(on_device, request))

    return replace(phase, batch=batch)


def _untouched(editor: Editor, request: SampleRequest, picture: RawPicture) -> Phase:
    """A picture as large as the request's would be; no stage is passed."""
    editor.cascade.check(request)
    side_px = next(stage.side_px for stage in reversed(editor.cascade.stages_of(request)) if stage.side_px)

    def batch() -> Batch:
        pixels = resize_crop(to_pixels(_tensor(picture).to(editor.device)), side_px)
        values = _repeat({PIXELS: pixels}, request)
        return Batch(editor.no_caption(len(request.seeds)), request.seeds, values, request)

    return Phase(len(request.seeds), (), batch)


def _frames(
    editor: Editor, request: SampleRequest, stages: Sequence[Stage], values: Callable[[], Mapping[str, Tensor]]
) -> Phase:
    """Frames without captions."""
    editor.cascade.check(request, stages)

    def batch() -> Batch:
        return Batch(editor.no_caption(len(request.seeds)), request.seeds, values(), request)

    return Phase(len(request.seeds), tuple(stages), batch)


def _inverted(editor: Editor, request: SampleRequest, pictures: Sequence[RawPicture]) -> Phase:
    """The inversion of pictures, unless it is remembered, and then their frames."""
    walk = editor.decoder.name
    # The inversion is guided, and takes as many steps, as the walk of the frames will be.
    scale, steps = request.guidance_scale, request.num_steps
    inversion = replace(
        request,
        guidance_scale={editor.inversion.name: scale[walk]} if walk in scale else {},
        num_steps={editor.inversion.name: steps[walk]} if walk in steps else {},
    )
    editor.cascade.check(request, _walk_stages(editor, request))  # refuse it before the inversion
    keys = [_key(picture, scale.get(walk), steps.get(walk)) for picture in pictures]
    recent = editor.recent.find(keys)
    if recent is not None:
        return _walked(editor, request, lambda: recent.z_image, recent.x_T)

    def batch() -> Batch:
        values = {
            Z_IMAGE: torch.cat([_embed(editor, picture) for picture in pictures]),
            X_0: torch.cat([editor.shrink(_tensor(picture)) for picture in pictures]),
        }
        return Batch(editor.no_caption(len(pictures)), (0,) * len(pictures), values, inversion)

    def then(values: Mapping[str, Tensor]) -> Phase:
        editor.recent.add(keys, Latents(values[Z_IMAGE], values[X_T]))
        return _walked(editor, request, lambda: values[Z_IMAGE], values[X_T])

    return Phase(len(pictures), (editor.inversion,), batch, then)


def _walked(editor: Editor, request: SampleRequest, z_image: Callable[[], Tensor], x_T: Tensor | None) -> Phase:
    """Frames by DDIM from the embeddings and the noise of the request's pictures; by default, from that of the seed."""

    def values() -> Mapping[str, Tensor]:
        noise = editor.noise(request.seeds) if x_T is None else x_T
        return _repeat(_walk_values(editor, request, Latents(z_image(), noise)), request)

    return _frames(editor, request, _walk_stages(editor, request), values)


def _walk_values(editor: Editor, request: SampleRequest, latents: Latents) -> Mapping[str, Tensor]:
    z_image, x_T = latents.z_image, latents.x_T
    match request.edit:
        case Interpolation(_, shares, noise):
            x_T = slerp(x_T[:1], x_T[1:], shares) if noise == "slerp" else x_T
            return {Z_IMAGE: slerp(z_image[:1], z_image[1:], shares), X_T: x_T}
        case TextDiff(_, source, target, thetas):
            return {Z_IMAGE: editor.turned(z_image, source, target, thetas), X_T: x_T}
        case PcaReconstruction():
            return {Z_IMAGE: z_image, X_T: x_T}
        case Variation(_, eta):
            return {Z_IMAGE: z_image, X_T: x_T, ETA: torch.tensor([eta or 0.0], device=x_T.device)}
        case _:
            raise EditError("the request is no walk from a picture")


def _walk_stages(editor: Editor, request: SampleRequest) -> tuple[Stage, ...]:
    stages = editor.cascade.stages
    return up_to((editor.latent_walk, *stages[stages.index(editor.decoder) + 1 :]), request.side_px)


def _repeat(values: Mapping[str, Tensor], request: SampleRequest) -> dict[str, Tensor]:
    """Values of one row become those of every picture of the request."""
    count = len(request.seeds)
    return {name: value.expand(count, *value.shape[1:]) for name, value in values.items()}


def _key(picture: RawPicture, guidance_scale: float | None, num_steps: int | None) -> Hashable:
    """What an inversion depends on, beside the networks."""
    digest = picture.sha256 or hashlib.sha256(picture.levels).hexdigest()
    return digest, picture.width, picture.height, guidance_scale, num_steps


def _embed(editor: Editor, picture: RawPicture) -> Tensor:
    return editor.embed(_tensor(picture))


def _rows(z_image: bytes, count: int) -> Tensor:
    return torch.frombuffer(bytearray(z_image), dtype=torch.float32).view(count, -1)


def _tensor(picture: RawPicture) -> Tensor:
    levels = torch.frombuffer(bytearray(picture.levels), dtype=torch.uint8)
    return levels.view(1, picture.height, picture.width, 3)


def _mask(mask: RawMask) -> Tensor:
    cells = torch.frombuffer(bytearray(mask.cells), dtype=torch.uint8)
    return cells.view(1, mask.side_px, mask.side_px).bool()
